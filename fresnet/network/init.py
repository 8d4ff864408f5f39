"""Initialisation: a network's first parameters, drawn from an explicit generator."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fresnet.errors import FresnetError, reason, shown, suggestion
from fresnet.network.check import DTYPES, check_params, first_conv, stats_dtype
from fresnet.network.family import RESNET50, SPECS
from fresnet.network.nodes import (
    BATCH_NORMS,
    Bias,
    Head,
    Layer,
    NoHead,
    NoNorm,
    Norm,
    Normed,
    NormStats,
    Params,
    Stats,
    Unit,
    Weights,
    beside,
    features_in,
    norm_shape,
)
from fresnet.network.specs import Spec
from fresnet.numbers import as_integer


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
    """A new network, with the distribution of torchvision's.

    Convolutions are normal with variance 2 / fan_out. Norms start as the identity (scale 1, bias 0,
    mean 0, var 1). The head is uniform within 1 / sqrt(c). Everything is drawn on the generator's
    device and then moved, so the same seed gives the same bits on every device. Convolution weights
    lie in memory channels last, and activations follow them.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET50, num_classes=10)
    >>> sum(leaf.numel() for leaf in fresnet.tree.leaves(params.weights))
    23528522

    Args:
      generator: the source of randomness, which the call advances; an int seeds a new one.
      spec: the architecture, one of `SPECS` or your own `Spec`.
      num_classes: the number of logits, k; 0 for a network without a head, whose `forward` returns
        features.
      in_channels: the channels of the images.
      zero_init_residual: start the last scale of every block at 0, so that each block starts
        as its shortcut (Goyal et al. 2017, arXiv:1706.02677). In V2 no norm follows the last
        convolution of a block, whose weight starts at 0 instead.
      dtype: the dtype of the weights; the statistics are never narrower than float32.
      device: the device of the tensors, by default the generator's; on "meta" nothing is drawn.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: if generator, spec, num_classes, in_channels, dtype or device is not as above.
    Source: He et al. 2015, arXiv:1502.01852, Eq. 14, in the backward direction.
    """
    generator = _generator("init", generator)
    if not isinstance(spec, Spec):
        hint = ""
        if isinstance(spec, str):
            hint = f": fresnet.SPECS[{spec!r}]" if spec in SPECS else f"; {suggestion(spec, SPECS)}"
        raise FresnetError(
            f"init expects a Spec, such as fresnet.RESNET50; got {shown(spec)}{hint}"
        )
    classes, channels = as_integer(num_classes), as_integer(in_channels)
    if classes is None or not channels or not (0 <= classes < 2**31 and 0 < channels < 2**31):
        raise FresnetError(
            "init expects num_classes to be an integer from 0 on, and in_channels from 1 on, below "
            f"2**31; got num_classes={shown(num_classes)}, in_channels={shown(in_channels)}"
        )
    if dtype not in DTYPES:
        raise FresnetError(f"init expects dtype to be one of {DTYPES}; got {shown(dtype)}")
    try:
        device = generator.device if device is None else torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise FresnetError(
            f"init expects device to be a torch.device that is there; got {shown(device)}: "
            f"{reason(error)}"
        ) from error
    last_scale = 0.0 if zero_init_residual else 1.0
    draw = _Values(generator, dtype, device, last_scale, spec.layer, spec.norm)
    weights = _weights(draw, spec, classes, channels)
    return Params(weights, fresh_stats(weights))


def with_head(params: Params, *, num_classes: int, generator: torch.Generator | int) -> Params:
    """The same network with a new head, drawn as `init` draws it: to train it for other classes.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18)
    >>> fresnet.with_head(params, num_classes=2, generator=1)
    Params(ResNet of BasicBlock (2, 2, 2, 2), 2 classes, 11,177,538 parameters, float32, cpu)

    Args:
      params: the network, with a head or without.
      num_classes: the number of logits, from 1 on. A network without a head has
        `fresnet.nodes.NoHead()` in its place.
      generator: the source of randomness, which the call advances; an int seeds a new one.
    Returns:
      The network. Its other weights and its statistics are those of params, not copies.
    Raises:
      FresnetError: if params is not a network, or if num_classes or generator is not as above.
    """
    check_params("with_head", params)
    source, classes = _generator("with_head", generator), as_integer(num_classes)
    if not classes or not 0 < classes < 2**31:
        raise FresnetError(
            "with_head expects num_classes to be an integer from 1 on, below 2**31; "
            f"got {shown(num_classes)}"
        )
    weights, stem = params.weights, first_conv(params.weights)
    head = _Values(source, stem.dtype, stem.device).head(features_in(weights), classes)
    return params._replace(weights=weights._replace(head=head))


def fresh_stats(weights: Weights) -> Stats:
    """The statistics beside these weights, with every mean 0 and every var 1."""
    return beside(_fresh, weights)


def _fresh(unit: Unit) -> NormStats | tuple[()]:
    if not isinstance(unit.norm, BATCH_NORMS):
        return ()
    like = unit.norm.scale
    dtype = stats_dtype(like.dtype)
    return NormStats(*(new(like.shape, dtype=dtype) for new in (like.new_zeros, like.new_ones)))


def _generator(caller: str, generator: torch.Generator | int) -> torch.Generator:
    seed = as_integer(generator)
    if seed is not None and -(2**63) <= seed < 2**64:
        return torch.Generator().manual_seed(seed)
    if not isinstance(generator, torch.Generator):
        raise FresnetError(f"{caller} expects a torch.Generator or an int; got {shown(generator)}")
    return generator


@dataclass(frozen=True)
class _Values:
    """Draws the leaves of nodes."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device
    last_scale: float = 1.0
    kind: type[Any] = Layer
    norm: type[Any] = Norm

    def layer(
        self, channels: int, out: int, side: int, groups: int = 1, *, last: bool = False
    ) -> Layer:
        scale = self.last_scale if last else 1.0
        unit: Layer = self.kind(self._conv(channels, out, side, groups), self._norm(out, scale))
        return unit

    def biased(self, channels: int, out: int) -> Layer:
        return Layer(self._conv(channels, out, 1), Bias(self._full((out,), 0.0)))

    def bare(self, channels: int, out: int, side: int, *, last: bool = False) -> Layer:
        conv = self._conv(channels, out, side)
        starts_at_0 = last and not self.last_scale
        unit: Layer = self.kind(torch.zeros_like(conv) if starts_at_0 else conv, NoNorm())
        return unit

    def row(self, length: int) -> Layer:
        weight = self._uniform(1, 1, 1, length, bound=1 / sqrt(length))
        return Layer(weight.contiguous(memory_format=torch.channels_last), NoNorm())

    def normed(self, channels: int) -> Normed:
        return Normed(self._norm(channels, 1.0))

    def head(self, channels: int, classes: int) -> Head | NoHead:
        if not classes:
            return NoHead()
        return Head(
            weight=self._uniform(classes, channels, bound=1 / sqrt(channels)),
            bias=self._uniform(classes, bound=1 / sqrt(channels)),
        )

    def _conv(self, channels: int, out: int, side: int, groups: int = 1) -> Tensor:
        std = sqrt(2 / (out * side * side))
        return self._drawn(
            (out, channels // groups, side, side),
            lambda empty: empty.normal_(0.0, std, generator=self.generator),
            torch.channels_last,
        )

    def _norm(self, channels: int, scale: float) -> Any:
        shape = norm_shape(self.norm, channels)
        return self.norm(scale=self._full(shape, scale), bias=self._full(shape, 0.0))

    def _full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)

    def _uniform(self, *shape: int, bound: float) -> Tensor:
        return self._drawn(
            shape, lambda empty: empty.uniform_(-bound, bound, generator=self.generator)
        )

    def _drawn(
        self,
        shape: tuple[int, ...],
        draw: Callable[[Tensor], Tensor],
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Drawn on the generator's device and then moved; on meta there is nothing to draw."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=layout)
        empty = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        return draw(empty).to(self.device).contiguous(memory_format=layout)


def _weights(draw: _Values, spec: Spec, num_classes: int, in_channels: int) -> Weights:
    widths = spec.stem_widths or (spec.width,)
    stem = spec.stem.draw(draw, in_channels, *widths)
    if spec.stem_pool is not None:
        stem = spec.stem_pool.around(stem, draw, widths[-1])
    channels, stages = widths[-1], []
    for stage, depth in enumerate(spec.depths):
        blocks = []
        for i in range(depth):
            plan = spec.plan(stage, channels, strides=stage > 0 and i == 0)
            blocks.append(spec.block.draw(draw, plan))
            channels = plan.out
        stages.append(spec.stage(tuple(blocks)) if stage else tuple(blocks))
    last = spec.last.draw(draw, channels)
    return Weights(stem, tuple(stages), last, draw.head(channels, num_classes))
