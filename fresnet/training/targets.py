"""Targets: the classes of images, and the cross-entropy of logits with them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fresnet.errors import FresnetError, describe, shown
from fresnet.network.check import check_device
from fresnet.numbers import as_number
from fresnet.pytorch import transform_stack
from fresnet.tree.tensors import has_values


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Each image's cross-entropy.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))  # log(4): all classes alike
    tensor([1.3863, 1.3863])

    Args:
      logits: `[b k]`.
      targets: classes, int64 `[b]`, or their probabilities `[b k]`.
      label_smoothing: the share of each target that is spread evenly over all classes.
    Returns:
      The losses `[b]`.
    Raises:
      FresnetError: if an argument is not as described.
    Source: Szegedy et al. 2016, arXiv:1512.00567, Sec. 7, for label smoothing.
    """
    share = as_number(label_smoothing)
    if share is None or not 0 <= share <= 1:
        raise FresnetError(
            f"cross_entropy expects label_smoothing from 0 to 1; got {shown(label_smoothing)}"
        )
    tensors = isinstance(logits, Tensor) and isinstance(targets, Tensor)
    if (
        not tensors
        or logits.ndim != 2
        or (targets.dtype, targets.shape)
        not in (
            (torch.int64, logits.shape[:1]),
            (logits.dtype, logits.shape),
        )
    ):
        raise FresnetError(
            "cross_entropy expects logits [b k] and targets that are classes, int64 [b], or "
            f"probabilities [b k] in the logits' dtype; got {describe(logits)} and "
            f"{describe(targets)}"
        )
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def checked_batch(expected: str, batch: Any) -> Any:
    """The batch, if it is images and targets.

    Raises:
      FresnetError: beginning with what was expected, if it is something else, such as images alone.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise FresnetError(f"{expected}; got {describe(batch)}")
    return batch


def check_classes(
    caller: str, x: Tensor, y: Tensor, classes: int, *, or_probabilities: bool = False
) -> None:
    """Refuse targets unless they are a class from 0 to classes - 1 for each image.

    Values are checked on the CPU only. On another device a check would wait for the device.

    Args:
      or_probabilities: whether the caller takes these too, and the message is to say so.
    Raises:
      FresnetError: if y has another dtype or shape, or if a class is outside that range.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        other = f", or probabilities, {x.dtype} {len(x), classes}".replace("torch.", "")
        raise FresnetError(
            f"{caller} expects y to be {len(x)} classes, int64 ({len(x)},)"
            f"{other if or_probabilities else ''}; got {describe(y)}"
        )
    check_device(caller, x, y)
    if torch.compiler.is_compiling() or transform_stack.active() or y.device.type != "cpu":
        return
    if not has_values(y):
        return
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise FresnetError(
            f"{caller} expects classes from 0 to {classes - 1}; got {int(outside[0])}"
        )
