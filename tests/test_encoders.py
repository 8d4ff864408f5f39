"""Networks without a head, and the features of any network, equal other libraries'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import timm
import torch
import transformers
from assertions import assert_all_close, assert_close, assert_same, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, images, seeds, small_specs, tiny_params, training_images
from torch import Tensor, nn
from torch.func import grad, vmap

import fresnet
from fresnet import FresnetError, Params, Spec, nodes, optim, training, tree
from fresnet.network.nodes import Stats, Weights

SPEC = Spec(nodes.BasicBlock, (1, 1), width=4)
ENCODER = fresnet.init(0, SPEC, num_classes=0)
X = torch.randn(3, 3, 40, 36, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])
LAST = fresnet.features(ENCODER, X)[-1]


def without_head(params: Params) -> Params:
    return params._replace(weights=params.weights._replace(head=nodes.NoHead()))


def check_statistics(params: Params, layout: str, model: nn.Module) -> None:
    state = fresnet.to_state_dict(params, layout)
    running = {name: b for name, b in model.named_buffers() if "running" in name}
    assert_all_close({name: state[name] for name in running}, running, 1e-12)


def check_encoder(
    model: nn.Module, layout: str, x: Tensor, read: Callable[[Any], Tensor] = lambda y: y
) -> None:
    """Entries go both ways. Features are the module's, in training too, and so are statistics."""
    state = model.state_dict()
    params = fresnet.from_state_dict(state)
    assert type(params.weights.head) is nodes.NoHead
    back = fresnet.to_state_dict(params, layout)
    assert back.keys() == state.keys()
    assert_same({name: back[name] for name in state}, dict(state))
    model.load_state_dict(back, strict=True)
    with torch.no_grad():
        assert_close(fresnet.forward(params, x), read(model.eval()(x)), 1e-12, "inference")
        features, stats = fresnet.forward_train(params, x)
        assert_close(features, read(model.train()(x)), 1e-12, "training")
    check_statistics(params._replace(stats=stats), layout, model)


@examples(5)
@given(x=training_images(), seed=seeds, spec=small_specs())
def test_encoders_of_torchvision(x: Tensor, seed: int, spec: Spec) -> None:
    model = reference.module(spec, seed)
    model.fc = nn.Identity()
    check_encoder(model, "torchvision", x)


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "seresnet18", "resnetv2_50"])
def test_encoders_of_timm(name: str) -> None:
    """In ResNet V2 the last norm and ReLU come before the mean."""
    model = reference.perturbed(timm.create_model(name, num_classes=0), seed=0)
    check_encoder(model, "timm", X.double())


@examples(10)
@given(
    x=training_images(),
    seed=seeds,
    layer_type=st.sampled_from(["basic", "bottleneck"]),
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=3),
)
def test_encoders_of_hugging_face(x: Tensor, seed: int, layer_type: str, depths: list[int]) -> None:
    """`ResNetModel`, of which `ResNetForImageClassification` has the names behind a prefix."""
    expansion = 4 if layer_type == "bottleneck" else 1
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4 * expansion << stage for stage in range(len(depths))],
        depths=depths,
        layer_type=layer_type,
    )
    model = reference.perturbed(transformers.ResNetModel(config), seed)
    check_encoder(model, "huggingface", x, lambda output: output.pooler_output.flatten(1))


def test_a_folder_of_hugging_faces_encoder_is_read(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    model = reference.perturbed(transformers.ResNetModel(config), 0, torch.float32)
    model.save_pretrained(tmp_path)
    assert_same(fresnet.load(tmp_path), fresnet.from_state_dict(model.state_dict()))


@examples(25)
@given(params=tiny_params(), x=images())
def test_features_are_what_a_head_sees(params: Params, x: Tensor) -> None:
    features, head = fresnet.embed(params, x), params.weights.head
    assert_same(features, fresnet.forward(without_head(params), x))
    if type(head) is nodes.NoHead:
        assert_same(features, fresnet.forward(params, x))
    else:
        assert_close(features @ head.weight.T + head.bias, fresnet.forward(params, x), 1e-12)


@examples(25)
@given(params=tiny_params(), x=images())
def test_forward_is_features_and_then_its_end(params: Params, x: Tensor) -> None:
    """To the bit, in ResNet V2 too, where a norm stands between them."""
    maps = fresnet.features(params, x)
    with unmutated(params, maps):
        assert_same(fresnet.forward_head(params, maps[-1]), fresnet.forward(params, x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((LAST, LAST), r"the last of features, activations \[b \d+ h w\] .*; got a tuple"),
        (LAST[0], r"at least one value; got float32 \(\d+, \d, \d\)"),
        (LAST[:0], r"at least one value; got float32 \(0, "),
        (LAST[..., :0], "at least one value; got float32"),
        (LAST[:, 1:], "at least one value; got float32"),
        (LAST.to_sparse(), "got sparse_coo float32"),
        (LAST.double(), "of the weights' torch.float32 on cpu; got torch.float64 on cpu"),
        (LAST.to("meta"), "got torch.float32 on meta"),
    ],
)
def test_what_is_not_the_last_activations_is_refused(x: Any, message: str) -> None:
    params = fresnet.with_head(ENCODER, num_classes=5, generator=0)
    with pytest.raises(FresnetError, match=message):
        fresnet.forward_head(params, x)
    with pytest.raises(FresnetError, match="forward_head expects Params"):
        fresnet.forward_head(params.weights, x)  # type: ignore[arg-type]


def test_the_end_of_forward_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        maps = fresnet.features(ENCODER, X)[-1]
        assert maps.dtype is torch.bfloat16
        assert_same(fresnet.forward_head(ENCODER, maps), fresnet.forward(ENCODER, X))


@examples(5)
@given(x=training_images(), seed=seeds, spec=small_specs(), momentum=st.floats(0, 1))
def test_features_in_training_equal_torchvisions_stages(
    x: Tensor, seed: int, spec: Spec, momentum: float
) -> None:
    """So do statistics, and the gradients of a loss that reads the output of every stage."""
    model = reference.module(spec, seed).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
    params = reference.params(model)

    def loss(weights: Weights) -> tuple[Tensor, tuple[tuple[Tensor, ...], Stats]]:
        found = fresnet.features_train(params._replace(weights=weights), x, momentum=momentum)
        return sum_of_squares(found[0]), found

    grads, (activations, stats) = grad(loss, has_aux=True)(params.weights)
    expected = reference.activations(model, x)
    sum_of_squares(expected).backward()
    assert len(activations) == len(expected) == 5
    for i, (a, b) in enumerate(zip(activations, expected, strict=True)):
        assert_close(a, b, 1e-12, f"activation {i}")
    check_statistics(params._replace(stats=stats), "torchvision", model)
    found, gradients = fresnet.to_state_dict(Params(grads, stats)), reference.gradients(model)
    assert_all_close({name: found[name] for name in gradients}, gradients, 1e-10)


def sum_of_squares(activations: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([one.square().sum() for one in activations]).sum()


@examples(25)
@given(params=tiny_params(grouped=False), x=training_images())
def test_features_in_training_are_those_of_forward_train(params: Params, x: Tensor) -> None:
    """Statistics are the same, that of V2's last norm too. Frozen norms make it `features`."""
    activations, stats = fresnet.features_train(params, x)
    assert_same(stats, fresnet.forward_train(params, x)[1])
    frozen = fresnet.freeze(params)
    found, same = fresnet.features_train(frozen, x)
    assert_same(same, params.stats)
    for a, b, c in zip(found, fresnet.features(params, x), activations, strict=True):
        assert_close(a, b, 1e-9)
        assert a.shape == c.shape


def test_the_body_does_not_depend_on_the_head() -> None:
    for name in ("resnet18", "resnetv2_50"):
        spec = fresnet.SPECS[name]
        headed = fresnet.init(0, spec, num_classes=7)
        assert_same(fresnet.init(0, spec, num_classes=0), without_head(headed))


def test_an_architecture_may_be_told_of_an_encoder() -> None:
    state = fresnet.to_state_dict(fresnet.init(0, fresnet.RESNET18, num_classes=0))
    params = fresnet.from_state_dict(state, architecture="resnet18")
    assert type(params.weights.head) is nodes.NoHead
    pooled = fresnet.from_state_dict(state, architecture="resnetblur18")
    assert type(pooled.weights.stem) is nodes.BlurredStem
    with pytest.raises(FresnetError, match="as architecture says"):
        fresnet.from_state_dict(state, architecture="resnet50")


def test_half_a_head_is_refused_and_an_error_says_that_there_is_none() -> None:
    state = fresnet.to_state_dict(ENCODER)
    with pytest.raises(FresnetError, match=r"fc.weight is missing: expected float \[k c\]"):
        fresnet.from_state_dict({**state, "fc.bias": torch.zeros(3)})
    with pytest.raises(FresnetError, match=r"width 4, no head, but:\s+layer1.0.x is unexpected"):
        fresnet.from_state_dict({**state, "layer1.0.x": torch.zeros(3, 8)})
    with pytest.warns(UserWarning, match=r"left out: fc.0.weight; it has no head"):
        fresnet.from_state_dict({**state, "fc.0.weight": torch.zeros(3, 8)})


def test_an_ensemble_of_encoders_maps() -> None:
    members = [fresnet.init(seed, SPEC, num_classes=0) for seed in range(2)]
    found = vmap(fresnet.embed, (0, None))(tree.stack(members), X)
    for features, member in zip(found, members, strict=True):
        assert_close(features, fresnet.embed(member, X), 1e-6)


def test_what_counts_classes_refuses_an_encoder() -> None:
    """A state of it may be made and kept: for steps of one's own."""
    state = training.start(ENCODER, optim.sgd(0.1))
    for mixing in (None, training.mixup(0.2)):
        step = training.make_train_step(optim.sgd(0.1), mixing=mixing)
        with pytest.raises(
            FresnetError, match="a train step expects a network with a head; got No"
        ):
            step(state, (X, Y))
    with pytest.raises(FresnetError, match=r"evaluate expects .*: fresnet.with_head\(params"):
        training.evaluate(ENCODER, [(X, Y)])


def test_an_encoder_says_that_it_is_one() -> None:
    *_, row = fresnet.summary(ENCODER, 64).rows
    assert row.layer == "NoHead"
    assert row.output == (8,)
    assert row.parameters == row.multiply_adds == 0
    assert row.description == "average pool"
