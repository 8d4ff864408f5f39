"""`as_module`: `forward` as a module, for libraries that ask for one, and for functional_call."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from assertions import assert_all_close, assert_close, assert_identical, assert_same, unmutated
from hypothesis import given
from strategies import examples, images, relaid, tiny_params
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import Bias, Bottleneck, GroupNorm, Layer, Rescale, over

PARAMS = fresnet.init(0, Spec(Bottleneck, (1, 1), width=3), num_classes=4, dtype=torch.float64)
X = torch.randn(5, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0])


def named(params: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers of the module."""
    module = fresnet.as_module(params)
    parameters = {name: leaf.detach() for name, leaf in module.named_parameters()}
    return parameters, dict(module.named_buffers())


@examples(25)
@given(params=tiny_params().flatmap(relaid), x=images())
def test_it_is_forward_and_gives_the_tree_back(params: Params, x: Tensor) -> None:
    with unmutated(params):
        module = fresnet.as_module(params)
        assert_close(module(x).detach(), fresnet.forward(params, x), 1e-9)
    found = tree.map(Tensor.detach, module.params())
    assert_identical(found, tree.map(Tensor.clone, params))
    assert not {leaf.data_ptr() for leaf in tree.leaves(found)} & {
        leaf.data_ptr() for leaf in tree.leaves(params)
    }
    weights = [*module.parameters()]
    assert all(a is b for a, b in zip(weights, tree.leaves(module.params().weights), strict=True))
    assert all(leaf.requires_grad for leaf in weights)
    assert [*map(id, module.buffers())] == [*map(id, tree.leaves(module.params().stats))]


def test_entries_have_the_names_of_state_dicts() -> None:
    theirs = reference.module(Spec(Bottleneck, (1, 1, 1, 1)), 0, num_classes=4).eval()
    module = fresnet.as_module(reference.params(theirs))
    expected = dict(theirs.named_parameters())
    assert [name for name, _ in module.named_parameters()] == [*expected]
    kept = {name: leaf for name, leaf in theirs.state_dict().items() if "num_batch" not in name}
    assert {*module.state_dict()} == {*kept}
    fresh = fresnet.as_module(fresnet.init(1, Spec(Bottleneck, (1, 1, 1, 1)), num_classes=4))
    fresh.to(next(theirs.parameters()).dtype).load_state_dict(kept, strict=True)
    assert_same(fresh.params(), module.params())
    assert_same(fresnet.from_state_dict(module.state_dict()), reference.params(theirs))


def test_training_by_a_module_is_training_of_weights() -> None:
    """With frozen norms, for which training and inference are one function."""
    frozen = fresnet.freeze(PARAMS)
    module = fresnet.as_module(frozen).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    cross_entropy(module(X), Y).backward()
    optimizer.step()

    def loss(weights: Any) -> Tensor:
        return cross_entropy(fresnet.forward_train(frozen._replace(weights=weights), X)[0], Y)

    grads = grad(loss)(frozen.weights)
    expected = tree.map(lambda w, g: w - 0.1 * g, frozen.weights, grads)
    assert_close(tree.ravel(module.params().weights).detach(), tree.ravel(expected), 1e-12)
    assert_same(module.params().stats, PARAMS.stats)


def test_train_is_refused_where_it_would_mean_something_else() -> None:
    grouped = fresnet.init(0, Spec(Bottleneck, (1,), norm=GroupNorm), num_classes=3)
    for params in (fresnet.freeze(PARAMS), fresnet.fold(PARAMS), grouped):
        assert fresnet.as_module(params).train().training
    some = fresnet.freeze(PARAMS, tree.matching("stem"))
    for params in (PARAMS, some):
        module = fresnet.as_module(params)
        assert not module.training
        assert not module.eval().training
        for wrong in (module, nn.Sequential(module)):
            with pytest.raises(FresnetError, match=r"expects train\(\) only of networks .*freeze"):
                wrong.train()


def test_what_is_no_network_to_copy_is_refused() -> None:
    with pytest.raises(FresnetError, match="as_module copies the network, so no transform"):
        grad(lambda head: fresnet.as_module(PARAMS)(X).sum())(PARAMS.weights.head)
    gated = fresnet.init(0, fresnet.SPECS["seresnet18"], num_classes=3, device="meta")

    def scaled(unit: Any) -> Any:
        if isinstance(unit, Layer) and isinstance(unit.norm, Bias):
            return unit._replace(norm=Rescale(unit.norm.bias, unit.norm.bias))
        return unit

    with pytest.raises(FresnetError, match="an entry expects a name of its own; got two"):
        fresnet.as_module(gated._replace(weights=over(scaled, gated.weights)))


@pytest.mark.parametrize("wrap", [lambda module: module, nn.Sequential])
def test_state_dicts_of_torchvision_and_timm_load_as_they_are(wrap: Any) -> None:
    """With counts of batches, and with one value a channel where norms go in groups."""
    grouped = Spec(Bottleneck, (1, 1, 1, 1), width=32, norm=GroupNorm)
    for spec in (Spec(Bottleneck, (1, 1, 1, 1)), grouped):
        params, other = (fresnet.init(seed, spec, num_classes=4) for seed in (0, 1))
        module, before = fresnet.as_module(other), "0." if wrap is nn.Sequential else ""
        state = {before + name: leaf for name, leaf in fresnet.to_state_dict(params).items()}
        with unmutated(state):
            wrap(module).load_state_dict(state, strict=True)
        assert_same(module.params(), params)
    state[f"{before}bn1.weight"] = state[f"{before}bn1.weight"][1:]
    with pytest.raises(RuntimeError, match=r"size mismatch for .*bn1\.weight"):
        wrap(module).load_state_dict(state)


def kernel_of(module: nn.Module) -> nn.Module:
    return module.get_submodule("layer1.0.conv2")


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, parametrizations.weight_norm])
def test_weights_that_others_compute(change: Callable[[nn.Module], Any]) -> None:
    """The network has the weight that is computed, and training moves what it is computed of."""
    module = fresnet.as_module(fresnet.freeze(PARAMS)).train()
    change(kernel_of(module))
    assert_close(module(X), fresnet.forward(PARAMS, X), 1e-12)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):  # a stale weight has no graph for a second pass back
        optimizer.zero_grad()
        cross_entropy(module(X), Y).backward()
        optimizer.step()
    moved = module.params().weights.stages[0][0].layer2.conv
    g, v = kernel_of(module).parameters()
    norms = v.flatten(1).norm(dim=1)[:, None, None, None]
    assert_close(moved, g * v / norms, 1e-12)


def test_hooks_of_others_are_not_called() -> None:
    """They expect the layer's input, and no layer of the module is run."""
    module = fresnet.as_module(PARAMS)
    kernel_of(module).register_forward_pre_hook(lambda layer, inputs: inputs[0])
    assert_same(module(X), fresnet.forward(PARAMS, X))


def test_pruned_weights() -> None:
    contiguous = tree.map(Tensor.contiguous, fresnet.freeze(PARAMS))  # it takes views as vectors
    module = fresnet.as_module(contiguous).train()
    prune.l1_unstructured(kernel_of(module), "weight", 0.5)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        cross_entropy(module(X), Y).backward()
        optimizer.step()
    entries = module.state_dict()
    kernel = entries["layer1.0.conv2.weight_orig"] * entries["layer1.0.conv2.weight_mask"]
    assert (kernel == 0).sum() == kernel.numel() // 2
    params = module.params()
    assert_same(params.weights.stages[0][0].layer2.conv, kernel)
    assert_same(module(X), fresnet.forward(params, X))
    prune.remove(kernel_of(module), "weight")
    assert_same(module(X), fresnet.forward(params, X))


def test_a_layer_may_be_exchanged() -> None:
    """It stands where torchvision has it."""
    module: Any = fresnet.as_module(PARAMS)
    block, head = module.layer1[0], nn.Linear(24, 7).double()
    assert block.conv2 is kernel_of(module)
    assert block.downsample[1].bias is module.get_parameter("layer1.0.downsample.1.bias")
    module.fc = head
    assert_close(module(X), head(fresnet.embed(PARAMS, X)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cast_is_that_of_the_network(dtype: torch.dtype) -> None:
    """Statistics are not rounded to a narrow dtype, not even on the way."""
    params = PARAMS._replace(stats=tree.map(lambda leaf: leaf + 0.3, PARAMS.stats))
    module = fresnet.as_module(params)
    nn.Sequential(module).to(dtype)
    assert_same(tree.map(Tensor.detach, module.params()), fresnet.cast(params, dtype))
    assert module(X.to(dtype)).dtype == dtype
    module.to("meta").to_empty(device="cpu").bfloat16()
    assert module.params().stats.stem.layer.mean.dtype == torch.float32


def test_parts_may_be_kept_from_training() -> None:
    module = fresnet.as_module(PARAMS)
    module.requires_grad_(False).get_submodule("layer2").requires_grad_(True)
    module(X).sum().backward()
    assert all(
        (leaf.grad is not None) == name.startswith("layer2.")
        for name, leaf in module.named_parameters()
    )


def test_copies_pickles_and_meta() -> None:
    module = fresnet.as_module(PARAMS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(other.params(), module.params())
        assert_same(other(X), module(X))
        nn.init.zeros_(other.params().weights.head.bias)
        assert not tree.equal(other.params(), module.params())
        other.load_state_dict(module.state_dict(), strict=True)
        assert_same(other.params(), module.params())
    empty = fresnet.as_module(tree.map(lambda leaf: leaf.to("meta"), PARAMS))
    empty.load_state_dict(module.state_dict(), assign=True)
    assert_same(empty(X), module(X))
    assert repr(module) == f"Network({PARAMS!r})"


@pytest.mark.slow
def test_it_compiles_in_one_graph() -> None:
    module = fresnet.as_module(PARAMS)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(X), module(X), 1e-12)


# What the tutorials of torch.func do with a module.


def test_per_sample_gradients_by_functional_call() -> None:
    parameters, buffers = named(PARAMS)
    module = fresnet.as_module(PARAMS)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(module, (parameters, buffers), (x[None],))
        return cross_entropy(logits, y[None])

    grads = vmap(grad(loss), (None, 0, 0))(parameters, X, Y)
    expected = fresnet.per_sample_grads(cross_entropy, PARAMS, X, Y, norms="running")
    assert_all_close(grads, dict(zip(parameters, tree.leaves(expected), strict=True)), 1e-10)


def test_one_tensor_may_stand_under_several_names() -> None:
    module = fresnet.as_module(PARAMS)
    shared: dict[str, Tensor] = dict(module.named_parameters())
    shared["bn1.bias"] = shared["bn1.weight"]
    norm = PARAMS.weights.stem.layer.norm
    tied = tree.at(PARAMS, "weights.stem.layer.norm.bias", norm.scale)
    assert_close(functional_call(module, shared, (X,)).detach(), fresnet.forward(tied, X), 1e-12)


def test_an_ensemble_of_modules() -> None:
    spec = Spec(Bottleneck, (1, 1), width=3)
    members = [fresnet.init(seed, spec, num_classes=4, dtype=torch.float64) for seed in range(3)]
    modules = [*map(fresnet.as_module, members)]
    state = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    logits = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(*state, X)
    expected = vmap(fresnet.forward, (0, None))(tree.stack(members), X)
    assert_close(logits.detach(), expected, 1e-12)


def test_the_neural_tangent_kernel_of_a_module() -> None:
    parameters, buffers = named(PARAMS)
    module = fresnet.as_module(PARAMS)

    def logits(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        one: Tensor = functional_call(module, (parameters, buffers), (x[None],))
        return one[0]

    jacobian = vmap(jacrev(logits), (None, 0))(parameters, X)
    each = [torch.einsum("nap,mbp->nmab", j, j) for j in (j.flatten(2) for j in jacobian.values())]
    kernel = torch.stack(each).sum(0)
    of_tree = jacrev(lambda w: fresnet.forward(PARAMS._replace(weights=w), X))(PARAMS.weights)
    flat = torch.cat([j.flatten(2) for j in tree.leaves(of_tree)], 2)
    assert_close(kernel, torch.einsum("nap,mbp->nmab", flat, flat), 1e-10)
