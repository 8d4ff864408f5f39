"""A training step as one pure function: (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, check_type, describe, shown
from fresnet.network.across import share_of
from fresnet.network.check import (
    check_device,
    check_differentiable,
    check_images,
    check_params,
    classes_of,
)
from fresnet.network.moments import merge, merge_across, update
from fresnet.network.net import run_training
from fresnet.network.nodes import Params, Regime, Stats, Weights
from fresnet.network.options import check_group, check_momentum
from fresnet.network.regimes import training_once
from fresnet.numbers import as_integer, as_number
from fresnet.optim import Optimizer, clip_by_norm, everywhere
from fresnet.optim.checks import checked_numbers
from fresnet.optim.interface import check_optimizer
from fresnet.pytorch.collectives import Group, all_sum, neighbours
from fresnet.training.backward import gradients
from fresnet.training.draws import drawn
from fresnet.training.masks import Masks, NoMasks, check_rates, masked
from fresnet.training.mixing import Mixing
from fresnet.training.state import NoAverage, TrainState
from fresnet.training.targets import check_classes, checked_batch, cross_entropy

Batch: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, object, object]
LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Seen: TypeAlias = tuple[Stats, Tensor]
"""The moments of a part of a batch, and how many of its images are classified right, `[]`."""

TrainStep: TypeAlias = Callable[[TrainState, Batch], "tuple[TrainState, Metrics]"]


class Metrics(NamedTuple):
    """Numbers to look at, over all images of all processes. No later step depends on them."""

    loss: Tensor
    """The mean loss, `[]`."""

    accuracy: Tensor
    """The share of images whose most probable class is right, `[]`.

    The right class of a mixed image is that of its larger part.
    """

    images: Tensor
    """The number of images, `[]`."""


def make_train_step(
    optimizer: Optimizer,
    *,
    loss_fn: LossFn = cross_entropy,
    mixing: Mixing | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    precision: torch.dtype | None = None,
    micro_batches: int = 1,
    recompute: bool = False,
    max_norm: float | None = None,
    momentum: float = 0.1,
    average_decay: float = 0.999,
    group: Group | None = None,
    norms_across: int = 1,
) -> TrainStep:
    """A step of training, `(state, batch) -> (state, metrics)`; a batch is `(x, y)`.

    x `[b c h w]` are images in the dtype of the weights. y are their classes, int64 `[b]`, or the
    probabilities of all classes `[b k]`. A batch of `fresnet.data` holds more, which the step
    leaves alone. The step is pure: the same state and batch give the same bits, and neither is
    written to. So it maps over ensembles, unless it mixes or drops: a generator's state cannot be
    mapped.

    >>> import torch, fresnet
    >>> optimizer = fresnet.optim.sgd(0.1, momentum=0.9)
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> state = fresnet.training.start(params, optimizer)
    >>> train_step = fresnet.training.make_train_step(optimizer)
    >>> state, metrics = train_step(state, (torch.ones(2, 3, 32, 32), torch.tensor([3, 4])))
    >>> state.step, metrics.images
    (tensor(1), tensor(2))

    Args:
      optimizer: from `fresnet.optim`. No gradient is taken of weights that it leaves as they are,
        so these count neither in time nor in max_norm.
      loss_fn: a function of logits `[b k]` and targets that returns each image's loss `[b]`.
        Targets are y, or probabilities `[b k]` if the step mixes. Binary cross-entropy, for
        example, is `lambda logits, targets: binary_cross_entropy_with_logits(logits, targets,
        reduction="none").mean(1)`.
      mixing: how each batch is mixed, from `fresnet.training.mixing`.
      drop_path, dropout: the rates of stochastic depth and of dropout before the head, as for
        `draw_masks`. Each step draws masks for the images of this process.
      precision: the dtype that the network computes in, by default that of the weights. In bfloat16
        the network reads rounded weights, except those of norms. The weights themselves, their
        gradients, the optimizer, the statistics and the loss keep their dtype.
      micro_batches: the number of parts that a batch is cut into. Their gradients are taken one
        after the other. A norm normalises each part by itself. Gradient and running statistics are
        those of as many processes with one part each, without `norms_across`.
      recompute: as in `forward_moments`.
      max_norm: the norm that the gradient is clipped to.
      momentum: as in `forward_train`.
      average_decay: the share of the old average in the new one, if the state keeps an average. It
        is smaller over the first steps: min(average_decay, (1 + step) / (10 + step)).
      group: the processes that train together. Each has a share of the batch; shares may differ in
        size. The loss is the mean over all their images, and their states stay equal to the bit.
      norms_across: the number of processes whose shares norms normalise as one, which divides that
        of the group: those of the first ranks, of the next, and so on. With all of them, the
        processes together do what one process does with the whole batch, unless a share is cut, or
        mixed: images are mixed within their share. All processes of the group call this function,
        since it may begin a group of fewer.
    Raises:
      FresnetError: if an option is not as described. The step raises it if the state, the images or
        the classes are not what the network takes, or if a share has fewer images than
        micro_batches.
    """
    check_optimizer("make_train_step", optimizer)
    check_type("make_train_step", Callable, "a function", loss_fn=loss_fn)
    check_type("make_train_step", Callable | None, "a function, such as mixup(0.2)", mixing=mixing)
    if max_norm is not None:
        checked_numbers("make_train_step", max_norm=max_norm)
    _check_options(precision, group, norms_across)
    weight = check_momentum("make_train_step", momentum)
    average_decay, micro_batches = _share(average_decay), _parts(micro_batches)
    rates = check_rates("make_train_step", drop_path=drop_path, dropout=dropout)
    draw = partial(drawn, mixing, rates, 0 if group is None else group.rank())
    do = training_once(None if group is None else neighbours(group, norms_across))
    loss_of = partial(_loss_of, loss_fn, do, precision, recompute)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        x, y, *_ = checked_batch("a train step expects a batch (x, y)", batch)
        _check(state, x, y, micro_batches)
        weights, stats = state.params
        x, targets, masks, rng = draw(state, x, y)
        images = torch.full_like(state.step, len(x))
        if group is not None:
            images = all_sum(images, group)
        count = micro_batches if group is not None else min(micro_batches, len(x))
        shares = _cut((masks, x, targets), count)
        trained, rest = _trained(weights, optimizer)
        parts = [(rest, stats, *share, images) for share in shares]
        grads: list[Any] = [*gradients(loss_of, trained, parts, group=group)]
        moments, sums = _together(grads.pop(), images, group, norms_across)
        if max_norm is not None:
            grads = [clip_by_norm(grads.pop(), max_norm)]
        # `pop` leaves the optimizer the only reference, so that it frees each gradient, or bucket
        # of gradients, once the weights are updated.
        weights, optimizer_state = optimizer.update(grads.pop(), state.optimizer, weights)
        params = Params(weights, update(stats, moments, momentum=weight))
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            average=_averaged(state, params, average_decay),
            rng=rng,
            position=state.position + 1,
        )
        return new, Metrics(sums[0], sums[1], images)

    return train_step


def _trained(weights: Weights, optimizer: Optimizer) -> tuple[Weights, Any]:
    """The weights that the optimizer changes, and the rest."""
    if optimizer.trains is everywhere:
        return weights, ()  # nothing to combine
    if not any(map(optimizer.trains, tree.paths(weights))):
        raise FresnetError("a train step expects an optimizer that changes a weight; got frozen")
    return tree.partition(weights, optimizer.trains)


def _cut(batch: Any, count: int) -> list[Any]:
    """The batch in so many parts, each leaf cut along its images."""
    return [tree.map(lambda leaf, i=i: leaf.tensor_split(count)[i], batch) for i in range(count)]


def _loss_of(
    loss_fn: LossFn,
    do: Regime,
    precision: torch.dtype | None,
    recompute: bool,
    trained: Weights,
    rest: Any,
    stats: Stats,
    masks: Masks | NoMasks,
    x: Tensor,
    targets: Tensor,
    images: Tensor,
) -> tuple[Tensor, Seen]:
    """What a part of the batch adds to the mean loss over all `images`, and what was seen."""
    x_narrow = x.to(precision or x.dtype)
    weights = tree.combine(trained, rest)
    weights = masked(weights, masks) if masks else weights
    logits, moments = run_training(Params(weights, stats), x_narrow, do, recompute=recompute)
    logits = logits.to(x.dtype)
    classes = targets if targets.ndim == 1 else targets.argmax(1)
    right = (logits.argmax(1) == classes).sum()
    losses = loss_fn(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != x.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else describe(losses)
        raise FresnetError(
            f"a train step expects loss_fn to return a loss for each image, ({len(x)},); got "
            f'{got}: reduction="none", and a mean over classes?'
        )
    return losses.sum() / images, (moments, right)


def _together(
    found: Sequence[tuple[Tensor, Seen]], images: Tensor, group: Group | None, norms_across: int
) -> tuple[Stats, Tensor]:
    """The moments of all parts of all processes, and the mean loss and accuracy `[2]`."""
    losses, seen = zip(*found, strict=True)
    moments, right = zip(*seen, strict=True)
    merged, loss = merge(*moments), torch.stack(losses).sum()
    sums = torch.stack([loss, torch.stack(right).sum().to(loss.dtype) / images])
    if group is None:
        return merged, sums
    if norms_across < group.size():
        merged = merge_across(share_of(merged, norms_across), group)
    return merged, all_sum(sums, group)


def _averaged(state: TrainState, params: Params, decay: float) -> Params | NoAverage:
    """average <- d average + (1 - d) params,  d = min(decay, (1 + step) / (10 + step))."""
    if not state.average:
        return ()
    step = state.step.double()
    new = 1 - ((1 + step) / (10 + step)).clamp(max=decay)
    return tree.map(lambda old, leaf: old.lerp(leaf, new.to(leaf.dtype)), state.average, params)


def _share(average_decay: float) -> float:
    number = as_number(average_decay)
    if number is None or not 0 <= number <= 1:
        raise FresnetError(
            f"make_train_step expects average_decay from 0 to 1; got {shown(average_decay)}"
        )
    return number


def _parts(micro_batches: int) -> int:
    number = as_integer(micro_batches)
    if number is None or number < 1:
        raise FresnetError(
            f"make_train_step expects micro_batches to be a positive integer; "
            f"got {shown(micro_batches)}"
        )
    return number


def _check_options(precision: torch.dtype | None, group: Group | None, norms_across: int) -> None:
    check_group("make_train_step", group)
    if precision not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise FresnetError(
            f"make_train_step expects precision to be torch.bfloat16, float32 or float64; "
            f"got {shown(precision)}"
        )
    number, size = as_integer(norms_across), 1 if group is None else group.size()
    if number is None or number < 1 or size % number:
        raise FresnetError(
            f"make_train_step expects norms_across to divide the number of processes, {size}; "
            f"got {shown(norms_across)}"
        )


def _check(state: TrainState, x: Tensor, y: Tensor, micro_batches: int) -> None:
    """Refuse a state, images or targets that do not fit, and parts without an image."""
    if type(state) is not TrainState:
        raise FresnetError(
            f"a train step expects a TrainState, as training.start makes it; got {describe(state)}"
        )
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise FresnetError("a train step expects to be outside of torch.inference_mode; got it on")
    check_params("a train step", state.params)
    check_images("a train step", state.params, x)
    check_differentiable("a train step", state.params, state.optimizer, x)
    classes = classes_of("a train step", state.params.weights)
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.shape != (len(x), classes):
        check_classes("a train step", x, y, classes, or_probabilities=True)
    check_device("a train step", x, y)
    if len(x) < micro_batches:
        raise FresnetError(
            f"a train step of {micro_batches} micro-batches expects as many images; got {len(x)}"
        )
