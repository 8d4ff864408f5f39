"""What the documents say of a teacher: hard and soft targets together."""

from typing import Any

import torch
from assertions import assert_close, assert_trees_close
from test_docs import HOWTO, blocks
from torch.func import grad
from torch.nn.functional import cross_entropy, kl_div, one_hot

import fresnet
from fresnet import Params, Spec, optim, training, tree
from fresnet.network.nodes import Weights

TEACHER, STUDENT = (
    fresnet.init(seed, Spec(depths=(1,), width=4), num_classes=5, dtype=torch.float64)
    for seed in range(2)
)
X = torch.randn(6, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
TEACHER_LOGITS = fresnet.forward(TEACHER, X)


def test_the_mean_of_both_targets_has_the_mean_of_both_losses() -> None:
    soft = TEACHER_LOGITS.softmax(1)
    optimizer = optim.sgd(1.0)
    step, state = training.make_train_step(optimizer), training.start(STUDENT, optimizer)
    state, metrics = step(state, (X, 0.1 * one_hot(Y, 5).double() + 0.9 * soft))

    def loss(weights: Weights) -> torch.Tensor:
        logits, _ = fresnet.forward_train(STUDENT._replace(weights=weights), X)
        return 0.1 * cross_entropy(logits, Y) + 0.9 * cross_entropy(logits, soft)

    assert_close(metrics.loss, loss(STUDENT.weights), 1e-12)
    descent = tree.map(torch.sub, STUDENT.weights, state.params.weights)
    assert_close(tree.ravel(descent), tree.ravel(grad(loss)(STUDENT.weights)), 1e-10)


def test_the_loss_that_is_printed_is_hintons() -> None:
    """Up to the entropy of the teacher, which has no gradient: a divergence, scaled by T^2."""
    written: dict[str, Any] = {"fresnet": fresnet, "Params": Params, "params": TEACHER}
    written["cross_entropy"] = cross_entropy
    block = next(code for code in blocks(HOWTO) if "temperature" in code)
    exec(block.split("\n\n\n")[0], written)
    grads, _ = grad(written["distil"], has_aux=True)(*STUDENT, X, Y)

    def loss(weights: Weights) -> torch.Tensor:
        logits, _ = fresnet.forward_train(Params(weights, STUDENT.stats), X)
        soft, softened = (TEACHER_LOGITS / 4).softmax(1), (logits / 4).log_softmax(1)
        divergence = kl_div(softened, soft, reduction="batchmean")
        return 0.1 * cross_entropy(logits, Y) + 0.9 * 16 * divergence

    assert_trees_close(grads, grad(loss)(STUDENT.weights), 1e-9)
