"""Nodes that an older PyTorch takes for leaves."""

from typing import Any

import torch

try:
    from torch.utils import _pytree
except ImportError:  # it is private
    _pytree = None  # type: ignore[assignment]


def register(*kinds: Any) -> None:
    """Let `torch.func` see what is in nodes of these types of NamedTuple.

    It does so without being told, but for PyTorch before 2.8 where a type is `Generic`.
    """
    for kind in kinds:
        node = kind._make(kind._fields)
        if _pytree is not None and _pytree.tree_leaves(node) == [node]:
            _pytree.register_pytree_node(kind, _flat, _made, flatten_with_keys_fn=_keyed)
            torch.fx._pytree.register_pytree_flatten_spec(kind, lambda node, spec: [*node])


def _flat(node: Any) -> tuple[list[Any], Any]:
    return [*node], type(node)


def _keyed(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    keys = map(_pytree.GetAttrKey, node._fields)
    return list(zip(keys, node, strict=True)), type(node)


def _made(children: Any, kind: Any) -> Any:
    return kind(*children)
