"""Optimizers for the parts of a tree: another one for each part, or none."""

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe, listed, shown, suggestion
from fresnet.optim.interface import Optimizer, State, check_state, first_step
from fresnet.tree import Path, Tree, Where


def nowhere(path: Path) -> bool:
    """Select no leaf."""
    return False


def _untouched(grads: object, state: State, weights: Tree) -> tuple[Tree, State]:
    check_state(state, 0)
    return weights, State(state.step + 1, ())


frozen = Optimizer(lambda weights: State(first_step(weights), ()), _untouched, trains=nowhere)
"""The optimizer that leaves weights as they are. A train step takes no gradients of them."""


def by_path(optimizers: Mapping[str | Where, Optimizer]) -> Optimizer:
    """An optimizer that updates each leaf by the first optimizer whose key chooses it.

    >>> import torch, fresnet
    >>> optim = fresnet.optim
    >>> slow, fast = optim.sgd(0.1), optim.sgd(1.0)
    >>> optimizer = optim.by_path({"stem": optim.frozen, "head": fast, "*": slow})
    >>> weights = {name: torch.zeros(1) for name in ("stem", "stages", "head")}
    >>> grads = {name: torch.ones(1) for name in weights}
    >>> optimizer.update(grads, optimizer.init(weights), weights)[0]
    {'stem': tensor([0.]), 'stages': tensor([-0.1000]), 'head': tensor([-1.])}

    A state has the number of updates, which all share, and the moments that each optimizer keeps of
    its part of the weights.

    Args:
      optimizers: for each optimizer the pattern of a name, as in `tree.matching`, or a function of
        paths. A leaf goes to the first that chooses it.
    Raises:
      FresnetError: if optimizers is not as described. `init` and `update` raise it if no key
        chooses a leaf, or if all leaves that a key chooses go to keys before it, unless it is "*".
    """
    if not isinstance(optimizers, Mapping) or not all(
        isinstance(optimizer, Optimizer) for optimizer in optimizers.values()
    ):
        got = [*optimizers.values()] if isinstance(optimizers, Mapping) else [optimizers]
        raise FresnetError(
            "by_path expects a mapping from patterns, or functions of paths, to optimizers; "
            f"got {listed([*map(describe, got)])}"
        )
    rules = [
        (key, key if callable(key) else tree.matching(key), optimizer)
        for key, optimizer in optimizers.items()
    ]

    def shares(weights: object) -> list[tuple[Optimizer, set[Path]]]:
        """The optimizers that have leaves to update, each with the paths to them."""
        rest, found = tree.paths(weights), []
        for key, chooses, optimizer in rules:
            own = {path for path in rest if chooses(path)}
            if not own and key != "*":
                raise FresnetError(
                    "by_path expects each key to choose a leaf that none before it chooses; "
                    f"got {shown(key)}{_hint(key, weights)}"
                )
            rest = [path for path in rest if path not in own]
            found += [(optimizer, own)] if own else []
        if rest:
            names = listed([*map(tree.dotted, rest)])
            raise FresnetError(f"by_path expects a key for each leaf; got none for {names}")
        return found

    def init(weights: object) -> State:
        states = [optimizer.init(_part(weights, own)) for optimizer, own in shares(weights)]
        return _together(states, first_step(weights))

    def update(grads: object, state: State, weights: Tree) -> tuple[Tree, State]:
        found = shares(weights)
        check_state(state, len(found))
        parts = [*map(partial(_part, grads), (own for _, own in found))][::-1]
        del grads  # so each optimizer has the only reference to its gradients, and frees them
        updated = [
            optimizer.update(parts.pop(), State(state.step, moments), _part(weights, own))
            for (optimizer, own), moments in zip(found, state.moments, strict=True)
        ]
        new, states = zip(*updated, strict=True)
        return tree.combine(*new), _together(states, state.step + 1)

    def trains(path: Path) -> bool:
        chosen = (optimizer for _, chooses, optimizer in rules if chooses(path))
        return next(chosen, frozen).trains(path)

    return Optimizer(init, update, trains)


def _together(states: Iterable[State], step: Tensor) -> State:
    return State(step, tuple(state.moments for state in states))


def _hint(key: str | Where, weights: object) -> str:
    """What may have been meant by a pattern that matches no name."""
    paths = tree.paths(weights)
    if callable(key) or any(map(tree.matching(key), paths)):
        return ""
    nodes = [path[:end] for path in paths for end in range(1, len(path) + 1)]
    return f"; {suggestion(key, dict.fromkeys(map(tree.dotted, nodes)))}"


def _part(whole: Tree, own: set[Path]) -> Tree:
    places = zip(tree.paths(whole), tree.leaves(whole), strict=True)
    return tree.unflatten(whole, [leaf if path in own else () for path, leaf in places])
