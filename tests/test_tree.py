"""Trees map, stack and ravel, or say where they differ."""

import operator
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
from fresnet.network.nodes import BasicBlock, Bottleneck, FrozenNorm, Head, Weights


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


@examples(200)
@given(one=trees(st.integers()))
def test_a_function_of_paths_sees_each_leaf_with_its_own(one: Any) -> None:
    assert tree.leaves(tree.map_with_path(lambda *places: [places], one, one)) == [
        part
        for path, leaf in zip(tree.paths(one), tree.leaves(one), strict=True)
        for part in (*path, leaf, leaf)
    ]


@examples(200)
@given(one=trees(st.integers()))
def test_named_leaves_make_the_tree_again_in_any_order(one: Any) -> None:
    names = [tree.dotted(path) for path in tree.paths(one)]
    if len({*names}) < len(names):
        with pytest.raises(FresnetError, match="one leaf of each name; got two"):
            tree.named(one)
        return
    entries = tree.named(one)
    assert [*entries.items()] == [*zip(names, tree.leaves(one), strict=True)]
    blank = tree.map(lambda _: None, one)
    assert tree.unnamed(blank, dict(reversed(entries.items()))) == one
    fewer = dict([*entries.items()][1:])
    for refused, words in (({**entries, "more": 0}, "no 'more'"), (fewer, "a leaf for")):
        if [*refused] != names:
            with pytest.raises(FresnetError, match=f"tree.unnamed expects {words}"):
                tree.unnamed(blank, refused)


@examples(100)
@given(one=trees(st.integers()))
def test_at_exchanges_the_leaf_at_a_path_and_nothing_else(one: Any) -> None:
    before, paths = tree.leaves(one), tree.paths(one)
    begun = {(path[:n], tree.dotted(path[:n])) for path in paths for n in range(len(path) + 1)}
    names = [name for _, name in begun]
    for i, path in enumerate(paths):
        expected = tree.unflatten(one, [*before[:i], "new", *before[i + 1 :]])
        assert tree.at(one, path, "new") == expected
        steps = [str(step) for step in path]
        alone = all(names.count(".".join(steps[:n])) == 1 for n in range(1, len(steps) + 1))
        if steps and "." not in "".join(steps) and alone:
            assert tree.at(one, tree.dotted(path), "new") == expected
    assert tree.leaves(one) == before


def test_a_step_is_a_key_before_it_is_the_name_of_one() -> None:
    both = {0: "a", "0": "b", 1: "c"}
    assert tree.at(both, (0,), "new") == {0: "new", "0": "b", 1: "c"}
    assert tree.at(both, ("0",), "new") == {0: "a", "0": "new", 1: "c"}
    assert tree.at(both, "1", "new") == {0: "a", "0": "b", 1: "new"}


def test_at_exchanges_nodes_of_a_network() -> None:
    params = fresnet.init(0, Spec(BasicBlock, (2, 1), width=4), num_classes=5)
    frozen = FrozenNorm(*params.weights.stages[0][1].layer2.norm)
    for path in ("weights.stages.0.1.layer2.norm", ("weights", "stages", 0, 1, "layer2", "norm")):
        changed = tree.at(params, path, frozen)
        assert changed.weights.stages[0][1].layer2.norm is frozen
        assert changed.weights.stages[0][0] is not None
        assert_same(tree.map(torch.neg, changed).stats, tree.map(torch.neg, params).stats)
    head = Head(torch.zeros(2, 8), torch.zeros(2))
    assert tree.at(params, "weights.head", head).weights.head is head
    assert tree.at(params, (), head) is head  # type: ignore[comparison-overlap]
    with pytest.raises(FresnetError, match="a Weights has no step 'hed'; did you mean 'head'"):
        tree.at(params, "weights.hed", head)
    with pytest.raises(FresnetError, match=r"float32 \(5,\) has no step 'x'; it has none"):
        tree.at(params, "weights.head.bias.x", head)


@examples(200)
@given(one=trees(st.integers()), data=st.data())
def test_a_tree_in_parts_combines_to_itself(one: Any, data: st.DataObject) -> None:
    chosen = {path for path in tree.paths(one) if data.draw(st.booleans())}
    if not chosen:
        with pytest.raises(FresnetError, match="expects where to choose a leaf; got none of"):
            tree.partition(one, chosen.__contains__)
        return
    parts = tree.partition(one, chosen.__contains__)
    for part, side in zip(parts, (True, False), strict=True):
        expected = [path for path in tree.paths(one) if (path in chosen) is side]
        assert tree.paths(part) == expected
        found, spec = _pytree.tree_flatten(part)
        assert found == tree.leaves(part)
        assert _pytree.tree_unflatten(found, spec) == part
    nothing = tree.map(lambda _: (), one)
    for whole in (tree.combine(*parts), tree.combine(nothing, *reversed(parts))):
        assert all(tree.leaves(tree.map(operator.eq, whole, one)))


def test_a_network_in_parts_is_differentiated_in_one_of_them() -> None:
    params = fresnet.init(0, Spec(Bottleneck, (1, 1), width=4), num_classes=5, dtype=torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(weights: Weights) -> torch.Tensor:
        return fresnet.forward(params._replace(weights=weights), x).square().sum()

    head, rest = tree.partition(params.weights, tree.matching("head"))
    grads = torch.func.grad(lambda part: loss(tree.combine(part, rest)))(head)
    assert tree.paths(grads) == [("head", "weight"), ("head", "bias")]
    assert_same(grads.head, torch.func.grad(loss)(params.weights).head)
    with pytest.raises(
        FresnetError, match=r"in one of them; got float64 .* at \('head', 'weight'\)"
    ):
        tree.combine(head, params.weights)
    with pytest.raises(FresnetError, match="got a Bottleneck and a BasicBlock at"):
        tree.combine(head.stages[0][0], BasicBlock(*head.stages[0][0][1:]))
    with pytest.raises(FresnetError, match="got a Norm and a FrozenNorm at"):
        tree.combine(params.weights.stem.layer.norm, FrozenNorm((), ()))  # type: ignore[arg-type]


def test_patterns_match_names_and_what_lies_below() -> None:
    def matched(*patterns: str) -> list[str]:
        where = tree.matching(*patterns)
        return [tree.dotted(path) for path in tree.paths(NUMBERS) if where(path)]

    assert matched("head") == ["head.weight", "head.bias"]
    assert matched("stages.1") == ["stages.1.norm.scale"]
    assert matched("stages.1*") == ["stages.1.norm.scale", "stages.10.norm.scale"]
    assert matched("*.norm", "*.bias") == [
        "stages.1.norm.scale",
        "stages.10.norm.scale",
        "head.bias",
        "header.bias",
    ]
    assert matched("stages.[02]", "hea") == matched() == []
    assert matched("stages.??") == ["stages.10.norm.scale"]
    assert len(matched("*")) == len(tree.leaves(NUMBERS))


NUMBERS = {
    "stages": {"1": {"norm": {"scale": 0}}, "10": {"norm": {"scale": 0}}},
    "head": {"weight": 0, "bias": 0},
    "header": {"bias": 0},
}


@examples(50)
@given(params=tiny_params(grouped=False), data=st.data())
def test_trees_are_equal_or_close_in_every_leaf(params: Params, data: st.DataObject) -> None:
    """One leaf differs in one respect, and the trees are told apart."""
    assert tree.equal(params, params)
    assert tree.equal(params, tree.map(torch.clone, params))
    assert tree.allclose(params, tree.map(lambda leaf: leaf * (1 + 1e-9), params))
    path = data.draw(st.sampled_from(tree.paths(params)))
    leaf = tree.named(params)[tree.dotted(path)]
    for other in (leaf.float(), leaf[None], leaf[:0], leaf.to("meta"), leaf + 1e-3):
        for same in (tree.equal, tree.allclose):
            assert not same(params, tree.at(params, path, other))
            assert not same(tree.at(params, path, other), params)
    nudged = tree.at(params, path, leaf + 1e-6)
    assert not tree.equal(params, nudged)
    assert not tree.allclose(params, nudged, rtol=0)
    assert tree.allclose(params, nudged, rtol=0, atol=1e-5)
    frozen = fresnet.freeze(params)
    assert tree.equal(params, frozen) == tree.allclose(params, frozen) == (frozen is params)


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
    last = r"\('weights', 'stages', 0, 0, 'layer3', 'conv'\)"
    place = rf"differs from the first at {last}, where it has \('weights', 'stages', 0, 1, 'layer1'"
    with pytest.raises(FresnetError, match=f"tree.map .*{place}"):
        tree.map(torch.add, bottleneck, basic)
    with pytest.raises(FresnetError, match=f"tree.stack .*{place}"):
        tree.stack([bottleneck, basic])
    with pytest.raises(
        FresnetError, match=r"\('weights', 'stem', 'layer', 'norm'\): FrozenNorm for Norm"
    ):
        tree.stack([basic, fresnet.freeze(basic)])
    for pair, lacks in (
        ((basic.weights, basic), "where it has"),
        (([1, 2], [1]), "which it lacks"),
    ):
        with pytest.raises(FresnetError, match=lacks):
            tree.map(torch.add, *pair)
    with pytest.raises(FresnetError, match=r"at \(1,\), which the first lacks"):
        tree.map(torch.add, [1], [1, 2])
    with pytest.raises(FresnetError, match="expects a vector of 5 values; got a Params"):
        tree.unravel(torch.zeros(5), basic)  # type: ignore[arg-type]
    with pytest.raises(FresnetError, match=r"such as tree.matching\('head'\); got '\*.norm'"):
        tree.partition(basic, "*.norm")  # type: ignore[arg-type]
    with pytest.raises(FresnetError, match=r"got none of \d+, such as weights.stem.layer.conv"):
        tree.partition(basic, tree.matching("norm"))
    with pytest.raises(
        FresnetError, match=r"got float32 \(4, 3, 7, 7\) on cpu, float32 \(8, 3, 7, 7\)"
    ):
        tree.stack([basic, wider])
    with pytest.raises(
        FresnetError, match=r"got float32 \(4, 3, 7, 7\) on cpu, float64 \(4, 3, 7, 7\)"
    ):
        tree.stack([basic, tree.map(torch.Tensor.double, basic)])
    with pytest.raises(FresnetError, match="a list or tuple of trees; got a Params"):
        tree.stack(basic)
    with pytest.raises(FresnetError, match=r"leaves of one dtype on one device; got .*float64"):
        tree.ravel((torch.zeros(1), torch.zeros(1).double()))
    on_meta = tree.map(lambda leaf: leaf.to("meta"), basic)
    with pytest.raises(FresnetError, match=r"one device; got .*float32 on cpu and .* on meta"):
        tree.ravel((basic, on_meta))
    with pytest.raises(
        FresnetError, match=r"got float32 \(4, 3, 7, 7\) on cpu, float32 .* on meta"
    ):
        tree.stack([basic, on_meta])
    for compare in (tree.equal, tree.allclose):
        assert not compare(basic, on_meta)
        assert not compare(tree.map(torch.Tensor.double, on_meta), on_meta)
        with pytest.raises(FresnetError, match=f"tree.{compare.__name__} expects tensors with val"):
            compare((basic, on_meta), (basic, on_meta))
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
