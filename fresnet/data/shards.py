"""Images in tar files, as webdataset lays them out, found once and read at random."""

import os
import tarfile
from collections.abc import Container, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from fresnet.data.folder import EXTENSIONS, Folder, check_names, is_folder, open_regular
from fresnet.errors import FresnetError, listed, reason, shown
from fresnet.reading import as_path

LABEL = ".cls"
BLOCK = 512


class Span(NamedTuple):
    """Where an image lies: its shard, and the bytes there."""

    shard: str
    offset: int
    size: int


class Shards(NamedTuple):
    """Images in tar files, and their classes. A label is the index of its class in `classes`.

    The name of a file is that of its shard, followed by its own name there.
    """

    root: str  # the folder that holds all shards
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    spans: tuple[Span, ...]

    def opened(self, index: int) -> BinaryIO:
        """The bytes of an image, as an open file.

        Raises:
          FresnetError: if its shard cannot be read.
        """
        shard, offset, size = self.spans[index]
        try:
            with open_regular(shard) as file:
                file.seek(offset)
                return BytesIO(file.read(size))
        except OSError as error:
            raise FresnetError(reason(error)) from error


Scanned: TypeAlias = Folder | Shards
"""What `scan` and `scan_shards` find."""


def scan_shards(
    paths: Sequence[str | os.PathLike[str]], *, classes: Sequence[str] | None = None
) -> Shards:
    """Find the images in tar files that have `key.jpg` and `key.cls`, a number, for each image.

        train = scan_shards(sorted(Path("imagenet").glob("train-*.tar")))
        images = Images(train, partial(augment, augmentation=augmentation), seed=0)

    The headers are read once. After that each image is read from its place, so batches, their order
    and what is broken are as with a folder. The shards must lie where a file can be read at random.

    >>> import io, pathlib, tarfile, tempfile, PIL.Image
    >>> PIL.Image.new("RGB", (40, 30)).save(image := io.BytesIO(), "jpeg")
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with tarfile.open(shard := pathlib.Path(root, "shard-000000.tar"), "w") as tar:
    ...         for i in range(2):
    ...             for end, content in (("jpg", image.getvalue()), ("cls", b"%d" % i)):
    ...                 member = tarfile.TarInfo(f"{i:06}.{end}")
    ...                 member.size = len(content)
    ...                 tar.addfile(member, io.BytesIO(content))
    ...     shards = scan_shards([shard])
    >>> shards.classes, shards.labels
    (('0', '1'), (0, 1))

    Args:
      paths: the tar files, none of them compressed.
      classes: the names of the classes, in the order of their labels. By default they are the
        labels themselves, "0", "1" and so on, and each of them must occur.
    Returns:
      The images, shard by shard in the order of `paths`, and in their order there. Files that are
      neither images nor labels, such as `key.json`, are passed over.
    Raises:
      FresnetError: if a shard cannot be read, is damaged or is compressed, if it has a name twice
        or two images of one key, if an image has no label or a label no image, if a label is no
        number or has no class, or if there are not two classes.
    """
    if isinstance(paths, str | bytes) or not isinstance(paths, Sequence) or not paths:
        raise FresnetError(f"scan_shards expects a list of tar files; got {shown(paths)}")
    check_names("scan_shards", classes)
    shards = [os.path.expanduser(as_path(path)) for path in paths]
    if len({os.path.realpath(shard) for shard in shards}) < len(shards):
        raise FresnetError(f"scan_shards expects each shard once; got {listed(shards)}")
    found = [image for shard in shards for image in _images(shard)]
    return Shards(
        os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards]),
        _numbers(found) if classes is None else _given(found, classes),
        files=tuple(image.file for image in found),
        labels=tuple(image.label for image in found),
        spans=tuple(image.span for image in found),
    )


def shards_in(root: Path) -> list[Path]:
    """The tar files in a folder that has no folder for a class, by name."""
    try:
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    except OSError:
        return []
    if any(map(is_folder, entries)):
        return []
    return sorted(Path(entry) for entry in entries if entry.name.endswith(".tar"))


class _Image(NamedTuple):
    file: str
    label: int
    span: Span


def _images(shard: str) -> list[_Image]:
    """The images of a shard, each with the label of the same key."""
    images: dict[str, tuple[str, Span]] = {}
    labels: dict[str, int] = {}
    try:
        with open_regular(shard) as file:
            for member in _members(file):
                key, end = _split(member.name)
                if end in EXTENSIONS:
                    _check_new(key, member.name, images)
                    span = Span(shard, member.offset_data, member.size)
                    images[key] = os.path.join(shard, member.name.lstrip("/")), span
                elif end == LABEL:
                    _check_new(key, member.name, labels)
                    file.seek(member.offset_data)
                    labels[key] = _label(member.name, file.read(min(member.size, 99)))
        for one, other, what in (images, labels, LABEL), (labels, images, "image"):
            if lone := [key for key in one if key not in other]:
                raise FresnetError(f"it has no {what} of {listed(lone)}")
        if not images:
            raise FresnetError(f"it has no file that ends in {', '.join(EXTENSIONS)}")
    except Exception as error:  # tarfile raises errors of any type where headers are damaged
        raise FresnetError(
            f"scan_shards expects tar files, uncompressed, with an image and a label, such as "
            f"1.jpg and 1{LABEL}, of each key; {shard}: {reason(error)}"
        ) from error
    return [_Image(file, labels[key], span) for key, (file, span) in images.items()]


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file. Its headers must lead to its end, from where on all is zero."""
    end, length = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.offset < end:  # a negative size leads back, and older Pythons go there
                raise FresnetError(f"it is damaged before byte {end}")
            end = member.offset_data + max(member.size, 0)
            if end > length:
                raise FresnetError(f"it is cut off in {member.name}")
            if member.isreg() and not member.issparse():
                yield member
            elif not member.isdir():
                raise FresnetError(f"{member.name} is no plain file")
        file.seek(tar.offset)
        rest = iter(partial(file.read, 2**20), b"")
        if length < tar.offset + BLOCK or any(map(any, rest)):
            raise FresnetError(
                f"it is damaged, cut off or followed by another at byte {tar.offset}"
            )


def _split(name: str) -> tuple[str, str]:
    """A name up to the first dot after its folders, and the rest in small letters.

    >>> _split("cats/0001.seg.PNG"), _split("._1.jpg"), _split("readme")
    (('cats/0001', '.seg.png'), ('', ''), ('', ''))
    """
    folder, base = os.path.split(name)
    stem, dot, end = base.partition(".")
    return (os.path.join(folder, stem), dot + end.lower()) if stem and dot else ("", "")


def _check_new(key: str, name: str, there: Container[str]) -> None:
    if key in there:
        raise FresnetError(f"it has a second file {name} for one key")


def _label(name: str, content: bytes) -> int:
    if not content.strip().isdigit():
        raise FresnetError(f"{name} holds {content[:20]!r}, which is no number of a class")
    return int(content)


def _numbers(found: Sequence[_Image]) -> tuple[str, ...]:
    """The labels as names of classes."""
    there = {image.label for image in found}
    lacking = next(label for label in count() if label not in there)
    if lacking < max(len(there), 2):
        raise FresnetError(
            f"scan_shards expects images of every class from 0 on, and of two at least; got none "
            f"of {lacking}: pass classes, the names of all of them"
        )
    return tuple(map(str, range(len(there))))


def _given(found: Sequence[_Image], classes: Sequence[str]) -> tuple[str, ...]:
    if len(classes) < 2:
        raise FresnetError(f"scan_shards expects two classes at least; got {shown(list(classes))}")
    for image in found:
        if image.label >= len(classes):
            raise FresnetError(
                f"scan_shards expects a label below {len(classes)}, the number of the classes "
                f"given; {image.file} has {image.label}"
            )
    return tuple(classes)
