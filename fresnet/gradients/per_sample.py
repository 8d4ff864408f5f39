"""Gradients of each image's own loss, with a choice of what BatchNorm is to one image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from fresnet import tree
from fresnet.errors import FresnetError, check_type, describe, shown
from fresnet.network.check import check_device, check_differentiable, check_params
from fresnet.network.check import check_images as check_images_of
from fresnet.network.moments import statistics
from fresnet.network.net import forward, forward_moments
from fresnet.network.nodes import Params, Weights
from fresnet.numbers import as_integer
from fresnet.pytorch.inference_mode import outside_inference_mode

MEANINGS = ("running", "batch", "coupled")

RANDOMNESS = ("error", "different", "same")
"""What `torch.vmap` does with a function that draws random numbers."""

LossFunction = Callable[[Tensor, Tensor], Tensor]


def per_sample_grads(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    norms: str | None = None,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Weights:
    """The gradient of each image's loss with respect to the weights.

    A batch normalisation ties the images of a batch together, so `norms` has to say what one
    image's gradient means:

    - `"running"`: the gradient through `forward`, by the running statistics. Images are
      independent.
    - `"batch"`: the gradient with the statistics of this batch as constants. Images are independent
      here too, at the operating point of training. The mean is not the gradient of training.
    - `"coupled"`: the gradient through `forward_train`, which goes through the batch's moments as
      well. The mean is the gradient that training takes.

    >>> import torch, fresnet
    >>> from torch.nn.functional import cross_entropy
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x, y = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running")
    >>> grads.head.bias.shape
    torch.Size([2, 10])

    Args:
      loss_fn: a function of one image's logits `[k]` (without a head, features `[c]`) and its
        target, one of y, that returns a 0-d tensor. It sees no batch dimension;
        `torch.nn.functional.cross_entropy` is such a function.
      params: the network.
      x: images, float `[b c h w]`.
      y: targets, `[b ...]`.
      norms: one of the three meanings above.
      chunk_size: how many gradients to take at once, by default all. It bounds the memory of the
        computation. The result still takes the memory of the weights for each image.
      randomness: as in `torch.vmap`, for a loss that draws, as by dropout: "different" draws for
        each image, "same" once for all.
    Returns:
      A tree like `params.weights`, each leaf with a first dimension of b.
    Raises:
      FresnetError: if norms is none of the three, if x and y differ in length, if chunk_size is
        not a positive integer, if randomness is none of `torch.vmap`'s, if the loss is not a 0-d
        tensor, or as `forward_train` does.
    """
    loss_fn = check_images("per_sample_grads", loss_fn, params, x, y, norms, MEANINGS, randomness)
    chunk = as_integer(chunk_size)
    if chunk_size is not None and (chunk is None or chunk < 1):
        raise FresnetError(
            f"per_sample_grads expects chunk_size to be a positive integer; got {shown(chunk_size)}"
        )
    if not len(x):
        none: Weights = tree.map(lambda leaf: leaf.new_zeros(0, *leaf.shape), params.weights)
        return none
    if norms == "coupled":
        return _coupled(loss_fn, params, x, y, chunk, randomness)
    return grads_apart(loss_fn, apart(params, x, norms), x, y, chunk, randomness=randomness)


def check_images(
    caller: str,
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    norms: str | None,
    meanings: Sequence[str],
    randomness: str,
) -> LossFunction:
    """Refuse arguments that are not a network, images, targets and one of the meanings.

    Returns:
      The loss function, which now refuses a loss that is not a 0-d tensor.
    Raises:
      FresnetError: saying what came.
    """
    check_params(caller, params)
    check_images_of(caller, params, x, least=0)
    check_differentiable(caller, params, x)
    check_type(caller, Callable, "a function of logits [k] and a target", loss_fn=loss_fn)
    if randomness not in RANDOMNESS:
        raise FresnetError(
            f"{caller} expects randomness to be one of {', '.join(map(repr, RANDOMNESS))}; "
            f"got {shown(randomness)}"
        )
    if norms not in meanings:
        raise FresnetError(
            f"{caller} expects norms to say what BatchNorm is to one image, "
            f"one of {', '.join(map(repr, meanings))}; got {shown(norms)}"
        )
    if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
        raise FresnetError(
            f"{caller} expects y to be a tensor of {len(x)} targets, one for each image; "
            f"got {describe(y)}"
        )
    check_device(caller, x, y)

    def scalar_loss(logits: Tensor, target: Tensor) -> Tensor:
        try:
            value = loss_fn(logits, target)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise FresnetError(
                f"{caller} expects randomness to be 'different' or 'same' for a loss that draws"
            ) from error
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise FresnetError(
                f"{caller} expects loss_fn(logits [k], target) to return a 0-d tensor; "
                f"got {describe(value)}"
            )
        return value

    return scalar_loss


def apart(params: Params, x: Tensor, norms: str | None) -> Params:
    """The network to run by `forward`, with its own statistics or with those of this batch.

    `forward` treats images independently. No derivative goes through the batch's statistics.
    """
    if norms == "running":
        return params
    with torch.no_grad():
        _, seen = forward_moments(params, x)
    return params._replace(stats=statistics(params.stats, seen))


@outside_inference_mode
def grads_apart(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None = None,
    *,
    randomness: str,
) -> Weights:
    """Each image's gradient through `forward`."""

    def loss(weights: Weights, image: Tensor, target: Tensor) -> Tensor:
        return loss_fn(forward(Params(weights, params.stats), image[None])[0], target)

    each = vmap(grad(loss), (None, 0, 0), randomness=randomness, chunk_size=chunk_size)
    grads: Weights = each(params.weights, x, y)
    return grads


@outside_inference_mode
def _coupled(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None,
    randomness: str,
) -> Weights:
    """Each image's gradient through one pass forward; the pass back runs once for each loss."""

    def losses(weights: Weights) -> Tensor:
        logits, _ = forward_moments(params._replace(weights=weights), x)
        return vmap(loss_fn, randomness=randomness)(logits, y)

    values, pull, *_ = vjp(losses, params.weights)
    one_hot = torch.eye(len(values), dtype=values.dtype, device=values.device)
    (grads,) = vmap(pull, chunk_size=chunk_size)(one_hot)
    result: Weights = grads
    return result
