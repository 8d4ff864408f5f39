"""Folders of images, one folder to a class."""

import os
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from fresnet.errors import FresnetError, reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The names that end so, in small letters or capitals, are images."""

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Folder(NamedTuple):
    """Images and their classes: labels are places in `classes`."""

    root: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


def scan(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> Folder:
    """The images `root/class/anything/below/image.jpg`, class by class and in order of their names.

        train = scan("imagenet/train")
        val = scan("imagenet/val", classes=train.classes)

    Args:
      root: holds a folder for each class.
      classes: those that there must be, such as the training folder's for a validation folder,
        labelled in this order.
    Returns:
      Classes, files and labels that are those of torchvision's `ImageFolder`.
    Raises:
      FresnetError: if root is not a folder of at least two classes, if a class has no image, if the
        classes are not those expected, or if a folder cannot be read.
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
    """The images anywhere below, folder by folder."""
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
