"""Norms of per-sample gradients, and their clipped sum, without forming the gradients."""

from functools import partial

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, shown
from fresnet.gradients.listening import Pass, squares_of, weighted_sum
from fresnet.gradients.per_sample import LossFunction, apart, check_images, grads_apart
from fresnet.network.check import stats_dtype
from fresnet.network.nodes import Params, StandardisedLayer, Weights, kinds
from fresnet.numbers import as_scalar
from fresnet.pytorch import transform_stack

MEANINGS = ("running", "batch")
"""The meanings of BatchNorm in which a gradient belongs to one image alone."""


def per_sample_norms(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    norms: str = "running",
    randomness: str = "error",
) -> Tensor:
    """The l2 norm of each image's gradient, without forming the gradient.

    The gradients are those of `per_sample_grads`.

    >>> import torch, fresnet
    >>> from torch.nn.functional import cross_entropy
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x, y = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> fresnet.per_sample_norms(cross_entropy, params, x, y).shape
    torch.Size([2])

    Args:
      loss_fn: a function of one image's logits `[k]` and its target, one of y, that returns a 0-d
        tensor.
      params: the network.
      x: images, float `[b c h w]`.
      y: targets, `[b ...]`.
      norms: what BatchNorm is to one image: "running" or "batch", as for `per_sample_grads`.
        "coupled" is refused, because there an image's gradient depends on the whole batch and takes
        a pass of its own.
      randomness: as for `per_sample_grads`.
    Returns:
      The norms `[b]`, never narrower than float32.
    Raises:
      FresnetError: if norms is neither of the two, if x and y differ in length, if the loss is not
        a 0-d tensor, or as `forward_train` does.
    Source: Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015.
    """
    loss_fn = check_images("per_sample_norms", loss_fn, params, x, y, norms, MEANINGS, randomness)
    if not len(x):
        return x.new_zeros(0, dtype=stats_dtype(x.dtype))
    params = apart(params, x, norms)
    taken = _taken(loss_fn, params, x, y, randomness, sums=False)
    if taken is None:
        return _norms(grads_apart(loss_fn, params, x, y, randomness=randomness))
    return taken.norms


def clipped_grads(
    loss_fn: LossFunction,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    max_norm: float | Tensor,
    norms: str = "running",
    randomness: str = "error",
) -> tuple[Weights, Tensor]:
    """The sum of the images' gradients, each scaled down to the norm `max_norm` if it is longer.

        sum_i g_i min(1, max_norm / |g_i|)

    Differentially private training adds noise to this sum, on the scale of `max_norm` (Abadi et al.
    2016, arXiv:1607.00133, Alg. 1).

    >>> import torch, fresnet
    >>> from torch.nn.functional import cross_entropy
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x, y = torch.ones(2, 3, 32, 32), torch.tensor([3, 4])
    >>> grads, norms = fresnet.clipped_grads(cross_entropy, params, x, y, max_norm=1.0)
    >>> grads.head.bias.shape, norms.shape
    (torch.Size([10]), torch.Size([2]))

    Args:
      loss_fn, params, x, y, norms, randomness: as for `per_sample_norms`. A batch without images,
        as Poisson sampling draws now and then, has a gradient of zeros.
      max_norm: a number above 0, or a 0-d float tensor.
    Returns:
      `(grads, norms)`: a tree like `params.weights`; each image's norm before clipping, `[b]`.
      Beside weights narrower than float32 the factors of convolutions are rounded down, so that a
      clipped gradient may be shorter than `max_norm` by 1 part in 128, and is longer only by what
      sums and products are rounded.
    Raises:
      FresnetError: if max_norm is neither, or as `per_sample_norms` does.
    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    max_norm = _checked_max_norm(max_norm)
    loss_fn = check_images("clipped_grads", loss_fn, params, x, y, norms, MEANINGS, randomness)
    if not len(x):
        zeros: Weights = tree.map(torch.zeros_like, params.weights)
        return zeros, x.new_zeros(0, dtype=stats_dtype(x.dtype))
    params = apart(params, x, norms)
    taken = _taken(loss_fn, params, x, y, randomness, sums=True)
    if taken is None:
        grads = grads_apart(loss_fn, params, x, y, randomness=randomness)
        found = _norms(grads)
        with torch.autocast(x.device.type, enabled=False):
            return tree.map(partial(weighted_sum, _factors(found, max_norm)), grads), found
    return taken.sum(_factors(taken.norms, max_norm)), taken.norms


def _checked_max_norm(max_norm: float | Tensor) -> float | Tensor:
    scalar = as_scalar(max_norm)
    if isinstance(scalar, Tensor) or (scalar is not None and scalar > 0):
        return scalar
    raise FresnetError(
        f"clipped_grads expects max_norm to be a number above 0 or a 0-d float tensor; "
        f"got {shown(max_norm)}"
    )


def _taken(
    loss_fn: LossFunction, params: Params, x: Tensor, y: Tensor, randomness: str, *, sums: bool
) -> Pass | None:
    """The pass, or None where the gradients themselves have to be formed.

    A compiler, an outer transform or autograd could not follow the pass, in inference mode there is
    no pass back, and autocast would round its products. Nor does it know tensors of a loss's own,
    or how a standardised kernel changes with its weight.
    """
    if (
        StandardisedLayer in kinds(params.weights)
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or transform_stack.differentiated(*tree.leaves((params, x, y)))
    ):
        return None
    taken = Pass(loss_fn, params, x, y, randomness, sums=sums)
    return None if torch.is_grad_enabled() and taken.loss_reaches_further else taken


def _norms(grads: Weights) -> Tensor:
    return torch.stack([squares_of(leaf) for leaf in tree.leaves(grads)]).sum(0).sqrt()


def _factors(norms: Tensor, max_norm: float | Tensor) -> Tensor:
    return (max_norm / norms).clamp(max=1)
