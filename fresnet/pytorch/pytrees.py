"""Nodes that an older PyTorch takes for leaves."""

from typing import Any

import torch

try:
    from torch.utils import _pytree
except ImportError:  # it is private
    _pytree = None  # type: ignore[assignment]


def register(*kinds: Any) -> None:
    """Let `torch.func` see what is in nodes of these types of NamedTuple.

    It does so without being told, but for PyTorch before 2.9 where a type is `Generic`.
    """
    for kind in kinds:
        node = kind._make(kind._fields)
        if _pytree is not None and _pytree.tree_leaves(node) == [node]:
            _pytree.register_pytree_node(kind, lambda node: ([*node], type(node)), _made)
            torch.fx._pytree.register_pytree_flatten_spec(kind, lambda node, spec: [*node])


def _made(children: Any, kind: Any) -> Any:
    return kind._make(children)
