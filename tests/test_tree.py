"""Trees map, stack and ravel, or say where they differ."""

from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, tiny_params, trees
from torch.utils import _pytree

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import BasicBlock, Bottleneck


@examples(20)
@given(params=tiny_params())
def test_stack_and_unstack_are_inverse(params: Params) -> None:
    members = [params, tree.map(torch.neg, params), tree.map(torch.zeros_like, params)]
    for member, back in zip(members, tree.unstack(tree.stack(members)), strict=True):
        assert_same(back, member)


@examples(20)
@given(params=tiny_params())
def test_ravel_and_unravel_are_inverse(params: Params) -> None:
    vector = tree.ravel(params)
    assert len(vector) == sum(leaf.numel() for leaf in tree.leaves(params))
    assert_same(tree.unravel(params, vector), params)
    doubled = tree.unravel(params, 2 * vector)
    assert_same(doubled, tree.map(lambda leaf: 2 * leaf, params))
    together = torch.func.vmap(lambda v: tree.unravel(params, v))(torch.stack([vector, 2 * vector]))
    assert_same(tree.unstack(together)[1], doubled)
    for leaf in tree.leaves(doubled):
        assert leaf.ndim != 4 or leaf.is_contiguous(memory_format=torch.channels_last)


@examples(200)
@given(one=trees(st.integers()))
def test_a_tree_here_is_a_tree_for_torch_func(one: Any) -> None:
    found, spec = _pytree.tree_flatten(one)
    assert tree.leaves(one) == found
    keyed, _ = _pytree.tree_flatten_with_path(one)
    assert tree.paths(one) == [tuple(map(_step, path)) for path, _ in keyed]
    doubled = [2 * leaf for leaf in found]
    for other in (tree.map(lambda leaf: 2 * leaf, one), tree.unflatten(one, doubled)):
        assert _pytree.tree_flatten(other) == (doubled, spec)
    assert tree.map(lambda a, b, c: a + b + c, one, one, one) == tree.map(lambda a: 3 * a, one)


@examples(200)
@given(one=trees(st.integers()), other=trees(st.integers()))
def test_trees_of_one_structure_map_and_no_others(one: Any, other: Any) -> None:
    if _pytree.tree_structure(one) == _pytree.tree_structure(other):
        assert tree.leaves(tree.map(lambda _, b: b, one, other)) == tree.leaves(other)
    else:
        with pytest.raises(FresnetError, match="tree 2 differs from the first"):
            tree.map(lambda _, b: b, one, other)


def test_dicts_of_other_types_keep_them() -> None:
    counts = defaultdict(int, {"b": 1, "a": 2})
    doubled = tree.map(lambda leaf: 2 * leaf, [OrderedDict(counts), counts])
    assert doubled == [OrderedDict(b=2, a=4), {"b": 2, "a": 4}]
    assert type(doubled[0]) is OrderedDict
    assert type(doubled[1]) is defaultdict
    assert counts == {"b": 1, "a": 2}


def test_a_dict_in_another_order_is_another_tree() -> None:
    """So no leaf is taken for that of another key."""
    one, other = {"a": torch.tensor(1), "b": torch.tensor(2)}, {"b": torch.tensor(3)}
    other["a"] = torch.tensor(4)
    for call in (lambda: tree.map(torch.add, one, other), lambda: tree.stack([one, other])):
        with pytest.raises(FresnetError, match=r"tree 2 differs from the first at \('a',\)"):
            call()
    assert tree.unflatten(other, tree.leaves(other)) == other
    assert tree.paths(tree.map(torch.neg, other)) == tree.paths(other) == [("b",), ("a",)]


def _step(key: Any) -> Any:
    match key:
        case _pytree.GetAttrKey(name=name):
            return name
        case _pytree.SequenceKey(idx=index):
            return index
        case _pytree.MappingKey(key=name):
            return name


def test_trees_that_do_not_fit_are_refused() -> None:
    bottleneck = fresnet.init(0, Spec(Bottleneck, (2, 2), width=4))
    basic = fresnet.init(0, Spec(BasicBlock, (2, 2), width=4))
    wider = fresnet.init(0, Spec(BasicBlock, (2, 2), width=8))
    place = r"differs from the first at \('weights', 'stages', 0, 0, 'layer3', 'conv'\)"
    with pytest.raises(FresnetError, match=f"tree.map .*{place}"):
        tree.map(torch.add, bottleneck, basic)
    with pytest.raises(FresnetError, match=f"tree.stack .*{place}"):
        tree.stack([bottleneck, basic])
    with pytest.raises(
        FresnetError, match=r"\('weights', 'stem', 'layer', 'norm'\): FrozenNorm for Norm"
    ):
        tree.stack([basic, fresnet.freeze(basic)])
    with pytest.raises(FresnetError, match=r"got float32 \(4, 3, 7, 7\), float32 \(8, 3, 7, 7\)"):
        tree.stack([basic, wider])
    with pytest.raises(FresnetError, match=r"got float32 \(4, 3, 7, 7\), float64 \(4, 3, 7, 7\)"):
        tree.stack([basic, tree.map(torch.Tensor.double, basic)])
    with pytest.raises(FresnetError, match="a list or tuple of trees; got a Params"):
        tree.stack(basic)
    with pytest.raises(FresnetError, match=r"leaves of one dtype; got .*float"):
        tree.ravel((torch.zeros(1), torch.zeros(1).double()))
    with pytest.raises(FresnetError, match="at least one tree"):
        tree.stack([])
    with pytest.raises(FresnetError, match="expects leaves of one first dimension"):
        tree.unstack((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(FresnetError, match="expects leaves of one first dimension"):
        tree.unstack((torch.tensor(2.0),))
    with pytest.raises(FresnetError, match="expects 2 leaves; got 1"):
        tree.unflatten((1, 2), [1])
    with pytest.raises(FresnetError, match=r"a vector of 5 values; got float32 \(4,\)"):
        tree.unravel((torch.zeros(2), torch.zeros(3)), torch.zeros(4))
