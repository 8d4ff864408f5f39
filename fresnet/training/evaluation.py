"""How well a network classifies."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fresnet.errors import FresnetError, check_type
from fresnet.network.check import check_call, check_params, check_values, classes_of, first_conv
from fresnet.network.net import forward
from fresnet.network.nodes import Params
from fresnet.network.options import check_group
from fresnet.pytorch import transform_stack
from fresnet.pytorch.collectives import Group, all_sum
from fresnet.training.step import Batch
from fresnet.training.targets import check_classes, checked_batch, cross_entropy
from fresnet.tree.text import register


class Evaluation(NamedTuple):
    """Results over all images of all processes."""

    images: int
    loss: float
    """The mean cross-entropy."""

    top1: float
    top5: float
    """The shares of images whose class is the most probable one, or one of the five most probable.

    If there are fewer than five classes, any class counts for `top5`.
    """

    confusion: Tensor
    """How many images of class i were classified as class j, int64 `[k k]`, on the CPU."""


register(Evaluation)


def evaluate(params: Params, batches: Iterable[Batch], *, group: Group | None = None) -> Evaluation:
    """Classify batches by the running statistics, and compare the results with their classes.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> batch = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> fresnet.training.evaluate(params, [batch]).images
    2

    Args:
      params: the network.
      batches: for each batch, images `[b c h w]` in the dtype of the weights and their classes
        `[b]`. A batch of `fresnet.data` holds more, which is left alone.
      group: processes that evaluate together. Each has a share of the batches, which may be empty.
    Raises:
      FresnetError: if there is no image at all, if a batch is no pair of images and classes, or if
        these are not what the network takes.
    """
    if transform_stack.READABLE and transform_stack.active():
        raise FresnetError(
            "evaluate counts images, so no transform of torch.func may go over it; "
            "evaluate each network by itself: map(evaluate, tree.unstack(networks), ...)"
        )
    check_params("evaluate", params)
    check_values("evaluate", params)
    check_group("evaluate", group)
    check_type("evaluate", Iterable, "an iterable of (x, y), such as a loader", batches=batches)
    classes, device = classes_of("evaluate", params.weights), first_conv(params.weights).device
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # losses, hits among five
    with torch.no_grad():
        for batch in batches:
            x, y, *_ = checked_batch("evaluate expects batches (x, y), as in [(x, y)]", batch)
            check_call("evaluate", params, x)
            check_classes("evaluate", x, y, classes)
            logits = forward(params, x).double()
            best = logits.topk(min(5, classes)).indices
            in_five = (best == y[:, None]).any(1)
            sums += torch.stack([cross_entropy(logits, y).sum(), in_five.sum()])
            confusion.index_add_(0, y * classes + best[:, 0], torch.ones_like(y))
        if group is not None:
            sums, confusion = all_sum(sums, group), all_sum(confusion, group)
    confusion = confusion.view(classes, classes)
    images = int(confusion.sum())
    if images == 0:
        raise FresnetError("evaluate expects at least one image; got none")
    loss, in_five = (sums / images).tolist()
    return Evaluation(images, loss, int(confusion.trace()) / images, in_five, confusion.cpu())
