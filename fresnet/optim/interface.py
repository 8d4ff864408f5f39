"""What an optimizer is, what it carries along, and which leaves it may be asked to tell apart."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, check_type, describe
from fresnet.optim.schedules import Schedule
from fresnet.tree import Tree, Where
from fresnet.tree.text import register
from fresnet.tree.walks import check_floats

Rate: TypeAlias = float | Tensor | Schedule


class Update(Protocol):
    """A step of an optimizer. Gradients and weights are trees of one structure and its shapes."""

    def __call__(self, grads: object, state: "State", weights: Tree) -> tuple[Tree, "State"]: ...


def everywhere(path: tree.Path) -> bool:
    """Select every leaf. This is what PyTorch's optimizers decay.

    >>> everywhere(("head", "bias"))
    True
    """
    return True


class Optimizer(NamedTuple):
    """`init(weights) -> state` and `update(grads, state, weights) -> (weights, state)`.

    A state is a tree of float tensors. Neither function writes to an argument. `trains` says which
    leaves change; a train step takes gradients of these alone.
    """

    init: Callable[[object], "State"]
    update: Update
    trains: Where = everywhere


class State(NamedTuple):
    """What an optimizer carries along: the number of updates, and means of past gradients.

    Args:
      step: the number of updates so far, `[]`.
      moments: trees like the weights; none, or the velocity, or Adam's two, the mean gradient and
        the mean square. `by_path` has a tuple of them for each part of the weights.
    """

    step: Tensor
    moments: tuple[Any, ...]


register(State)


def kernels(path: tree.Path) -> bool:
    """Select convolutions and the head's matrix, but no norm and no bias.

    >>> layer = ("stages", 0, 1, "layer2")
    >>> kernels((*layer, "conv")), kernels((*layer, "norm", "scale")), kernels(("head", "bias"))
    (True, False, False)
    """
    return path[-1:] not in (("scale",), ("bias",))


def all_but_norms(path: tree.Path) -> bool:
    """Select every leaf except those of norms and of biases that stand in a norm's place.

    >>> all_but_norms(("head", "bias")), all_but_norms(("stages", 0, 1, "layer2", "norm", "bias"))
    (True, False)
    """
    return "norm" not in path


def first_step(weights: object) -> Tensor:
    """The number of updates before the first one, `[]`.

    Raises:
      FresnetError: if the weights have no leaf, or one that is no float tensor.
    """
    check_floats("init", weights)
    first = tree.leaves(weights)[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=first.device)


def check_optimizer(caller: str, optimizer: object) -> None:
    """Refuse what is not an optimizer, such as a learning rate."""
    check_type(caller, Optimizer, "one of fresnet.optim, such as sgd(0.1)", optimizer=optimizer)


def check_state(state: State, count: int) -> None:
    """Refuse what is no state, and that of an optimizer that keeps more or fewer moments."""
    if not isinstance(state, State):
        raise FresnetError(
            "update expects grads, a state as init makes it, and weights, in this order; "
            f"got {describe(state)} for the state"
        )
    if len(state.moments) != count:
        raise FresnetError(
            f"update expects a state with {count} moments, as its own init makes it; "
            f"got one with {len(state.moments)}"
        )
