"""Folders of images, one folder to a class."""

import os
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from fresnet.errors import FresnetError, reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""How the names of images end, in small letters or capitals."""

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Folder(NamedTuple):
    """Images and their classes. A file's label is the index of its class in `classes`."""

    root: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


def scan(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> Folder:
    """Find the images `root/class/anything/below/image.jpg`: by class, then by name.

        train = scan("imagenet/train")
        val = scan("imagenet/val", classes=train.classes)

    Args:
      root: the folder that holds a folder for each class.
      classes: the classes that must be there, in the order of their labels. For a validation folder
        they are those of the training folder. By default all folders, in the order of their names.
    Returns:
      The same classes, files and labels that torchvision's `ImageFolder` finds.
    Raises:
      FresnetError: if root is not a folder of at least two classes, if a class has no image, if the
        classes are not the expected ones, or if a folder cannot be read.
    """
    root = os.path.expanduser(root)
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        _check_classes(root, found)
        if classes is not None:
            _check_same(root, found, classes)
            found = list(classes)
        images = [_images(os.path.join(root, name)) for name in found]
    except OSError as error:
        place = error.filename or root
        raise FresnetError(
            f"scan expects a folder of class folders; {place}: {reason(error)}"
        ) from error
    return Folder(
        root,
        classes=tuple(found),
        files=tuple(file for files in images for file in files),
        labels=tuple(label for label, files in enumerate(images) for _ in files),
    )


def _images(folder: str) -> list[str]:
    """The images in a folder and in all folders below it, folder by folder."""
    named = sorted(
        (below, name)
        for below, _, names in os.walk(folder, onerror=_refuse, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    )
    if not named:
        raise FresnetError(
            f"scan expects images in every class; {folder} has none that ends in "
            f"{', '.join(EXTENSIONS)}"
        )
    return [os.path.join(*parts) for parts in named]


def _refuse(error: OSError) -> NoReturn:
    raise error


def _check_classes(root: str, found: Sequence[str]) -> None:
    if "train" in found and SPLITS.issuperset(found):
        hint = f"did you mean {os.path.join(root, 'train')}?"
        raise FresnetError(f"scan expects classes in {root}; got {', '.join(found)}: {hint}")
    if len(found) < 2:
        got = f"only {found[0]!r}" if found else "no folder"
        raise FresnetError(
            f"scan expects {root} to hold a folder for each of two classes or more; got {got}"
        )


def _check_same(root: str, found: Sequence[str], expected: Sequence[str]) -> None:
    for problem, names in (
        ("lacks", sorted(set(expected) - set(found))),
        ("has besides", sorted(set(found) - set(expected))),
    ):
        if names:
            shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
            raise FresnetError(
                f"scan expects the {len(expected)} classes given; {root} {problem} "
                f"{len(names)}: {shown}"
            )
