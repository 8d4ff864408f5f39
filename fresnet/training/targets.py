"""Targets: the classes of images, and the cross-entropy of logits with them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fresnet.errors import FresnetError, describe
from fresnet.network.check import has_values
from fresnet.pytorch import transform_stack


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
    Source: Szegedy et al. 2016, arXiv:1512.00567, Sec. 7, for label smoothing.
    """
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def check_classes(caller: str, x: Tensor, y: Tensor, classes: int) -> None:
    """Refuse targets unless they are a class from 0 to classes - 1 for each image.

    Values are checked on the CPU only. On another device a check would wait for the device.

    Raises:
      FresnetError: if y has another dtype or shape, or if a class is outside that range.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise FresnetError(
            f"{caller} expects y to be {len(x)} classes, int64 ({len(x)},); got {describe(y)}"
        )
    if torch.compiler.is_compiling() or transform_stack.active() or y.device.type != "cpu":
        return
    if not has_values(y):
        return
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise FresnetError(
            f"{caller} expects classes from 0 to {classes - 1}; got {int(outside[0])}"
        )
