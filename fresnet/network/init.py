"""Initialisation: a network's first parameters, drawn from an explicit generator."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.network.check import DTYPES, stats_dtype
from fresnet.network.nodes import (
    STATS_OF,
    BasicBlock,
    Block,
    DeepStem,
    Head,
    Identity,
    Norm,
    NormStats,
    NoShortcut,
    Params,
    Shortcut,
    Stats,
    Stem,
    Stem7x7,
    Weights,
    ZeroPad,
    blocks_of,
)
from fresnet.network.specs import RESNET50, Spec


def init(
    generator: torch.Generator | int,
    spec: Spec = RESNET50,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    zero_init_residual: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Params:
    """A new network, distributed as torchvision's are.

    Convolutions are normal with variance 2 / fan_out, norms start as the identity (scale 1,
    bias 0, mean 0, var 1), the head is uniform within 1 / sqrt(c). Everything is drawn on the
    generator's device and then moved, so the same seed gives the same bits wherever the network
    will live. Convolution weights lie in memory channels last, which activations follow.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET50, num_classes=10)
    >>> sum(leaf.numel() for leaf in fresnet.tree.leaves(params.weights))
    23528522

    Args:
      generator: where the randomness comes from, advanced by the call; an int seeds a new one.
      spec: the architecture, one of `SPECS` or your own `Spec`.
      num_classes: the number of logits, k.
      in_channels: the channels of the images.
      zero_init_residual: start the last scale of every block at 0, so that each block starts
        as its shortcut (Goyal et al. 2017, arXiv:1706.02677).
      dtype: of the weights; the statistics are never narrower than float32.
      device: where the tensors go, by default the generator's; on "meta" nothing is drawn.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: if generator, spec, num_classes, in_channels, dtype or device is not of this
        kind.
    Source: He et al. 2015, arXiv:1502.01852, Eq. 14, in the backward direction.
    """
    if type(generator) is int and -(2**63) <= generator < 2**64:
        generator = torch.Generator().manual_seed(generator)
    if not isinstance(generator, torch.Generator):
        raise FresnetError(f"init expects a torch.Generator or an int; got {generator!r}")
    if not isinstance(spec, Spec):
        raise FresnetError(f"init expects a Spec, such as fresnet.RESNET50; got {spec!r}")
    if not all(type(n) is int and 0 < n < 2**31 for n in (num_classes, in_channels)):
        raise FresnetError(
            "init expects num_classes and in_channels to be positive integers below 2**31; "
            f"got num_classes={num_classes}, in_channels={in_channels}"
        )
    if dtype not in DTYPES:
        raise FresnetError(f"init expects dtype to be one of {DTYPES}; got {dtype!r}")
    try:
        device = generator.device if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise FresnetError(f"init expects device to be a torch.device; got {device!r}") from error
    draw = _Draw(generator, dtype, device)
    weights = _weights(draw, spec, num_classes, in_channels, 0.0 if zero_init_residual else 1.0)
    return Params(weights, fresh_stats(weights))


def fresh_head(seed: int, channels: int, classes: int) -> Head:
    """A head as `init` draws it, for a network that was trained on other classes."""
    generator = torch.Generator().manual_seed(seed)
    return _Draw(generator, torch.float32, generator.device).head(channels, classes)


def fresh_stats(weights: Weights) -> Stats:
    """The statistics beside these weights, every mean 0 and every var 1."""
    return Stats(
        stem=_fresh_stats(weights.stem),
        stages=tuple(
            tuple(_fresh_stats(block) for block in blocks_of(stage)) for stage in weights.stages
        ),
    )


@dataclass(frozen=True)
class _Draw:
    """Draws the leaves."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    def conv(self, channels: int, out_channels: int, size: int, groups: int = 1) -> Tensor:
        std = sqrt(2 / (out_channels * size * size))
        weight = self._empty(out_channels, channels // groups, size, size)
        weight = weight.normal_(0.0, std, generator=self.generator)
        return weight.to(self.device).contiguous(memory_format=torch.channels_last)

    def norm(self, channels: int, scale: float = 1.0) -> Norm:
        return Norm(
            scale=torch.full((channels,), scale, dtype=self.dtype, device=self.device),
            bias=torch.zeros(channels, dtype=self.dtype, device=self.device),
        )

    def head(self, channels: int, classes: int) -> Head:
        return Head(
            weight=self._uniform(classes, channels, bound=1 / sqrt(channels)),
            bias=self._uniform(classes, bound=1 / sqrt(channels)),
        )

    def _uniform(self, *shape: int, bound: float) -> Tensor:
        return self._empty(*shape).uniform_(-bound, bound, generator=self.generator).to(self.device)

    def _empty(self, *shape: int) -> Tensor:
        on_meta = self.device.type == "meta"
        return torch.empty(
            shape, dtype=self.dtype, device=self.device if on_meta else self.generator.device
        )


def _weights(
    draw: _Draw, spec: Spec, num_classes: int, in_channels: int, last_scale: float
) -> Weights:
    stem = _stem(draw, spec, in_channels)
    channels, stages = spec.width, []
    for stage, depth in enumerate(spec.depths):
        blocks = []
        for i in range(depth):
            strides = stage > 0 and i == 0
            blocks.append(_block(draw, spec, stage, channels, strides, last_scale))
            channels = spec.out_channels(stage)
        stages.append(tuple(blocks))
    return Weights(stem, tuple(stages), draw.head(channels, num_classes))


def _stem(draw: _Draw, spec: Spec, in_channels: int) -> Stem:
    width = spec.width
    if spec.stem is DeepStem:
        return DeepStem(
            *(draw.conv(in_channels, width // 2, 3), draw.norm(width // 2)),
            *(draw.conv(width // 2, width // 2, 3), draw.norm(width // 2)),
            *(draw.conv(width // 2, width, 3), draw.norm(width)),
        )
    size = 7 if spec.stem is Stem7x7 else 3
    stem: Stem = spec.stem(draw.conv(in_channels, width, size), draw.norm(width))
    return stem


def _block(
    draw: _Draw, spec: Spec, stage: int, channels: int, strides: bool, last_scale: float
) -> Block:
    inner, out_channels = spec.inner_width(stage), spec.out_channels(stage)
    shortcut = _shortcut(draw, spec, channels, out_channels, strides)
    if spec.block is BasicBlock:
        return BasicBlock(
            *(draw.conv(channels, inner, 3), draw.norm(inner)),
            *(draw.conv(inner, inner, 3), draw.norm(inner, last_scale)),
            shortcut,
        )
    block: Block = spec.block(
        *(draw.conv(channels, inner, 1), draw.norm(inner)),
        *(draw.conv(inner, inner, 3, spec.groups), draw.norm(inner)),
        *(draw.conv(inner, out_channels, 1), draw.norm(out_channels, last_scale)),
        shortcut,
    )
    return block


def _shortcut(draw: _Draw, spec: Spec, channels: int, out_channels: int, strides: bool) -> Shortcut:
    if spec.shortcut is NoShortcut:
        return NoShortcut()
    if channels == out_channels and not strides:
        return Identity()
    if spec.shortcut is ZeroPad:
        return ZeroPad()
    shortcut: Shortcut = spec.shortcut(
        draw.conv(channels, out_channels, 1), draw.norm(out_channels)
    )
    return shortcut


def _fresh_stats(node: Any) -> Any:
    stats = STATS_OF[type(node)]
    if stats is tuple:
        return ()
    if stats is NormStats:
        dtype = stats_dtype(node.scale.dtype)
        return NormStats(
            mean=torch.zeros_like(node.scale, dtype=dtype),
            var=torch.ones_like(node.scale, dtype=dtype),
        )
    return stats(*(_fresh_stats(getattr(node, field)) for field in stats._fields))
