"""What a run leaves to be looked at: a log, TensorBoard's files, and a bar while it lasts."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from fresnet.training.evaluation import Evaluation

LOG = "log.jsonl"
BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps, {remaining} left{postfix}"

Line = Mapping[str, Any]


class Record:
    """Where a run writes: `log.jsonl`, TensorBoard's files, and the terminal.

    Each line of the log is an object, such as {"step": 7, "train": {"loss": 1.5}}.
    """

    def __init__(self, log: TextIO, board: "_Board", bar: "tqdm[Any]") -> None:
        self._log, self._board, self._bar = log, board, bar

    def step(self, step: int, *, loss: float, accuracy: float, rate: float, images: int) -> None:
        self._write(step, "train", loss=loss, accuracy=accuracy, rate=rate, images=images)
        self._bar.set_postfix_str(f"loss {loss:.3f}, top 1 {accuracy:.0%}", refresh=False)
        self._bar.update(1)

    def evaluation(self, step: int, epoch: int, epochs: int, found: Evaluation) -> None:
        images, loss, top1, top5, _ = found
        self._write(step, "evaluation", loss=loss, top1=top1, top5=top5, images=images)
        self._bar.write(
            f"epoch {epoch} of {epochs}: validation loss {loss:.3f}, "
            f"top 1 {top1:.2%}, top 5 {top5:.2%}"
        )

    def left_out(self, step: int, files: Sequence[str]) -> None:
        if files:
            self._line(step, "left_out", files=files)

    def sync(self) -> None:
        """Leave nothing to be lost with the power."""
        os.fsync(self._log.fileno())

    def _write(self, step: int, kind: str, **values: float) -> None:
        self._line(step, kind, **values)
        self._board.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def _line(self, step: int, kind: str, **values: Any) -> None:
        self._log.write(json.dumps({"step": step, kind: values}) + "\n")
        self._log.flush()


class _Board:
    """A file of TensorBoard's, in which scalars of this step and later ones replace older files'.

    It is written at once: a `SummaryWriter` has a thread of its own, to which errors come, and
    which the loader's workers would be forked beside.
    """

    def __init__(self, file: BinaryIO, first: int) -> None:
        self._file, self._writer = file, RecordWriter(file)
        self._add(file_version="brain.Event:2")
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def _add(self, **content: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


@contextmanager
def recording(folder: Path, *, steps: int, after: int) -> Iterator[Record]:
    """The record of a run of so many steps that goes on after some of them.

    What a killed run wrote of steps after its last checkpoint is cut off.
    """
    kept, events = folder / f".{LOG}", folder / "tensorboard"
    with kept.open("w") as file:
        lines = (line for line in read_log(folder) if line["step"] <= after)
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    kept.replace(folder / LOG)
    events.mkdir(exist_ok=True)
    # Files are read in the order of their names.
    name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
    with (
        (folder / LOG).open("a") as log,
        (events / name).open("wb") as board,
        tqdm(total=steps, initial=after, disable=None, bar_format=BAR) as bar,
    ):
        if after:
            bar.write(f"going on after step {after:,} of {steps:,}")
        yield Record(log, _Board(board, after + 1), bar)


def read_log(folder: Path) -> Iterator[Line]:
    """The lines of a run's log, if there is one, up to one that was cut short."""
    path = folder / LOG
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
