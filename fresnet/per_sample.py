"""Gradients of each image's own loss, with BatchNorm's part in them named."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from fresnet.errors import FresnetError
from fresnet.moments import statistics
from fresnet.net import forward, forward_moments
from fresnet.types import Params, Stats, Weights

MEANINGS = ("running", "batch", "coupled")

LossFunction = Callable[[Tensor, Tensor], Tensor]


def per_sample_grads(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    norms: str | None = None,
    chunk_size: int | None = None,
) -> Weights:
    """The gradient of each image's loss with respect to the weights.

    A batch normalisation ties the images of a batch together, so what one image's gradient is has
    to be said:

    - `norms="running"`: through `forward`, by the running statistics. Images are independent.
    - `norms="batch"`: as if the statistics of this batch were constants. Independent again, at the
      operating point of training; their mean is not the gradient of training.
    - `norms="coupled"`: through `forward_train`, each image's loss through the batch's moments
      as well. The mean is the gradient that training takes.

    >>> import torch, fresnet
    >>> from torch.nn.functional import cross_entropy
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x, y = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running")
    >>> grads.head.bias.shape
    torch.Size([2, 10])

    Args:
      loss_fn: of one image's logits `[k]` and its target, one of y; returns a scalar.
      params: the network.
      x: images, float `[b c h w]`.
      y: targets, `[b ...]`.
      norms: the meaning, one of the three above.
      chunk_size: how many gradients to take at once, by default all. Memory grows with it.
    Returns:
      A tree like `params.weights`, each leaf with a first dimension of b.
    Raises:
      FresnetError: if norms is none of the three, if x and y differ in length, or if chunk_size
        is not positive; and as `forward` and `forward_train` do.
    """
    if norms not in MEANINGS:
        raise FresnetError(
            "per_sample_grads expects norms to say what BatchNorm is to one image, "
            f"one of {', '.join(map(repr, MEANINGS))}; got {norms!r}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise FresnetError(f"per_sample_grads expects a positive chunk_size; got {chunk_size}")
    if len(y) != len(x):
        raise FresnetError(f"per_sample_grads expects {len(x)} targets, one an image; got {len(y)}")
    weights, stats = params
    if norms == "coupled":
        return _coupled(loss_fn, params, x, y, chunk_size)
    if norms == "batch":
        stats = _batch_statistics(params, x)

    def loss(weights: Weights, image: Tensor, target: Tensor) -> Tensor:
        return loss_fn(forward(Params(weights, stats), image[None])[0], target)

    grads: Weights = vmap(grad(loss), (None, 0, 0), chunk_size=chunk_size)(weights, x, y)
    return grads


def _batch_statistics(params: Params, x: Tensor) -> Stats:
    with torch.no_grad():
        stats: Stats = statistics(params.stats, forward_moments(params, x)[1])
    return stats


def _coupled(
    loss_fn: LossFunction, params: Params, x: Tensor, y: Tensor, chunk_size: int | None
) -> Weights:
    """One pass forward; backward once for each loss."""

    def losses(weights: Weights) -> Tensor:
        logits, _ = forward_moments(params._replace(weights=weights), x)
        return vmap(loss_fn)(logits, y)

    values, pull, *_ = vjp(losses, params.weights)
    one_hot = torch.eye(len(values), dtype=values.dtype, device=values.device)
    (grads,) = vmap(pull, chunk_size=chunk_size)(one_hot)
    result: Weights = grads
    return result
