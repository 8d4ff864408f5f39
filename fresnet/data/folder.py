"""Folders of images, one folder to a class."""

import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fresnet.errors import FresnetError, listed, reason, shown
from fresnet.reading import as_path, check_regular

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""How the names of images end, in small letters or capitals."""

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Folder(NamedTuple):
    """Images and their classes. A file's label is the index of its class in `classes`."""

    root: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def opened(self, index: int) -> BinaryIO:
        """The file of an image, opened.

        Raises:
          FresnetError: if that cannot be done.
        """
        return open_regular(self.files[index])


def scan(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> Folder:
    """Find the images `root/class/anything/below/image.jpg`: by class, then by name.

        train = scan("imagenet/train")
        val = scan("imagenet/val", classes=train.classes)

    >>> import pathlib, tempfile, PIL.Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("cat", "dog"):
    ...         (folder := pathlib.Path(root, name)).mkdir()
    ...         PIL.Image.new("RGB", (40, 30)).save(folder / "1.png")
    ...     scan(root).classes
    ('cat', 'dog')

    Args:
      root: the folder that holds a folder for each class.
      classes: the classes that must be there, in the order of their labels. For a validation folder
        they are those of the training folder. By default all folders, in the order of their names.
    Returns:
      The same classes, files and labels that torchvision's `ImageFolder` finds, but for what is
      hidden (`.ipynb_checkpoints`) and for links to a folder that holds them, which are passed
      over with a warning.
    Raises:
      FresnetError: if root is not a folder of at least two classes, if a class has no image, if the
        classes are not the expected ones, if a name has a line break, which no list of labels can
        hold, or if a folder cannot be read.
    """
    check_names("scan", classes)
    root = os.path.expanduser(as_path(root))
    try:
        found = sorted(entry.name for entry in os.scandir(root) if is_folder(entry))
        hidden = [name for name in found if name.startswith(".")]
        found = [name for name in found if name not in hidden]
        _check_classes(root, found)
        if classes is not None:
            _check_same(root, found, classes)
            found = list(classes)
        passed_over = [os.path.join(root, name) for name in hidden]
        images = [_images(root, name, passed_over) for name in found]
    except FresnetError:
        raise
    except (OSError, ValueError) as error:
        place = getattr(error, "filename", None) or root
        raise FresnetError(
            f"scan expects a folder of class folders; {place}: {reason(error)}"
        ) from error
    if passed_over:
        warnings.warn(
            "scan passes over what is hidden, and links to a folder around them: "
            f"{listed(passed_over)}",
            stacklevel=2,
        )
    return Folder(
        root,
        classes=tuple(found),
        files=tuple(file for files in images for file in files),
        labels=tuple(label for label, files in enumerate(images) for _ in files),
    )


def check_names(caller: str, classes: Sequence[str] | None) -> None:
    """Refuse what are no names of classes, unless none are given."""
    if not isinstance(classes, Sequence | None) or not all(
        isinstance(name, str) for name in classes or ()
    ):
        raise FresnetError(f"{caller} expects classes to be a list of names; got {shown(classes)}")


def open_regular(path: str) -> BinaryIO:
    """A file opened in binary.

    Raises:
      FresnetError: if that cannot be done.
    """
    try:
        check_regular(path)
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise FresnetError(reason(error)) from error


def _images(root: str, name: str, passed_over: list[str]) -> list[str]:
    """The images in a class's folder and in all folders below it, folder by folder."""
    folder = os.path.join(root, name)
    named = _named(_walk(root, folder, passed_over))
    if not named:
        raise FresnetError(
            f"scan expects images in every class; {folder} has none that ends in "
            f"{', '.join(EXTENSIONS)}"
        )
    return named


def images_below(root: str) -> list[str]:
    """The images in a folder and in all folders below it that are not hidden, folder by folder.

    Raises:
      FresnetError: if a folder cannot be read.
    """
    try:
        return _named(_walk(os.path.join(root, os.pardir), root, []))
    except OSError as error:
        raise FresnetError(f"cannot read {error.filename or root}: {reason(error)}") from error


def _named(folders: Iterable[tuple[str, list[str]]]) -> list[str]:
    """The files whose names end as those of images do."""
    found = sorted((folder, name) for folder, names in folders for name in names)
    return [os.path.join(*file) for file in found if file[1].lower().endswith(EXTENSIONS)]


def _walk(root: str, folder: str, passed_over: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder, links followed, with the names of its files; no folder within itself."""
    waiting: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(root),))]
    while waiting:
        folder, above = waiting.pop()
        here = os.path.realpath(folder)
        if any(place == here or place.startswith(here + os.sep) for place in above):
            passed_over.append(folder)
            continue
        entries = [(entry, is_folder(entry)) for entry in os.scandir(folder)]
        yield folder, [entry.name for entry, below in entries if not below]
        for entry, below in entries:
            if below and entry.name.startswith("."):
                passed_over.append(entry.path)
            elif below:
                waiting.append((entry.path, (*above, here)))


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry of a folder is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _check_classes(root: str, found: Sequence[str]) -> None:
    broken = [name for name in found if "\n" in name or "\r" in name]
    if broken:
        raise FresnetError(
            f"scan expects names of classes on one line; got {broken[0]!r} in {root}: rename it"
        )
    if "train" in found and SPLITS.issuperset(found):
        hint = f"did you mean {os.path.join(root, 'train')}?"
        raise FresnetError(f"scan expects classes in {root}; got {', '.join(found)}: {hint}")
    if len(found) < 2:
        got = f"only {found[0]!r}" if found else "no folder"
        raise FresnetError(
            f"scan expects {root} to hold a folder for each of two classes or more; got {got}"
        )


def _check_same(root: str, found: Sequence[str], expected: Sequence[str]) -> None:
    if len(set(expected)) < len(expected):
        raise FresnetError(f"scan expects each class once; got {listed([*expected])}")
    lacking, besides = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    composed = {unicodedata.normalize("NFC", name): name for name in besides}
    for name in lacking:
        if (other := composed.get(unicodedata.normalize("NFC", name))) is not None:
            raise FresnetError(
                f"scan expects the classes given; {root} spells {name!r} with other code points, "
                f"{other!a} and not {name!a}: rename one"
            )
    for problem, names in (("lacks", lacking), ("has besides", besides)):
        if names:
            raise FresnetError(
                f"scan expects the {len(expected)} classes given; {root} {problem} "
                f"{len(names)}: {listed(list(map(repr, names)))}"
            )


def write_labels(path: Path, classes: Sequence[str]) -> None:
    """Write the names of classes, one to a line, in UTF-8.

    A folder's name that is not UTF-8 is written byte by byte as it is.
    """
    text = "".join(f"{name}\n" for name in classes)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def read_labels(path: Path) -> list[str]:
    """The lines of a file of labels, as `write_labels` wrote it or an editor did.

    Raises:
      FresnetError: if it is no text, or no file.
    """
    check_regular(path)
    content = path.read_bytes()
    if b"\0" in content:
        raise FresnetError("it is no text")
    text = content.decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
