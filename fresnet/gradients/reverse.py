"""`torch.func.grad_and_value` at the price of `torch.autograd`.

torch.func keeps the graph of a loss until its gradient is complete, because that gradient may be
differentiated again. Where nobody can do so, each part of the graph is freed here as soon as the
backward pass has gone through it, and operations take their quicker forms.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, check_type, describe, shown
from fresnet.numbers import as_integer
from fresnet.pytorch import transform_stack


def grad_and_value(
    loss_fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`torch.func.grad_and_value`, quicker and in less memory where no transform is around it.

    Signature and results are torch.func's. Under a transform or a compiler, and where an argument
    requires a gradient, torch.func computes them. If the loss depends on anything else that
    requires a gradient, so do the results.

    >>> import torch, fresnet
    >>> def loss_fn(w, x):
    ...     return (w["scale"] * x).sum(), x.mean()
    >>> fresnet.grad_and_value(loss_fn, has_aux=True)({"scale": torch.ones(2)}, torch.ones(2))
    ({'scale': tensor([1., 1.])}, (tensor(2.), tensor(1.)))

    Args:
      loss_fn: a function of trees of tensors that returns a 0-d tensor, the loss.
      argnums: the number of the argument by which the gradient is taken, or a tuple of several.
      has_aux: whether loss_fn returns `(loss, aux)`, with a tree of which no derivative is taken.
    Returns:
      A function of the same arguments that returns `(grads, loss)`, or `(grads, (loss, aux))`.
      grads is a tree like the argument; of several arguments, a tuple of trees.
    Raises:
      FresnetError: if loss_fn is no function. What is returned raises it if there are no such
        arguments, or if loss_fn returns something else.
    """
    check_type("grad_and_value", Callable, "a function", loss_fn=loss_fn)
    composed = torch.func.grad_and_value(loss_fn, argnums, has_aux)
    if torch.compiler.is_compiling():
        return composed

    @wraps(loss_fn)
    def gradient(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if torch.compiler.is_compiling():
            return composed(*args, **kwargs)
        places = _places(argnums, len(args))
        by = tuple(args[place] for place in places)
        leaves, beside = tree.leaves(by), tree.leaves((args, [*kwargs.values()]))
        tensors = [leaf for leaf in beside if isinstance(leaf, Tensor)]
        if not all(map(_is_plain, leaves)) or transform_stack.differentiated(*tensors):
            return composed(*args, **kwargs)
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        arguments = [*args]
        for place, argument in zip(places, tree.unflatten(by, inputs), strict=True):
            arguments[place] = argument
        with torch.enable_grad():
            result = loss_fn(*arguments, **kwargs)
        loss, aux = _checked(result) if has_aux else (_checked((result, ()))[0], ())
        further = torch.is_grad_enabled() and _reaches_further((loss, aux), inputs)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, inputs, create_graph=further, materialize_grads=True)
        else:
            grads = tuple(map(torch.zeros_like, leaves))
        if not further:
            loss, aux = tree.map(_detached, (loss, aux))
        found = tree.unflatten(by, grads)
        return found if isinstance(argnums, tuple) else found[0], (loss, aux) if has_aux else loss

    return gradient


def _places(argnums: int | tuple[int, ...], count: int) -> list[int]:
    numbers = [*map(as_integer, argnums if isinstance(argnums, tuple) else (argnums,))]
    if not numbers or any(number is None or not -count <= number < count for number in numbers):
        raise FresnetError(
            f"grad_and_value expects argnums of {count} positional arguments; got {shown(argnums)}"
        )
    return [number for number in numbers if number is not None]


def _is_plain(leaf: object) -> bool:
    """Whether a leaf can be copied as one that requires a gradient; torch.func says what cannot."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_inference()


def _checked(result: Any) -> tuple[Tensor, Any]:
    """The loss and what is beside it.

    Raises:
      FresnetError: if these are no tensor `[]` and no pair.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise FresnetError(
            f"grad_and_value with has_aux expects loss_fn to return (loss, aux); "
            f"got {describe(result)}"
        )
    loss, aux = result
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        hint = "" if isinstance(loss, Tensor) else ", or has_aux=True if it returns (loss, aux)"
        raise FresnetError(
            f"grad_and_value expects loss_fn to return a loss, a float tensor []{hint}; "
            f"got {describe(loss)}"
        )
    return loss, aux


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _reaches_further(results: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph of results leads to tensors that want a gradient, other than the inputs."""
    known = set(map(id, inputs))
    waiting: list[Any] = []
    for leaf in tree.leaves(results):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            if leaf.grad_fn is None and id(leaf) not in known:
                return True
            waiting.append(leaf.grad_fn)
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known:
                return True
            waiting += [following for following, _ in node.next_functions]
    return False
