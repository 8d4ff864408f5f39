"""What a run shows of itself: a log, files for TensorBoard, and a progress bar."""

import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from fresnet.errors import FresnetError
from fresnet.reading import from_json
from fresnet.training.evaluation import Evaluation
from fresnet.weights.storage import write_file

LOG = "log.jsonl"
BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps, {remaining} left{postfix}"

Line = Mapping[str, Any]


class Record:
    """Where a run writes its numbers: `log.jsonl`, files for TensorBoard, and the terminal.

    Each line of the log is a JSON object, such as {"step": 7, "train": {"loss": 1.5}}.
    """

    def __init__(self, log: TextIO, board: "_Board", bar: "tqdm[Any]") -> None:
        self._log, self._board, self._bar = log, board, bar
        self._images, self._since = 0, time.perf_counter()  # of the epoch, without evaluations

    def step(self, step: int, *, loss: float, accuracy: float, rate: float, images: int) -> None:
        self._write(step, "train", loss=loss, accuracy=accuracy, rate=rate, images=images)
        self._images, self._until = self._images + images, time.perf_counter()
        told = f"loss {loss:.3f}, top 1 {accuracy:.0%}, {self._speed()}"
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update(1)

    def _speed(self) -> str:
        return f"{self._images / (self._until - self._since):,.1f} images/s"

    def evaluation(self, step: int, epoch: int, epochs: int, found: Evaluation) -> None:
        images, loss, top1, top5, _ = found
        self._write(step, "evaluation", loss=loss, top1=top1, top5=top5, images=images)
        speed = f", {self._speed()}" if self._images else ""
        self._bar.write(f"epoch {epoch} of {epochs}: validation {in_words(found)}{speed}")
        self._images, self._since = 0, time.perf_counter()

    def left_out(self, step: int, files: Sequence[str]) -> None:
        if files:
            self._line(step, "left_out", files=files)

    def sync(self) -> None:
        """Wait until the log lies on the disk, where a power cut does not reach it."""
        os.fsync(self._log.fileno())

    def _write(self, step: int, kind: str, **values: float) -> None:
        self._line(step, kind, **values)
        self._board.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def _line(self, step: int, kind: str, **values: float | Sequence[str]) -> None:
        self._log.write(json.dumps({"step": step, kind: values}) + "\n")
        self._log.flush()


def in_words(found: Evaluation) -> str:
    """An evaluation in words. Of five classes or fewer, each would be among the first five."""
    top5 = f", top 5 {found.top5:.2%}" if len(found.confusion) > 5 else ""
    return f"loss {found.loss:.3f}, top 1 {found.top1:.2%}{top5}"


class _Board:
    """A file for TensorBoard. From its first step on, its scalars replace those of older files.

    Each value is written at once. A `SummaryWriter` would write in a thread of its own: errors
    would be raised there, and the loader would fork its workers beside that thread.
    """

    def __init__(self, file: BinaryIO, first: int) -> None:
        self._file, self._writer = file, RecordWriter(file)
        self._add(file_version="brain.Event:2")
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def _add(self, **content: object) -> None:
        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


@contextmanager
def recording(folder: Path, *, steps: int, after: int, plan: str) -> Iterator[Record]:
    """The record of a run of `steps` steps that goes on after step `after`.

    The plan is what it says first. A run that was killed may have logged steps after its last
    checkpoint. They are cut off. Lines that are damaged are left out, and a warning says how many.
    """
    damaged = 0

    def write(path: Path) -> None:
        nonlocal damaged
        with path.open("w", encoding="utf-8") as file:
            for line in _lines(folder):
                if line is None:
                    damaged += 1
                elif line["step"] <= after:
                    file.write(json.dumps(line) + "\n")

    write_file("train", folder / LOG, write)
    if damaged:
        warnings.warn(f"{folder / LOG}: left out as damaged, {damaged} lines", stacklevel=3)
    events = folder / "tensorboard"
    events.mkdir(exist_ok=True)
    name = f"events.out.tfevents.{_after_all_in(events):019}.{os.getpid()}"
    with (
        (folder / LOG).open("a", encoding="utf-8") as log,
        (events / name).open("wb") as board,
        tqdm(total=steps, initial=after, disable=None, bar_format=BAR) as bar,
    ):
        bar.write(plan)
        if after:
            bar.write(f"going on after step {after:,} of {steps:,}")
        yield Record(log, _Board(board, after + 1), bar)


def _after_all_in(events: Path) -> int:
    """The time in ns, or a later one: TensorBoard reads files in the order of their names.

    A clock may go back between two starts of a run.
    """
    names = (
        re.match(r"events\.out\.tfevents\.(\d{1,19})\.", path.name) for path in events.iterdir()
    )
    return max([time.time_ns(), *(int(name[1]) + 1 for name in names if name)])


def read_log(folder: Path) -> Iterator[Line]:
    """The lines of a run's log, but for damaged ones. Without a log there are none."""
    return (line for line in _lines(folder) if line is not None)


def _lines(folder: Path) -> Iterator[Line | None]:
    """The lines of a run's log, None for each that is damaged, without a last one cut short."""
    path = folder / LOG
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            line = _line(text)
            if line is not None or text.endswith(b"\n"):
                yield line


def _line(text: bytes) -> Line | None:
    """What a line says, or None if it is not as `Record` writes it."""
    try:
        line: Line = from_json(text)
    except FresnetError:
        return None
    if not isinstance(line, dict) or len(line) != 2:
        return None
    match line:
        case {
            "train": {"loss": float(), "accuracy": float(), "rate": float(), "images": int()},
            "step": int(step),
        } if step >= 0:
            return line
        case {
            "evaluation": {"loss": float(), "top1": float(), "top5": float(), "images": int()},
            "step": int(step),
        } if step >= 0:
            return line
        case {"left_out": {"files": list(files)}, "step": int(step)} if step >= 0 and all(
            isinstance(file, str) for file in files
        ):
            return line
    return None


def evaluated_steps(folder: Path) -> set[int]:
    """The steps after which a run was evaluated."""
    return {line["step"] for line in read_log(folder) if "evaluation" in line}


def left_out_files(folder: Path) -> list[str]:
    """The files that a run left out, each once."""
    lines = (line["left_out"]["files"] for line in read_log(folder) if "left_out" in line)
    return sorted({file for files in lines for file in files})
