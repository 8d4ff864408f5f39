"""The tables of `docs/performance.md`: what was asked for, what was measured, and how."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness import Measured, quartiles, ratios, table

PAGES_KEPT, DEFAULT, GPU = "pages kept", "default allocator", "on a GPU"
HEADINGS = {PAGES_KEPT: "With pages kept", DEFAULT: "Default allocator", GPU: "On a GPU"}
TARGETS = "| | of | against | asked | measured (quartiles) |\n| --- | --- | --- | ---: | --- |"


class Target(NamedTuple):
    """A goal: one contender is at least `at_least` times as good as the best of the others."""

    title: str
    name: str
    others: Sequence[str]
    at_least: float
    setting: str = PAGES_KEPT
    memory: bool = False


def targets() -> list[Target]:
    found = []
    for images in ("1 image", "8 images", "32 images"):
        dtypes = ("float32", "bfloat16", "int8")
        wide, narrow, int8 = (f"Inference, {images}, {dtype}" for dtype in dtypes)
        rivals = ("OpenVINO performance", "OpenVINO mixed", "ONNX Runtime")
        found += [
            Target(wide, "fresnet", ("OpenVINO", "ONNX Runtime"), 1.05),
            Target(wide, "fresnet", ("torchvision",), 1.25),
            Target(wide, "fresnet", ("torchvision",), 1.6, DEFAULT),
            Target(narrow, "fresnet", ("OpenVINO",), 1.0),
            Target(int8, "fresnet", ("fresnet in float32",), 2.0),
            Target(int8, "fresnet", rivals, 1.0),
        ]
    step = "Training step, 16 images of 224 px"
    compiled = "Training step compiled, 16 images of 224 px"
    found += [
        Target(step, "fresnet", ("torchvision",), 0.97),
        Target(step, "fresnet", ("torchvision",), 1 / 1.05, memory=True),
        Target(compiled, "fresnet", ("torchvision",), 1.0),
        Target(compiled, "fresnet", ("torchvision",), 1 / 0.9, memory=True),
        Target(step, "fresnet in bfloat16", ("torchvision in bfloat16",), 1.0),
        Target(step, "fresnet in bfloat16", ("fresnet",), 2.0),
        *(
            Target(f"Layer by layer, {name}, 1 image of 32 px", "fresnet", ("torchvision",), 1.0)
            for name in ("ResNet-18", "ResNet-50")
        ),
        Target("Training step, 4 images of 32 px", "fresnet", ("torchvision",), 1 / 1.02),
        *(
            Target(
                "Loss and gradient, 16 images of 224 px",
                name,
                ("torchvision, backward()",),
                at_least,
                memory=memory,
            )
            for name, at_least, memory in (
                ("fresnet.grad_and_value", 0.98, False),
                ("fresnet.grad_and_value", 1.0, True),
                ("torch.func.grad_and_value", 0.96, False),
            )
        ),
    ]
    for clock in ("by the clock", "by the processor"):
        title = f"From the start to first logits, {clock}"
        found.append(Target(title, "fresnet", ("torchvision",), 1 / 0.6))
    small, large = (f"ResNet-50, {n} images of {side} px" for n, side in ((8, 64), (4, 224)))
    stock = ("stock vmap(grad)",)
    found += [
        Target(f"Per-sample gradients, {small}", "fresnet running", stock, 2.5, DEFAULT),
        Target(f"Per-sample gradients, {small}", "fresnet running", stock, 1.7),
        Target(f"Per-sample gradients, {large}", "fresnet running", stock, 1.0),
    ]
    for size in (small, large):
        title = f"Norms of per-sample gradients, {size}"
        for name in ("per_sample_norms", "clipped_grads"):
            found.append(Target(title, name, ("one batched gradient",), 0.5))
            found.append(Target(title, name, ("one batched gradient",), 1 / 1.3, memory=True))
        opacus = ("Opacus, ghost clipping", "Opacus, fast gradient clipping")
        title = f"Clipped sum of gradients with GroupNorm, {size}"
        found.append(Target(title, "clipped_grads", opacus, 1.0))
    for what in ("logits", "gradients"):
        title = f"Ensemble of 8 ResNet-18, {what}, 16 images of 64 px"
        found.append(Target(title, "fresnet vmap", ("loop",), 1.0))
    found += [
        Target(title, "fresnet", ("Flax",), 1.0)
        for title in (
            *(
                f"Inference beside Flax, {images}"
                for images in ("1 image", "8 images", "32 images")
            ),
            "Training step beside Flax, 16 images of 224 px",
            "Per-sample gradients beside Flax, 8 images of 64 px",
            "Per-sample gradients beside Flax, 4 images of 224 px",
            "Ensemble of 8 ResNet-18 beside Flax, logits, 16 images of 64 px",
            "Ensemble of 8 ResNet-18 beside Flax, gradients, 16 images of 64 px",
        )
    ]
    reading = "Reading images, JPEGs of 500x375"
    found += [
        Target(reading, "fresnet", ("torchvision",), 1.0),
        Target(reading, "fresnet, shards", ("torchvision",), 1.0),
        Target(reading, "fresnet fast", ("torchvision",), 1.3),
        Target(reading, "fresnet fast", ("torchvision v2, tensors",), 1.0),
    ]
    rival = ("torchvision compiled",)
    for images in ("1 image", "8 images", "32 images", "128 images", "256 images"):
        found += [
            Target(f"Inference on a GPU, {images}", "fresnet", rival, 1.0, GPU),
            Target(f"Training step on a GPU, {images}", "fresnet compiled", rival, 1.0, GPU),
        ]
    return found


Results = Mapping[tuple[str, str], Mapping[str, Any]]


def best(rows: Sequence[Measured], names: Sequence[str]) -> str:
    """The fastest of these contenders."""
    seconds = {row.name: statistics.median(row.seconds) for row in rows}
    return min(names, key=seconds.__getitem__)


def judge(results: Results) -> str:
    """The targets in Markdown, those that are not met before the others."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    for target in targets():
        entry = results.get((target.title, target.setting))
        if entry is None:
            continue
        rows = [Measured(**row) for row in entry["rows"]]
        rival = best(rows, target.others)
        if target.memory:
            peaks = {row.name: row.peak for row in rows}
            middle = peaks[rival] / max(peaks[target.name], 1)
            measured = f"{middle:.3f}"
        else:
            low, middle, high = quartiles(ratios(rows, target.name, rival))
            measured = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        what = "as little memory as" if target.memory else "as fast as"
        default = ", default allocator" if target.setting == DEFAULT else ""
        lines[middle >= target.at_least].append(
            f"| {target.title}{default} | {target.name} | {what} {rival} "
            f"| {target.at_least:.2f} | {measured} |"
        )
    count = {met: len(found) for met, found in lines.items()}
    parts = [f"Of {sum(count.values())} targets {count[False]} are not met."]
    for met, heading in ((False, "Targets that are not met"), (True, "Targets that are met")):
        if lines[met]:
            parts += [f"\n### {heading}\n\n{TARGETS}", *lines[met]]
    return "\n".join(parts)


def report(results: Results) -> str:
    """The measured part of the document."""
    cpu = [entry for (_, setting), entry in results.items() if setting != GPU]
    parts = [_measured(cpu), judge(results)]
    for setting, heading in HEADINGS.items():
        entries = [entry for (_, found), entry in results.items() if found == setting]
        if entries:
            parts.append(f"\n## {heading}\n")
            parts += [_measured(entries)] if setting == GPU else []
            parts.append("\n\n".join(map(table, entries)))
    return "\n".join(parts)


def _measured(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line that says when, on which machine and with which versions it was measured."""
    environments = [entry["environment"] for entry in entries]
    dates = sorted({environment["date"] for environment in environments})
    versions = {name: value for each in environments for name, value in each.items()}
    environment = {**versions, "date": " and ".join(dates)}
    return f"Measured: {', '.join(f'{name} {value}' for name, value in environment.items())}.\n"
