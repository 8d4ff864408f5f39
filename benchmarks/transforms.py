"""Per-sample gradients and ensembles: fresnet beside stock `torch.func`, Opacus and loops.

    python benchmarks/transforms.py              # prints tables; --full for all sizes

Contenders that compute the same thing must agree to 2%, because two correct implementations may
differ so much in float32.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Run, main
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.weights.names import names

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

Contenders = Mapping[str, Callable[[], Any]]


def per_sample(batch: int, side: int) -> Contenders:
    """Per-sample gradients of a ResNet-50 by the running statistics, then by the batch's."""
    x, y = images(batch, side)
    model = reference.module(fresnet.RESNET50, 0, dtype=torch.float32).eval()
    params, state = reference.params(model), {k: v.detach() for k, v in model.named_parameters()}

    def stock_loss(state: Any, image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, state, (image[None],)), label[None])

    def ours(norms: str, chunk_size: int | None = None) -> Any:
        return fresnet.per_sample_grads(
            cross_entropy, params, x, y, norms=norms, chunk_size=chunk_size
        )

    def loop() -> Any:
        def loss(weights: Any, image: Tensor, label: Tensor) -> Tensor:
            return cross_entropy(fresnet.forward(Params(weights, params.stats), image), label)

        rows = (slice(i, i + 1) for i in range(len(x)))
        return tree.stack([grad(loss)(params.weights, x[row], y[row]) for row in rows])

    stock = vmap(grad(stock_loss), (None, 0, 0))
    return {
        "stock vmap(grad)": lambda: stock(state, x, y),
        "fresnet running": lambda: ours("running"),
        "fresnet running, in chunks": lambda: ours("running", batch // 4),
        "loop": loop,
        "fresnet batch": lambda: ours("batch"),
        "fresnet coupled": lambda: ours("coupled"),
    }


def ensembles(members: int, batch: int, side: int, *, gradient: bool) -> Contenders:
    """Logits or gradients of several ResNet-18 by the running statistics."""
    x, y = images(batch, side)
    models = [
        reference.module(fresnet.RESNET18, seed, dtype=torch.float32).eval()
        for seed in range(members)
    ]
    networks = [reference.params(model) for model in models]
    stacked = tree.stack(networks)
    state, buffers = stack_module_state(models)

    def ours(params: Params) -> Any:
        if not gradient:
            return fresnet.forward(params, x)

        def loss(weights: Any) -> Tensor:
            return cross_entropy(fresnet.forward(Params(weights, params.stats), x), y)

        return grad(loss)(params.weights)

    def theirs(state: Any, buffers: Any) -> Any:
        def logits(state: Any) -> Tensor:
            output: Tensor = functional_call(models[0], (state, buffers), (x,))
            return output

        if not gradient:
            return logits(state)
        return grad(lambda state: cross_entropy(logits(state), y))(state)

    def without_graph(run: Callable[[], Any]) -> Callable[[], Any]:
        return run if gradient else torch.no_grad()(run)

    return {
        "stock vmap": without_graph(lambda: vmap(theirs)(state, buffers)),
        "fresnet vmap": without_graph(lambda: vmap(ours)(stacked)),
        "loop": without_graph(lambda: tree.stack([ours(params) for params in networks])),
    }


def module_for_opacus() -> torch.nn.Module:
    """torchvision's network with GroupNorm and no operation in place, as Opacus requires."""
    from torchvision.models.resnet import Bottleneck, ResNet

    class Block(Bottleneck):  # type: ignore[misc]
        """torchvision's block, but its sum is not in place either."""

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if self.downsample is None else self.downsample(x)
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
            result: Tensor = self.relu(x + shortcut)
            return result

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: torch.nn.Module = ResNet(
            Block, [3, 4, 6, 3], 10, norm_layer=partial(torch.nn.GroupNorm, 32)
        )
    for layer in model.modules():
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = False
    return model


def opacus(batch: int, side: int) -> Run:
    """Opacus 1.6 gets maps in channels first: in channels last its gradients are wrong."""
    from opacus.grad_sample import GradSampleModule

    x, y = images(batch, side)
    x = x.contiguous()
    module = GradSampleModule(module_for_opacus(), loss_reduction="sum")

    def run() -> None:
        module.zero_grad()
        cross_entropy(module(x), y, reduction="sum").backward()

    return run


def images(batch: int, side: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10


def named(result: Any) -> dict[str, Tensor]:
    """Gradients of a module or of a tree under torchvision's names; logits under their own."""
    if isinstance(result, Tensor):
        return {"logits": result}
    if isinstance(result, dict):
        return result
    listed = names(Params(result, stats=()))  # type: ignore[arg-type]
    return dict(zip(listed, tree.leaves(result), strict=True))


def ready(run: Run) -> Callable[[], Run]:
    return lambda: run


def comparisons(full: bool) -> Iterator[Comparison]:
    warnings.filterwarnings("ignore", "There is a performance drop")  # from stock vmap
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # from Opacus
    for batch, side in ((8, 64), (4, 224)) if full else ((8, 64),):
        size = f"ResNet-50, {batch} images of {side} px"
        contenders = {name: ready(run) for name, run in per_sample(batch, side).items()}
        contenders["Opacus, GroupNorm"] = partial(opacus, batch, side)
        unlike = dict.fromkeys(["fresnet batch", "fresnet coupled", "Opacus, GroupNorm"], inf)
        yield Comparison(
            f"Per-sample gradients, {size}",
            contenders,
            batch,
            agree=0.02,
            bounds=unlike,
            view=named,
        )
    for gradient in (False, True):
        what = "gradients" if gradient else "logits"
        runs = ensembles(8, 16, 64, gradient=gradient)
        yield Comparison(
            f"Ensemble of 8 ResNet-18, {what}, 16 images of 64 px",
            {name: ready(run) for name, run in runs.items()},
            16,
            agree=0.02,
            view=named,
        )


if __name__ == "__main__":
    main(__doc__, comparisons)
