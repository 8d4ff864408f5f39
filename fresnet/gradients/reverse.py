"""`torch.func.grad_and_value` at the price of `torch.autograd`.

torch.func keeps the graph of a loss until its gradient is complete, because that gradient may be
differentiated again. Where nobody can do so, each part of the graph is freed here as soon as the
backward pass has gone through it, and operations take their quicker forms.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import PLAIN, FresnetError, check_type, describe, shown
from fresnet.numbers import as_integer
from fresnet.pytorch import transform_stack
from fresnet.pytorch.inference_mode import outside_inference_mode


def grad_and_value(
    loss_fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`torch.func.grad_and_value`, quicker and in less memory where no transform is around it.

    Signature and results are torch.func's. Under a transform or a compiler, and where an argument
    requires a gradient, torch.func computes them. If the loss depends on anything else that
    requires a gradient, so do the results. If aux holds objects of which only torch.func knows
    whether they hold tensors, loss_fn is called a second time, by torch.func.

    >>> import torch, fresnet
    >>> def loss_fn(w, x):
    ...     return (w["scale"] * x).sum(), x.mean()
    >>> fresnet.grad_and_value(loss_fn, has_aux=True)({"scale": torch.ones(2)}, torch.ones(2))
    ({'scale': tensor([1., 1.])}, (tensor(2.), tensor(1.)))

    Args:
      loss_fn: a function of trees of tensors that returns a float tensor `[]`, the loss.
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

    def checked(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        _check(result, has_aux)
        return result

    composed = torch.func.grad_and_value(checked, argnums, has_aux)
    if torch.compiler.is_compiling():
        return composed
    freeing = outside_inference_mode(partial(_freeing, checked, has_aux))

    @wraps(loss_fn)
    def gradient(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if torch.compiler.is_compiling():
            return composed(*args, **kwargs)
        places = _places(argnums, len(args))
        by = tuple(args[place] for place in places)
        found = freeing(places, by, args, kwargs) if _is_free(by, args, kwargs) else None
        if found is None:
            return composed(*args, **kwargs)
        grads, value = found
        return grads if isinstance(argnums, tuple) else grads[0], value

    return gradient


def _freeing(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    places: Sequence[int],
    by: tuple[Any, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any] | None:
    """The gradients by these arguments, and the value; None if torch.func has to look at aux."""
    inputs = [leaf.detach().requires_grad_() for leaf in tree.leaves(by)]
    arguments = [*args]
    for place, argument in zip(places, tree.unflatten(by, inputs), strict=True):
        arguments[place] = argument
    with torch.enable_grad():
        result = loss_fn(*arguments, **kwargs)
    loss, aux = result if has_aux else (result, ())
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in tree.leaves(aux)):
        return None  # it may hold tensors
    known = torch.is_grad_enabled(), inputs
    further = _goes_on(loss, *known)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, inputs, create_graph=further, materialize_grads=True)
    else:
        grads = tuple(map(torch.zeros_like, inputs))

    def cut(leaf: Any) -> Any:
        return leaf.detach() if isinstance(leaf, Tensor) and not _goes_on(leaf, *known) else leaf

    loss, aux = tree.map(cut, (loss, aux))
    return tree.unflatten(by, grads), (loss, aux) if has_aux else loss


def _places(argnums: int | tuple[int, ...], count: int) -> list[int]:
    numbers = [*map(as_integer, argnums if isinstance(argnums, tuple) else (argnums,))]
    places = [n % count for n in numbers if n is not None and -count <= n < count]
    if not numbers or len({*places}) != len(numbers):
        raise FresnetError(
            f"grad_and_value expects argnums to be different numbers from {-count} to {count - 1}, "
            f"as it is called with {count} arguments by position; got {shown(argnums)}"
        )
    return places


def _is_free(by: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether nobody can differentiate further by an argument, and the leaves can be copied.

    What they cannot be copied of, torch.func takes or refuses.
    """
    leaves, beside = tree.leaves(by), tree.leaves((args, [*kwargs.values()]))
    tensors = [leaf for leaf in beside if isinstance(leaf, Tensor)]
    return (
        bool(leaves)
        and all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        and not any(leaf.is_inference() for leaf in tensors)
        and not transform_stack.differentiated(*tensors)
    )


def _check(result: Any, has_aux: bool) -> None:
    """Refuse what is no loss, or no pair of a loss and something else."""
    if has_aux and (not isinstance(result, tuple) or len(result) != 2):
        raise FresnetError(
            "grad_and_value with has_aux expects loss_fn to return (loss, aux); "
            f"got {describe(result)}"
        )
    loss = result[0] if has_aux else result
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        hint = "" if isinstance(loss, Tensor) else ", or has_aux=True if it returns (loss, aux)"
        raise FresnetError(
            f"grad_and_value expects loss_fn to return a loss, a float tensor []{hint}; "
            f"got {describe(loss)}"
        )


def _goes_on(result: Tensor, enabled: bool, inputs: Sequence[Tensor]) -> bool:
    """Whether others can differentiate a result, by what is none of the inputs."""
    return transform_stack.has_tangent(result) or (enabled and reaches_further(result, inputs))


def reaches_further(result: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a value depends on a tensor that wants a gradient, other than the inputs."""
    if result.requires_grad and result.grad_fn is None:
        return all(result is not one for one in inputs)
    known, waiting, seen = set(map(id, inputs)), [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known:
                return True
            waiting += [following for following, _ in node.next_functions]
    return False
