"""The residual network of He et al. 2015 (arXiv:1512.03385) as pure functions of its parameters.

A layer is a convolution, a norm, the sum with a shortcut where one ends, and ReLU. One body,
`run_network`, says how stem and stages are made of layers, with the layer handed in: inference's
uses the running statistics, training's uses the batch and returns its moments.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from fresnet.network.check import check_call, check_group, check_momentum
from fresnet.network.moments import update
from fresnet.network.nodes import (
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
from fresnet.network.norm import NormFunction, inference_norm, training_norm
from fresnet.network.ops import (
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
from fresnet.network.recompute import recomputed
from fresnet.pytorch.collectives import Group


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
    activations, _ = run_network(params, x, inference_layer)
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
    _check("forward_train", params, x, group)
    logits, moments = run_training(params, x, group=group)
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
    _check("forward_moments", params, x, group)
    return run_training(params, x, group=group, recompute=recompute)


def _check(caller: str, params: Params, x: Tensor, group: Group | None) -> None:
    check_call(caller, params, x)
    check_group(caller, group)


def run_training(
    params: Params,
    x: Tensor,
    *,
    group: Group | None = None,
    recompute: bool = False,
    once: bool = False,
) -> tuple[Tensor, Stats]:
    """As `forward_moments`, of what has been checked; in x's dtype, whatever the weights'.

    Once: `torch.autograd` differentiates it at most once.
    """

    def convolve(x: Tensor, conv: Tensor, **options: int) -> Tensor:
        # Rounded here, not all in advance: so each gradient is widened as soon as it is there.
        return conv2d(x, conv.to(x.dtype), **options)

    layer = partial(compose, convolve, partial(training_norm, group=group, once=once))
    activations, moments = run_network(params, x, layer, recompute=recompute)
    head = Head(*(leaf.to(x.dtype) for leaf in params.weights.head))
    return run_head(head, activations[-1]), moments


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
    activations, _ = run_network(params, x, inference_layer)
    return activations


def compose(
    convolve: Callable[..., Tensor],
    normalise: NormFunction,
    conv: Tensor,
    norm: Any,
    stats: Any,
    x: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    shortcut: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Any]:
    """relu(norm(conv(x)) + shortcut), and what the norm returned beside it."""
    y = convolve(x, conv, stride=stride, dilation=dilation, groups=groups)
    y, seen = normalise(norm, stats, y)
    y = y if shortcut is None else add(y, shortcut)
    return relu(y) if activation else y, seen


Layer: TypeAlias = Callable[..., tuple[Tensor, Any]]
"""As `compose` once convolution and norm are given."""

inference_layer: Layer = partial(compose, conv2d, inference_norm)


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


def run_network(
    params: Params,
    x: Tensor,
    layer: Layer,
    *,
    pool: Callable[[Tensor], Tensor] = max_pool,
    recompute: bool = False,
) -> tuple[tuple[Tensor, ...], Stats]:
    """Stem and stages: their outputs, and a tree of what the layers returned."""
    weights, stats = params
    x, stem_stats = run_stem(weights.stem, stats.stem, x, layer, pool)
    activations, stages_stats = [x], []
    for blocks, blocks_stats in zip(plan(weights), stats.stages, strict=True):
        stage_stats = []
        for (block, grid), block_stats in zip(blocks, blocks_stats, strict=True):
            run_block = partial(RUN_BLOCK[type(block)], grid=grid, layer=layer)
            run_block = partial(recomputed, run_block) if recompute else run_block
            x, new_stats = run_block(block, block_stats, x)
            stage_stats.append(new_stats)
        activations.append(x)
        stages_stats.append(tuple(stage_stats))
    return tuple(activations), Stats(stem_stats, tuple(stages_stats))


def run_stem(
    w: Stem, s: Any, x: Tensor, layer: Layer, pool: Callable[[Tensor], Tensor] = max_pool
) -> tuple[Tensor, StemStats]:
    match w:
        case Stem7x7():
            y, stats = layer(w.conv, w.norm, s.norm, x, stride=2)
            return pool(y), Stem7x7Stats(stats)
        case Stem3x3():
            y, stats = layer(w.conv, w.norm, s.norm, x)
            return y, Stem3x3Stats(stats)
        case DeepStem():
            y, norm1 = layer(w.conv1, w.norm1, s.norm1, x, stride=2)
            y, norm2 = layer(w.conv2, w.norm2, s.norm2, y)
            y, norm3 = layer(w.conv3, w.norm3, s.norm3, y)
            return pool(y), DeepStemStats(norm1, norm2, norm3)


def _basic_block(
    w: BasicBlock, s: BasicBlockStats, x: Tensor, grid: Grid, layer: Layer
) -> tuple[Tensor, BlockStats]:
    stride, before, after = grid
    y, norm1 = layer(w.conv1, w.norm1, s.norm1, x, stride=stride, dilation=before)
    added, shortcut = _shortcut(w.shortcut, s.shortcut, x, w.conv2, stride, layer)
    y, norm2 = layer(w.conv2, w.norm2, s.norm2, y, dilation=after, shortcut=added)
    return y, BasicBlockStats(norm1, norm2, shortcut)


def _bottleneck(
    w: Bottleneck, s: BottleneckStats, x: Tensor, grid: Grid, layer: Layer
) -> tuple[Tensor, BlockStats]:
    stride, before, _ = grid
    y, norm1 = layer(w.conv1, w.norm1, s.norm1, x)
    y, norm2 = layer(
        w.conv2, w.norm2, s.norm2, y, stride=stride, dilation=before, groups=_groups(w)
    )
    added, shortcut = _shortcut(w.shortcut, s.shortcut, x, w.conv3, stride, layer)
    y, norm3 = layer(w.conv3, w.norm3, s.norm3, y, shortcut=added)
    return y, BottleneckStats(norm1, norm2, norm3, shortcut)


def _bottleneck_v1(
    w: BottleneckV1, s: BottleneckStats, x: Tensor, grid: Grid, layer: Layer
) -> tuple[Tensor, BlockStats]:
    stride, _, after = grid
    y, norm1 = layer(w.conv1, w.norm1, s.norm1, x, stride=stride)
    y, norm2 = layer(w.conv2, w.norm2, s.norm2, y, dilation=after, groups=_groups(w))
    added, shortcut = _shortcut(w.shortcut, s.shortcut, x, w.conv3, stride, layer)
    y, norm3 = layer(w.conv3, w.norm3, s.norm3, y, shortcut=added)
    return y, BottleneckStats(norm1, norm2, norm3, shortcut)


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
    w: Shortcut, s: Any, x: Tensor, last: Tensor, stride: int, layer: Layer
) -> tuple[Tensor | None, ShortcutStats]:
    """What is added to the output of the block's last convolution."""
    match w:
        case Identity():
            return x, s
        case Projection():
            x, stats = layer(w.conv, w.norm, s.norm, x, stride=stride, activation=False)
            return x, ProjectionStats(stats)
        case PooledProjection():
            x = average_pool(x) if stride == 2 else x
            x, stats = layer(w.conv, w.norm, s.norm, x, activation=False)
            return x, ProjectionStats(stats)
        case ZeroPad():
            return zero_pad(subsample(x, stride), channels=last.shape[0]), s
        case NoShortcut():
            return None, s


def run_head(w: Head, x: Tensor) -> Tensor:
    return linear(global_average_pool(x), w.weight, w.bias)
