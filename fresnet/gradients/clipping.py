"""Norms of per-sample gradients, and their clipped sum, without forming the gradients.

This takes one pass forward, and one pass back through activations alone. On the way back each layer
is told its cotangent. From the cotangent and its input it computes the squared norm of each image's
gradient, and later the sum of the gradients with any weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.gradients.per_sample import LossFunction, apart, check_images, grads_apart
from fresnet.network import ops
from fresnet.network.check import stats_dtype
from fresnet.network.convolution import squared_norms, weight_gradient
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    AnyNorm,
    Bias,
    Geometry,
    Head,
    Layer,
    NoNorm,
    Normed,
    NormStats,
    Pair,
    Params,
    Weights,
)
from fresnet.network.norm import EPS, check_width, inference_norm
from fresnet.network.regimes import Composed
from fresnet.numbers import as_number
from fresnet.pytorch import transform_stack

MEANINGS = ("running", "batch")
"""The meanings of BatchNorm in which a gradient belongs to one image alone."""


def per_sample_norms(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    norms: str = "running",
    randomness: str = "error",
) -> Tensor:
    """The l2 norm of each image's gradient, without forming the gradient.

    The gradients are those of `per_sample_grads`.

    >>> import torch, fresnet
    >>> from torch.nn.functional import cross_entropy
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x, y = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> fresnet.per_sample_norms(cross_entropy, params, x, y).shape
    torch.Size([2])

    Args:
      loss_fn: a function of one image's logits `[k]` and its target, one of y, that returns a 0-d
        tensor.
      params: the network.
      x: images, float `[b c h w]`.
      y: targets, `[b ...]`.
      norms: what BatchNorm is to one image: "running" or "batch", as for `per_sample_grads`.
        "coupled" is refused, because there an image's gradient depends on the whole batch and takes
        a pass of its own.
      randomness: as for `per_sample_grads`.
    Returns:
      The norms `[b]`, never narrower than float32.
    Raises:
      FresnetError: if norms is neither of the two, if x and y differ in length, if the loss is not
        a 0-d tensor, or as `forward_train` does.
    Source: Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015.
    """
    loss_fn = check_images("per_sample_norms", loss_fn, params, x, y, norms, MEANINGS, randomness)
    if not len(x):
        return x.new_zeros(0, dtype=stats_dtype(x.dtype))
    params = apart(params, x, norms)
    taken = _taken(loss_fn, params, x, y, randomness, sums=False)
    if taken is None:
        return _norms(grads_apart(loss_fn, params, x, y, randomness=randomness))
    return taken.norms


def clipped_grads(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    max_norm: float | Tensor,
    norms: str = "running",
    randomness: str = "error",
) -> tuple[Weights, Tensor]:
    """The sum of the images' gradients, each scaled down to the norm `max_norm` if it is longer.

        sum_i g_i min(1, max_norm / |g_i|)

    Differentially private training adds noise to this sum, on the scale of `max_norm` (Abadi et al.
    2016, arXiv:1607.00133, Alg. 1).

    >>> import torch, fresnet
    >>> from torch.nn.functional import cross_entropy
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x, y = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> grads, norms = fresnet.clipped_grads(cross_entropy, params, x, y, max_norm=1.0)
    >>> grads.head.bias.shape, norms.shape
    (torch.Size([10]), torch.Size([2]))

    Args:
      loss_fn, params, x, y, norms, randomness: as for `per_sample_norms`. A batch without images,
        as Poisson sampling draws now and then, has a gradient of zeros.
      max_norm: a number above 0, or a 0-d float tensor.
    Returns:
      `(grads, norms)`: a tree like `params.weights`; each image's norm before clipping, `[b]`.
    Raises:
      FresnetError: if max_norm is neither, or as `per_sample_norms` does.
    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    max_norm = _checked_max_norm(max_norm)
    loss_fn = check_images("clipped_grads", loss_fn, params, x, y, norms, MEANINGS, randomness)
    if not len(x):
        zeros: Weights = tree.map(torch.zeros_like, params.weights)
        return zeros, x.new_zeros(0, dtype=stats_dtype(x.dtype))
    params = apart(params, x, norms)
    taken = _taken(loss_fn, params, x, y, randomness, sums=True)
    if taken is None:
        grads = grads_apart(loss_fn, params, x, y, randomness=randomness)
        found = _norms(grads)
        with torch.autocast(x.device.type, enabled=False):
            return tree.map(partial(_weighted, _factors(found, max_norm)), grads), found
    return taken.sum(_factors(taken.norms, max_norm)), taken.norms


def _checked_max_norm(max_norm: float | Tensor) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        if max_norm.ndim == 0 and max_norm.is_floating_point():
            return max_norm
    else:
        number = as_number(max_norm)
        if number is not None and number > 0:
            return number
    got = describe(max_norm) if isinstance(max_norm, Tensor) else repr(max_norm)
    raise FresnetError(
        f"clipped_grads expects max_norm to be a number above 0 or a 0-d float tensor; got {got}"
    )


def _taken(
    loss_fn: LossFunction, params: Params, x: Tensor, y: Tensor, randomness: str, *, sums: bool
) -> "_Pass | None":
    """The pass, or None where the gradients themselves have to be formed.

    A compiler, an outer transform or autograd could not follow the pass, in inference mode there is
    no pass back, and autocast would round its products. Nor does it know tensors of a loss's own.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or transform_stack.differentiated(*tree.leaves((params, x, y)))
    ):
        return None
    taken = _Pass(loss_fn, params, x, y, randomness, sums=sums)
    return None if torch.is_grad_enabled() and taken.loss_reaches_further else taken


def _norms(grads: Weights) -> Tensor:
    return torch.stack([_squares(leaf) for leaf in tree.leaves(grads)]).sum(0).sqrt()


def _squares(grads: Tensor) -> Tensor:
    """The squared norm `[b]` of each image's gradient, from grads `[b ...]`."""
    return grads.flatten(1).to(stats_dtype(grads.dtype)).square().sum(1)


def _factors(norms: Tensor, max_norm: float | Tensor) -> Tensor:
    return (max_norm / norms).clamp(max=1)


def _weighted(factors: Tensor, grads: Tensor) -> Tensor:
    """The sum of grads `[b ...]` over the images, each times its factor."""
    total: Tensor = torch.tensordot(factors.to(grads.dtype), grads, 1)
    return total


class _Pass:
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
        do = _Listening(x, sums=sums)
        with torch.enable_grad():
            run = run_network(params, x, do)
            seen, logits = run.seen, do.head(params.weights.head, run.y)
            cut = logits.detach().requires_grad_()
            total = vmap(loss_fn, randomness=randomness)(cut, y).sum()
        self.loss_reaches_further = _reaches_further(total, cut)
        del run
        if total.requires_grad:
            (cotangent,) = torch.autograd.grad(total, cut, materialize_grads=True)
            torch.autograd.grad(logits, do.root, cotangent)
        self._weights, self._told = params.weights, Weights(*seen, do.told_head)
        self.norms = torch.stack(do.squares).sum(0).sqrt()

    def sum(self, factors: Tensor) -> Weights:
        """The sum of the images' gradients, each times its factor."""
        return tree.map(lambda leaf, told: told.sum(leaf, factors), self._weights, self._told)


def _reaches_further(total: Tensor, cut: Tensor) -> bool:
    """Whether a value depends on a leaf that wants a gradient, other than `cut`."""
    waiting, seen = [total.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if getattr(node, "variable", cut) is not cut:
                return True
            waiting += [following for following, _ in node.next_functions]
    return False


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


class _Listening(Composed):
    """Inference in which each layer is told its cotangent on the way back.

    From the cotangent and its input the layer computes each image's squared norm. It leaves behind
    a `_Told` for each of its leaves, which then knows how to sum the gradients.
    """

    def __init__(self, x: Tensor, *, sums: bool) -> None:
        super().__init__(inference_norm)
        self.root, self._sums = x, sums
        self.squares = [x.new_zeros(len(x), dtype=stats_dtype(x.dtype))]
        self.told_head: Any = Head(_Told(), _Told())  # type: ignore[arg-type]

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
                scaled = cotangent * factors.to(x.dtype)[:, None, None, None]
                return weight_gradient(scaled, x, conv, how)

            self._tell(told, squared_norms(cotangent[:, None], x[:, None], conv, how), weighted)

        y, norm_told = self._norm(norm, at.beside, self._watch(ops.conv2d(x, conv, how), x, tell))
        y = y if add is None else ops.add(y, add)
        return (ops.relu(y) if relu else y), Layer(told, norm_told)  # type: ignore[arg-type]

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Normed]:
        y, told = self._norm(at.unit.norm, at.beside, x)
        return ops.relu(y), Normed(told)

    def head(self, at: Head, x: Tensor) -> Tensor:
        x = ops.global_average_pool(x)

        def tell(cotangent: Tensor, x: Tensor) -> None:
            squares = _squares(cotangent)
            self._tell(self.told_head.bias, squares, partial(_weighted, grads=cotangent))
            self._tell(
                self.told_head.weight,
                squares * _squares(x),
                lambda factors: (cotangent * factors.to(x.dtype)[:, None]).mT @ x,
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
            if not isinstance(norm, Bias):
                scale = (cotangent * x).sum((2, 3))
                if stats:
                    scale = (scale - bias * stats.mean) * torch.rsqrt(stats.var + EPS)
                grads = [scale, bias]
            for leaf, each in zip(told, grads, strict=True):
                self._tell(leaf, _squares(each), partial(_weighted, grads=each))

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
