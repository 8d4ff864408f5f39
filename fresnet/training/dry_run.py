"""What a run would be, as a table: its recipe, its images, and the time that a step takes."""

import time

from fresnet import data
from fresnet.training.course import Course
from fresnet.training.processes import check_same
from fresnet.training.words import table


def tried(course: Course) -> str:
    """Take the next step of a run, write nothing, and say in a table what the run would be.

    Where batches differ in size, a step is taken on a smallest one too.

    Raises:
      FresnetError: if the run would refuse these steps.
    """
    order, step = course.order, course.step
    check_same(course.state, course.processes.group)
    places = next(course.places(), None) or _places(course, 0)
    began = time.perf_counter()
    (batch,) = course.batches([places])
    read = time.perf_counter()
    course.take(batch)
    seen = "no image can be read"
    if course.unread is not None:
        seen = f"loss {float(course.unread[1].loss):.3f}"
    computed = time.perf_counter()
    if order.size % course.per_epoch:
        (smallest,) = course.batches([_places(course, course.per_epoch - 1)])
        course.take(smallest)
    course.read()
    rows = {
        **course.plan(),
        **({"goes on": f"after step {step:,}, from {course.out}"} if step else {}),
        "next step" if step else "first step": f"{seen}; {read - began:.2f} s to read "
        f"images, {computed - read:.2f} s more",
        "all steps": f"{_duration(course.steps * (computed - read))} at that rate, if images "
        "are read meanwhile",
    }
    return table(rows)


def _places(course: Course, step: int) -> list[data.Place]:
    rank, ranks = course.processes.rank, course.processes.size
    return data.batch_at(course.order, step, rank=rank, ranks=ranks)


def _duration(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} seconds"
