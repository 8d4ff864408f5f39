"""Images read from their files, augmented, and put together to batches by other processes."""

from collections import abc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from fresnet.data.folder import Folder
from fresnet.data.order import Place, keyed_generator
from fresnet.data.preprocess import upright_rgb
from fresnet.errors import FresnetError, reason

Transform = Callable[[Image, Generator], Tensor]
"""From an upright RGB image to `[3 h w]`: drawing from the generator alone, and writing to nothing.

Where processes are spawned it is pickled: `functools.partial` of a module's function is, a lambda
is not.
"""


class Example(NamedTuple):
    place: Place
    x: Tensor  # [3 h w]
    label: int


class Broken(NamedTuple):
    """A file that holds no image, or one that the transform refuses."""

    place: Place
    file: str
    reason: str


class Batch(NamedTuple):
    x: Tensor  # [b 3 h w], float32, channels last
    y: Tensor  # [b], int64
    places: list[Place]  # of these b images
    broken: tuple[str, ...]  # "file: reason" of those that would have been here too


@dataclass(frozen=True)
class Images(Dataset[Example | Broken]):
    """The transformed images of a folder, by `Place`.

    What a transform draws depends on the seed, the epoch and the place, not on who asks when.
    """

    folder: Folder
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, place: Place) -> Example | Broken:
        file, label = self.folder.files[place.image], self.folder.labels[place.image]
        generator = keyed_generator(self.seed, place.epoch, place.place)
        try:
            return Example(place, self.transform(_read(file), generator), label)
        except FresnetError as error:
            return Broken(place, file, reason(error))


def _read(file: str) -> Image:
    try:
        return upright_rgb(file)
    except Exception as error:  # of any type: it is Pillow's decoders that raise
        raise FresnetError(reason(error)) from error


def loader(
    images: Images,
    places: Iterable[list[Place]],
    *,
    workers: int = 0,
    broken: Literal["raise", "skip"] = "raise",
) -> abc.Generator[Batch, None, None]:
    """The batches of these places, in their order, read ahead by worker processes.

        order = Order(len(images), batch=256, seed=0)
        for x, y, *_ in loader(images, batches(order, start=0, stop=450_000), workers=8): ...

    Batches do not depend on the number of workers, each of which runs one thread. Where CUDA is
    available they lie in pinned memory.

    Args:
      places: those of each batch, such as from `batches`.
      workers: processes that read; 0 reads in this one.
      broken: whether to raise at an image that cannot be read or to leave it out of its batch.
    Raises:
      FresnetError: at once if an argument is none of these; at its batch, naming the file, if an
        image is broken, or all of a batch are where they may be skipped; if a worker dies.
    """
    if workers < 0:
        raise FresnetError(f"loader expects workers of at least 0; got {workers}")
    if broken not in ("raise", "skip"):
        raise FresnetError(f"loader expects broken to be 'raise' or 'skip'; got {broken!r}")
    data = DataLoader(
        images,
        batch_sampler=places,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=Generator("cpu"),  # else it would draw the workers' seeds from the global one
    )
    return _batches(data, broken)


def _batches(data: "DataLoader[Any]", broken: str) -> abc.Generator[Batch, None, None]:
    # Started in the main thread, DataLoader handles SIGCHLD, and a worker's death would raise in
    # whatever the main thread is at, such as a training step.
    with ThreadPoolExecutor(1) as starter:
        ready: Any = starter.submit(iter, data).result()
    try:
        while (batch := _next(ready)) is not None:
            if batch.broken and (broken == "raise" or not batch.places):
                first, count = batch.broken[0], len(batch.broken)
                which = f"{count} of {count + len(batch.places)} images of a batch"
                raise FresnetError(f"loader cannot use {which}; the first is {first}")
            yield batch
    finally:
        # At once, as an exception's traceback may keep it: were it left to the garbage collector,
        # a worker of another loader, forked meanwhile, would collect it too and hang.
        if data.num_workers > 0:
            ready._shutdown_workers()


def _next(ready: Any) -> Batch | None:
    """None after the last."""
    try:
        batch: Batch | None = next(ready, None)
    except (RuntimeError, OSError, EOFError) as error:
        # By its words: of the same types are a transform's own errors.
        if "DataLoader worker (pid" in str(error) or "in pin memory thread" in str(error):
            raise FresnetError(
                f"a worker of the loader died, perhaps of too little memory: {reason(error)}"
            ) from error
        raise
    return batch


def _collate(items: list[Example | Broken]) -> Batch:
    good = [item for item in items if isinstance(item, Example)]
    bad = [item for item in items if isinstance(item, Broken)]
    # Along the last axis of [h w 3] images nothing is moved: channels last without a second copy.
    rows = [example.x.movedim(0, -1) for example in good]
    return Batch(
        x=torch.stack(rows).movedim(-1, 1) if rows else torch.empty(0),
        y=torch.tensor([example.label for example in good], dtype=torch.int64),
        places=[example.place for example in good],
        broken=tuple(f"{item.file}: {item.reason}" for item in bad),
    )
