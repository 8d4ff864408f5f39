"""The same network to run in another way: frozen, folded, dilated, cast, statistics anew."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe, shown
from fresnet.network import moments
from fresnet.network.check import DTYPES, check_call, check_params, stats_dtype
from fresnet.network.init import fresh_stats
from fresnet.network.net import forward_moments
from fresnet.network.nodes import (
    EPS,
    POOLED,
    Bias,
    DilatedStage,
    FrozenNorm,
    Layer,
    NoNorm,
    Norm,
    Normed,
    NormStats,
    Params,
    PooledProjection,
    Projection,
    Rescale,
    StandardisedLayer,
    Stats,
    Unit,
    beside,
    blocks_of,
    replaced,
)
from fresnet.network.norm import WITHOUT_STATISTICS
from fresnet.numbers import as_integer

T = TypeVar("T")


def freeze(params: Params, where: Callable[[tree.Path], bool] = lambda path: True) -> Params:
    """Norms that go by their running statistics in training too: all, or some.

    Their statistics stay as they are; their scale and bias are weights as before, with gradients.
    A state dict does not tell which norms are frozen, a file of `save` does.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> params = fresnet.freeze(params, lambda path: path[:2] != ("stages", 3))
    >>> type(params.weights.stages[0][0].layer1.norm).__name__
    'FrozenNorm'

    Args:
      params: the network.
      where: whether to freeze the norm at this path, such as
        `("stages", 0, 1, "layer2", "norm")`; `tree.matching("stages.[01]")` chooses by name.
    Returns:
      The same network; where frozen, a `FrozenNorm` stands for each `Norm`.
    Raises:
      FresnetError: if params is not a network, or if where chooses none of its norms.
    """
    check_params("freeze", params)
    if not callable(where):
        raise FresnetError(
            "freeze expects where to be a function of paths, such as tree.matching('stem'); "
            f"got {shown(where)}"
        )
    weights = params.weights
    places = tree.unflatten(weights, tree.paths(weights))
    at_units = Stats(*places[:-1])
    paths: list[tree.Path] = []

    def look(unit: Unit, at: Any) -> None:
        if isinstance(unit.norm, Norm | FrozenNorm):
            paths.append(at.norm.scale[:-1])

    beside(look, weights, at_units)
    chosen = {path for path in paths if where(path)}
    if not chosen:
        example = f", such as {paths[0]}" if paths else ""
        raise FresnetError(
            f"freeze expects where to choose a norm; got none of {len(paths)}{example}"
        )

    def frozen(unit: Unit, at: Any) -> Unit:
        """The unit, if the path to its norm is chosen; `at` has paths for leaves."""
        if isinstance(unit.norm, Norm) and at.norm.scale[:-1] in chosen:
            return unit._replace(norm=FrozenNorm(*unit.norm))
        return unit

    return params._replace(weights=replaced(frozen, weights, at_units))


def fold(params: Params) -> Params:
    """The same function with every norm folded into its convolution: for inference.

        weight <- weight * factor,   bias <- bias - mean * factor,
        factor = scale / sqrt(var + eps)

    Differentiable in params. What comes out can be trained like any network, but without norms.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> folded, x = fresnet.fold(params), torch.ones(2, 3, 32, 32)
    >>> torch.allclose(fresnet.forward(folded, x), fresnet.forward(params, x), atol=1e-5)
    True

    Args:
      params: the network; frozen norms are folded like others.
    Returns:
      The network with a `Bias` after each convolution, a `Rescale` for each other norm, and no
      statistics. A norm in groups stays, since its moments are each image's own; a kernel is
      standardised once and for all. Cast to a narrower dtype afterwards, not before: weights are
      rounded once then.
    Raises:
      FresnetError: if params is not a network, or if a norm's channels are not its convolution's.
    Source: Jacob et al. 2017, arXiv:1712.05877, Sec. 3.2.
    """
    check_params("fold", params)
    folded = replaced(_folded, *params)
    return Params(folded, fresh_stats(folded))


def _folded(unit: Unit, stats: Any) -> Unit:
    """A unit without statistics. Every convolution then has a bias, as fused kernels want it."""
    match unit:
        case StandardisedLayer():
            return _folded(Layer(unit.kernel(), unit.norm), stats)
        case Layer(conv, Norm() | FrozenNorm() as norm):
            factor, bias = _affine(norm, stats, conv)
            return Layer((conv * factor[:, None, None, None]).to(conv.dtype), Bias(bias))
        case Layer(conv, NoNorm()):
            return Layer(conv, Bias(torch.zeros_like(conv[:, 0, 0, 0])))
        case Normed(Norm() | FrozenNorm() as norm):
            factor, bias = _affine(norm, stats, norm.scale)
            return Normed(Rescale(factor.to(bias.dtype), bias))
        case Layer(conv, Rescale(scale, bias)):
            return Layer((conv * scale[:, None, None, None]).to(conv.dtype), Bias(bias))
        case Layer() | Normed() if type(unit.norm) in WITHOUT_STATISTICS:
            return unit
    raise FresnetError(f"fold knows no {type(unit).__name__} with {describe(unit.norm)}")


def _affine(norm: Norm | FrozenNorm, stats: NormStats, like: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's factor and bias for each channel, of which `like` has as many."""
    shapes = [leaf.shape for leaf in (*norm, *stats)]
    if any(shape != like.shape[:1] for shape in shapes):
        got = ", ".join(str(tuple(shape)) for shape in shapes)
        raise FresnetError(
            f"fold expects scale, bias, mean and var [{len(like)}] each, beside a weight "
            f"{tuple(like.shape)}; got {got}"
        )
    factor = norm.scale * torch.rsqrt(stats.var + EPS)
    return factor, (norm.bias - stats.mean * factor).to(like.dtype)


def dilate(params: Params, *, output_stride: int) -> Params:
    """The network with finer activations, for segmentation: later stages dilate, not stride.

    Their activations at every second (fourth) place are those of the network as it was, but for
    blocks with attention and norms in groups, which take means over more places.

    >>> import torch, fresnet
    >>> params = fresnet.dilate(fresnet.init(0, fresnet.RESNET18), output_stride=8)
    >>> fresnet.features(params, torch.ones(1, 3, 64, 64))[-1].shape
    torch.Size([1, 512, 8, 8])

    Args:
      params: the network.
      output_stride: pixels from one of the last activations to the next; a ResNet-50's is 32,
        and here 16, 8 or 4.
    Returns:
      The same weights and statistics; the last stages are of the type `DilatedStage`.
    Raises:
      FresnetError: if params is not a network, if it has no such stride, or if a stage pools its
        shortcuts (ResNet-D) or against aliasing, or projects by more than 1x1 (SENet-154), which
        has no dilated form.
    Source: Yu, Koltun & Funkhouser 2017, arXiv:1705.09914, Sec. 2.
    """
    check_params("dilate", params)
    weights = params.weights
    strides = [weights.stem.stride() * 2**i for i in range(len(weights.stages))]
    wanted = as_integer(output_stride)
    if wanted is None or wanted not in strides:
        raise FresnetError(
            f"dilate expects output_stride to be one of {strides}; got {shown(output_stride)}"
        )
    for stage, stride in zip(weights.stages, strides, strict=True):
        shortcut = blocks_of(stage)[0].shortcut
        kinds = type(stage), type(shortcut)
        pooling = [kind.__name__ for kind in kinds if kind in (*POOLED, PooledProjection)]
        if stride > wanted and pooling:
            raise FresnetError(f"dilate expects stages that do not pool; got {pooling[0]}")
        if stride > wanted and isinstance(shortcut, Projection):
            side = shortcut.layer.conv.shape[-1]
            if side > 1:
                raise FresnetError(f"dilate expects projections of 1x1; got {side}x{side}")

    def dilated(stages: tuple[Any, ...]) -> tuple[Any, ...]:
        each = zip(map(blocks_of, stages), strides, strict=True)
        return tuple(DilatedStage(b) if stride > wanted else b for b, stride in each)

    return Params(
        weights._replace(stages=dilated(weights.stages)),
        params.stats._replace(stages=dilated(params.stats.stages)),
    )


def cast(params: Params, dtype: torch.dtype) -> Params:
    """The network with weights in another dtype.

    Statistics get that dtype too, but stay float32 beside weights that are narrower.

    >>> import torch, fresnet
    >>> params = fresnet.cast(fresnet.init(0, fresnet.RESNET18), torch.bfloat16)
    >>> params.weights.stem.layer.norm.scale.dtype, params.stats.stem.layer.mean.dtype
    (torch.bfloat16, torch.float32)

    Args:
      dtype: float16, bfloat16, float32 or float64.
    Raises:
      FresnetError: if params is not a network, or if dtype is none of these.
    """
    check_params("cast", params)
    if dtype not in DTYPES:
        raise FresnetError(f"cast expects dtype to be one of {DTYPES}; got {shown(dtype)}")
    wide = stats_dtype(dtype)
    return Params(
        tree.map(lambda leaf: leaf.to(dtype), params.weights),
        tree.map(lambda leaf: leaf.to(wide), params.stats),
    )


def recalibrate(params: Params, batches: Iterable[Tensor | Sequence[object]]) -> Params:
    """Running statistics anew, from all of these images: for averaged, pruned or cast weights.

    Every batch is normalised by its own moments, as in training; the moments of all are merged,
    so that larger batches weigh more and differences between batches count as variance.

    Args:
      params: the network; its running statistics are not used, but where norms are frozen.
      batches: images, each float `[b c h w]`, or what a loader gives: images and their targets, of
        which only the images are taken. At least one batch; read once, one at a time.
    Returns:
      The network with new statistics (the variance unbiased); frozen norms keep theirs.
    Raises:
      FresnetError: if batches is a tensor or holds none, or as `forward_train` does.
    """
    check_params("recalibrate", params)
    merged = merge_over("recalibrate", batches, partial(_moments, params), moments.merge)
    return params._replace(stats=moments.statistics(params.stats, merged, correction=1))


@torch.no_grad()
def _moments(params: Params, x: Tensor) -> Stats:
    check_call("recalibrate", params, x)
    return forward_moments(params, x)[1]


def merge_over(
    caller: str,
    batches: Iterable[Tensor | Sequence[object]],
    look: Callable[[Tensor], T],
    merge: Callable[[T, T], T],
) -> T:
    """What is seen of all batches, one at a time."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise FresnetError(
            f"{caller} expects an iterable of batches [b c h w] or (x, y), such as [x] or a "
            f"loader; got {describe(batches)}"
        )
    seen = map(look, map(_images, batches))
    first = next(seen, None)
    if first is None:
        raise FresnetError(f"{caller} expects at least one batch; got none")
    return reduce(merge, seen, first)


def _images(batch: Any) -> Any:
    """The images of a batch that a loader gives: what stands first, unless more images follow."""
    if isinstance(batch, tuple | list) and batch:
        first, *rest = batch
        if not any(isinstance(other, Tensor) and other.ndim > 2 for other in rest):
            return first
    return batch
