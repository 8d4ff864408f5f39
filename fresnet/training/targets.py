"""The classes that images are to be taken for, and what it costs to miss them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fresnet.errors import FresnetError, describe
from fresnet.pytorch import transform_stack


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Each image's cross-entropy.

    Args:
      logits: `[b k]`.
      targets: classes, int64 `[b]`, or their probabilities `[b k]`.
      label_smoothing: the share of each target that goes to all classes alike (Szegedy et al. 2016,
        arXiv:1512.00567, Sec. 7).
    Returns:
      `[b]`.
    """
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def check_classes(caller: str, x: Tensor, y: Tensor, classes: int) -> None:
    """Refuse what is not a class from 0 to classes - 1 for each image.

    Values are read on the CPU alone: elsewhere it would wait for the device.

    Raises:
      FresnetError: saying what came.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise FresnetError(
            f"{caller} expects y to be {len(x)} classes, int64 ({len(x)},); got {describe(y)}"
        )
    if torch.compiler.is_compiling() or transform_stack.active() or y.device.type != "cpu":
        return
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise FresnetError(
            f"{caller} expects classes from 0 to {classes - 1}; got {int(outside[0])}"
        )
