"""The same work in JAX: fresnet beside a ResNet of Flax under `jax.jit`.

    python benchmarks/jax_flax.py                # prints tables; --full for all sizes

Flax's network is that of its ImageNet example, but for the padding, which is PyTorch's. It gets
fresnet's weights and images in its own layout, `[b h w c]`. XLA starts a thread for each core that
the process may run on, so the process is bound to as many cores as PyTorch has threads. Where JAX
and Flax are not installed, nothing is measured.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transforms
from einops import rearrange
from harness import Comparison, Run, main
from torch import Tensor
from training_step import DECAY, MOMENTUM, RATE
from training_step import ours as training_step
from transforms import Contenders, images, ready

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import units_of

try:
    import jax
    import optax
    from flax import linen
except ImportError:
    print("JAX and Flax are not installed, so they are left out.")
    sys.exit()

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

SIDES = {"Bottleneck": (1, 3, 1), "BasicBlock": (3, 3)}
"""The kernels of each block, of which the first 3x3 has the stride."""


class ResNet(linen.Module):  # type: ignore[misc]
    """A network of Flax's layers, which are numbered in the order of their calls."""

    spec: fresnet.Spec
    training: bool = False

    @linen.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        def layer(x: Any, channels: int, side: int, stride: int) -> Any:
            size, padding = (side, side), side // 2
            x = linen.Conv(channels, size, stride, padding, use_bias=False)(x)
            return linen.BatchNorm(use_running_average=not self.training, momentum=0.9)(x)

        sides, expansion = SIDES[self.spec.block.__name__], self.spec.block.expansion()
        x = linen.relu(layer(x, 64, 7, 2))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, depth in enumerate(self.spec.depths):
            for stride in [1 + (i > 0)] + [1] * (depth - 1):
                width, y = 64 << i, x
                for side in sides[:-1]:
                    y = linen.relu(layer(y, width, side, stride if side == 3 else 1))
                y = layer(y, width * expansion, sides[-1], 1)
                x = x if x.shape == y.shape else layer(x, width * expansion, 1, stride)
                x = linen.relu(x + y)
        return linen.Dense(10)(x.mean((1, 2)))


def as_flax(weights: Any) -> dict[str, Any]:
    """Weights, or gradients like them, as Flax names and lays them out."""
    found = {"Dense_0": {"kernel": weights.head.weight.mT, "bias": weights.head.bias}}
    for i, unit in enumerate(units_of((weights.stem, weights.stages))):
        found[f"Conv_{i}"] = {"kernel": rearrange(unit.conv, "... o c i j -> ... i j c o")}
        found[f"BatchNorm_{i}"] = unit.norm._asdict()
    return found


def variables(params: Params) -> Any:
    """The weights and the statistics of a network, as Flax's module takes them."""
    moments = iter(tree.leaves(params.stats))
    pairs = zip(moments, moments, strict=True)
    stats = {f"BatchNorm_{i}": {"mean": mean, "var": var} for i, (mean, var) in enumerate(pairs)}
    return jax.tree.map(as_array, (as_flax(params.weights), stats))


def as_array(tensor: Tensor) -> Any:
    return jax.numpy.asarray(tensor.contiguous().numpy())


def view(result: Any) -> Any:
    """Logits, losses or gradients of either side, as what is compared."""
    if isinstance(result, Tensor):
        return result
    found = as_flax(result) if isinstance(result, tuple) else result
    leaves = jax.tree_util.tree_leaves_with_path(found)
    named = {jax.tree_util.keystr(path): torch.as_tensor(leaf) for path, leaf in leaves}
    return named.get("", named)


def network(spec: fresnet.Spec, seed: int = 0) -> Params:
    return reference.params(reference.module(spec, seed, dtype=torch.float32))


def jitted(function: Callable[..., Any], *inputs: Any) -> Run:
    """A run of the compiled function, to its end."""
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*inputs))


def logits_of(model: ResNet, weights: Any, stats: Any, x: Any) -> Any:
    return model.apply({"params": weights, "batch_stats": stats}, x)


def applied(model: ResNet, weights: Any, stats: Any, x: Any, y: Any) -> Any:
    """The loss, and the new statistics of a model in training."""
    state = {"params": weights, "batch_stats": stats}
    logits, new = model.apply(state, x, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), new["batch_stats"]


def gradient_of(model: ResNet) -> Callable[..., Any]:
    gradient: Callable[..., Any] = jax.grad(lambda *inputs: applied(model, *inputs)[0])
    return gradient


def inference(x: Tensor) -> Contenders:
    params, logits = network(fresnet.RESNET50), partial(logits_of, ResNet(fresnet.RESNET50))
    return {
        "Flax": partial(jitted, logits, *variables(params), nhwc(x)),
        "fresnet": lambda: partial(fresnet.compile_inference(params, x), x),
    }


def training(x: Tensor, y: Tensor) -> Contenders:
    def flax() -> Run:
        model = ResNet(fresnet.RESNET50, training=True)
        optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM))
        weights, stats = variables(network(fresnet.RESNET50))
        state, batch = (weights, stats, optimizer.init(weights)), (nhwc(x), as_array(y))

        @partial(jax.jit, donate_argnums=0)
        def train_step(state: Any, x: Any, y: Any) -> Any:
            weights, stats, velocity = state
            take = jax.value_and_grad(partial(applied, model), has_aux=True)
            (loss, stats), grads = take(weights, stats, x, y)
            updates, velocity = optimizer.update(grads, velocity, weights)
            return (optax.apply_updates(weights, updates), stats, velocity), loss

        def step() -> Any:
            nonlocal state
            state, loss = jax.block_until_ready(train_step(state, *batch))
            return loss

        return step

    return {"Flax": flax, "fresnet": partial(training_step, x, y)}


def per_sample(batch: int, side: int) -> Contenders:
    (x, y), state = images(batch, side), variables(network(fresnet.RESNET50))
    each = jax.vmap(gradient_of(ResNet(fresnet.RESNET50)), (None, None, 0, 0))
    flax = partial(jitted, each, *state, nhwc(x)[:, None], as_array(y)[:, None])
    return {"Flax": flax, "fresnet": ready(transforms.per_sample(batch, side)["fresnet running"])}


def ensemble(*, gradient: bool) -> Contenders:
    (x, y), model = images(16, 64), ResNet(fresnet.RESNET18)
    state = variables(tree.stack([network(fresnet.RESNET18, seed) for seed in range(8)]))
    if gradient:
        each = jax.vmap(gradient_of(model), (0, 0, None, None))
        flax = partial(jitted, each, *state, nhwc(x), as_array(y))
    else:
        flax = partial(jitted, jax.vmap(partial(logits_of, model), (0, 0, None)), *state, nhwc(x))
    ours = transforms.ensembles(8, 16, 64, gradient=gradient)["fresnet vmap"]
    return {"Flax": flax, "fresnet": ready(ours)}


def nhwc(x: Tensor) -> Any:
    return as_array(rearrange(x, "b c h w -> b h w c"))


def comparisons(full: bool) -> Iterator[Comparison]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
    compare = partial(Comparison, view=view)
    for batch in (1, 8, 32) if full else (1,):
        title = f"Inference beside Flax, {batch} image{'s' * (batch > 1)}"
        yield compare(title, inference(images(batch, 224)[0]), batch)
    for batch, side in ((16, 224),) if full else ((8, 112),):
        title = f"Training step beside Flax, {batch} images of {side} px"
        yield compare(title, training(*images(batch, side)), batch, agree=0.05)
    for batch, side in ((8, 64), (4, 224)) if full else ((8, 64),):
        title = f"Per-sample gradients beside Flax, {batch} images of {side} px"
        yield compare(title, per_sample(batch, side), batch, agree=0.02)
    for what in ("logits", "gradients"):
        title = f"Ensemble of 8 ResNet-18 beside Flax, {what}, 16 images of 64 px"
        yield compare(title, ensemble(gradient=what == "gradients"), 16, agree=0.02)


if __name__ == "__main__":
    main(__doc__, comparisons)
