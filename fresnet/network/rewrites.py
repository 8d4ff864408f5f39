"""The same network to run in another way: norms frozen or folded, statistics anew, dilated."""

from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network import moments
from fresnet.network.check import check_call, check_params
from fresnet.network.init import fresh_stats
from fresnet.network.net import forward_moments
from fresnet.network.nodes import (
    Bias,
    DilatedStage,
    FrozenNorm,
    Norm,
    Params,
    PooledProjection,
    Stats,
    Stem3x3,
    Weights,
    blocks_of,
)
from fresnet.network.norm import EPS

T = TypeVar("T")


def freeze(params: Params, where: Callable[[tree.Path], bool] = lambda path: True) -> Params:
    """Norms that go by their running statistics in training too: all, or some.

    Their statistics stay as they are; their scale and bias are weights as before, with gradients.
    A state dict does not tell which norms are frozen, a file of `save` does.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> params = fresnet.freeze(params, lambda path: path[:2] != ("stages", 3))
    >>> type(params.weights.stages[0][0].norm1).__name__
    'FrozenNorm'

    Args:
      params: the network.
      where: told the way to a norm, such as `("stages", 0, 1, "norm2")`, whether to freeze it.
    Returns:
      The same network; where frozen, a `FrozenNorm` stands for each `Norm`.
    Raises:
      FresnetError: if params is not a network, or if where chooses none of its norms.
    """
    check_params("freeze", params)
    if not callable(where):
        raise FresnetError(f"freeze expects where to be a function of paths; got {describe(where)}")
    paths = [path[:-1] for path in tree.paths(params.weights) if path[-1] == "scale"]
    chosen = {path for path in paths if where(path)}
    if not chosen:
        example = f", such as {paths[0]}" if paths else ""
        raise FresnetError(
            f"freeze expects where to choose a norm; got none of {len(paths)}{example}"
        )
    return params._replace(weights=_freeze(params.weights, (), chosen))


def _freeze(node: Any, path: tree.Path, chosen: set[tree.Path]) -> Any:
    if isinstance(node, Norm):
        return FrozenNorm(*node) if path in chosen else node
    if not isinstance(node, tuple):
        return node
    names = getattr(node, "_fields", range(len(node)))
    return tree.rebuild(
        node,
        (_freeze(child, (*path, name), chosen) for name, child in zip(names, node, strict=True)),
    )


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
      The network with a `Bias` for each norm, and no statistics. Cast to a narrower dtype
      afterwards, not before: weights are rounded once then.
    Raises:
      FresnetError: if params is not a network, or if a norm's channels are not its convolution's.
    Source: Jacob et al. 2017, arXiv:1712.05877, Sec. 3.2.
    """
    check_params("fold", params)
    weights, stats = params
    stages = []
    for stage, stage_stats in zip(weights.stages, stats.stages, strict=True):
        pairs = zip(blocks_of(stage), stage_stats, strict=True)
        blocks = tuple(_fold(block, block_stats) for block, block_stats in pairs)
        stages.append(DilatedStage(blocks) if isinstance(stage, DilatedStage) else blocks)
    stem = _fold(weights.stem, stats.stem)
    folded = Weights(stem, tuple(stages), weights.head)
    return Params(folded, fresh_stats(folded))


def _fold(node: Any, stats: Any) -> Any:
    """A stem, a block or a shortcut without its norms."""
    changed = {}
    for field, child in zip(node._fields, node, strict=True):
        if field == "shortcut":
            changed[field] = _fold(child, stats.shortcut)
        elif isinstance(child, Norm | FrozenNorm):
            conv, (mean, var) = field.replace("norm", "conv"), getattr(stats, field)
            weight = getattr(node, conv)
            shapes = [leaf.shape for leaf in (*child, mean, var)]
            if set(shapes) != {weight.shape[:1]}:
                got = ", ".join(str(tuple(shape)) for shape in shapes)
                raise FresnetError(
                    f"fold expects scale, bias, mean and var [{len(weight)}] each, beside a "
                    f"convolution {tuple(weight.shape)}; got {got}"
                )
            factor = child.scale * torch.rsqrt(var + EPS)
            changed[conv] = (weight * factor[:, None, None, None]).to(weight.dtype)
            changed[field] = Bias((child.bias - mean * factor).to(weight.dtype))
    return node._replace(**changed)


def dilate(params: Params, *, output_stride: int) -> Params:
    """The network with finer activations, for segmentation: later stages dilate, not stride.

    Their activations at every second (fourth) place are those of the network as it was.

    >>> import torch, fresnet
    >>> params = fresnet.dilate(fresnet.init(0, fresnet.RESNET18), output_stride=8)
    >>> fresnet.features(params, torch.ones(1, 3, 64, 64))[-1].shape
    torch.Size([1, 512, 8, 8])

    Args:
      params: the network.
      output_stride: pixels from one of the last activations to the next; a ResNet-50's is 32,
        and here 16, 8 or 4.
    Returns:
      The same weights; the last stages are `DilatedStage`s.
    Raises:
      FresnetError: if params is not a network, if it has no such stride, or if a stage pools its
        shortcuts (ResNet-D), which has no dilated form.
    Source: Yu, Koltun & Funkhouser 2017, arXiv:1705.09914, Sec. 2.
    """
    check_params("dilate", params)
    weights = params.weights
    stem_stride = 1 if isinstance(weights.stem, Stem3x3) else 4
    strides = [stem_stride * 2**i for i in range(len(weights.stages))]
    if type(output_stride) is not int or output_stride not in strides:
        raise FresnetError(
            f"dilate expects output_stride to be one of {strides}; got {output_stride!r}"
        )
    stages = []
    for stage, stride in zip(weights.stages, strides, strict=True):
        blocks = blocks_of(stage)
        dilated = stride > output_stride
        if dilated and isinstance(blocks[0].shortcut, PooledProjection):
            raise FresnetError("dilate expects shortcuts without pooling; got PooledProjection")
        stages.append(DilatedStage(blocks) if dilated else blocks)
    return params._replace(weights=weights._replace(stages=tuple(stages)))


def recalibrate(params: Params, batches: Iterable[Tensor]) -> Params:
    """Running statistics anew, from all of these images: for averaged, pruned or cast weights.

    Every batch is normalised by its own moments, as in training; the moments of all are merged,
    so that larger batches weigh more and differences between batches count as variance.

    Args:
      params: the network; its running statistics are not used, but where norms are frozen.
      batches: images, each float `[b c h w]`, at least one batch; read once, one at a time.
    Returns:
      The network with new statistics (the variance unbiased); frozen norms keep theirs.
    Raises:
      FresnetError: if batches is a tensor or holds none, or as `forward_train` does.
    """
    merged = merge_over("recalibrate", batches, partial(_moments, params), moments.merge)
    return params._replace(stats=moments.statistics(params.stats, merged, correction=1))


@torch.no_grad()
def _moments(params: Params, x: Tensor) -> Stats:
    check_call("recalibrate", params, x)
    return forward_moments(params, x)[1]


def merge_over(
    caller: str,
    batches: Iterable[Tensor],
    look: Callable[[Tensor], T],
    merge: Callable[[T, T], T],
) -> T:
    """What is seen of all batches, one at a time."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise FresnetError(
            f"{caller} expects an iterable of batches [b c h w], such as [x] or "
            f"(x for x, _ in loader); got {describe(batches)}"
        )
    seen = map(look, batches)
    first = next(seen, None)
    if first is None:
        raise FresnetError(f"{caller} expects at least one batch; got none")
    return reduce(merge, seen, first)
