"""Per-sample gradients and ensembles: fresnet against stock `torch.func` on torchvision's module.

    python benchmarks/transforms.py              # ten minutes; --quick for one round

Contenders that compute the same thing are checked for it first, to 2%, by which two correct
implementations may differ in float32. All take turns in one process, A B A B; a row gives the
median of each one's times, the median ratio to the first within a round with its quartiles, and its
peak memory above what was there before. Run it a second time with

    MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

for glibc to keep its pages, which otherwise come fresh from the system for every large tensor.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.interop import names
from fresnet.training.gradients import gradients

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

Contenders = Mapping[str, Callable[[], Any]]


def per_sample(batch: int, side: int, chunk_size: int) -> Contenders:
    """Gradients of each image's loss by the running statistics, ResNet-50; then BatchNorm's own."""
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
        f"fresnet running, chunks of {chunk_size}": lambda: ours("running", chunk_size),
        "loop": loop,
        "fresnet batch": lambda: ours("batch"),
        "fresnet coupled": lambda: ours("coupled"),
    }


def clipping(batch: int, side: int) -> Contenders:
    """One gradient of a batch through `forward`; norms of its images' gradients, their clipped sum.

    ResNet-50, by the running statistics.
    """
    x, y = images(batch, side)
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))

    def loss(weights: Any, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[()]]:
        return cross_entropy(fresnet.forward(Params(weights, params.stats), x), y), ()

    def explicit() -> Any:
        grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running")
        norms = sum(g.flatten(1).square().sum(1) for g in tree.leaves(grads)) ** 0.5
        return tree.map(lambda g: torch.tensordot((1 / norms).clamp(max=1), g, 1), grads)

    return {
        "one batched gradient": lambda: gradients(loss, params.weights, [(x, y)])[0],
        "per_sample_norms": lambda: fresnet.per_sample_norms(cross_entropy, params, x, y),
        "clipped_grads": lambda: fresnet.clipped_grads(cross_entropy, params, x, y, max_norm=1.0),
        "per_sample_grads, clipped": explicit,
    }


def ensembles(members: int, batch: int, side: int, *, gradient: bool) -> Contenders:
    """Logits, or gradients, of several ResNet-18 by the running statistics."""
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


def images(batch: int, side: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10


def compare(title: str, contenders: Contenders, rounds: int, equal: int) -> None:
    """Check that the first so many agree, then time all in turns; a Markdown table."""
    first, *others = (named(run()) for run in list(contenders.values())[:equal])
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            error = (other[name] - value).norm()
            assert error <= 0.02 * value.norm() + 1e-4, f"{title}: contenders disagree on {name}"
    del first, others
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(
        f"\n### {title}\n\n| | median s | ratio (quartiles) | peak MiB |\n| --- | --- | --- | --- |"
    )
    base = times[next(iter(contenders))]
    for name, run in contenders.items():
        ratios = [a / b for a, b in zip(times[name], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        median = statistics.median(times[name])
        spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {median:.3f} | {spread} | {peak_memory(run):.0f} |", flush=True)


def named(result: Any) -> dict[str, Tensor]:
    """Gradients of a module or of a tree under torchvision's names; logits under their own."""
    if isinstance(result, Tensor):
        return {"logits": result}
    if isinstance(result, dict):
        return result
    listed = names(Params(result, stats=()))  # type: ignore[arg-type]
    return dict(zip(listed, tree.leaves(result), strict=True))


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB of resident memory at most while this runs, above what is resident before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round instead of seven")
    warnings.filterwarnings("ignore", "There is a performance drop")  # of stock vmap
    rounds = 1 if parser.parse_args().quick else 7
    pages = "keeps its pages" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default"
    print(
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, float32, channels last; allocator: {pages}"
    )
    for batch, side in ((8, 64), (4, 224)):
        title = f"per-sample gradients, ResNet-50, {batch} images of {side}x{side}"
        compare(title, per_sample(batch, side, chunk_size=batch // 4), rounds, equal=4)
        title = f"clipping per-sample gradients, ResNet-50, {batch} images of {side}x{side}"
        compare(title, clipping(batch, side), rounds, equal=1)
    for gradient in (False, True):
        what = "gradients" if gradient else "logits"
        title = f"{what} of 8 ResNet-18, 16 images of 64x64"
        compare(title, ensembles(8, 16, 64, gradient=gradient), rounds, equal=3)


if __name__ == "__main__":
    main()
