"""Folders are read as torchvision reads them, and batches are functions of their places."""

import os
import pickle
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same, global_generators_untouched
from hypothesis import given
from PIL import Image
from reference import torchvision
from sklearn.datasets import load_digits
from strategies import examples, image_trees
from torch import Generator, Tensor

import fresnet.data
from fresnet import FresnetError, preprocess
from fresnet.data import (
    AreaCrop,
    Augmentation,
    Batch,
    Broken,
    Example,
    Images,
    Order,
    Place,
    augment,
    batches,
    loader,
    prepare,
    scan,
)
from fresnet.data.folder import read_labels, write_labels
from fresnet.data.presets import Preset
from fresnet.data.shards import Scanned

RECIPE = Augmentation(AreaCrop(24), trivial_augment=True, lighting=0.1, erase=0.5)
AUGMENT = partial(augment, augmentation=RECIPE)
PLAIN = partial(prepare, preset=Preset(32, 32, "bilinear"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits of seven classes, PNG and JPEG, some in a folder below that of their class."""
    root = tmp_path_factory.mktemp("digits")
    for i, (pixels, label) in enumerate(zip(*load_digits(n_class=7, return_X_y=True), strict=True)):
        if i == 60:
            break
        folder = root / str(label) / ("" if i % 3 else "more")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(np.uint8)).resize((40, 36))
        image.save(folder / f"{i}.{'png' if i % 2 else 'JPG'}", "png" if i % 2 else "jpeg")
    (root / "0" / "notes.txt").write_text("not an image")
    (root / "readme.png").write_text("in no class")
    return root


@pytest.fixture
def damaged(digits: Path, tmp_path: Path) -> Path:
    """The same digits, with the first files damaged in the ways of `DAMAGES`."""
    root = shutil.copytree(digits, tmp_path / "damaged")
    for file, damage in zip(scan(root).files, DAMAGES, strict=False):
        damage(Path(file))
    return root


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def bomb(file: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(file, "png")


# What is done to a file, and what the error says.
DAMAGES: dict[Callable[[Path], Any], str] = {
    truncate: "truncated",
    bomb: "decompression bomb",
    lambda file: file.write_bytes(b""): "cannot identify image file",
    lambda file: file.write_text("not an image"): "cannot identify image file",
}


def in_order(folder: Scanned, size: int = 10) -> list[list[Place]]:
    places = [Place(0, i, i) for i in range(len(folder.files))]
    return [places[i : i + size] for i in range(0, len(places), size)]


def assert_same_batches(actual: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_same((a.x, a.y), (b.x, b.y))
        assert a[2:] == b[2:]


# Folders


@examples(40)
@given(image_trees())
def test_scan_is_image_folder(tmp_path_factory: pytest.TempPathFactory, paths: set[str]) -> None:
    root = tmp_path_factory.mktemp("tree")
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    expected = torchvision.datasets.ImageFolder(str(root))
    folder = scan(root)
    assert folder.root == expected.root
    assert list(folder.classes) == expected.classes
    assert list(zip(folder.files, folder.labels, strict=True)) == expected.samples
    assert scan(root, classes=folder.classes) == folder
    shutil.rmtree(root)


def test_links_are_followed(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(digits / "3")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").symlink_to(digits / "4")
    expected = torchvision.datasets.ImageFolder(str(tmp_path))
    assert list(scan(tmp_path).files) == [file for file, _ in expected.samples]


def test_hidden_folders_are_no_classes_and_told_once(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "a")
    expected = scan(tmp_path / "a")
    for hidden in (".ipynb_checkpoints", "3/.cache"):
        (tmp_path / "a" / hidden).mkdir()
        (tmp_path / "a" / hidden / "1.png").touch()
    with pytest.warns(UserWarning, match="passes over what is hidden") as told:
        assert scan(tmp_path / "a") == expected
    assert len(told) == 1


def test_a_link_to_a_folder_that_holds_it_multiplies_nothing(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/more/2.png", "b/1.png", "c/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "more" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "all").symlink_to(tmp_path)
    (tmp_path / "c" / "self").symlink_to("self")
    with pytest.warns(UserWarning, match="links to a folder around them: ") as told:
        found = scan(tmp_path)
    assert len(told) == 1
    files = [Path(file).relative_to(tmp_path).as_posix() for file in found.files]
    assert files == ["a/1.png", "a/more/2.png", "b/1.png", "c/1.png"]
    assert found.labels == (0, 0, 1, 2)


def test_names_of_classes_are_on_one_line(tmp_path: Path) -> None:
    for name in ("a\nb", "c\rd", "e"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    with pytest.raises(FresnetError, match=r"names of classes on one line; got 'a\\nb'"):
        scan(tmp_path)


def test_labels_are_written_as_they_are(tmp_path: Path) -> None:
    """Also names of folders that are no UTF-8, whatever the locale says."""
    names = ["caf\u00e9", os.fsdecode(b"caf\xe9"), "\u732b", " cat ", ""]
    write_labels(tmp_path / "labels.txt", names)
    assert (tmp_path / "labels.txt").read_bytes().splitlines()[1] == b"caf\xe9"
    assert read_labels(tmp_path / "labels.txt") == names
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_labels(tmp_path / "labels.txt") == ["cat", "dog"]


def test_names_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    for name in ("caf\u00e9", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    message = "spells 'cafe\u0301' with other code points"
    with pytest.raises(FresnetError, match=message):
        scan(tmp_path, classes=["cafe\u0301", "dog"])


def test_labels_follow_the_classes_given(digits: Path) -> None:
    backwards = scan(digits, classes="6543210")
    assert backwards.classes == tuple("6543210")
    for file, label in zip(backwards.files, backwards.labels, strict=True):
        assert Path(file).relative_to(digits).parts[0] == backwards.classes[label]
    assert sorted(backwards.files) == sorted(scan(digits).files)


TREES = {
    "nothing": [],
    "one": ["cat/1.png"],
    "loose": ["1.png", "2.png"],
    "empty": ["cat/1.png", "dog/1.gif"],
    "splits": ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png"],
    "train": ["train/cat/1.png"],
    "animals": ["cat/1.png", "dog/1.png"],
}


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("nothing", None, "{} to hold a folder for each of two classes or more; got no folder"),
        ("loose", None, "{} to hold a folder for each of two classes or more; got no folder"),
        ("one", None, "{} to hold a folder for each of two classes or more; got only 'cat'"),
        ("empty", None, "images in every class; {}/dog has none that ends in .jpg, .jpeg, .png"),
        ("splits", None, "classes in {}; got train, val: did you mean {}/train?"),
        ("train", None, "classes in {}; got train: did you mean {}/train?"),
        ("missing", None, "a folder of class folders; {}: No such file or directory"),
        ("animals/cat/1.png", None, "a folder of class folders; {}: Not a directory"),
        ("animals", ["ant", "cat", "dog"], "the 3 classes given; {} lacks 1: 'ant'"),
        ("animals", ["cat", "eel"], "the 2 classes given; {} lacks 1: 'eel'"),
        ("animals", ["cat"], "the 1 classes given; {} has besides 1: 'dog'"),
        ("animals", ["cat", "dog", "cat"], "each class once; got cat, dog and cat"),
        ("animals", list("abcdef"), "{} lacks 6: 'a', 'b', 'c' and 3 more"),
    ],
)
def test_bad_folders(
    name: str, classes: Sequence[str] | None, message: str, tmp_path: Path
) -> None:
    for tree, files in TREES.items():
        (tmp_path / tree).mkdir()
        for file in files:
            (tmp_path / tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / tree / file).touch()
    root = tmp_path / name
    with pytest.raises(FresnetError, match=re.escape(message.replace("{}", str(root)))):
        scan(root, classes=classes)


def test_a_folder_that_cannot_be_read(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for an empty folder, as `os.walk` does."""
    closed, scandir = str(digits / "3" / "more"), os.scandir

    def refuse(path: Any) -> Any:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FresnetError, match=re.escape(f"{closed}: Permission denied")):
        scan(digits)


# Batches


def test_a_plain_batch_is_what_preprocess_makes(digits: Path) -> None:
    folder = scan(digits)
    for places, batch in zip(
        in_order(folder), loader(Images(folder, PLAIN, 0), in_order(folder)), strict=True
    ):
        files = [folder.files[place.image] for place in places]
        assert_same(batch.x, preprocess(files, Preset(32, 32, "bilinear")))
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert batch.y.dtype == torch.int64
        assert [folder.classes[label] for label in batch.y] == [
            Path(file).relative_to(digits).parts[0] for file in files
        ]
        assert batch.places == places
        assert batch.broken == ()


def test_workers_and_global_generators_do_not_matter(digits: Path) -> None:
    images = Images(scan(digits), AUGMENT, seed=3)
    order = Order(len(images), batch=16, seed=5, repeats=2)
    expected = list(loader(images, batches(order, 0, 6)))
    for workers in (1, 2):
        torch.manual_seed(workers)
        with global_generators_untouched():
            actual = list(loader(images, batches(order, 0, 6), workers=workers))
        assert_same_batches(actual, expected)
    with global_generators_untouched():
        assert_same_batches(list(loader(images, batches(order, 3, 6))), expected[3:])


def test_ranks_share_the_images_of_a_batch(digits: Path) -> None:
    images = Images(scan(digits), AUGMENT, seed=3)
    order = Order(len(images), batch=20, seed=5)
    whole = list(loader(images, batches(order, 0, 2)))
    shares = [list(loader(images, batches(order, 0, 2, rank=rank, ranks=3))) for rank in range(3)]
    for i, batch in enumerate(whole):
        assert_same(torch.cat([share[i].x for share in shares]), batch.x)
        assert_same(torch.cat([share[i].y for share in shares]), batch.y)


def test_draws_depend_on_seed_epoch_and_place(digits: Path) -> None:
    images = Images(scan(digits), AUGMENT, seed=3)

    def x(images: Images, *place: int) -> Tensor:
        item = images[Place(*place)]
        assert isinstance(item, Example)
        return item.x

    drawn = [
        x(images, 0, 0, 7),
        x(images, 1, 0, 7),
        x(images, 0, 1, 7),
        x(Images(images.folder, AUGMENT, seed=4), 0, 0, 7),
    ]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == 4
    assert_same(x(images, 0, 0, 7), drawn[0])
    assert_same(x(pickle.loads(pickle.dumps(images)), 0, 0, 7), drawn[0])


def threads_and_process(image: Image.Image, generator: Generator) -> Tensor:
    return torch.tensor([torch.get_num_threads(), os.getpid()]).expand(3, 1, 2)


def test_workers_run_one_thread(digits: Path) -> None:
    images = Images(scan(digits), threads_and_process, 0)
    reported = [batch.x[0, 0, 0] for batch in loader(images, in_order(images.folder), workers=2)]
    assert {int(threads) for threads, _ in reported} == {1}
    processes = {int(process) for _, process in reported}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_skipped_and_named(damaged: Path, workers: int) -> None:
    images = Images(scan(damaged), PLAIN, 0)
    places = in_order(images.folder)
    found = list(loader(images, places, workers=workers, broken="skip"))
    for i, (named, damage) in enumerate(zip(found[0].broken, DAMAGES.values(), strict=True)):
        assert named.startswith(f"{images.folder.files[i]}: ")
        assert damage in named
    assert not any(batch.broken for batch in found[1:])
    assert found[0].places == places[0][len(DAMAGES) :]
    assert [len(batch.x) for batch in found] == [len(batch.y) for batch in found] == [6] + [10] * 5


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_fatal(damaged: Path, workers: int) -> None:
    folder = scan(damaged)
    places = in_order(folder)[::-1]
    found = loader(Images(folder, PLAIN, 0), places, workers=workers)
    assert len([next(found) for _ in places[1:]]) == 5
    message = f"loader cannot use 4 of 10 images of a batch; the first is {folder.files[0]}: "
    with pytest.raises(FresnetError, match=re.escape(message)):
        next(found)


def test_a_batch_of_broken_images_is_empty(damaged: Path) -> None:
    images = Images(scan(damaged), PLAIN, 0)
    first, second, *_ = loader(images, in_order(images.folder, len(DAMAGES)), broken="skip")
    assert (len(first.x), len(first.y), first.places, len(first.broken)) == (0, 0, [], 4)
    assert len(second.x) == 4


def test_a_file_that_is_gone(damaged: Path) -> None:
    images = Images(scan(damaged), PLAIN, 0)
    Path(images.folder.files[9]).unlink()
    item = images[Place(0, 0, 9)]
    assert isinstance(item, Broken)
    assert item == (Place(0, 0, 9), images.folder.files[9], "No such file or directory")


def test_an_image_that_the_transform_refuses(digits: Path) -> None:
    bad = partial(augment, augmentation=RECIPE._replace(flip=2))
    images = Images(scan(digits), bad, 0)
    with pytest.raises(FresnetError, match=r"any of 60 images; .* augment expects a flip"):
        list(loader(images, in_order(images.folder), broken="skip"))


def faulty(image: Image.Image, generator: Generator) -> Tensor:
    raise RuntimeError("a fault of the transform's own")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_transform_is_no_broken_image(digits: Path, workers: int) -> None:
    images, others = Images(scan(digits), faulty, 0), active_children()
    with pytest.raises(RuntimeError, match="a fault of the transform's own"):
        next(loader(images, in_order(images.folder), workers=workers, broken="skip"))
    assert active_children() == others


@pytest.mark.slow
def test_a_dead_worker_is_an_error_of_the_loader(digits: Path) -> None:
    """It neither hangs nor raises in the step that the main process is at."""
    folder = scan(digits)
    others = active_children()
    found = loader(Images(folder, PLAIN, 0), in_order(folder, 1), workers=2)
    next(found)
    worker, *_ = (child for child in active_children() if child not in others)
    os.kill(worker.pid or 0, signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.05)
    with pytest.raises(FresnetError, match=r"a worker of the loader died, .*\(pid"):
        list(found)


def test_a_loader_that_is_left_leaves_no_process(digits: Path) -> None:
    others = active_children()
    found = loader(Images(scan(digits), PLAIN, 0), in_order(scan(digits), 1), workers=1)
    next(found)
    assert len(active_children()) == len(others) + 1
    del found
    assert active_children() == others


def test_two_loaders_at_once(digits: Path) -> None:
    """This happens when an evaluation follows an epoch and training then goes on."""
    images = Images(scan(digits), PLAIN, 0)
    places = in_order(images.folder)
    expected = list(loader(images, places))
    training = loader(images, places, workers=1)
    first = next(training)
    assert_same_batches(list(loader(images, places, workers=1)), expected)
    assert_same_batches([first, *training], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "loader expects workers of at least 0; got -1"),
        ({"broken": "ignore"}, "loader expects broken to be 'raise' or 'skip'; got 'ignore'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, digits: Path) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        loader(Images(scan(digits), PLAIN, 0), [], **options)


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fresnet.data.loading", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fresnet\[io\]'"):
        fresnet.data.loader  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fresnet.data.nothing  # noqa: B018
