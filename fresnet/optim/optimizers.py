"""Optimizers as pure functions of trees: SGD, AdamW and LARS."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, shown
from fresnet.optim.checks import check_moments, check_shapes, checked_numbers, checked_rates
from fresnet.optim.interface import Optimizer, Rate, State, everywhere, first_step, kernels
from fresnet.pytorch import transform_stack
from fresnet.tree import Tree, Where

Move: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""The update of one leaf, `(selected, w, g, *moments) -> (w, *moments)`, selected by a `Where`."""


def sgd(
    learning_rate: Rate,
    *,
    momentum: float | Tensor = 0.0,
    weight_decay: Rate = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
    decay_where: Where = everywhere,
) -> Optimizer:
    """Stochastic gradient descent, with the steps of `torch.optim.SGD`.

        g <- g + weight_decay w
        v <- momentum v + g
        w <- w - learning_rate v           (with nesterov: g + momentum v instead of v)

    >>> import torch
    >>> weights = (torch.tensor([1.0, 2.0]),)
    >>> optimizer = sgd(0.1, momentum=0.9)
    >>> optimizer.update((torch.ones(2),), optimizer.init(weights), weights)[0]
    (tensor([0.9000, 1.9000]),)

    Args:
      learning_rate, weight_decay: numbers, 0-d tensors or schedules.
      momentum: a number or a 0-d tensor.
      nesterov: step along the velocity once more (Sutskever et al. 2013).
      decoupled: shrink w by learning_rate weight_decay w instead of adding weight_decay w to its
        gradient (Loshchilov & Hutter 2019, arXiv:1711.05101).
      decay_where: a function of the path to a leaf that says whether its weights decay, such as
        `kernels`.
    Raises:
      FresnetError: if a number is negative, or if nesterov comes without momentum.
    """
    learning_rate, weight_decay = checked_rates(
        "sgd", learning_rate=learning_rate, weight_decay=weight_decay
    )
    (momentum,) = checked_numbers("sgd", momentum=momentum)
    has_velocity = isinstance(momentum, Tensor) or momentum > 0
    if nesterov and not has_velocity:
        raise FresnetError("sgd expects a momentum above 0 with nesterov; got 0")

    def at(step: Tensor) -> Move:
        rate, decay = _at(learning_rate, step), _at(weight_decay, step)

        def move(decays: bool, w: Tensor, g: Tensor, *velocity: Tensor) -> tuple[Tensor, ...]:
            if decays and not decoupled:
                g = _plus(g, decay, w)
                plus = _plus if nesterov else _plus_over
            else:
                plus = _plus
            velocity = tuple(plus(g, momentum, v) for v in velocity)
            ahead = _plus(g, momentum, velocity[0]) if nesterov else velocity[0] if velocity else g
            if decays and decoupled:
                w = _plus(w, -rate * decay, w)
            return _plus(w, -rate, ahead), *velocity

        return move

    return _optimizer(at, moments=1 if has_velocity else 0, decay_where=decay_where)


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
    learning_rate, weight_decay = checked_rates(
        "adamw", learning_rate=learning_rate, weight_decay=weight_decay
    )
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise FresnetError(f"adamw expects betas to be two numbers; got {shown(betas)}")
    eps, b1, b2 = checked_numbers("adamw", eps=eps, beta1=betas[0], beta2=betas[1])
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise FresnetError(f"adamw expects betas from 0 to below 1; got {shown(betas)}")

    def at(step: Tensor) -> Move:
        rate, decay = _at(learning_rate, step), _at(weight_decay, step)
        t = step + 1

        def move(
            decays: bool, w: Tensor, g: Tensor, m: Tensor, s: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            m, s = m.lerp(g, 1 - b1), torch.addcmul(b2 * s, g, g, value=1 - b2)
            if decays:
                w = _plus(w, -rate * decay, w)
            root = (s / (1 - b2**t)).sqrt() + eps
            return _plus(w, -rate / (1 - b1**t), m / root), m, s

        return move

    return _optimizer(at, moments=2, decay_where=decay_where)


def lars(
    learning_rate: Rate,
    *,
    momentum: float | Tensor = 0.9,
    weight_decay: Rate = 0.0,
    trust: float = 0.001,
    adapt_where: Where = kernels,
) -> Optimizer:
    """SGD for large batches: each leaf's rate is scaled to the size of its weights.

        g <- trust |w| / (|g| + weight_decay |w|) (g + weight_decay w)
        v <- momentum v + g
        w <- w - learning_rate v

    A leaf has the factor 1 and does not decay if |w| or |g| is 0, or if `adapt_where` is false.

    Args:
      learning_rate, weight_decay: numbers, 0-d tensors or schedules.
      momentum: a number or a 0-d tensor.
      trust: the factor that scales the ratio of norms.
      adapt_where: a function of the path to a leaf that says whether its rate adapts and its
        weights decay.
    Raises:
      FresnetError: if a number is negative.
    Source: You, Gitman & Ginsburg 2017, arXiv:1708.03888, Alg. 1.
    """
    learning_rate, weight_decay = checked_rates(
        "lars", learning_rate=learning_rate, weight_decay=weight_decay
    )
    momentum, trust = checked_numbers("lars", momentum=momentum, trust=trust)

    def at(step: Tensor) -> Move:
        rate, decay = _at(learning_rate, step), _at(weight_decay, step)

        def move(adapts: bool, w: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if adapts:
                size, slope = w.norm(), g.norm()
                factor = trust * size / (slope + decay * size)
                usable = (size > 0) & (slope > 0)
                g = torch.where(usable, factor * _plus(g, decay, w), g)
            v = _plus(g, momentum, v)
            return _plus(w, -rate, v), v

        return move

    return _optimizer(at, moments=1, decay_where=adapt_where)


def clip_by_norm(grads: Tree, max_norm: float | Tensor) -> Tree:
    """The gradients, scaled down if the norm of all of them together is above `max_norm`.

    >>> import torch
    >>> clip_by_norm((torch.tensor([3.0]), torch.tensor([4.0])), 1.0)
    (tensor([0.6000]), tensor([0.8000]))

    Raises:
      FresnetError: if max_norm is negative.
    Source: Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063, Alg. 1.
    """
    (max_norm,) = checked_numbers("clip_by_norm", max_norm=max_norm)
    norm = torch.stack([g.norm() for g in tree.leaves(grads)]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    return tree.map(lambda g: g * factor, grads)


def _optimizer(at: Callable[[Tensor], Move], *, moments: int, decay_where: Where) -> Optimizer:
    """An optimizer made of `at`, which gives the update of a leaf for each step."""

    def init(weights: object) -> State:
        zeros = tuple(tree.map(torch.zeros_like, weights) for _ in range(moments))
        return State(first_step(weights), zeros)

    def update(grads: object, state: State, weights: Tree) -> tuple[Tree, State]:
        check_moments(state.moments, moments)
        tree.map(check_shapes, weights, grads, *state.moments)
        where, move = map(decay_where, tree.paths(weights)), at(state.step)
        taken = tree.leaves(grads)[::-1]
        del grads  # so gradients that only this call holds are freed one by one
        others = zip(*map(tree.leaves, (weights, *state.moments)), strict=True)
        moved = [
            _in_dtype_of((w, *old), move(decays, w, taken.pop(), *old))
            for decays, (w, *old) in zip(where, others, strict=True)
        ]
        weights, *new = (tree.unflatten(weights, leaves) for leaves in zip(*moved, strict=True))
        return weights, State(state.step + 1, tuple(new))

    return Optimizer(init, update)


def _in_dtype_of(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """The new tensors; a rate that is a tensor widens those without dimensions."""
    return [leaf.to(before.dtype) for before, leaf in zip(old, new, strict=True)]


def _plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """x + factor y in one pass, without a tensor that holds factor y."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor)
    return torch.add(x, y, alpha=factor)


def _plus_over(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """x + factor y, written over x, which nothing else reads."""
    if torch.compiler.is_compiling() or transform_stack.active():
        return _plus(x, factor, y)
    if isinstance(factor, Tensor):
        return x.addcmul_(y, factor)
    return x.add_(y, alpha=factor)


def _at(rate: Rate, step: Tensor) -> float | Tensor:
    return rate(step) if callable(rate) else rate
