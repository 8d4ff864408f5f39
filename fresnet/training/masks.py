"""Stochastic depth and dropout, as masks: what is drawn is a value, and is laid around nodes.

masks = draw_masks(generator, params.weights, len(x), drop_path=0.1, dropout=0.2)
logits, stats = forward_train(params._replace(weights=masked(params.weights, masks)), x)
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor

from fresnet.errors import FresnetError, describe, shown
from fresnet.network.check import first_conv
from fresnet.network.nodes import (
    MASKS,
    Dropout,
    DropPath,
    Head,
    NoHead,
    NoShortcut,
    Weights,
    blocks_of,
    with_blocks,
)
from fresnet.numbers import as_integer, as_number
from fresnet.tree.text import register

NoMasks: TypeAlias = tuple[()]


class Masks(NamedTuple):
    """How often a part of a network counts for each image: 0, or 1 / (1 - rate)."""

    paths: tuple[tuple[Tensor | Any, ...], ...]
    """Of each block of each stage, `[b]`; `()` where nothing is dropped."""

    features: Tensor | Any
    """Of what the head sees, `[b c]`; or `()`."""


register(Masks)


def draw_masks(
    generator: Generator,
    weights: Weights,
    images: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> Masks:
    """Draw what is dropped of each image of a batch.

    The rate of stochastic depth rises from 0 at the first block to `drop_path` at the last. The
    numbers are drawn on the generator's device and then moved, so they are the same on every
    device. Those of a CPU's generator for an image do not depend on the images after it.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> generator = torch.Generator().manual_seed(0)
    >>> draw_masks(generator, params.weights, 4, drop_path=0.5, dropout=0.5)
    Masks(
      paths=(((), f32[4]), (f32[4], f32[4]), (f32[4], f32[4]), (f32[4], f32[4])),
      features=f32[4,512]
    )

    Args:
      generator: the source of randomness, which the call advances.
      weights: those that the masks are for, of one network or of a stack of networks.
      images: how many the batch has.
      drop_path: the rate at which the last block's branch is dropped, from 0 to below 1.
      dropout: the rate at which features are dropped before the head, from 0 to below 1.
    Returns:
      The masks, which `masked` lays around the weights.
    Raises:
      FresnetError: if an argument is not as described, or if a path is to be dropped in a block
        without a shortcut, or features before no head.
    Source: Huang et al. 2016, arXiv:1603.09382, Sec. 3, with timm's rates.
    """
    if not isinstance(generator, Generator):
        raise FresnetError(f"draw_masks expects a torch.Generator; got {describe(generator)}")
    _check_weights("draw_masks", weights)
    count = as_integer(images)
    if count is None or count < 0:
        raise FresnetError(f"draw_masks expects a number of images; got {shown(images)}")
    drop_path, dropout = check_rates("draw_masks", drop_path=drop_path, dropout=dropout)
    blocks = [block for stage in weights.stages for block in blocks_of(stage)]
    if drop_path and any(isinstance(block.shortcut, NoShortcut) for block in blocks):
        raise FresnetError("draw_masks expects shortcuts where paths are dropped; got NoShortcut")
    if dropout and isinstance(weights.head, NoHead):
        raise FresnetError("draw_masks expects a head where features are dropped; got NoHead")
    features = weights.head.weight.shape[-1] if dropout else 0
    size = (count, len(blocks) + features)
    drawn = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float32)
    like = first_conv(weights)
    drawn = drawn.to(like.device)

    def mask(drawn: Tensor, rate: float) -> Tensor | Any:
        return (drawn >= rate).to(like.dtype) / (1 - rate) if rate else ()

    columns = enumerate(drawn[:, : len(blocks)].unbind(1))
    last = max(1, len(blocks) - 1)
    paths = [mask(column, drop_path * i / last) for i, column in columns]
    each = iter(paths)
    return Masks(
        tuple(tuple(next(each) for _ in blocks_of(stage)) for stage in weights.stages),
        mask(drawn[:, len(blocks) :], dropout),
    )


def masked(weights: Weights, masks: Masks) -> Weights:
    """The network that drops what the masks say, of a batch of so many images.

    >>> import torch, fresnet
    >>> params, x = fresnet.init(0, fresnet.RESNET18, num_classes=10), torch.ones(4, 3, 32, 32)
    >>> generator = torch.Generator().manual_seed(0)
    >>> masks = draw_masks(generator, params.weights, len(x), dropout=0.5)
    >>> fresnet.forward(params._replace(weights=masked(params.weights, masks)), x).shape
    torch.Size([4, 10])

    Args:
      weights: those of the network.
      masks: as `draw_masks` draws them for it.
    Returns:
      The weights, with a `DropPath` around each block of which a path is dropped, and a `Dropout`
      around the head if features are. What keeps a network, such as `save`, refuses them.
    Raises:
      FresnetError: if weights are no weights or have masks, or if the masks are for another
        network.
    """
    _check_weights("masked", weights)
    depths = [len(blocks_of(stage)) for stage in weights.stages]
    there = [len(stage) for stage in masks.paths] if type(masks) is Masks else describe(masks)
    if there != depths:
        raise FresnetError(f"masked expects Masks of {depths} blocks in each stage; got {there}")
    stages = tuple(
        with_blocks(
            stage,
            [
                block if isinstance(keep, tuple) else DropPath(block, keep)
                for block, keep in zip(blocks_of(stage), keeps, strict=True)
            ],
        )
        for stage, keeps in zip(weights.stages, masks.paths, strict=True)
    )
    head = weights.head
    if not isinstance(masks.features, tuple):
        seen = head.weight.shape[-1] if isinstance(head, Head) else 0
        if masks.features.shape[-1:] != (seen,):
            raise FresnetError(
                f"masked expects Masks of {seen} features before the head; "
                f"got {describe(masks.features)}"
            )
    if not isinstance(masks.features, tuple):
        head = Dropout(head, masks.features)
    return weights._replace(stages=stages, head=head)


def check_rates(caller: str, **rates: float) -> list[float]:
    """The rates as numbers from 0 to below 1.

    Raises:
      FresnetError: naming one that is not.
    """
    found = []
    for name, rate in rates.items():
        number = as_number(rate)
        if number is None or not 0 <= number < 1:
            raise FresnetError(
                f"{caller} expects {name} to be a number from 0 to below 1; got {shown(rate)}"
            )
        found.append(float(number))
    return found


def _check_weights(caller: str, weights: Weights) -> None:
    if type(weights) is not Weights:
        raise FresnetError(f"{caller} expects Weights; got {describe(weights)}")
    blocks = (block for stage in weights.stages for block in blocks_of(stage))
    if any(isinstance(node, MASKS) for node in (weights.head, *blocks)):
        raise FresnetError(f"{caller} expects weights without masks; got some that have masks")
