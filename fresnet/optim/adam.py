"""Adam, AdamW and LAMB: steps along the mean gradient, divided by the root of the mean square."""

from typing import NamedTuple

import torch
from torch import Tensor

from fresnet.errors import FresnetError, shown
from fresnet.optim.checks import check_where, checked_numbers, checked_rates
from fresnet.optim.interface import Optimizer, Rate, everywhere, kernels
from fresnet.optim.leafwise import Move, at_step, leafwise, plus
from fresnet.tree import Where


def adam(
    learning_rate: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rate = 0.0,
    decay_where: Where = everywhere,
) -> Optimizer:
    """Adam, with the steps of `torch.optim.Adam`.

        g <- g + weight_decay w
        m <- b1 m + (1 - b1) g,   s <- b2 s + (1 - b2) g^2
        w <- w - learning_rate m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps)

    Args:
      learning_rate, weight_decay: numbers, 0-d tensors or schedules.
      betas: b1 and b2.
      eps: a number that is added to the square root.
      decay_where: as for `sgd`.
    Raises:
      FresnetError: if a number is negative, or if a beta is not below 1.
    Source: Kingma & Ba 2015, arXiv:1412.6980, Alg. 1.
    """
    return _adam("adam", learning_rate, betas, eps, weight_decay, decay_where, decoupled=False)


def adamw(
    learning_rate: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rate = 0.01,
    decay_where: Where = everywhere,
) -> Optimizer:
    """Adam with decoupled weight decay, with the steps of `torch.optim.AdamW`.

        m <- b1 m + (1 - b1) g,   s <- b2 s + (1 - b2) g^2
        w <- (1 - learning_rate weight_decay) w
             - learning_rate m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps)

    Args:
      learning_rate, weight_decay: numbers, 0-d tensors or schedules.
      betas: b1 and b2.
      eps: a number that is added to the square root.
      decay_where: as for `sgd`.
    Raises:
      FresnetError: if a number is negative, or if a beta is not below 1.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2.
    """
    return _adam("adamw", learning_rate, betas, eps, weight_decay, decay_where, decoupled=True)


def _adam(
    caller: str,
    learning_rate: Rate,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Rate,
    decay_where: Where,
    *,
    decoupled: bool,
) -> Optimizer:
    learning_rate, weight_decay = checked_rates(
        caller, learning_rate=learning_rate, weight_decay=weight_decay
    )
    means = _means(caller, betas, eps)
    check_where(caller, decay_where=decay_where)

    def at(step: Tensor) -> Move:
        rate, decay = at_step(learning_rate, step), at_step(weight_decay, step)
        t = step + 1

        def move(
            decays: bool, w: Tensor, g: Tensor, m: Tensor, s: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            if decays and not decoupled:
                g = plus(g, decay, w)
            m, s = means.after(g, m, s)
            if decays and decoupled:
                w = plus(w, -rate * decay, w)
            return plus(w, -rate / (1 - means.b1**t), m / means.root(s, t)), m, s

        return move

    return leafwise(at, moments=2, where=decay_where)


def lamb(
    learning_rate: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: Rate = 0.01,
    adapt_where: Where = kernels,
) -> Optimizer:
    """AdamW for large batches: each leaf's step is as long as its weights, times the rate.

        m <- b1 m + (1 - b1) g,   s <- b2 s + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps) + weight_decay w
        w <- w - learning_rate |w| / |u| u

    A leaf has the factor 1 in place of `|w| / |u|` if either is 0, or if `adapt_where` is false. It
    does not decay in the second case. The paper clips no gradients; other implementations do, as
    `clip_by_norm(grads, 1.0)` does.

    >>> import torch, fresnet
    >>> optimizer, weights = fresnet.optim.lamb(0.1), {"conv": torch.ones(4)}
    >>> optimizer.update({"conv": 100 * torch.ones(4)}, optimizer.init(weights), weights)[0]
    {'conv': tensor([0.9000, 0.9000, 0.9000, 0.9000])}

    Args:
      learning_rate, weight_decay: numbers, 0-d tensors or schedules.
      betas: b1 and b2.
      eps: a number that is added to the square root.
      adapt_where: a function of the path to a leaf that says whether its rate adapts and its
        weights decay.
    Raises:
      FresnetError: if a number is negative, or if a beta is not below 1.
    Source: You et al. 2020, arXiv:1904.00962, Alg. 2.
    """
    learning_rate, weight_decay = checked_rates(
        "lamb", learning_rate=learning_rate, weight_decay=weight_decay
    )
    means = _means("lamb", betas, eps)
    check_where("lamb", adapt_where=adapt_where)

    def at(step: Tensor) -> Move:
        rate, decay = at_step(learning_rate, step), at_step(weight_decay, step)
        t = step + 1

        def move(
            adapts: bool, w: Tensor, g: Tensor, m: Tensor, s: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            m, s = means.after(g, m, s)
            u = m / (1 - means.b1**t) / means.root(s, t)
            if not adapts:
                return plus(w, -rate, u), m, s
            u = plus(u, decay, w)
            size, length = w.norm(), u.norm()
            factor = torch.where((size > 0) & (length > 0), size / length, 1.0)
            return plus(w, -rate * factor, u), m, s

        return move

    return leafwise(at, moments=2, where=adapt_where)


class _Means(NamedTuple):
    """How the means of gradients and of their squares move, and what is made of the second."""

    b1: float
    b2: float
    eps: float

    def after(self, g: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return m.lerp(g, 1 - self.b1), torch.addcmul(self.b2 * s, g, g, value=1 - self.b2)

    def root(self, s: Tensor, t: Tensor) -> Tensor:
        return (s / (1 - self.b2**t)).sqrt() + self.eps


def _means(caller: str, betas: tuple[float, float], eps: float) -> _Means:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise FresnetError(f"{caller} expects betas to be two numbers; got {shown(betas)}")
    eps, b1, b2 = checked_numbers(caller, eps=eps, beta1=betas[0], beta2=betas[1])
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise FresnetError(f"{caller} expects betas from 0 to below 1; got {shown(betas)}")
    return _Means(b1, b2, eps)
