"""What a run leaves to be looked at: a log, TensorBoard's files, and a bar while it lasts."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fresnet.training.evaluation import Evaluation

LOG = "log.jsonl"
BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps, {remaining} left{postfix}"

Line = Mapping[str, Any]


class Record:
    """Where a run writes: `log.jsonl`, TensorBoard's files, and the terminal.

    Each line of the log is an object, such as {"step": 7, "train": {"loss": 1.5}}.
    """

    def __init__(self, folder: Path, bar: "tqdm[Any]") -> None:
        self._file = (folder / LOG).open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=bar.n + 1)
        self._bar = bar

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
            self._write(step, "left_out", files=files)

    def sync(self) -> None:
        """Leave nothing to be lost with the power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def _write(self, step: int, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"step": step, kind: values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)


@contextmanager
def recording(folder: Path, *, steps: int, after: int) -> Iterator[Record]:
    """The record of a run of so many steps that goes on after some of them.

    What a killed run wrote of steps after its last checkpoint is cut off.
    """
    kept = folder / f".{LOG}"
    with kept.open("w") as file:
        lines = (line for line in read_log(folder) if line["step"] <= after)
        file.writelines(json.dumps(line) + "\n" for line in lines)
    kept.replace(folder / LOG)
    record = Record(folder, tqdm(total=steps, initial=after, disable=None, bar_format=BAR))
    try:
        yield record
    finally:
        record.close()


def read_log(folder: Path) -> Iterator[Line]:
    """The lines of a run's log, if there is one, up to one that was cut short."""
    path = folder / LOG
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
