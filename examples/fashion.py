"""Plain and residual networks on Fashion-MNIST by the paper's recipe: its Fig. 6 on real images.

    python examples/fashion.py --networks resnet20 plain20 resnet56 plain56

The networks are the paper's for CIFAR, on the 28x28 pixels of one channel as they are. The recipe
is the paper's too (He et al. 2015, arXiv:1512.03385, Sec. 4.2): batches of 128, SGD with momentum
0.9 and weight decay 1e-4, a rate of 0.1 that is divided by 10 after 1/2 and 3/4 of the run, images
padded by 4 pixels, cropped and mirrored at random. The paper's run has 164 epochs.

After each epoch a network adds a line to its log in --out, and saves its state. The same command
goes on with a run that was stopped, to the bit as if it had never been. At the end the example
prints a table and draws two pictures: the errors in all logs of --out, and, of the training images
that the first network gets wrong, those with the longest gradients: mislabelled, odd, or hard. The
trained networks lie in --out too, for `fresnet.load` and for `fashion_ensemble.py`.
With --networks and no name after it, nothing is trained, and it shows the logs alone.

The images lie on the device as bytes, and are cropped there. On a GPU, steps compute in bfloat16
unless --no-bfloat16 is given, and are recorded in CUDA graphs, because each kernel of so small a
network takes less time than its launch. On a CPU they do so with --bfloat16, which is faster where
the processor multiplies in it. Evaluation is in float32, on a GPU with TF32 convolutions.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from clothes import BATCH, CLASSES, FOLDER, Clothes, cropped, drawn, load, normalised
from style import BLUE, MAGENTA, ORANGE, RED, TEAL, figure
from torch import Tensor
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, optim, training, tree
from fresnet.training import TrainState

RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
TOGETHER, CHUNK = 12, 1000  # the most steps in one graph, and images at once outside training
KINDS = {"plain": "plain", "resnet": "residual"}
NETWORKS = [f"{kind}{depth}" for kind in KINDS for depth in (20, 32, 44, 56, 110)]

Outputs = TypeVar("Outputs")
Several = Callable[[TrainState, Tensor], tuple[TrainState, Tensor]]


class Row(NamedTuple):
    """What the log says of an epoch. Training is judged on augmented images, while they train."""

    epoch: int
    train_loss: float
    train_error: float
    test_error: float
    seconds: float


class Epoch(NamedTuple):
    """Where a run stands after an epoch."""

    params: Params
    rows: list[Row]


def steps_on(clothes: Clothes, optimizer: optim.Optimizer, *, bfloat16: bool = False) -> Several:
    """A function of a state and draws `[n b 4]` that takes n steps.

    It returns the new state, and the mean loss and the error of each batch, `[n 2]`.
    """
    precision = torch.bfloat16 if bfloat16 else None
    train_step = training.make_train_step(optimizer, precision=precision)

    def several(state: TrainState, draws: Tensor) -> tuple[TrainState, Tensor]:
        seen = []
        for batch in draws:
            x, y = cropped(clothes, batch)
            state, metrics = train_step(state, (normalised(x), y))
            seen.append(torch.stack([metrics.loss, 1 - metrics.accuracy]))
        return state, torch.stack(seen)

    return several


def captured(function: Callable[..., Outputs], *examples: Any) -> Callable[..., Outputs]:
    """The same function for arguments like the examples, as a CUDA graph if they lie on a GPU.

    A graph computes in the same memory every time, so arguments are copied in and results out. The
    function is pure, so the calls that warm it up and record it leave no trace.
    """
    if not tree.leaves(examples)[0].is_cuda:
        return function
    inputs = tree.map(Tensor.clone, examples)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)

    def replay(*arguments: Any) -> Outputs:
        tree.map(Tensor.copy_, inputs, arguments)
        graph.replay()
        return tree.map(Tensor.clone, outputs)

    return replay


def train(
    name: str,
    data: tuple[Clothes, Clothes],
    *,
    epochs: int,
    seed: int,
    bfloat16: bool = False,
    out: Path,
) -> Iterator[Epoch]:
    """Train a network, and yield it with its log after every epoch.

    A run that was stopped goes on from its last epoch, which is yielded first.

    Raises:
      FresnetError: if the checkpoints in `out` are of another run.
    """
    clothes, test = data
    size = len(clothes.labels)
    per_epoch = size // BATCH
    if not per_epoch:
        raise FresnetError(f"an epoch takes at least {BATCH} training images; there are {size}")
    schedule = optim.steps(RATE, at=(epochs * per_epoch // 2, epochs * per_epoch * 3 // 4))
    optimizer = optim.sgd(schedule, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    spec, device = fresnet.SPECS[name], clothes.images.device
    params = fresnet.init(seed, spec, num_classes=len(CLASSES), in_channels=1, device=device)
    state, rows = training.start(params, optimizer), list[Row]()

    folder = out / "checkpoints" / name
    run = {"epochs": epochs, "seed": seed, "bfloat16": bfloat16}
    if found := training.restore_state(state, folder):
        for option, value in run.items():
            if (was := found.notes.get(option)) != value:
                raise FresnetError(f"{folder} was started with {option} {was}, not {value}")
        state, rows = found.state, [Row(*row) for row in found.notes["rows"]]
        write(rows, out / f"{name}.csv")
        yield Epoch(state.params, rows)

    together = math.gcd(TOGETHER, per_epoch)
    first = drawn(size, seed, 0)[:together].to(device)
    several = captured(steps_on(clothes, optimizer, bfloat16=bfloat16), state, first)
    for epoch in range(len(rows), epochs):
        began, seen = time.perf_counter(), []
        for draws in drawn(size, seed, epoch).to(device).split(together):
            state, metrics = several(state, draws)
            seen.append(metrics)
        loss, error = torch.cat(seen).mean(0).tolist()
        parts = zip(test.images.split(CHUNK), test.labels.split(CHUNK), strict=True)
        right = training.evaluate(state.params, [(normalised(x), y) for x, y in parts]).top1
        seconds = time.perf_counter() - began
        rows = [*rows, Row(epoch + 1, loss, error, 1 - right, seconds)]
        training.save_state(state, folder, step=epoch + 1, keep=1, notes={"rows": rows, **run})
        write(rows, out / f"{name}.csv")
        yield Epoch(state.params, rows)


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows((row.epoch, *(f"{value:.5f}" for value in row[1:])) for row in rows)


def logs(folder: Path) -> dict[str, list[Row]]:
    """The logs in a folder by network, in the order of `NETWORKS`."""
    found = {}
    for name in NETWORKS:
        if (path := folder / f"{name}.csv").is_file():
            _, *lines = csv.reader(path.read_text().splitlines())
            found[name] = [Row(int(epoch), *map(float, rest)) for epoch, *rest in lines]
    return found


def table(found: dict[str, list[Row]]) -> str:
    """The last epoch of each network, in Markdown."""
    lines = [
        "| network | epochs | training loss | training error | test error |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in found.items():
        last = rows[-1]
        errors = f"{last.train_error:.2%} | {last.test_error:.2%}"
        lines.append(f"| {name} | {last.epoch} | {last.train_loss:.4f} | {errors} |")
    return "\n".join(lines)


def draw_curves(found: dict[str, list[Row]], path: Path) -> None:
    """Draw errors as the paper's Fig. 6 does: thin lines for training, bold ones for testing."""
    picture = figure(7.6)
    top = 300 * max(rows[-1].test_error for rows in found.values())
    panels = picture.subplots(2, 1, sharex=True, sharey=True)
    for axes, (prefix, kind) in zip(panels, KINDS.items(), strict=True):
        ours = [name for name in found if name.startswith(prefix)]
        for color, name in zip((BLUE, RED, TEAL, ORANGE, MAGENTA), ours, strict=False):
            epochs, _, training_errors, test_errors, _ = zip(*found[name], strict=True)
            axes.plot(epochs, [100 * e for e in training_errors], color=color, linewidth=1)
            errors = [100 * e for e in test_errors]
            marker = "o" if len(errors) == 1 else None  # a line of one point is not seen
            axes.plot(epochs, errors, color=color, linewidth=3, marker=marker, label=name)
        axes.set(title=f"{kind.capitalize()} networks", ylabel="error, %", ylim=(0, min(top, 100)))
        if ours:
            axes.legend(title="bold: test, thin: training", loc="upper right")
    panels[-1].set(xlabel="epoch", xlim=(0, None))
    picture.savefig(path)


def suspects(params: Params, clothes: Clothes) -> tuple[Tensor, Tensor]:
    """The images that the network gets wrong, the longest gradient first, and all its guesses."""
    images, labels = clothes
    parts = [fresnet.forward(params, normalised(x)).argmax(1) for x in images.split(CHUNK)]
    said = torch.cat(parts)
    wrong = (said != labels).nonzero().flatten()
    norms = [
        fresnet.per_sample_norms(cross_entropy, params, normalised(images[some]), labels[some])
        for some in wrong.split(100)
    ]
    return wrong[torch.cat(norms).argsort(descending=True)], said


def draw_suspects(params: Params, clothes: Clothes, path: Path) -> None:
    images, labels = clothes
    order, said = suspects(params, clothes)
    picture = figure(9.0)
    picture.set_layout_engine("constrained", h_pad=0.12)
    picture.suptitle(
        f"Of {len(order):,} training images that the network gets wrong,\n"
        "those with the longest gradients: label above, guess below"
    )
    for axes, i in zip(picture.subplots(5, 5).flat, order.tolist(), strict=False):
        axes.imshow(images[i].numpy(force=True), cmap="gray_r")
        axes.set(xticks=[], yticks=[], frame_on=False)
        axes.set_title(CLASSES[labels[i]], fontsize=13)
        axes.set_xlabel(CLASSES[said[i]], color=RED)
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        epilog="Ctrl-C stops; the same command goes on from the last epoch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option(
        "--networks",
        nargs="*",
        metavar="NAME",
        choices=NETWORKS,
        default=["resnet20"],
        help="plain or resnet, and 20, 32, 44, 56 or 110 layers",
    )
    option("--epochs", type=int, default=164, help="passes over the training images")
    option("--seed", type=int, default=0, help="random seed")
    option(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="compute steps in bfloat16 (default: on a GPU)",
    )
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    option("--device", choices=devices, default=devices[0], help="where to compute")
    option("--data", type=Path, default=FOLDER, help="the folder of the four idx files")
    option("--out", type=Path, default=Path("runs/fashion"), help="output folder")
    args = parser.parse_args()
    vars(args).setdefault("bfloat16", args.device == "cuda")
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {args.epochs}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.deterministic = True  # else a resumed run on a GPU may differ in rounding
    try:
        if args.networks:
            train_all(args)
    except FresnetError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last epoch")
    found = logs(args.out)
    if not found:
        sys.exit(f"there is no log in {args.out}")
    draw_curves(found, args.out / "curves.png")
    print(table(found))


def train_all(args: argparse.Namespace) -> None:
    """Train the networks one after the other, and draw the suspects of the first one."""
    data = tree.map(lambda leaf: leaf.to(args.device), load(args.data))
    run = {option: getattr(args, option) for option in ("epochs", "seed", "bfloat16", "out")}
    for name in args.networks:
        for epoch in train(name, data, **run):
            row = epoch.rows[-1]
            print(
                f"{name:9} epoch {row.epoch:3} of {args.epochs}: training error "
                f"{row.train_error:.2%}, test error {row.test_error:.2%}, {row.seconds:.1f} s",
                flush=True,
            )
        fresnet.save(epoch.params, args.out / f"{name}.safetensors")
        if name == args.networks[0]:
            draw_suspects(epoch.params, data[0], args.out / "suspects.png")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
