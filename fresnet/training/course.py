"""A run under way: where it stands, and what it does besides steps."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fresnet import data, tree
from fresnet.data import Augmentation, Images, Place
from fresnet.data.folder import write_labels
from fresnet.data.loading import OnBroken
from fresnet.data.presets import Preset
from fresnet.data.shards import Scanned
from fresnet.errors import FresnetError, listed
from fresnet.network.nodes import Params
from fresnet.reading import check_regular
from fresnet.training.checkpoint import save_state
from fresnet.training.evaluation import Evaluation, evaluate
from fresnet.training.plan import Run, assemble
from fresnet.training.plots import draw_confusion, draw_curves
from fresnet.training.processes import Processes, gathered
from fresnet.training.recipes import schedule_of
from fresnet.training.record import (
    LOG,
    Record,
    evaluated_steps,
    left_out_files,
    read_log,
    recording,
)
from fresnet.training.resuming import CHECKPOINTS, last_good, notes_of, resumed
from fresnet.training.step import Metrics
from fresnet.training.stopping import LOCK, alone, stop_signals
from fresnet.training.words import rows, table
from fresnet.weights.files import save
from fresnet.weights.storage import remove_leftovers, write_file

NETWORK, LABELS = "network.safetensors", "labels.txt"
CURVES, CONFUSION = "curves.png", "confusion.png"


class Outcome(NamedTuple):
    params: Params  # the average of the weights, if the recipe keeps one
    evaluation: Evaluation
    broken: tuple[str, ...]  # "file: reason" for each image that was left out


class Options(NamedTuple):
    """What may be chosen anew each time that a run is started."""

    recompute: bool
    workers: int
    broken: OnBroken
    keep: int
    save_every: int | None


class Course:
    """A run under way in one of its processes: where it stands, and what it does besides steps.

    Only the first process has a record, and only that process writes files.
    """

    def __init__(
        self,
        run: Run,
        params: Params,
        folders: tuple[Scanned, Scanned],
        out: Path,
        processes: Processes,
        options: Options,
    ) -> None:
        for name in (LOG, LOCK, LABELS, NETWORK, CURVES, CONFUSION):
            check_regular(out / name)
        self.run, self.out, self.processes, self.options = run, out, processes, options
        self.training, self.validation = folders
        first, self.train_step, self.order = assemble(
            run, params, len(self.training.files), processes, options.recompute
        )
        self.load = partial(data.loader, workers=options.workers, broken=options.broken)
        self.per_epoch = data.steps_per_epoch(self.order)
        self.steps = run.recipe.epochs * self.per_epoch
        self.rate = schedule_of(run.recipe, self.per_epoch)
        self.notes = notes_of(run, *folders)
        self.state = resumed(first, out, self.notes)
        self.step = int(self.state.step)
        self.dtype = self.state.params.weights.head.bias.dtype
        self.record: Record | None = None
        self.stopped: Callable[[], bool] = lambda: False
        self.left_out: list[str] = []  # files that are not in the log yet
        self.unread: tuple[int, Metrics, data.Batch] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the folder to this run, open its record, and listen for signals to stop."""
        with ExitStack() as stack:
            if self.processes.rank == 0:
                stack.enter_context(alone(self.out))
                remove_leftovers(self.out)
                self.record = stack.enter_context(
                    recording(self.out, steps=self.steps, after=self.step, plan=table(self.plan()))
                )
            self.stopped = stack.enter_context(stop_signals())
            yield

    def plan(self) -> Mapping[str, str]:
        """What the run is, as the rows of a table."""
        parameters = sum(leaf.numel() for leaf in tree.leaves(self.state.params.weights))
        images, validation = len(self.training.files), len(self.validation.files)
        return {
            "network": f"{self.run.network}, {parameters:,} parameters",
            "images": f"{images:,} to train on, {validation:,} to validate",
            **rows(self.run, self.per_epoch, self.processes.size),
        }

    def places(self) -> Iterator[list[Place]]:
        """This process's share of the images of each step that is still to come."""
        rank, ranks = self.processes.rank, self.processes.size
        return data.batches(
            self.order, int(self.state.position), self.steps, rank=rank, ranks=ranks
        )

    def batches(self, places: Iterable[list[Place]]) -> Generator[data.Batch, None, None]:
        """The augmented images of these places, as pixels if light and holes leave them so."""
        augmentation = self.run.recipe.augmentation
        in_pixels = augmentation.lighting == augmentation.erase == 0
        augment = partial(
            data.augment_pixels if in_pixels else data.augment, augmentation=augmentation
        )
        return self.load(Images(self.training, augment, self.run.seed), places)

    def placed(self, x: Tensor, like: Augmentation | Preset) -> Tensor:
        """Images on the device, in the dtype of the weights; pixels are normalised there."""
        x = x.to(self.processes.device, non_blocking=True)
        return (data.normalise(x, like) if x.dtype == torch.uint8 else x).to(self.dtype)

    def take(self, batch: data.Batch) -> None:
        """Take a step, and read the numbers of the one before while the device is at work on it."""
        if len(batch.places) < (2 if batch.broken and self.run.recipe.batch > 1 else 1):
            self.pass_over(batch)
            return
        x = self.placed(batch.x, self.run.recipe.augmentation)
        y = batch.y.to(self.processes.device, non_blocking=True)
        self.state, metrics = self.train_step(self.state, (x, y))
        self.step += 1
        self.read()
        self.unread = (self.step, metrics, batch)

    def pass_over(self, batch: data.Batch) -> None:
        """Go on without a step where no image of a batch can be read, or one of several.

        One image alone would be normalised by itself.

        Raises:
          FresnetError: if other processes take the step.
        """
        if self.processes.size > 1:
            raise FresnetError(
                f"a process can read none of its {len(batch.broken)} images at step "
                f"{self.step + 1}; the first is {batch.broken[0]}: repair them, or use fewer "
                "processes"
            )
        self.read()
        self.left_out.extend(batch.broken)
        state = self.state
        self.state = state._replace(
            step=state.step + 1,
            optimizer=state.optimizer._replace(step=state.optimizer.step + 1),
            position=state.position + 1,
        )
        self.step += 1

    def read(self) -> None:
        """Read and record the numbers of the last step, unless this has been done.

        If a loss is not finite this raises, and raises again before the state would be saved.
        """
        if self.unread is None:
            return
        step, metrics, batch = self.unread
        loss, accuracy, count = (value.item() for value in metrics)
        rate = float(self.rate(torch.tensor(float(step - 1), device="cpu")))
        if not math.isfinite(loss):
            epoch, number = divmod(step - 1, self.per_epoch)
            files = [self.training.files[place.image] for place in batch.places]
            raise FresnetError(
                f"the loss is {loss} at step {step}, batch {number + 1} of epoch {epoch + 1}, "
                f"which has {listed(files)}, at a learning rate of {rate:.3g}; "
                f"{last_good(self.out)}"
            )
        self.left_out.extend(batch.broken)
        if self.record:
            self.record.step(step, loss=loss, accuracy=accuracy, rate=rate, images=int(count))
        self.unread = None

    def epoch_ends(self) -> bool:
        return self.step % self.per_epoch == 0

    def checkpoint_due(self) -> bool:
        every = self.options.save_every
        return self.epoch_ends() or (every is not None and self.step % every == 0)

    def checkpoint(self, *, together: bool) -> None:
        """Save the state. `together` says whether all processes do so, after the same step.

        Raises:
          FresnetError: if a loss or a weight is not finite. Nothing is saved then.
        """
        self.read()
        if not all(leaf.isfinite().all() for leaf in tree.leaves(self.state.params)):
            raise FresnetError(
                f"weights are not finite after step {self.step}; {last_good(self.out)}"
            )
        self.log_left_out(together=together)
        if self.record:
            self.record.sync()
            save_state(
                self.state,
                self.out / CHECKPOINTS,
                step=self.step,
                keep=self.options.keep,
                notes=self.notes,
                preset=self.run.recipe.preset,
                labels=self.training.classes,
            )

    def log_left_out(self, *, together: bool) -> None:
        """Log the files that were left out: of all processes together, or of this one alone."""
        files = gathered(self.left_out, self.processes) if together else self.left_out
        if self.record:
            self.record.left_out(self.step, files)
        self.left_out.clear()

    def missed_evaluation(self) -> bool:
        """Whether the run was stopped between the end of an epoch and its evaluation."""
        return self.epoch_ends() and self.step > 0 and self.step not in evaluated_steps(self.out)

    def end_epoch(self) -> Evaluation:
        """Evaluate after an epoch, and record it."""
        found = self.validate()
        self.log_left_out(together=True)
        if self.record:
            epoch = self.step // self.per_epoch
            self.record.evaluation(self.step, epoch, self.run.recipe.epochs, found)
        return found

    def validate(self) -> Evaluation:
        """Evaluate the network, or its average if there is one, on the images to validate on.

        Each process takes its share of the images. A signal ends the evaluation. The state has been
        saved before, and the run evaluates again when it goes on.
        """
        recipe, processes = self.run.recipe, self.processes
        images = Images(self.validation, partial(data.prepare_pixels, preset=recipe.preset), seed=0)
        share = range(processes.rank, len(images), processes.size)
        count = -(-len(share) * processes.size * self.run.micro_batches // recipe.batch)
        # The batches are of about one size, so that few broken images seldom leave one empty.
        places = [[Place(epoch=0, place=i, image=i) for i in share[k::count]] for k in range(count)]

        def on_device(batch: data.Batch) -> tuple[Tensor, Tensor]:
            self.left_out.extend(batch.broken)
            if self.stopped():
                raise KeyboardInterrupt
            return self.placed(batch.x, recipe.preset), batch.y.to(processes.device)

        with closing(self.load(images, places)) as batches:
            network = self.state.average or self.state.params
            found = map(on_device, batches)
            return evaluate(network, (b for b in found if len(b[0])), group=processes.group)

    def finish(self, found: Evaluation) -> Outcome:
        """Write the network, its labels and the pictures."""
        outcome = Outcome(
            self.state.average or self.state.params, found, tuple(left_out_files(self.out))
        )
        if self.processes.rank == 0:
            classes = self.training.classes
            preset = self.run.recipe.preset
            save(outcome.params, self.out / NETWORK, preset=preset, labels=classes)
            lines, confusion = read_log(self.out), found.confusion
            for name, write in (
                (LABELS, partial(write_labels, classes=classes)),
                (CURVES, partial(draw_curves, lines, self.per_epoch)),
                (CONFUSION, partial(draw_confusion, confusion, classes)),
            ):
                write_file("train", self.out / name, write)
        return outcome
