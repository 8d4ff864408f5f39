"""Other libraries take a network as a tree, a function or a module, and get right values from it.

A library that is not installed is skipped. `python tests/test_clients.py` prints the table of
`docs/clients.md`.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference  # noqa: F401  (makes torchvision importable beside a CPU-only torch)
import torch
from assertions import assert_close, assert_same, assert_trees_close
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fresnet
from fresnet import Params, Spec, tree
from fresnet.network.nodes import Bottleneck, Weights

PARAMS = fresnet.init(
    torch.Generator().manual_seed(0),
    Spec(Bottleneck, (1, 1), width=2),
    num_classes=4,
    dtype=torch.float64,
)
X = torch.randn(5, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0])
DOCUMENT = Path(__file__).parent.parent / "docs" / "clients.md"


class Client(NamedTuple):
    package: str
    version: str
    what: str
    by: str
    check: Callable[[Any], None]

    @property
    def module(self) -> str:
        """What is imported."""
        return {"laplace-torch": "laplace", "curvlinops-for-pytorch": "curvlinops"}.get(
            self.package, self.package
        )


CLIENTS: list[Client] = []


def tried(package: str, version: str, what: str, *, by: str) -> Callable[..., Any]:
    """A check of a library, which is called with the library."""

    def listed(check: Callable[[Any], None]) -> Callable[[Any], None]:
        CLIENTS.append(Client(package, version, what, by, check))
        return check

    return listed


def table() -> str:
    rows = [("library", "version", "what was tried", "what it is given"), ("---",) * 4]
    rows += [(f"`{one.package}`", *one[1:4]) for one in CLIENTS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def of_weights(weights: Weights) -> Tensor:
    """Logits as a function of the weights."""
    return fresnet.forward(PARAMS._replace(weights=weights), X)


def loss_of(weights: Weights) -> Tensor:
    return cross_entropy(of_weights(weights), Y)


def jacobian() -> Tensor:
    """Of the logits by all weights, `[b k w]`."""
    return torch.cat([j.flatten(2) for j in tree.leaves(jacrev(of_weights)(PARAMS.weights))], 2)


@tried("optree", "0.20.0", "leaves and maps, node types kept", by="trees")
def _(optree: Any) -> None:
    leaves, _ = optree.tree_flatten(PARAMS)
    assert all(a is b for a, b in zip(leaves, tree.leaves(PARAMS), strict=True))
    assert_same(optree.tree_map(torch.neg, PARAMS), tree.map(torch.neg, PARAMS))


@tried("torchopt", "0.7.3", "its functional SGD with momentum", by="trees of weights")
def _(torchopt: Any) -> None:
    theirs, ours = torchopt.sgd(0.1, momentum=0.9), fresnet.optim.sgd(0.1, momentum=0.9)
    weights = expected = PARAMS.weights
    state, own_state = theirs.init(weights), ours.init(weights)
    for _ in range(3):
        updates, state = theirs.update(grad(loss_of)(weights), state, params=weights, inplace=False)
        weights = torchopt.apply_updates(weights, updates, inplace=False)
        expected, own_state = ours.update(grad(loss_of)(expected), own_state, expected)
    assert_trees_close(weights, expected, 1e-12)


@tried("posteriors", "0.1.3", "the diagonal empirical Fisher matrix", by="trees of weights")
def _(posteriors: Any) -> None:
    def log_posterior(weights: Weights, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = fresnet.forward(PARAMS._replace(weights=weights), batch[0])
        return -cross_entropy(logits, batch[1]), logits

    laplace = posteriors.laplace.diag_fisher.build(log_posterior)
    state, _ = laplace.update(laplace.init(PARAMS.weights), (X, Y))
    grads = fresnet.per_sample_grads(cross_entropy, PARAMS, X, Y, norms="running")
    expected = tree.map(lambda g: g.square().sum(0), grads)
    assert_close(tree.ravel(state.prec_diag), tree.ravel(expected), 1e-10)


@tried("captum", "0.9.0", "saliency and integrated gradients", by="`forward`, or a module")
def _(_: Any) -> None:
    attr: Any = importlib.import_module("captum.attr")

    def logit(x: Tensor, y: Tensor) -> Tensor:
        return fresnet.forward(PARAMS, x[None])[0].gather(0, y[None]).sum()

    slopes = vmap(grad(logit), (0, 0))
    path = [slopes((k + 0.5) / 8 * X, Y) for k in range(8)]
    for model in (partial(fresnet.forward, PARAMS), fresnet.as_module(PARAMS)):
        assert_close(attr.Saliency(model).attribute(X, target=Y), slopes(X, Y).abs(), 1e-10)
        integrated = attr.IntegratedGradients(model).attribute(
            X, target=Y, n_steps=8, method="riemann_middle"
        )
        assert_close(integrated, X * sum(path) / 8, 1e-10)


@tried("torchmetrics", "1.9.0", "accuracy and confusion matrix", by="logits")
def _(torchmetrics: Any) -> None:
    ours = fresnet.training.evaluate(PARAMS, [(X, Y)])
    options: Any = {"task": "multiclass", "num_classes": 4}
    accuracy = torchmetrics.Accuracy(**options, average="micro")
    confusion = torchmetrics.ConfusionMatrix(**options)
    for x, y in ((X[:2], Y[:2]), (X[2:], Y[2:])):
        accuracy.update(fresnet.forward(PARAMS, x), y)
        confusion.update(fresnet.forward(PARAMS, x), y)
    assert accuracy.compute() == pytest.approx(ours.top1)
    assert torch.equal(confusion.compute(), ours.confusion)


@tried("curvlinops-for-pytorch", "3.0.1", "products with the Hessian", by="a module")
def _(curvlinops: Any) -> None:
    module = fresnet.as_module(PARAMS)
    weights = [*module.parameters()]
    hessian = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), weights, [(X, Y)])
    v = tree.map(torch.cos, PARAMS.weights)
    _, expected, *_ = jvp(grad(loss_of), (PARAMS.weights,), (v,))
    assert_close(hessian @ tree.ravel(v), tree.ravel(expected), 1e-9)


@tried(
    "laplace-torch", "0.3", "the full Gauss-Newton matrix", by="a module with contiguous weights"
)
def _(laplace: Any) -> None:
    module = fresnet.as_module(tree.map(Tensor.contiguous, PARAMS))
    approximation = laplace.Laplace(
        module, "classification", subset_of_weights="all", hessian_structure="full"
    )
    approximation.fit(DataLoader(TensorDataset(X, Y), batch_size=2))
    p, j = of_weights(PARAMS.weights).softmax(1), jacobian()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert_close(approximation.H, torch.einsum("bkv,bkl,blw->vw", j, curvature, j), 1e-6)


@tried(
    "opacus",
    "1.6.0",
    'a private step, with `grad_sample_mode="no_op"` and `per_sample_grads`',
    by="a module with frozen norms",
)
def _(opacus: Any) -> None:
    params = fresnet.freeze(PARAMS)
    module = fresnet.as_module(params).train()
    _, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), 1.0),
        data_loader=DataLoader(TensorDataset(X, Y), batch_size=len(X)),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        grad_sample_mode="no_op",
    )
    grads = fresnet.per_sample_grads(cross_entropy, params, X, Y, norms="running")
    for leaf, each in zip(module.parameters(), tree.leaves(grads), strict=True):
        leaf.grad_sample = each  # type: ignore[attr-defined]
    optimizer.step()
    total, _ = fresnet.clipped_grads(cross_entropy, params, X, Y, max_norm=0.5)
    expected = tree.map(lambda w, g: w - g / len(X), params.weights, total)
    # Opacus adds 1e-6 to each norm.
    assert_close(
        tree.ravel(module.params().weights).detach() - tree.ravel(params.weights),
        tree.ravel(expected) - tree.ravel(params.weights),
        1e-5,
    )


@tried("foolbox", "3.3.4", "the fast gradient sign attack", by="a module in float32")
def _(foolbox: Any) -> None:
    params = fresnet.cast(PARAMS, torch.float32)
    x = X.float().clamp(-2, 2)
    model = foolbox.PyTorchModel(fresnet.as_module(params), bounds=(-2, 2), device="cpu")
    _, moved, _ = foolbox.attacks.FGSM()(model, x, Y, epsilons=0.05)
    slope = grad(lambda x: cross_entropy(fresnet.forward(params, x), Y, reduction="sum"))(x)
    assert_close(moved, (x + 0.05 * slope.sign()).clamp(-2, 2), 1e-6)


@tried("tensordict", "0.15.3", "a module run with other parameters", by="a module")
def _(tensordict: Any) -> None:
    module = fresnet.as_module(PARAMS)
    halved: Params = tree.map(lambda leaf: leaf / 2, PARAMS)
    with tensordict.from_module(module).data.mul(0.5).to_module(module):
        assert_close(module(X).detach(), fresnet.forward(halved, X), 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.package)
def test_a_library_gets_right_values(client: Client) -> None:
    client.check(pytest.importorskip(client.module))


def test_the_table_says_what_is_tried() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table(), end="")
