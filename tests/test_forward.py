"""`forward` and `features` equal torchvision's network in evaluation mode."""

import pytest
import reference
import torch
from assertions import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import class_counts, examples, images, seeds, small_specs, tiny_params
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

import fresnet
from fresnet import tree
from fresnet.network.check import DTYPES
from fresnet.network.nodes import Norm, NormStats, Weights
from fresnet.network.norm import inference_norm


@examples(20)
@given(params=tiny_params(), dtype=st.sampled_from(DTYPES))
def test_a_network_is_cast_but_its_statistics_stay_wide(
    params: fresnet.Params, dtype: torch.dtype
) -> None:
    cast = fresnet.cast(params, dtype)
    assert_same(cast.weights, tree.map(lambda leaf: leaf.to(dtype), params.weights))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert_same(cast.stats, tree.map(lambda leaf: leaf.to(wide), params.stats))
    assert fresnet.forward(cast, torch.zeros(1, 3, 33, 33, dtype=dtype)).dtype is dtype
    assert_same(fresnet.cast(cast, dtype), cast)


@pytest.mark.slow
@reference.every_member
@examples(8)
@given(x=images(), seed=seeds, classes=class_counts)
def test_forward_equals_torchvision(name: str, x: Tensor, seed: int, classes: int) -> None:
    model = reference.module(fresnet.SPECS[name], seed, classes).eval()
    with torch.no_grad():
        logits = fresnet.forward(reference.params(model), x)
        assert_close(logits, model(x), 1e-12)


@examples(25)
@given(x=images(), seed=seeds, classes=class_counts, spec=small_specs())
def test_forward_of_any_depths_equals_torchvision(
    x: Tensor, seed: int, classes: int, spec: fresnet.Spec
) -> None:
    model = reference.module(spec, seed, classes).eval()
    with torch.no_grad():
        assert_close(fresnet.forward(reference.params(model), x), model(x), 1e-12)


@reference.every_member
@examples(4)
@given(x=images(dtype=torch.float32), seed=seeds)
def test_forward_in_float32_equals_torchvision_to_the_bit(name: str, x: Tensor, seed: int) -> None:
    model = reference.module(fresnet.SPECS[name], seed, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_same(fresnet.forward(reference.params(model), x), model(x))


@reference.every_member
@examples(3)
@given(x=images(), seed=seeds)
def test_features_equal_torchvisions_stages(name: str, x: Tensor, seed: int) -> None:
    model = reference.module(fresnet.SPECS[name], seed).eval()
    with torch.no_grad():
        actual = fresnet.features(reference.params(model), x)
        expected = reference.activations(model, x)
    assert len(actual) == 5
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, 1e-12, f"activation {i}")


@pytest.mark.slow
@examples(10)
@given(x=images(), seed=seeds, spec=small_specs())
def test_gradients_through_forward_equal_torchvision(
    x: Tensor, seed: int, spec: fresnet.Spec
) -> None:
    """These are the gradients of fine-tuning with running statistics."""
    model = reference.module(spec, seed).eval()
    weights, stats = reference.params(model)
    model(x).square().sum().backward()

    def loss(weights: Weights) -> Tensor:
        return fresnet.forward(fresnet.Params(weights, stats), x).square().sum()

    grads = torch.func.grad(loss)(weights)
    actual = fresnet.to_state_dict(fresnet.Params(grads, stats))
    for name, expected in reference.gradients(model).items():
        assert_close(actual[name], expected, 1e-10, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [2, 5, 16, 19])
def test_inference_norm_rounds_alike_where_a_derivative_is_taken(
    channels: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """PyTorch's kernel and the composed form give the same bits, in the same layout."""
    generator = torch.Generator().manual_seed(channels)
    scale, bias, mean = torch.randn(3, channels, generator=generator).to(dtype)
    norm, mean = Norm(scale, bias), mean.to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, channels, 3, 7, generator=generator).to(dtype, memory_format=layout)
    stats = NormStats(mean, mean.square() + 0.3)
    y, _ = inference_norm(norm, stats, x)
    composed, _ = inference_norm(norm, stats._replace(mean=mean.clone().requires_grad_()), x)
    assert composed.requires_grad
    assert not y.requires_grad
    assert y.stride() == composed.stride()
    assert_same(y, composed.detach())


@examples(20)
@given(x=images())
def test_inference_norm_is_differentiable_in_every_argument(x: Tensor) -> None:
    """The statistics are among them. PyTorch's own kernel refuses these."""
    x = x[:2, :, :3, :3].clone().requires_grad_()
    vectors = [torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(4)]

    def y(scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
        return inference_norm(Norm(scale, bias), NormStats(mean, var), x)[0]

    assert gradcheck(y, (*vectors, x))


def test_statistics_have_derivatives_in_forward_mode_without_torch_func() -> None:
    params = fresnet.init(
        0, fresnet.Spec(fresnet.RESNET18.block, (1,), 4), num_classes=3, dtype=torch.float64
    )
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    along = tree.map(torch.cos, params.stats)

    def logits(stats: fresnet.nodes.Stats) -> Tensor:
        return fresnet.forward(params._replace(stats=stats), x)

    expected = torch.func.jvp(logits, (params.stats,), (along,))[1]
    with forward_ad.dual_level():
        dual = tree.map(forward_ad.make_dual, params.stats, along)
        tangent = forward_ad.unpack_dual(logits(dual)).tangent
    torch.testing.assert_close(tangent, expected)
