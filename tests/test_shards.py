"""Tar files are folders of images: the same batches, errors and runs."""

import errno
import io
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from strategies import examples

from fresnet import FresnetError
from fresnet.data import (
    AreaCrop,
    Augmentation,
    Images,
    Order,
    Place,
    Shards,
    augment,
    batches,
    loader,
    read_image,
    scan,
    scan_shards,
)
from fresnet.data.loading import Batch
from fresnet.data.shards import shards_in
from fresnet.training.plan import Run
from fresnet.training.recipes import RECIPES
from fresnet.training.resuming import notes_of

Files = Mapping[str, bytes]


def write_tar(path: Path, files: Files | Sequence[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5  # a fraction takes a header of its own
            tar.addfile(member, io.BytesIO(content))
    return path


def image_of(seed: int, kind: str = "png") -> bytes:
    pixels = load_digits().data[seed].reshape(8, 8) * 15.9
    image = Image.fromarray(pixels.astype(np.uint8)).resize((24, 20)).convert("RGB")
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


PNG = image_of(0)
PAIR = {"1.png": PNG, "1.cls": b"0", "2.png": image_of(1), "2.cls": b"1"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 digits of three classes in a folder, and in two shards in the folder's order."""
    root = tmp_path_factory.mktemp("both")
    samples = [(i % 3, f"{i:04}", image_of(i, "png" if i % 2 else "jpeg"), i) for i in range(24)]
    shards: list[dict[str, bytes]] = [{}, {}]
    for label, key, content, i in sorted(samples):
        end = "png" if i % 2 else "jpg"
        file = root / "folder" / str(label) / f"{key}.{end}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        where = shards[label > 0]
        where |= {f"a/{key}.{end.upper()}": content, f"a/{key}.json": b"{}"}
        where |= {f"a/{key}.cls": f"{label}\n".encode(), f"a/._{key}.png": b"", "readme": b""}
    for i, files in enumerate(shards):
        write_tar(root / f"shard-{i:06}.tar", files)
    return root


def shards_of(root: Path) -> Shards:
    return scan_shards(sorted(root.glob("*.tar")))


def images_of(folder: Any) -> Images:
    return Images(folder, partial(augment, augmentation=Augmentation(AreaCrop(16))), seed=3)


def assert_same_batches(actual: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same((one.x, one.y), (other.x, other.y))
        assert one.places == other.places


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_folder(both: Path, workers: int) -> None:
    folder, shards = scan(both / "folder"), shards_of(both)
    assert shards.classes == folder.classes
    assert shards.labels == folder.labels
    assert shards.root == str(both)
    assert shards.files[0] == str(both / "shard-000000.tar" / "a" / "0000.JPG")
    order = Order(24, batch=7, seed=1)
    expected = [*loader(images_of(folder), batches(order, 0, 6))]
    actual = [*loader(images_of(shards), batches(order, 0, 6), workers=workers)]
    assert_same_batches(actual, expected)
    resumed = [*loader(images_of(shards), batches(order, 4, 6), workers=workers)]
    assert_same_batches(resumed, expected[4:])


@pytest.mark.parametrize(
    "options",
    [
        {"format": tarfile.USTAR_FORMAT},
        {"format": tarfile.GNU_FORMAT},
        {"format": tarfile.PAX_FORMAT},
    ],
)
def test_every_kind_of_tar_file(options: Any, tmp_path: Path) -> None:
    long = "folder/" * (5 if options["format"] == tarfile.USTAR_FORMAT else 40)
    files = {f"{long}{name}": content for name, content in PAIR.items()}
    shards = scan_shards([write_tar(tmp_path / "a.tar", files, **options)])
    for index, name in enumerate(("1.png", "2.png")):
        with shards.opened(index) as file:
            assert file.read() == PAIR[name]
        assert shards.files[index] == f"{tmp_path}/a.tar/{long}{name}"


def test_classes_may_be_given(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"1.png": PNG, "1.cls": b"2"})
    shards = scan_shards([shard], classes=["ant", "bee", "cat"])
    assert (shards.classes, shards.labels) == (("ant", "bee", "cat"), (2,))
    with pytest.raises(FresnetError, match=r"label below 2, .* classes given; .*1\.png has 2"):
        scan_shards([shard], classes=["ant", "bee"])
    with pytest.raises(FresnetError, match=r"expects two classes at least; got \['ant'\]"):
        scan_shards([shard], classes=["ant"])


def test_a_name_from_the_root_is_a_name_in_the_shard(tmp_path: Path) -> None:
    files = {f"/data/{name}": content for name, content in PAIR.items()}
    shards = scan_shards([write_tar(tmp_path / "a.tar", files)])
    assert shards.files == tuple(f"{tmp_path}/a.tar/data/{i}.png" for i in (1, 2))


def test_other_labels_are_another_run(tmp_path: Path) -> None:
    """A checkpoint notes them, since names do not hold them."""
    one = scan_shards([write_tar(tmp_path / "a.tar", PAIR)])
    other = scan_shards([write_tar(tmp_path / "a.tar", {**PAIR, "1.cls": b"1", "2.cls": b"0"})])
    run = Run("tiny", RECIPES["v1"])
    assert notes_of(run, one, one) == notes_of(run, one, one)
    assert notes_of(run, one, one) != notes_of(run, other, one) != notes_of(run, one, other)


CUT = "it is damaged, cut off or followed by another at byte"
WRONG: Mapping[str, tuple[Any, str]] = {
    "no label": ({**PAIR, "3.png": PNG}, "it has no .cls of 3"),
    "no image": ({**PAIR, "3.cls": b"1", "4.cls": b"1"}, "it has no image of 3 and 4"),
    "twice": ([*PAIR.items(), ("1.png", PNG)], "it has a second file 1.png for one key"),
    "two images": ({**PAIR, "1.jpg": PNG}, "it has a second file 1.jpg for one key"),
    "two labels": ([*PAIR.items(), ("1.cls", b"1")], "it has a second file 1.cls for one key"),
    "a text": ({**PAIR, "2.cls": b"cat"}, "2.cls holds b'cat', which is no number of a class"),
    "negative": ({**PAIR, "2.cls": b"-1"}, "2.cls holds b'-1', which"),
    "empty label": ({**PAIR, "2.cls": b""}, "2.cls holds b'', which"),
    "huge": ({**PAIR, "2.cls": b"9" * 99}, "got none of 1: pass classes"),
    "a gap": ({**PAIR, "2.cls": b"2"}, "of every class from 0 on, and of two at least; got none"),
    "one class": ({"1.png": PNG, "1.cls": b"0"}, "of two at least; got none of 1: pass classes"),
    "empty": ({}, "it has no file that ends in .jpg, .jpeg"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_shard(name: str, tmp_path: Path) -> None:
    files, message = WRONG[name]
    with pytest.raises(FresnetError, match=re.escape(message)) as caught:
        scan_shards([write_tar(tmp_path / "a.tar", files)])
    assert str(caught.value).startswith("scan_shards expects ")
    assert len(str(caught.value)) < 400


def wiped(tar: bytes, at: int, count: int) -> bytes:
    return tar[:at] + bytes(count) + tar[at + count :]


DAMAGES: Mapping[str, tuple[Callable[[bytes], bytes], str]] = {
    "no bytes": (lambda tar: b"", "empty file"),
    "no tar": (lambda tar: b"nonsense" * 200, "invalid header"),
    "cut in an image": (lambda tar: tar[:600], "it is cut off in 1.png"),
    "cut in a label": (lambda tar: tar[: tar.index(b"1.cls") + 512], "cut off in 1.cls"),
    "cut between files": (lambda tar: tar[: tar.index(b"2.png")], CUT),
    "no end": (lambda tar: tar[: tar.index(b"2.cls") + 1024], CUT),
    "a header": (lambda tar: tar.replace(b"2.png", b"3.png"), CUT),
    "a wiped header": (lambda tar: wiped(tar, tar.index(b"2.png"), 512), CUT),
    "two in one": (lambda tar: tar + tar, CUT),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard(name: str, tmp_path: Path) -> None:
    """Also one that Python's own reader takes to end early."""
    damage, message = DAMAGES[name]
    path = write_tar(tmp_path / "a.tar", PAIR, format=tarfile.GNU_FORMAT)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FresnetError, match=re.escape(f"{path}: ") + f".*{re.escape(message)}"):
        scan_shards([path])


@examples(150)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_byte_may_be_wrong(tmp_path_factory: pytest.TempPathFactory, at: int, to: int) -> None:
    """A shard is refused in words, or all of its images are found."""
    path = tmp_path_factory.getbasetemp() / "any.tar"
    content = bytearray(write_tar(path, PAIR).read_bytes())
    content[at % len(content)] = to
    path.write_bytes(content)
    with suppress(FresnetError):
        assert len(scan_shards([path]).files) == 2


def test_links_and_compressed_shards_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIR)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        tar.addfile(link)
    with pytest.raises(FresnetError, match=r"3\.png is no plain file"):
        scan_shards([path])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(path)
    with pytest.raises(FresnetError, match="expects tar files, uncompressed"):
        scan_shards([tmp_path / "a.tar.gz"])
    content = bytearray(write_tar(path, PAIR, format=tarfile.GNU_FORMAT).read_bytes())
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(FresnetError, match=r"1\.png is no plain file"):
        scan_shards([path])


def test_tar_files_beside_folders_are_no_shards(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tar.gz"):
        (tmp_path / name).touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "._a.tar").touch()
    (tmp_path / "nowhere").symlink_to("a" * 300)  # of which Python's Path raises an error
    assert shards_in(tmp_path) == [tmp_path / "a.tar", tmp_path / "b.tar"]
    (tmp_path / "cat").mkdir()
    assert shards_in(tmp_path) == shards_in(tmp_path / "none") == []


def test_a_header_that_leads_back_is_no_endless_file(tmp_path: Path) -> None:
    files = {**PAIR, "2.json": b"{}"}  # a name that is passed over, and so not seen to come twice
    path = write_tar(tmp_path / "a.tar", files, format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    at = content.index(b"2.json")
    header = content[at : at + 512]
    header[124:136] = b"\xff" * 10 + (2**16 - 512).to_bytes(2, "big")  # a size of -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[at : at + 512] = header
    path.write_bytes(content)
    with pytest.raises(FresnetError, match="it is damaged"):
        scan_shards([path])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "scan_shards expects a list of tar files; got []"),
        ("a.tar", "scan_shards expects a list of tar files; got 'a.tar'"),
        (["a.tar", "./a.tar"], "scan_shards expects each shard once; got a.tar and a.tar"),
        (["b.tar"], "b.tar: No such file or directory"),
        (["folder"], "folder: folder is no regular file"),
    ],
)
def test_bad_paths(
    paths: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    write_tar(Path("a.tar"), PAIR)
    with pytest.raises(FresnetError, match=re.escape(message)):
        scan_shards(paths)


class Unreadable(io.BytesIO):
    def read(self, *_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_is_broken_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**PAIR, "3.png": PNG[:-40], "3.cls": b"0", "4.png": b"no image", "4.cls": b"1"}
    shards = scan_shards([write_tar(tmp_path / "a.tar", files)])
    images, places = images_of(shards), [[Place(0, i, i) for i in range(4)]]
    [batch] = loader(images, places, broken="skip")
    assert len(batch.x) == 2
    first, second = batch.broken
    assert first.startswith(f"{tmp_path}/a.tar/3.png: ")
    assert second == f"{tmp_path}/a.tar/4.png: cannot identify image file"
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FresnetError, match=r"a\.tar/1\.png: No such file"):
        next(loader(images, places))
    monkeypatch.setattr("fresnet.data.shards.open_regular", lambda _: Unreadable())
    with pytest.raises(FresnetError, match=r"a\.tar/1\.png: Input/output error"):
        next(loader(images, places))


def test_images_are_read_where_they_lie(both: Path) -> None:
    folder, shards = scan(both / "folder"), shards_of(both)
    for index in (23, 0, 7):
        with shards.opened(index) as one, folder.opened(index) as other:
            assert one.read() == other.read()
            one.seek(0)
            assert read_image(one).size == (24, 20)
