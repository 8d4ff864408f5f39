"""The residual network of He et al. 2015 (arXiv:1512.03385) as pure functions of its parameters.

The nodes of the tree say what follows what (`fresnet.nodes`), and a regime says how it is computed:
inference goes by the running statistics, training by the batch, whose moments it returns.
"""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from fresnet import tree
from fresnet.network.check import check_call, check_features, check_params
from fresnet.network.moments import update
from fresnet.network.nodes import (
    Block,
    Grid,
    Params,
    Regime,
    Stats,
    blocks_of,
    grids,
    paired,
    with_blocks,
)
from fresnet.network.options import check_group, check_momentum
from fresnet.network.recompute import recomputed
from fresnet.network.regimes import INFERENCE, TRAINING, training
from fresnet.pytorch.collectives import Group


def forward(params: Params, x: Tensor) -> Tensor:
    """Classify a batch of images by the running statistics: inference.

    Each image's logits are a function of that image alone. A network without a head, of which the
    tree has a `NoHead`, returns features, as `embed` does.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> fresnet.forward(params, torch.ones(2, 3, 32, 48)).shape
    torch.Size([2, 10])

    Args:
      params: the network.
      x: images, float `[b c h w]`, in the dtype of the weights; normalised as in training.
    Returns:
      logits `[b k]`; without a head, features `[b c]`.
    Raises:
      FresnetError: if the tree or the images are not what a network takes.
    """
    check_call("forward", params, x)
    logits: Tensor = params.weights.head.run(run_network(params, x, INFERENCE).y, INFERENCE)
    return logits


def embed(params: Params, x: Tensor) -> Tensor:
    """What a head sees of each image, by the running statistics: features for other tasks.

    They are the means of the last maps; in ResNet V2, of those behind the last norm and ReLU. This
    is `forward` of the network without its head, so `compile_inference` and `export` of that
    network are `embed` too:

    >>> import torch, fresnet
    >>> params, x = fresnet.init(0, fresnet.RESNET18), torch.ones(2, 3, 32, 48)
    >>> encoder = params._replace(weights=params.weights._replace(head=fresnet.nodes.NoHead()))
    >>> torch.equal(fresnet.embed(params, x), fresnet.forward(encoder, x))
    True

    Args:
      params: the network, with a head or without.
      x: images, float `[b c h w]`, in the dtype of the weights.
    Returns:
      features `[b c]`, with the channels of the last stage.
    Raises:
      FresnetError: if the tree or the images are not what a network takes.
    """
    check_call("embed", params, x)
    return INFERENCE.mean(run_network(params, x, INFERENCE).y)


def forward_head(params: Params, x: Tensor) -> Tensor:
    """Classify the activations of the last stage by the running statistics: the end of `forward`.

    So logits can be differentiated by what `features` returns, as class activation maps need it.

    >>> import torch, fresnet
    >>> params, x = fresnet.init(0, fresnet.RESNET18, num_classes=10), torch.ones(2, 3, 32, 48)
    >>> *_, last = fresnet.features(params, x)
    >>> torch.equal(fresnet.forward_head(params, last), fresnet.forward(params, x))
    True

    Args:
      params: the network.
      x: activations, float `[b c h w]`, the last of `features`.
    Returns:
      As `forward`: logits `[b k]`; without a head, features `[b c]`.
    Raises:
      FresnetError: if params is not a network, or if x is not what its last stage puts out.
    """
    check_params("forward_head", params, masks=True)
    check_features("forward_head", params, x)
    at = paired(*params)
    y, _ = at.last.run(x, INFERENCE)
    logits: Tensor = params.weights.head.run(y, INFERENCE)
    return logits


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
      `(logits, stats)`: logits `[b k]`, or features `[b c]` without a head; the new running
      statistics.
    Raises:
      FresnetError: if the tree, the images, the momentum or the group are not what a network
        takes, or if some norm would see one value per channel.
    """
    run, stats = _trained("forward_train", params, x, momentum, group)
    return params.weights.head.run(run.y, TRAINING), stats


def forward_moments(
    params: Params, x: Tensor, *, group: Group | None = None, recompute: bool = False
) -> tuple[Tensor, Stats]:
    """Classify a batch as `forward_train` does, and return what its norms saw.

    Moments of several batches are merged by `fresnet.moments.merge`, and become running statistics
    by `fresnet.moments.update`.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> logits, moments = fresnet.forward_moments(params, torch.ones(2, 3, 32, 48))
    >>> moments.stem.layer.n                    # 2 images of 16x24 activations
    tensor(768.)

    Args:
      params: the network.
      x: images, float `[b c h w]`, in the dtype of the weights.
      group: as for `forward_train`.
      recompute: keep no activations within a block but compute them again for the gradient:
        half of what is allocated, for one more pass forward. The moments are those of the first.
    Returns:
      `(logits, moments)`: logits `[b k]`, or features `[b c]` without a head; a tree like
      `params.stats` with `Moments` for `NormStats`, constants with respect to params and x. Eager,
      a variance is correct to about one rounding of itself + eps.
    Raises:
      FresnetError: as `forward_train` does.
    """
    check_call("forward_moments", params, x)
    check_group("forward_moments", group)
    return run_training(params, x, training(group), recompute=recompute)


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
    return run_network(params, x, INFERENCE).activations


def features_train(
    params: Params, x: Tensor, *, momentum: float | Tensor = 0.1, group: Group | None = None
) -> tuple[tuple[Tensor, ...], Stats]:
    """The activations of stem and stages by the statistics of the batch: to train a detector.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=0)
    >>> activations, stats = fresnet.features_train(params, torch.ones(2, 3, 64, 96))
    >>> activations[-1].shape
    torch.Size([2, 512, 2, 3])

    Args:
      params, x, momentum, group: as for `forward_train`.
    Returns:
      `(activations, stats)`: those that `features` returns; the new running statistics.
    Raises:
      FresnetError: as `forward_train` does.
    """
    run, stats = _trained("features_train", params, x, momentum, group)
    return run.activations, stats


class Run(NamedTuple):
    """What becomes of images in a network, without its head."""

    activations: tuple[Tensor, ...]
    """Of the stem, then of each stage."""

    y: Tensor
    """What the head takes."""

    seen: Stats
    """What each unit left behind, in the unit's place."""


def run_network(
    params: Params, x: Tensor, do: Regime, *, last: Regime | None = None, recompute: bool = False
) -> Run:
    """Run stem, stages and last norm by a regime.

    Args:
      do: the regime.
      last: that of the last stage and of what follows, if it is another.
      recompute: whether to keep no activations within a block.
    """
    at = paired(*params)
    x, stem = at.stem.run(x, do)
    activations, stages = [x], []
    for stage, stage_grids in zip(at.stages, grids(at.stages), strict=True):
        if last is not None and len(activations) == len(at.stages):
            do = last
        seen = []
        for block, grid in zip(blocks_of(stage), stage_grids, strict=True):
            run = partial(_run_block, grid=grid, do=do)
            x, block_seen = recomputed(run, block, x) if recompute else run(block, x)
            seen.append(block_seen)
        activations.append(x)
        stages.append(with_blocks(stage, seen))
    y, last_seen = at.last.run(x, do)
    return Run(tuple(activations), y, Stats(stem, tuple(stages), last_seen))


def _trained(
    caller: str, params: Params, x: Tensor, momentum: float | Tensor, group: Group | None
) -> tuple[Run, Stats]:
    """A run by the statistics of the batch, and the new running statistics."""
    momentum = check_momentum(caller, momentum)
    check_call(caller, params, x)
    check_group(caller, group)
    run = run_network(params, x, training(group))
    return run, update(params.stats, run.seen, momentum=momentum)


def _run_block(block: Block, x: Tensor, *, grid: Grid, do: Regime) -> tuple[Tensor, Any]:
    return block.run(x, grid, do)


def run_training(
    params: Params, x: Tensor, do: Regime, *, recompute: bool = False
) -> tuple[Tensor, Stats]:
    """As `forward_moments`, of what has been checked; in x's dtype, whatever the weights'."""
    run = run_network(params, x, do, recompute=recompute)
    head = tree.map(lambda leaf: leaf.to(x.dtype), params.weights.head)
    return head.run(run.y, do), run.seen
