"""Norms and clipped sums of per-sample gradients: fresnet beside one gradient, and beside Opacus.

    python benchmarks/clipping.py                # prints tables; --full for all sizes

Opacus computes clipped sums in two ways: its ghost clipping goes without the gradients of linear
layers, and its fast gradient clipping forms the gradients of one layer after the other. It takes
GroupNorm in the place of BatchNorm, so both sides run one network with GroupNorm. All clipped sums
must agree to 1e-6 in float64, and then to 2% in float32, where rounding takes ReLU to its other
side now and then.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Run, errors_of, main
from torch import Tensor
from torch.nn.functional import cross_entropy
from transforms import Contenders, images, module_for_opacus, named, ready

import fresnet
from fresnet import Params, tree
from fresnet.training.backward import gradients

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

MAX_NORM = 1.0


def norms(batch: int, side: int) -> Contenders:
    """Norms and clipped sums of the per-sample gradients of a ResNet-50, beside one gradient.

    All go by the running statistics. The one gradient is that of the whole batch through `forward`.
    """
    x, y = images(batch, side)
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))

    def loss(weights: Any, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[()]]:
        return cross_entropy(fresnet.forward(Params(weights, params.stats), x), y), ()

    def explicit() -> Any:
        grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running")
        norms = sum(g.flatten(1).square().sum(1) for g in tree.leaves(grads)) ** 0.5
        return tree.map(lambda g: torch.tensordot((MAX_NORM / norms).clamp(max=1), g, 1), grads)

    return {
        "one batched gradient": lambda: gradients(loss, params.weights, [(x, y)])[0],
        "per_sample_norms": lambda: fresnet.per_sample_norms(cross_entropy, params, x, y),
        "clipped_grads": lambda: clipped(params, x, y),
        "per_sample_grads, clipped": explicit,
    }


def clipped(params: Params, x: Tensor, y: Tensor) -> Any:
    return fresnet.clipped_grads(cross_entropy, params, x, y, max_norm=MAX_NORM)[0]


def opacus(x: Tensor, y: Tensor, *, ghost: bool) -> Run:
    """The clipped sum by Opacus' module, loss and optimizer, as its own training loop has it.

    It gets maps in channels first: in channels last Opacus 1.6 takes norms that are wrong.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    x = x.contiguous()
    module = GradSampleModuleFastGradientClipping(
        module_for_opacus().to(x.dtype),
        loss_reduction="sum",
        max_grad_norm=MAX_NORM,
        use_ghost_clipping=ghost,
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters()),
        noise_multiplier=0.0,
        max_grad_norm=MAX_NORM,
        expected_batch_size=len(x),
        loss_reduction="sum",
    )
    criterion = torch.nn.CrossEntropyLoss(reduction="sum")
    loss = DPLossFastGradientClipping(module, optimizer, criterion, loss_reduction="sum")

    def run() -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss(module(x), y).backward()
        return {name: p.grad for name, p in module._module.named_parameters()}

    return run


def clipped_sums(x: Tensor, y: Tensor) -> dict[str, Callable[[], Run]]:
    params = reference.params(module_for_opacus().to(x.dtype))
    return {
        "Opacus, ghost clipping": partial(opacus, x, y, ghost=True),
        "Opacus, fast gradient clipping": partial(opacus, x, y, ghost=False),
        "clipped_grads": ready(partial(clipped, params, x, y)),
    }


def flat(result: Any) -> dict[str, Tensor]:
    """Gradients by name; fresnet's norms lie in groups, and Opacus' do not."""
    return {name: grad.flatten() for name, grad in named(result).items()}


def comparisons(full: bool) -> Iterator[Comparison]:
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # from Opacus
    warnings.filterwarnings("ignore", "there are no running statistics")  # from fresnet
    for batch, side in ((8, 64), (4, 224)) if full else ((8, 64),):
        size = f"ResNet-50, {batch} images of {side} px"
        contenders = {name: ready(run) for name, run in norms(batch, side).items()}
        unlike = dict.fromkeys(contenders, inf)
        yield Comparison(f"Norms of per-sample gradients, {size}", contenders, batch, bounds=unlike)
        x, y = images(batch, side)
        compare = partial(Comparison, images=batch, view=flat)
        if side <= 64:
            wide = compare("In float64", clipped_sums(x.double(), y), agree=1e-6)
            errors_of(wide, {name: build() for name, build in wide.contenders.items()})
        title = f"Clipped sum of gradients with GroupNorm, {size}"
        yield compare(title, clipped_sums(x, y), agree=0.02)


if __name__ == "__main__":
    main(__doc__, comparisons)
