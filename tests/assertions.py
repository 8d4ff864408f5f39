"""Every comparison of the suite."""

import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnet import Params, forward, tree
from fresnet.errors import describe
from fresnet.network.net import run_network
from fresnet.network.regimes import INFERENCE


def assert_close(actual: Tensor, expected: Tensor, relative: float, name: str = "tensor") -> None:
    """||actual - expected|| <= relative ||expected||."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    error, norm = (actual - expected).norm().item(), expected.norm().item()
    assert error <= relative * norm, f"{name}: off by {error:.2e}, norm {norm:.2e}"


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float
) -> None:
    """Both have the same names, and each tensor is close in its own norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, relative, name)


def assert_trees_close(actual: Any, expected: Any, relative: float) -> None:
    """The trees have one structure, and each leaf is close in its own norm."""
    names = tree.paths(expected)
    assert tree.paths(actual) == names
    for name, a, b in zip(names, tree.leaves(actual), tree.leaves(expected), strict=True):
        assert_close(a, b, relative, str(name))


def assert_same(actual: Any, expected: Any) -> None:
    """The trees or tensors have one structure and are equal to the bit."""
    names = tree.paths(expected)
    assert tree.paths(actual) == names
    for name, a, b in zip(names, tree.leaves(actual), tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def assert_identical(actual: Any, expected: Any) -> None:
    """The trees have the same node types, and leaves of the same strides and bits, even in NaNs."""
    tree.map(torch.equal, actual, expected)  # refuses other node types, even without leaves
    for name, a, b in zip(
        tree.paths(expected), tree.leaves(actual), tree.leaves(expected), strict=True
    ):
        assert describe(a) == describe(b), name
        assert a.stride() == b.stride(), name
        assert bits(a) == bits(b), name


def logit_terms(params: Params, x: Tensor) -> Tensor:
    """The sum of each logit's absolute terms. Terms may cancel in a logit, but not in this sum."""
    head, features = params.weights.head, run_network(params, x, INFERENCE).y
    terms: Tensor = tree.map(torch.abs, head).run(features.abs(), INFERENCE)
    return terms


def grown_rounding(params: Params, x: Tensor, by: float) -> Tensor:
    """How far from themselves logits are, in the mean of squares, if weights are off by this part.

    That is what kernels leave which round by this part: they compute sums of terms that are off.
    """
    generator = torch.Generator().manual_seed(0)

    def off(leaf: Tensor) -> Tensor:
        return leaf * (1 + by * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype))

    exact = forward(params, x)
    errors = [forward(tree.map(off, params), x) - exact for _ in range(8)]
    return torch.stack(errors).square().sum((1, 2)).mean().sqrt()


def assert_close_or_rounded(logits: Tensor, params: Params, x: Tensor, relative: float) -> None:
    """Logits are those of `forward` in float64, or as close as rounding leaves this network's."""
    assert logits.dtype == x.dtype
    wide, exact = tree.map(Tensor.double, params), x.double()
    expected = forward(wide, exact)
    assert logits.shape == expected.shape
    error = (logits - expected).norm()
    if error > relative * expected.norm():
        assert error <= 4 * grown_rounding(wide, exact, torch.finfo(x.dtype).eps)


def bits(x: Tensor) -> bytes:
    return x.detach().reshape(-1)[:, None].view(torch.uint8).numpy().tobytes()


@contextmanager
def unmutated(*trees: Any) -> Iterator[None]:
    """No leaf is written to: its values and its version counter stay the same."""
    leaves = tree.leaves(trees)
    before = [(leaf.clone(), leaf._version) for leaf in leaves]
    yield
    for leaf, (value, version) in zip(leaves, before, strict=True):
        assert leaf._version == version
        assert bits(leaf) == bits(value)


@contextmanager
def global_generators_untouched() -> Iterator[None]:
    """Nothing draws from the global generators of Python, NumPy and torch, or seeds them."""
    before = _states()
    yield
    assert _states() == before


def _states() -> bytes:
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))
