"""The residual network of He et al. 2015 (arXiv:1512.03385) as pure functions of its parameters.

One body, `_network`, runs stem and stages with the norm handed in. Inference hands in the norm
that uses the running statistics, training the one that uses the batch and returns its moments.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from fresnet.check import check_call, check_group, check_momentum
from fresnet.collectives import Group
from fresnet.moments import update
from fresnet.norm import NormFunction, inference_norm, training_norm
from fresnet.ops import (
    add,
    average_pool,
    conv2d,
    global_average_pool,
    linear,
    max_pool,
    relu,
    subsample,
    zero_pad,
)
from fresnet.recompute import recomputed
from fresnet.types import (
    BasicBlock,
    BasicBlockStats,
    Block,
    BlockStats,
    Bottleneck,
    BottleneckStats,
    BottleneckV1,
    DeepStem,
    DeepStemStats,
    DilatedStage,
    Head,
    Identity,
    NoShortcut,
    Params,
    PooledProjection,
    Projection,
    ProjectionStats,
    Shortcut,
    ShortcutStats,
    Stats,
    Stem,
    Stem3x3,
    Stem3x3Stats,
    Stem7x7,
    Stem7x7Stats,
    StemStats,
    Weights,
    ZeroPad,
    blocks_of,
)


def forward(params: Params, x: Tensor) -> Tensor:
    """Classify a batch of images by the running statistics: inference.

    Each image's logits are a function of that image alone.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> fresnet.forward(params, torch.ones(2, 3, 32, 48)).shape
    torch.Size([2, 10])

    Args:
      params: the network.
      x: images, float `[b c h w]`, in the dtype of the weights; normalised as in training.
    Returns:
      logits `[b k]`.
    Raises:
      FresnetError: if the tree or the images are not what a network takes.
    """
    check_call("forward", params, x)
    activations, _ = _network(params, x, inference_norm)
    return run_head(params.weights.head, activations[-1])


def forward_train(
    params: Params, x: Tensor, *, momentum: float | Tensor = 0.1, group: Group | None = None
) -> tuple[Tensor, Stats]:
    """Classify a batch of images by the statistics of the batch itself: training.

    The logits do not depend on `params.stats`, but for those of frozen norms. The returned
    statistics are constants with respect to params and x, so a loss may carry them as an auxiliary
    output.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> logits, stats = fresnet.forward_train(params, torch.ones(2, 3, 32, 48))
    >>> params = params._replace(stats=stats)

    Args:
      params: the network.
      x: images, float `[b c h w]`, in the dtype of the weights.
      momentum: the weight of the batch's moments in the new running statistics
        (PyTorch's sense; 0.1 here is 0.9 in Flax): a number from 0 to 1 or a 0-d float tensor.
      group: the processes of `torch.distributed` whose batches are normalised as one; by default
        each process normalises its own.
    Returns:
      `(logits, stats)`: logits `[b k]`; the new running statistics.
    Raises:
      FresnetError: if the tree, the images, the momentum or the group are not what a network
        takes, or if some norm would see one value per channel.
    """
    check_momentum("forward_train", momentum)
    logits, moments = _forward_moments("forward_train", params, x, group)
    return logits, update(params.stats, moments, momentum=momentum)


def forward_moments(
    params: Params, x: Tensor, *, group: Group | None = None, recompute: bool = False
) -> tuple[Tensor, Stats]:
    """Classify a batch as `forward_train` does, and return what its norms saw.

    Moments of several batches are merged by `fresnet.moments.merge`, and become running statistics
    by `fresnet.moments.update`.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> logits, moments = fresnet.forward_moments(params, torch.ones(2, 3, 32, 48))
    >>> moments.stem.norm.n                     # 2 images of 16x24 activations
    tensor(768.)

    Args:
      params: the network.
      x: images, float `[b c h w]`, in the dtype of the weights.
      group: as for `forward_train`.
      recompute: keep no activations within a block but compute them again for the gradient:
        half of what is allocated, for one more pass forward. The moments are those of the first.
    Returns:
      `(logits, moments)`: logits `[b k]`; a tree like `params.stats` with `Moments` for
      `NormStats`, constants with respect to params and x. Eager, a variance is correct to about
      one rounding of itself + eps.
    Raises:
      FresnetError: as `forward_train` does.
    """
    return _forward_moments("forward_moments", params, x, group, recompute)


def _forward_moments(
    caller: str, params: Params, x: Tensor, group: Group | None, recompute: bool = False
) -> tuple[Tensor, Stats]:
    check_call(caller, params, x)
    check_group(caller, group)
    norm = partial(training_norm, group=group)
    activations, moments = _network(params, x, norm, recompute=recompute)
    return run_head(params.weights.head, activations[-1]), moments


def features(params: Params, x: Tensor) -> tuple[Tensor, ...]:
    """The activations of stem and stages by the running statistics, for detection and the like.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET50)
    >>> for activation in fresnet.features(params, torch.ones(1, 3, 64, 96)):
    ...     print(tuple(activation.shape))
    (1, 64, 16, 24)
    (1, 256, 16, 24)
    (1, 512, 8, 12)
    (1, 1024, 4, 6)
    (1, 2048, 2, 3)

    Args:
      params: the network.
      x: images, float `[b c h w]`, in the dtype of the weights.
    Returns:
      The output of the stem (pooled, as the first stage takes it), then of each stage.
    Raises:
      FresnetError: if the tree or the images are not what a network takes.
    """
    check_call("features", params, x)
    activations, _ = _network(params, x, inference_norm)
    return activations


class Grid(NamedTuple):
    """How a block reads activations: its stride, and the dilation before and after the stride."""

    stride: int
    dilation: int
    dilation_after: int


def plan(weights: Weights) -> list[list[tuple[Block, Grid]]]:
    """Each stage's blocks with their grids: from the second stage on, the first block strides."""
    stages, stride, dilation = [], 1, 1
    for stage in weights.stages:
        if isinstance(stage, DilatedStage):
            first = Grid(1, dilation, dilation * stride)
        else:
            first = Grid(stride, dilation, dilation)
        stride, dilation = 2, first.dilation_after
        blocks = blocks_of(stage)
        grids = [first] + [Grid(1, dilation, dilation)] * (len(blocks) - 1)
        stages.append(list(zip(blocks, grids, strict=True)))
    return stages


def _network(
    params: Params, x: Tensor, norm: NormFunction, *, recompute: bool = False
) -> tuple[tuple[Tensor, ...], Stats]:
    """Stem and stages: their outputs, and a tree of what the norm returned."""
    weights, stats = params
    x, stem_stats = run_stem(weights.stem, stats.stem, x, norm)
    activations, stages_stats = [x], []
    for blocks, blocks_stats in zip(plan(weights), stats.stages, strict=True):
        stage_stats = []
        for (block, grid), block_stats in zip(blocks, blocks_stats, strict=True):
            run = partial(RUN_BLOCK[type(block)], grid=grid, norm=norm)
            run = partial(recomputed, run) if recompute else run
            x, new_stats = run(block, block_stats, x)
            stage_stats.append(new_stats)
        activations.append(x)
        stages_stats.append(tuple(stage_stats))
    return tuple(activations), Stats(stem_stats, tuple(stages_stats))


def run_stem(w: Stem, s: Any, x: Tensor, norm: NormFunction) -> tuple[Tensor, StemStats]:
    match w:
        case Stem7x7():
            y, stats = norm(w.norm, s.norm, conv2d(x, w.conv, stride=2))
            return max_pool(relu(y)), Stem7x7Stats(stats)
        case Stem3x3():
            y, stats = norm(w.norm, s.norm, conv2d(x, w.conv))
            return relu(y), Stem3x3Stats(stats)
        case DeepStem():
            y, norm1 = norm(w.norm1, s.norm1, conv2d(x, w.conv1, stride=2))
            y, norm2 = norm(w.norm2, s.norm2, conv2d(relu(y), w.conv2))
            y, norm3 = norm(w.norm3, s.norm3, conv2d(relu(y), w.conv3))
            return max_pool(relu(y)), DeepStemStats(norm1, norm2, norm3)


def _basic_block(
    w: BasicBlock, s: BasicBlockStats, x: Tensor, grid: Grid, norm: NormFunction
) -> tuple[Tensor, BlockStats]:
    y = conv2d(x, w.conv1, stride=grid.stride, dilation=grid.dilation)
    y, norm1 = norm(w.norm1, s.norm1, y)
    y = conv2d(relu(y), w.conv2, dilation=grid.dilation_after)
    y, norm2 = norm(w.norm2, s.norm2, y)
    y, shortcut = _shortcut(w.shortcut, s.shortcut, x, y, grid.stride, norm)
    return relu(y), BasicBlockStats(norm1, norm2, shortcut)


def _bottleneck(
    w: Bottleneck, s: BottleneckStats, x: Tensor, grid: Grid, norm: NormFunction
) -> tuple[Tensor, BlockStats]:
    y, norm1 = norm(w.norm1, s.norm1, conv2d(x, w.conv1))
    groups = _groups(w)
    y = conv2d(relu(y), w.conv2, stride=grid.stride, dilation=grid.dilation, groups=groups)
    y, norm2 = norm(w.norm2, s.norm2, y)
    y, norm3 = norm(w.norm3, s.norm3, conv2d(relu(y), w.conv3))
    y, shortcut = _shortcut(w.shortcut, s.shortcut, x, y, grid.stride, norm)
    return relu(y), BottleneckStats(norm1, norm2, norm3, shortcut)


def _bottleneck_v1(
    w: BottleneckV1, s: BottleneckStats, x: Tensor, grid: Grid, norm: NormFunction
) -> tuple[Tensor, BlockStats]:
    y, norm1 = norm(w.norm1, s.norm1, conv2d(x, w.conv1, stride=grid.stride))
    y = conv2d(relu(y), w.conv2, dilation=grid.dilation_after, groups=_groups(w))
    y, norm2 = norm(w.norm2, s.norm2, y)
    y, norm3 = norm(w.norm3, s.norm3, conv2d(relu(y), w.conv3))
    y, shortcut = _shortcut(w.shortcut, s.shortcut, x, y, grid.stride, norm)
    return relu(y), BottleneckStats(norm1, norm2, norm3, shortcut)


def _groups(w: Bottleneck | BottleneckV1) -> int:
    """Of the 3x3: as its weight has so much fewer input channels than there are activations."""
    channels = w.conv2.shape[1] if w.conv2.ndim == 4 else 0
    return w.conv1.shape[0] // channels if channels else 1  # what does not fit, conv2d refuses


RUN_BLOCK: Mapping[type, Callable[..., tuple[Tensor, BlockStats]]] = {
    BasicBlock: _basic_block,
    Bottleneck: _bottleneck,
    BottleneckV1: _bottleneck_v1,
}


def _shortcut(
    w: Shortcut, s: Any, x: Tensor, y: Tensor, stride: int, norm: NormFunction
) -> tuple[Tensor, ShortcutStats]:
    """y, and x added to it by way of the shortcut."""
    match w:
        case Identity():
            return add(y, x), s
        case Projection():
            x, stats = norm(w.norm, s.norm, conv2d(x, w.conv, stride=stride))
            return add(y, x), ProjectionStats(stats)
        case PooledProjection():
            x = average_pool(x) if stride == 2 else x
            x, stats = norm(w.norm, s.norm, conv2d(x, w.conv))
            return add(y, x), ProjectionStats(stats)
        case ZeroPad():
            return add(y, zero_pad(subsample(x, stride), channels=y.shape[1])), s
        case NoShortcut():
            return y, s


def run_head(w: Head, x: Tensor) -> Tensor:
    return linear(global_average_pool(x), w.weight, w.bias)
