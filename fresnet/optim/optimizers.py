"""SGD and LARS as pure functions of trees, and clipping."""

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError
from fresnet.optim.checks import check_where, checked_numbers, checked_rates
from fresnet.optim.interface import Optimizer, Rate, everywhere, kernels
from fresnet.optim.leafwise import Move, at_step, leafwise, plus, plus_over
from fresnet.tree import Tree, Where
from fresnet.tree.walks import check_floats


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
    check_where("sgd", decay_where=decay_where)
    has_velocity = isinstance(momentum, Tensor) or momentum > 0
    if nesterov and not has_velocity:
        raise FresnetError("sgd expects a momentum above 0 with nesterov; got 0")

    def at(step: Tensor) -> Move:
        rate, decay = at_step(learning_rate, step), at_step(weight_decay, step)

        def move(decays: bool, w: Tensor, g: Tensor, *velocity: Tensor) -> tuple[Tensor, ...]:
            if decays and not decoupled:
                g = plus(g, decay, w)
                added = plus if nesterov else plus_over
            else:
                added = plus
            velocity = tuple(added(g, momentum, v) for v in velocity)
            ahead = plus(g, momentum, velocity[0]) if nesterov else velocity[0] if velocity else g
            if decays and decoupled:
                w = plus(w, -rate * decay, w)
            return plus(w, -rate, ahead), *velocity

        return move

    return leafwise(at, moments=1 if has_velocity else 0, where=decay_where)


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

    A leaf has the factor 1 and does not decay if `|w|` or `|g|` is 0, or if `adapt_where` is false.
    In the paper the velocity holds the rates, `v <- momentum v + learning_rate g`. Here it does
    not, as in `torch.optim.SGD`. That is the same as long as the rate is.

    >>> import torch, fresnet
    >>> optimizer, weights = fresnet.optim.lars(1.0, momentum=0.0), {"conv": torch.ones(4)}
    >>> optimizer.update({"conv": 100 * torch.ones(4)}, optimizer.init(weights), weights)[0]
    {'conv': tensor([0.9990, 0.9990, 0.9990, 0.9990])}

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
    check_where("lars", adapt_where=adapt_where)

    def at(step: Tensor) -> Move:
        rate, decay = at_step(learning_rate, step), at_step(weight_decay, step)

        def move(adapts: bool, w: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if adapts:
                size, slope = w.norm(), g.norm()
                factor = trust * size / (slope + decay * size)
                usable = (size > 0) & (slope > 0)
                g = torch.where(usable, factor * plus(g, decay, w), g)
            v = plus(g, momentum, v)
            return plus(w, -rate, v), v

        return move

    return leafwise(at, moments=1, where=adapt_where)


def clip_by_norm(grads: Tree, max_norm: float | Tensor) -> Tree:
    """The gradients, scaled down if the norm of all of them together is above `max_norm`.

    >>> import torch
    >>> clip_by_norm((torch.tensor([3.0]), torch.tensor([4.0])), 1.0)
    (tensor([0.6000]), tensor([0.8000]))

    Raises:
      FresnetError: if max_norm is negative, or if grads is no tree of float tensors.
    Source: Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063, Alg. 1.
    """
    (max_norm,) = checked_numbers("clip_by_norm", max_norm=max_norm)
    check_floats("clip_by_norm", grads)
    norm = torch.stack([g.norm() for g in tree.leaves(grads)]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    return tree.map(lambda g: g * factor, grads)
