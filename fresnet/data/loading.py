"""Images read from their files, augmented, and put together as batches by worker processes."""

from collections import abc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

import torch
from einops import rearrange
from PIL.Image import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from fresnet.data.order import Place, keyed_generator
from fresnet.data.preprocess import read_image
from fresnet.data.shards import Scanned
from fresnet.errors import FresnetError, check_type, describe, reason, shown
from fresnet.numbers import as_integer

Reader: TypeAlias = Callable[[BinaryIO], Any]
"""A function from an open file to what the transform takes: `read_image` or `read_pixels`.

It raises `FresnetError` if it cannot read the file. Any other error ends the batches.
"""

Transform: TypeAlias = Callable[[Image, Generator], Tensor] | Callable[[Tensor, Generator], Tensor]
"""A function from an upright RGB image, as the reader gives it, to `[3 h w]`.

It draws from the generator alone, and writes to nothing. Where processes are spawned it must be
possible to pickle it: a `functools.partial` of a module's function can be pickled, a lambda cannot.
"""

OnBroken: TypeAlias = Literal["raise", "skip"]
"""Whether an image that cannot be read raises, or is left out of its batch."""


class Example(NamedTuple):
    """An image as the transform makes it, and its label."""

    place: Place
    x: Tensor  # [3 h w]
    label: int


class Broken(NamedTuple):
    """A file that holds no image, or an image that the transform refuses."""

    place: Place
    file: str
    reason: str


class Batch(NamedTuple):
    """Images and labels of a batch, their places in the order, and what was left out."""

    x: Tensor  # [b 3 h w], float32, or uint8 if the transform gives pixels; channels last
    y: Tensor  # [b], int64
    places: list[Place]  # the places of these b images
    broken: tuple[str, ...]  # "file: reason" for each image that was left out


@dataclass(frozen=True)
class Images(Dataset[Example | Broken]):
    """The transformed images of a folder or of shards, indexed by `Place`.

    `read` makes of an open file what the transform takes: an image of Pillow, or with `read_pixels`
    a tensor of pixels. What a transform draws depends only on the seed, the epoch and the place: it
    is the same whichever process asks, and whenever.
    """

    folder: Scanned
    transform: Transform
    seed: int
    read: Reader = read_image

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, place: Place) -> Example | Broken:
        generator = keyed_generator(self.seed, place.epoch, place.place)
        try:
            with self.folder.opened(place.image) as file:
                image = self.read(file)
            return Example(place, self.transform(image, generator), self.folder.labels[place.image])
        except FresnetError as error:
            return Broken(place, self.folder.files[place.image], reason(error))


def loader(
    images: Images,
    places: Iterable[list[Place]],
    *,
    workers: int = 0,
    broken: OnBroken = "raise",
) -> abc.Generator[Batch, None, None]:
    """The batches of images at these places, in order, read ahead by worker processes.

        order = Order(len(images), batch=256, seed=0)
        for x, y, *_ in loader(images, batches(order, start=0, stop=450_000), workers=8): ...

    >>> import pathlib, tempfile, PIL.Image
    >>> from functools import partial
    >>> from fresnet.data import Order, batches, prepare, scan
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("cat", "dog"):
    ...         (folder := pathlib.Path(root, name)).mkdir()
    ...         PIL.Image.new("RGB", (40, 30)).save(folder / "1.png")
    ...     images = Images(scan(root), partial(prepare, preset="imagenet-v1"), seed=0)
    ...     order = Order(len(images), batch=2, seed=0)
    ...     for x, y, *_ in loader(images, batches(order, start=0, stop=1)):
    ...         print(x.shape, y.shape)
    torch.Size([2, 3, 224, 224]) torch.Size([2])

    Batches do not depend on the number of workers. Each worker runs one thread. Where CUDA is
    available, batches lie in pinned memory.

    Args:
      images: the images of a folder or of shards.
      places: the places of each batch's images, such as from `batches`.
      workers: the number of processes that read; 0 reads in this process.
      broken: whether an image that cannot be read raises, or is left out of its batch, which then
        may be empty.
    Raises:
      FresnetError: at once if an argument is not as described; at a batch if one of its images is
        broken and none may be left out, or if all images are broken; if a worker dies. It names the
        first file.
    """
    check_type("loader", Images, "Images(folder, transform, seed)", images=images)
    check_type("loader", Iterable, "lists of places, such as batches(order, 0, 9)", places=places)
    number = as_integer(workers)
    if number is None or number < 0:
        raise FresnetError(f"loader expects workers of at least 0; got {shown(workers)}")
    if broken not in ("raise", "skip"):
        raise FresnetError(f"loader expects broken to be 'raise' or 'skip'; got {shown(broken)}")
    data = DataLoader(
        images,
        batch_sampler=_checked(places),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=Generator("cpu"),  # else the global one would draw the workers' seeds
    )
    return _batches(images, data, broken)


def _checked(places: Iterable[list[Place]]) -> Iterator[list[Place]]:
    for batch in places:
        if not isinstance(batch, list) or not all(isinstance(place, Place) for place in batch):
            raise FresnetError(
                f"loader expects lists of Place, as batches gives them; got {describe(batch)}"
            )
        yield batch


def _batches(
    images: Images, data: "DataLoader[Example | Broken]", broken: OnBroken
) -> abc.Generator[Batch, None, None]:
    # If DataLoader is started in the main thread, it handles SIGCHLD: a worker's death then raises
    # wherever the main thread is, for example in a training step. So another thread starts it.
    with ThreadPoolExecutor(1) as starter:
        ready: Any = starter.submit(iter, data).result()
    missed: list[str] = []  # the broken images since one could be read
    try:
        while (batch := _next(ready)) is not None:
            missed = [] if batch.places else [*missed, *batch.broken]
            if len(missed) >= len(images):
                raise FresnetError(
                    f"loader cannot use any of {len(images)} images; the first is {missed[0]}"
                )
            if batch.broken and broken == "raise":
                first, count = batch.broken[0], len(batch.broken)
                which = f"{count} of {count + len(batch.places)} images of a batch"
                raise FresnetError(f"loader cannot use {which}; the first is {first}")
            yield batch
    finally:
        # Workers are shut down here and not by the garbage collector. An exception's traceback may
        # keep `ready` alive; a worker of another loader, forked meanwhile, would then collect it
        # too, and hang.
        if data.num_workers > 0:
            shut_down = getattr(ready, "_shutdown_workers", None)  # it is private
            if shut_down is not None:
                shut_down()


def _next(ready: Iterator[Batch]) -> Batch | None:
    """The next batch, or None after the last one."""
    try:
        return next(ready, None)
    except (RuntimeError, OSError, EOFError) as error:
        # Only the message tells: a transform may raise errors of the same types.
        if "DataLoader worker (pid" in str(error) or "in pin memory thread" in str(error):
            raise FresnetError(
                f"a worker of the loader died, perhaps of too little memory: {reason(error)}"
            ) from error
        raise


def _collate(items: list[Example | Broken]) -> Batch:
    good = [item for item in items if isinstance(item, Example)]
    bad = [item for item in items if isinstance(item, Broken)]
    # Stacked as [h w c], the images make a batch in channels_last without a second copy.
    rows = [rearrange(example.x, "c h w -> h w c") for example in good]
    return Batch(
        x=rearrange(torch.stack(rows), "b h w c -> b c h w")
        if rows
        else torch.empty(0, device="cpu"),
        y=torch.tensor([example.label for example in good], dtype=torch.int64, device="cpu"),
        places=[example.place for example in good],
        broken=tuple(f"{item.file}: {item.reason}" for item in bad),
    )
