"""A whole run on folders of images: recipe, data, steps, evaluations, checkpoints and record.

Stopped at any moment and started again, it goes on from its last checkpoint and ends with the same
bits as if it had never been stopped. By another number of processes it goes on as well: to rounding
the same where norms go across them and nothing is mixed, else with the norms of other shares.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple, TypeAlias
from zlib import crc32

import torch
from torch import Tensor, distributed

from fresnet import data, tree
from fresnet.data import Folder, Images, Order, Place
from fresnet.errors import FresnetError
from fresnet.network.nodes import Params
from fresnet.pytorch.collectives import answered
from fresnet.training.checkpoint import restore_state, save_state, saved_states
from fresnet.training.evaluation import Evaluation, evaluate
from fresnet.training.plots import draw_confusion, draw_curves
from fresnet.training.processes import Processes, check_same
from fresnet.training.recipes import Recipe, average_decay_of, mixing_of, optimizer_of, schedule_of
from fresnet.training.record import read_log, recording
from fresnet.training.state import TrainState, start
from fresnet.training.step import Metrics, TrainStep, make_train_step
from fresnet.training.targets import cross_entropy
from fresnet.weights.files import save

CHECKPOINTS, NETWORK = "checkpoints", "network.safetensors"
LABELS = "labels.txt"
CURVES, CONFUSION = "curves.png", "confusion.png"

Broken: TypeAlias = Literal["raise", "skip"]


class Run(NamedTuple):
    """What a run's numbers depend on, but for images: a checkpoint goes on with no other."""

    network: str  # in words: what it begins with
    recipe: Recipe
    seed: int = 0
    precision: torch.dtype | None = None
    micro_batches: int = 1
    norms_across: bool = False


class Outcome(NamedTuple):
    params: Params  # or their average, if the recipe keeps one
    evaluation: Evaluation
    broken: tuple[str, ...]  # "file: reason" of images that were left out


def train(
    run: Run,
    params: Params,
    folders: tuple[Folder, Folder],
    out: Path,
    processes: Processes,
    *,
    recompute: bool = False,
    workers: int = 0,
    broken: Broken = "raise",
    keep: int = 3,
    save_every: int | None = None,
) -> Outcome:
    """Train to the end, from the last checkpoint in `out` if there is one.

    Args:
      params: the network to begin with.
      folders: of training and of validation.
      out: where checkpoints, log, pictures and the trained network go.
      processes: this one among those that train together.
      recompute: as in `make_train_step`.
      workers: processes that read images, for each that trains.
      broken: whether an image that cannot be read ends the run, "raise", or is left out, "skip".
      keep: how many checkpoints.
      save_every: steps between checkpoints, besides those at the end of each epoch.
    Raises:
      FresnetError: if the checkpoint is of another run, if a loss or a weight is not finite, if an
        image cannot be read, a file not be written, or another process does not answer.
      KeyboardInterrupt: at SIGINT or SIGTERM, once the state is saved; at a second one at once.
    """
    training, validation = folders
    recipe, main = run.recipe, processes.rank == 0
    if save_every is not None and save_every < 1:
        raise FresnetError(f"train expects save_every to be at least 1; got {save_every}")
    state, train_step, order = assemble(run, params, len(training.files), processes, recompute)
    per_epoch = data.steps_per_epoch(order)
    steps, rate = recipe.epochs * per_epoch, schedule_of(recipe, per_epoch)
    notes = _notes(run, training)
    state = _resumed(state, out, notes)
    step = int(state.step)
    # Read before the first process writes there, and so before they agree on the state.
    due = step % per_epoch == 0 < step and step not in _evaluations(out)
    check_same(state, processes.group)
    images = Images(training, partial(data.augment, augmentation=recipe.augmentation), run.seed)
    places = data.batches(
        order, int(state.position), steps, rank=processes.rank, ranks=processes.size
    )
    dtype = state.params.weights.head.bias.dtype
    left_out: list[str] = []  # and not yet in the log

    with ExitStack() as stack:
        record = None
        if main:
            stack.enter_context(_alone(out))
            record = stack.enter_context(recording(out, steps=steps, after=step))
        stopped = stack.enter_context(_stop_signals())

        def read(step: int, metrics: Metrics, batch: data.Batch) -> None:
            loss, accuracy, count = (value.item() for value in metrics)
            at = float(rate(torch.tensor(float(step - 1))))
            if not math.isfinite(loss):
                epoch, number = divmod(step - 1, per_epoch)
                raise FresnetError(
                    f"the loss is {loss} at step {step}, batch {number + 1} of epoch {epoch + 1}, "
                    f"which has {_few(batch, training)}, at a learning rate of {at:.3g}; "
                    f"{_last_good(out)}"
                )
            left_out.extend(batch.broken)
            if record:
                record.step(step, loss=loss, accuracy=accuracy, rate=at, images=int(count))

        def leave_out(step: int, together: bool = True) -> None:
            files = _gathered(left_out, processes) if together else left_out
            if record:
                record.left_out(step, files)
            left_out.clear()

        def checkpoint(step: int, together: bool = True) -> None:
            unread.settle()
            if not all(leaf.isfinite().all() for leaf in tree.leaves(state.params)):
                raise FresnetError(f"weights are not finite after step {step}; {_last_good(out)}")
            leave_out(step, together)
            if record:
                record.sync()
                save_state(state, out / CHECKPOINTS, step=step, keep=keep, notes=notes)

        def seen(batch: data.Batch) -> None:
            left_out.extend(batch.broken)
            if stopped():
                raise KeyboardInterrupt  # the state is saved, and this is made up for

        def evaluation() -> Evaluation:
            return _evaluation(run, validation, processes, state, workers, broken, seen)

        def evaluated(step: int) -> Evaluation:
            found = evaluation()
            leave_out(step)
            if record:
                record.evaluation(step, step // per_epoch, recipe.epochs, found)
            return found

        unread = _Late(read)
        try:
            found = evaluated(step) if due else None
            batches = data.loader(images, places, workers=workers, broken=broken)
            for batch in stack.enter_context(closing(batches)):
                x = batch.x.to(processes.device, dtype, non_blocking=True)
                y = batch.y.to(processes.device, non_blocking=True)
                state, metrics = train_step(state, (x, y))
                step += 1
                unread.put(step, metrics, batch)
                stop, epoch_ends = stopped(), step % per_epoch == 0
                if stop or epoch_ends or (save_every and step % save_every == 0):
                    checkpoint(step, together=not stop)
                if stop:
                    raise KeyboardInterrupt
                if epoch_ends:
                    found = evaluated(step)
            found = found or evaluation()  # once more, after its end
        except Exception as error:
            if not stopped():
                raise
            checkpoint(step, together=False)  # the others have stopped sooner, within this step
            raise KeyboardInterrupt from error

        outcome = Outcome(state.average or state.params, found, tuple(_left_out(out)))
        if main:
            save(outcome.params, out / NETWORK)
            (out / LABELS).write_text("".join(f"{name}\n" for name in training.classes))
            draw_curves(read_log(out), per_epoch, out / CURVES)
            draw_confusion(outcome.evaluation.confusion, training.classes, out / CONFUSION)
        return outcome


def assemble(
    run: Run, params: Params, images: int, processes: Processes, recompute: bool = False
) -> tuple[TrainState, TrainStep, Order]:
    """The state before the first step of a run on so many images, its step, and their order."""
    recipe = run.recipe
    order = Order(images, recipe.batch, run.seed, recipe.repeats)
    optimizer = optimizer_of(recipe, data.steps_per_epoch(order))
    train_step = make_train_step(
        optimizer,
        loss_fn=partial(cross_entropy, label_smoothing=recipe.label_smoothing),
        mixing=mixing_of(recipe),
        precision=run.precision,
        micro_batches=run.micro_batches,
        recompute=recompute,
        average_decay=average_decay_of(recipe),
        group=processes.group,
        norms_across=run.norms_across and processes.group is not None,
    )
    state = start(params, optimizer, seed=run.seed, average=recipe.average > 0)
    return state, train_step, order


class _Late:
    """Reads a step's numbers once the next step is under way, so that no device waits for it."""

    def __init__(self, read: Callable[..., None]) -> None:
        self._read = read
        self._unread: tuple[Any, ...] = ()

    def put(self, *numbers: Any) -> None:
        self.settle()
        self._unread = numbers

    def settle(self) -> None:
        if self._unread:
            self._read(*self._unread)
            self._unread = ()  # not if it raises: what is wrong stays wrong


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a folder to one run at a time, where there are locks."""
    try:
        import fcntl
    except ImportError:  # as on Windows
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
        except BlockingIOError as error:
            raise FresnetError(f"another run is writing to {out}: choose another folder") from error
        yield


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came: a step in progress is finished first. A second one raises."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluation(
    run: Run,
    folder: Folder,
    processes: Processes,
    state: TrainState,
    workers: int,
    broken: Broken,
    seen: Callable[[data.Batch], None],
) -> Evaluation:
    """Of the average, if there is one; each process takes its share of the images."""
    images = Images(folder, partial(data.prepare, preset=run.recipe.preset), seed=0)
    share = range(processes.rank, len(images), processes.size)
    count = -(-len(share) * processes.size * run.micro_batches // run.recipe.batch)
    # None much smaller than another, so that a broken image is seldom all of one.
    places = [[Place(epoch=0, place=i, image=i) for i in share[k::count]] for k in range(count)]
    dtype = state.params.weights.head.bias.dtype

    def placed(batch: data.Batch) -> tuple[Tensor, Tensor]:
        seen(batch)
        return batch.x.to(processes.device, dtype), batch.y.to(processes.device)

    with closing(data.loader(images, places, workers=workers, broken=broken)) as batches:
        return evaluate(state.average or state.params, map(placed, batches), group=processes.group)


def _resumed(state: TrainState, out: Path, notes: Mapping[str, Any]) -> TrainState:
    """The last checkpoint of this run, or the state as it is if there is none."""
    restored = restore_state(state, out / CHECKPOINTS)
    if restored is None:
        return state
    others = [
        f"{name} {shorten(str(there.get(name)), 40)}, not {shorten(str(notes.get(name)), 40)}"
        for there in (restored.notes,)
        for name in dict.fromkeys([*notes, *there])
        if there.get(name) != notes.get(name)
    ]
    if others:
        raise FresnetError(
            f"{out} holds a run of {'; of '.join(others)}: go on with the same, or choose another "
            "folder"
        )
    resumed: TrainState = restored.state
    return resumed


def _notes(run: Run, folder: Folder) -> dict[str, Any]:
    """The run and its images in words, flat, for a checkpoint."""
    files = "\n".join(os.path.relpath(file, folder.root) for file in folder.files)
    notes: dict[str, Any] = {
        "images": len(folder.files),
        "classes": " ".join(folder.classes),
        "files' checksum": f"{crc32(files.encode(errors='surrogateescape')):08x}",
    }

    def add(name: str, value: Any) -> None:
        if hasattr(value, "_asdict"):
            for field, part in value._asdict().items():
                add(field if name == "recipe" else f"{name} {field}".strip(), part)
        else:
            notes[name] = getattr(value, "__name__", None) or str(value)

    for field, value in run._asdict().items():
        add(field, value)
    return notes


def _gathered(names: list[str], processes: Processes) -> list[str]:
    """Those of all processes."""
    if processes.group is None:
        return names
    everyone: list[list[str]] = [[]] * processes.size
    with answered(processes.rank, processes.size):
        distributed.all_gather_object(everyone, names, group=processes.group)
    return [name for one in everyone for name in one]


def _few(batch: data.Batch, folder: Folder) -> str:
    """The first of its files."""
    named = [folder.files[place.image] for place in batch.places[:3]]
    return ", ".join([*named, "..."] if len(batch.places) > 3 else named)


def _last_good(out: Path) -> str:
    found = saved_states(out / CHECKPOINTS)
    return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint yet"


def _evaluations(out: Path) -> set[int]:
    """The steps after which there was an evaluation."""
    return {line["step"] for line in read_log(out) if "evaluation" in line}


def _left_out(out: Path) -> list[str]:
    """Files that the log names, each once."""
    lines = (line["left_out"]["files"] for line in read_log(out) if "left_out" in line)
    return sorted({file for files in lines for file in files})
