"""Which images each training step sees, as a function of the step.

order = Order(size=1_281_167, batch=256, seed=0)
places = batch_at(order, step=70_000)    # the same at every call
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from fresnet.errors import FresnetError, check_type, shown
from fresnet.numbers import as_integer


class Order(NamedTuple):
    """A shuffle for each epoch, dealt to batches as evenly as possible.

    No image is dropped, and the batches of an epoch differ in size by at most one image. With
    repeats, each image of the shuffle stands several times in a row. The epoch still ends after
    `size` places, so it holds fewer different images.

    Source: Hoffer et al. 2020, arXiv:1901.09335, and the RASampler of torchvision's references, for
    repeats.
    """

    size: int  # the number of images
    batch: int  # the size of the largest batch, over all processes together
    seed: int
    repeats: int = 1


class Place(NamedTuple):
    """A place in training, and the image that stands there."""

    epoch: int
    place: int  # the index in the order of the epoch, which differs for repeats of an image
    image: int


def steps_per_epoch(order: Order) -> int:
    """The smallest number of batches that hold an epoch.

    >>> steps_per_epoch(Order(size=10, batch=4, seed=0))
    3

    Raises:
      FresnetError: if size, batch or repeats are below 1.
    """
    check_type("steps_per_epoch", Order, "an Order", order=order)
    for name, value in order._asdict().items():
        number = as_integer(value)
        if number is None or (name != "seed" and number < 1):
            least = "" if name == "seed" else " of at least 1"
            raise FresnetError(
                f"an Order expects {name} to be an integer{least}; got {shown(value)}"
            )
    return -(-order.size // order.batch)


def batch_at(order: Order, step: int, *, rank: int = 0, ranks: int = 1) -> list[Place]:
    """What this process sees at a step; the first step is 0. Each call shuffles a whole epoch.

    >>> batch_at(Order(size=10, batch=2, seed=0), step=9)
    [Place(epoch=1, place=8, image=7), Place(epoch=1, place=9, image=3)]

    Args:
      rank: this process among the `ranks` processes that share the batch. Their parts, one after
        the other, are the batch of a process alone. The sizes of parts differ by at most one.
    Raises:
      FresnetError: if there is no such step or rank, or if a rank would get no image.
    """
    check_type("batch_at", Integral, "an integer, such as int(state.position)", step=step)
    return next(batches(order, step, step + 1, rank=rank, ranks=ranks))


def batches(
    order: Order, start: int, stop: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[list[Place]]:
    """`batch_at` for every step from start to before stop, with one shuffle for each epoch.

    >>> [len(places) for places in batches(Order(size=10, batch=4, seed=0), start=0, stop=3)]
    [4, 3, 3]

    Args and Raises are those of `batch_at`.
    """
    steps = steps_per_epoch(order)
    for name, value in {"start": start, "stop": stop, "rank": rank, "ranks": ranks}.items():
        if as_integer(value) is None:
            raise FresnetError(
                f"batches expects {name} to be an integer, such as int(state.position); "
                f"got {shown(value)}"
            )
    if not 0 <= start <= stop:
        raise FresnetError(
            f"batches expects 0 <= start <= stop; got {shown(start)} and {shown(stop)}"
        )
    if not 0 <= rank < ranks:
        raise FresnetError(
            f"batches expects a rank from 0 to below ranks={shown(ranks)}; got {shown(rank)}"
        )
    if ranks > (smallest := order.size // steps):
        raise FresnetError(
            f"batches expects an image for each of {ranks} ranks; "
            f"{order.size} images in {steps} batches make batches of {smallest}"
        )
    return _batches(order, start, stop, rank, ranks)


def _batches(order: Order, start: int, stop: int, rank: int, ranks: int) -> Iterator[list[Place]]:
    steps = steps_per_epoch(order)
    for epoch, group in groupby(range(start, stop), lambda step: step // steps):
        indices = _shuffled(order, epoch)
        for step in group:
            places = _part(_part(range(order.size), steps, step % steps), ranks, rank)
            images = indices[places.start : places.stop].tolist()
            yield [Place(epoch, *pair) for pair in zip(places, images, strict=True)]


def _shuffled(order: Order, epoch: int) -> Tensor:
    """The indices of an epoch's images, in order, `[size]`."""
    generator = keyed_generator(order.seed, epoch)
    shuffled = torch.randperm(order.size, generator=generator, device="cpu")
    distinct = shuffled[: -(-order.size // order.repeats)]
    return distinct.repeat_interleave(order.repeats)[: order.size]


def _part(whole: range, parts: int, i: int) -> range:
    """The i-th of `parts` parts, divided as by `torch.tensor_split`.

    >>> [_part(range(10), 3, i) for i in range(3)]
    [range(0, 4), range(4, 7), range(7, 10)]
    """
    least, larger = divmod(len(whole), parts)
    begin = i * least + min(i, larger)
    return whole[begin : begin + least + (i < larger)]


def keyed_generator(*key: int) -> torch.Generator:
    """A generator for this sequence of numbers, unrelated to that for any other sequence.

    A generator for the sum of seed and epoch would draw the same for seed 0 at epoch 1 and for seed
    1 at epoch 0.
    """
    digest = blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
