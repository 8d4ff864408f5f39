"""The residual network of He et al. 2015 (arXiv:1512.03385) as pure functions of its parameters.

One body, `_network`, runs stem and stages with the norm handed in. Inference hands in the norm
that uses the running statistics, training the one that uses the batch and returns its moments.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn.functional import relu

from fresnet.check import check_call, check_group, check_momentum
from fresnet.collectives import Group
from fresnet.moments import update
from fresnet.norm import NormFunction, inference_norm, training_norm
from fresnet.ops import add_relu, conv2d, global_average_pool, linear, max_pool
from fresnet.types import (
    BasicBlock,
    BasicBlockStats,
    Block,
    BlockStats,
    Bottleneck,
    BottleneckStats,
    Head,
    Identity,
    Params,
    Projection,
    ProjectionStats,
    Shortcut,
    ShortcutStats,
    Stats,
    Stem7x7,
    Stem7x7Stats,
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
    return _head(params.weights.head, activations[-1])


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
    params: Params, x: Tensor, *, group: Group | None = None
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
    Returns:
      `(logits, moments)`: logits `[b k]`; a tree like `params.stats` with `Moments` for
      `NormStats`, constants with respect to params and x. Eager, a variance is correct to about
      one rounding of itself + eps.
    Raises:
      FresnetError: as `forward_train` does.
    """
    return _forward_moments("forward_moments", params, x, group)


def _forward_moments(
    caller: str, params: Params, x: Tensor, group: Group | None
) -> tuple[Tensor, Stats]:
    check_call(caller, params, x)
    check_group(caller, group)
    activations, moments = _network(params, x, partial(training_norm, group=group))
    return _head(params.weights.head, activations[-1]), moments


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


def _network(params: Params, x: Tensor, norm: NormFunction) -> tuple[tuple[Tensor, ...], Stats]:
    """Stem and stages: their outputs, and a tree of what the norm returned."""
    weights, stats = params
    x, stem_stats = _stem(weights.stem, stats.stem, x, norm)
    activations = [x]
    stages_stats: list[tuple[BlockStats, ...]] = []
    for i, (blocks, blocks_stats) in enumerate(zip(weights.stages, stats.stages, strict=True)):
        stride = 1 if i == 0 else 2
        x, new_stats = _stage(blocks, blocks_stats, x, stride, norm)
        activations.append(x)
        stages_stats.append(new_stats)
    return tuple(activations), Stats(stem_stats, tuple(stages_stats))


def _stage(
    blocks: tuple[Block, ...],
    blocks_stats: tuple[BlockStats, ...],
    x: Tensor,
    stride: int,
    norm: NormFunction,
) -> tuple[Tensor, tuple[BlockStats, ...]]:
    """Blocks of one size in a row; the first strides."""
    stage_stats = []
    for block, block_stats in zip(blocks, blocks_stats, strict=True):
        x, new_stats = RUN_BLOCK[type(block)](block, block_stats, x, stride, norm)
        stage_stats.append(new_stats)
        stride = 1
    return x, tuple(stage_stats)


def _stem(
    w: Stem7x7, s: Stem7x7Stats, x: Tensor, norm: NormFunction
) -> tuple[Tensor, Stem7x7Stats]:
    y, stats = norm(w.norm, s.norm, conv2d(x, w.conv, stride=2))
    return max_pool(relu(y)), Stem7x7Stats(stats)


def _basic_block(
    w: BasicBlock, s: BasicBlockStats, x: Tensor, stride: int, norm: NormFunction
) -> tuple[Tensor, BlockStats]:
    y, norm1 = norm(w.norm1, s.norm1, conv2d(x, w.conv1, stride))
    y, norm2 = norm(w.norm2, s.norm2, conv2d(relu(y), w.conv2))
    x, shortcut = _shortcut(w.shortcut, s.shortcut, x, stride, norm)
    return add_relu(y, x), BasicBlockStats(norm1, norm2, shortcut)


def _bottleneck(
    w: Bottleneck, s: BottleneckStats, x: Tensor, stride: int, norm: NormFunction
) -> tuple[Tensor, BlockStats]:
    y, norm1 = norm(w.norm1, s.norm1, conv2d(x, w.conv1))
    y, norm2 = norm(w.norm2, s.norm2, conv2d(relu(y), w.conv2, stride))
    y, norm3 = norm(w.norm3, s.norm3, conv2d(relu(y), w.conv3))
    x, shortcut = _shortcut(w.shortcut, s.shortcut, x, stride, norm)
    return add_relu(y, x), BottleneckStats(norm1, norm2, norm3, shortcut)


RUN_BLOCK: Mapping[type, Callable[..., tuple[Tensor, BlockStats]]] = {
    BasicBlock: _basic_block,
    Bottleneck: _bottleneck,
}


def _shortcut(
    w: Shortcut, s: ShortcutStats, x: Tensor, stride: int, norm: NormFunction
) -> tuple[Tensor, ShortcutStats]:
    return RUN_SHORTCUT[type(w)](w, s, x, stride, norm)


def _identity(
    w: Identity, s: Identity, x: Tensor, stride: int, norm: NormFunction
) -> tuple[Tensor, ShortcutStats]:
    return x, s


def _projection(
    w: Projection, s: ProjectionStats, x: Tensor, stride: int, norm: NormFunction
) -> tuple[Tensor, ShortcutStats]:
    y, stats = norm(w.norm, s.norm, conv2d(x, w.conv, stride))
    return y, ProjectionStats(stats)


RUN_SHORTCUT: Mapping[type, Callable[..., tuple[Tensor, ShortcutStats]]] = {
    Identity: _identity,
    Projection: _projection,
}


def _head(w: Head, x: Tensor) -> Tensor:
    return linear(global_average_pool(x), w.weight, w.bias)
