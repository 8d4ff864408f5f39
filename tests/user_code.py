"""A user's script, typed: it has to check under mypy --strict and pyright, and to run."""

from pathlib import Path

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, optim, training, tree
from fresnet.nodes import BasicBlock, Layer, NormStats, Stats, Weights


def loss_fn(weights: Weights, stats: Stats, x: Tensor, y: Tensor) -> tuple[Tensor, Stats]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def step(params: Params, x: Tensor, y: Tensor) -> Params:
    grads, (_, stats) = fresnet.grad_and_value(loss_fn, has_aux=True)(*params, x, y)
    weights: Weights = tree.map(lambda w, g: w - 0.1 * g, params.weights, grads)
    return Params(weights, stats)


def first_layer(params: Params) -> tuple[Layer, NormStats]:
    layer: Layer = params.weights.stages[0][0].layer1
    stats: NormStats = params.stats.stages[0][0].layer1
    return layer, stats


def main(folder: Path) -> Tensor:
    spec = fresnet.Spec(BasicBlock, (1, 1), width=4)
    params = fresnet.init(0, spec, num_classes=3)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    params = step(params, x, y)
    layer, stats = first_layer(params)
    assert layer.conv.shape[0] == stats.mean.shape[0]

    grads: Weights = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running")
    total, norms = fresnet.clipped_grads(cross_entropy, params, x, y, max_norm=1.0)
    assert grads.head.bias.shape == (4, *total.head.bias.shape)
    assert norms.shape == (4,)

    optimizer = optim.sgd(optim.cosine(0.1, over=10), momentum=0.9, decay_where=optim.kernels)
    train_step = training.make_train_step(optimizer)
    state = training.start(params, optimizer, average=True)
    state, metrics = train_step(state, (x, y))
    assert metrics.loss.isfinite()

    members: list[Params] = [fresnet.init(seed, spec, num_classes=3) for seed in range(2)]
    logits: Tensor = vmap(fresnet.forward, (0, None))(tree.stack(members), x)
    assert logits.shape == (2, 4, 3)

    path = folder / "network.safetensors"
    fresnet.save(state.params, path)
    loaded: Params = fresnet.load(path)
    entries: dict[str, Tensor] = fresnet.to_state_dict(loaded)
    assert fresnet.from_state_dict(entries).weights.head.weight.shape == (3, 8)
    infer = fresnet.compile_inference(loaded, x)
    return infer(x)
