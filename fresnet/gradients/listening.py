"""One pass forward and back in which each layer is told its cotangent.

From the cotangent and its input a layer computes the squared norm of each image's gradient, and
later the sum of the gradients with any weights. No gradient of an image is formed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fresnet import tree
from fresnet.gradients.per_sample import LossFunction
from fresnet.gradients.reverse import reaches_further
from fresnet.network import ops
from fresnet.network.check import stats_dtype
from fresnet.network.convolution import squared_norms, weight_gradient
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    EPS,
    AnyNorm,
    Bias,
    Geometry,
    Head,
    Layer,
    NoHead,
    NoNorm,
    Normed,
    NormStats,
    Pair,
    Params,
    Weights,
)
from fresnet.network.norm import check_width, inference_norm, norm_without_statistics
from fresnet.network.regimes import Composed


def squares_of(grads: Tensor) -> Tensor:
    """The squared norm `[b]` of each image's gradient, from grads `[b ...]`."""
    return grads.flatten(1).to(stats_dtype(grads.dtype)).square().sum(1)


def weighted_sum(factors: Tensor, grads: Tensor) -> Tensor:
    """The sum of grads `[b ...]` over the images, each times its factor, which is wider."""
    total: Tensor = torch.tensordot(factors, grads.to(factors.dtype), 1)
    return total.to(grads.dtype)


def _narrowed(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors in a dtype, none rounded up: else a clipped gradient would exceed its bound."""
    narrow = factors.to(dtype)
    if dtype.itemsize > 2:
        return narrow
    below = (narrow.view(torch.int16) - 1).view(dtype)  # the number before it: factors are positive
    return torch.where(narrow > factors, below, narrow)


class Pass:
    """One pass forward and back, without derivatives by weights, and what it told each leaf.

    Without `sums` only the norms are kept.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        params: Params,
        x: Tensor,
        y: Tensor,
        randomness: str,
        *,
        sums: bool,
    ) -> None:
        params, x = tree.map(Tensor.detach, (params, x))
        do = Listening(x, sums=sums)
        with torch.enable_grad():
            run = run_network(params, x, do)
            seen, logits = run.seen, params.weights.head.run(run.y, do)
            cut = logits.detach().requires_grad_()
            total = vmap(loss_fn, randomness=randomness)(cut, y).sum()
        self.loss_reaches_further = reaches_further(total, [cut])
        del run
        if total.requires_grad:
            (cotangent,) = torch.autograd.grad(total, cut, materialize_grads=True)
            torch.autograd.grad(logits, do.root, cotangent)
        do.root = x  # else its hook would keep itself, and the first activations, alive
        self._weights, self._told = params.weights, Weights(*seen, do.told_head)
        self.norms = torch.stack(do.squares).sum(0).sqrt()

    def sum(self, factors: Tensor) -> Weights:
        """The sum of the images' gradients, each times its factor."""
        return tree.map(lambda leaf, told: told.sum(leaf, factors), self._weights, self._told)


class _Told:
    """What a leaf is told on the way back, which is how to sum the images' gradients."""

    def __init__(self) -> None:
        self.weighted: Callable[[Tensor], Tensor] | None = None

    def sum(self, leaf: Tensor, factors: Tensor) -> Tensor:
        """The weighted sum of gradients by this leaf, or zeros if none came. Call it only once."""
        if self.weighted is None:
            return torch.zeros_like(leaf)
        weighted, self.weighted = self.weighted, None  # so activations are freed one by one
        return weighted(factors).to(leaf.dtype)


class Listening(Composed):
    """Inference in which each layer is told its cotangent on the way back.

    From the cotangent and its input the layer computes each image's squared norm. It leaves behind
    a `_Told` for each of its leaves, which then knows how to sum the gradients.
    """

    def __init__(self, x: Tensor, *, sums: bool) -> None:
        super().__init__(inference_norm)
        self.root, self._sums = x, sums
        self.squares = [x.new_zeros(len(x), dtype=stats_dtype(x.dtype))]
        self.told_head: Any = NoHead()

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Layer]:
        conv, norm = at.unit
        told = _Told()

        def tell(cotangent: Tensor, x: Tensor) -> None:
            def weighted(factors: Tensor) -> Tensor:
                scaled = cotangent * _narrowed(factors, x.dtype)[:, None, None, None]
                return weight_gradient(scaled, x, conv, how)

            self._tell(told, squared_norms(cotangent[:, None], x[:, None], conv, how), weighted)

        y, norm_told = self._norm(norm, at.beside, self._watch(ops.conv2d(x, conv, how), x, tell))
        y = y if add is None else ops.add(y, add)
        return (ops.relu(y) if relu else y), Layer(told, norm_told)  # type: ignore[arg-type]

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Normed]:
        y, told = self._norm(at.unit.norm, at.beside, x)
        return ops.relu(y), Normed(told)

    def head(self, at: Head, x: Tensor) -> Tensor:
        self.told_head = Head(_Told(), _Told())  # type: ignore[arg-type]

        def tell(cotangent: Tensor, x: Tensor) -> None:
            squares = squares_of(cotangent)
            self._tell(self.told_head.bias, squares, partial(weighted_sum, grads=cotangent))
            self._tell(
                self.told_head.weight,
                squares * squares_of(x),
                lambda factors: (cotangent * factors[:, None]).mT @ x.to(factors.dtype),
            )

        return self._watch(ops.linear(x, *at), x, tell)

    def _norm(
        self, norm: AnyNorm, stats: NormStats | tuple[()], x: Tensor
    ) -> tuple[Tensor, AnyNorm]:
        """y, and the norm with a `_Told` in place of each leaf."""
        told: Any = type(norm)(*(_Told() for _ in norm))  # type: ignore[arg-type]

        def tell(cotangent: Tensor, x: Tensor) -> None:
            cotangent = cotangent.to(stats_dtype(cotangent.dtype))
            bias = cotangent.sum((2, 3))
            grads = [bias]
            if not isinstance(norm, Bias | NoNorm):
                if not stats:
                    unscaled = (torch.ones_like(norm.scale), torch.zeros_like(norm.bias))
                    x = norm_without_statistics(type(norm)(*unscaled), x)
                scale = (cotangent * x).sum((2, 3))
                if stats:
                    scale = (scale - bias * stats.mean) * torch.rsqrt(stats.var + EPS)
                grads = [scale, bias]
            for leaf, place, each in zip(norm, told, grads, strict=True):
                each = each.unflatten(1, leaf.shape)
                self._tell(place, squares_of(each), partial(weighted_sum, grads=each))

        if isinstance(norm, NoNorm):  # the root must not be written over
            return (x.clone() if x is self.root else x), told
        if isinstance(norm, Bias):  # `inference_norm` would write its sum over the root
            check_width(norm, x)
            return self._watch(x + norm.bias[:, None, None], x, tell), told
        y, _ = inference_norm(norm, stats, x)
        return self._watch(y, x, tell), told

    def _watch(self, y: Tensor, x: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        """y; on the way back `tell` is called with the cotangent of y, and with x."""
        if not y.requires_grad:  # y is the first layer's
            self.root = y.requires_grad_()
        held = [x.detach()]  # until `tell` is called
        y.register_hook(lambda cotangent: tell(cotangent, held.pop()))
        return y

    def _tell(self, leaf: _Told, squares: Tensor, weighted: Callable[[Tensor], Tensor]) -> None:
        self.squares.append(squares.to(self.squares[0].dtype))
        if self._sums:
            leaf.weighted = weighted
