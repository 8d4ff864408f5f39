"""Schedules: learning rates and weight decays as functions of the step."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fresnet.errors import FresnetError, check_type, shown
from fresnet.numbers import as_number
from fresnet.optim.checks import checked_numbers

Schedule: TypeAlias = Callable[[Tensor], float | Tensor]
"""From the step, `[]`, to a rate. The step is 0 at the first update."""


def steps(peak: float | Tensor, *, at: Sequence[int], factor: float = 0.1) -> Schedule:
    """A schedule that begins at the peak and is multiplied by `factor` at each step of `at`.

    The paper trains by such a schedule (He et al. 2015, arXiv:1512.03385).

    >>> rate = steps(1.0, at=(2, 4))
    >>> [round(float(rate(torch.tensor(step))), 3) for step in range(5)]
    [1.0, 1.0, 0.1, 0.1, 0.01]

    Raises:
      FresnetError: if `at` is not a list of numbers, or if another number is negative.
    """
    checked_numbers("steps", peak=peak, factor=factor)
    if not isinstance(at, Sequence) or any(as_number(step) is None for step in at):
        raise FresnetError(f"steps expects at to be a list of steps; got {shown(at)}")
    return lambda step: peak * factor ** sum((step >= a) * 1.0 for a in at)


def cosine(peak: float | Tensor, *, over: int, end: float | Tensor = 0.0) -> Schedule:
    """A schedule that falls from `peak` to `end` by half a cosine in `over` steps, and then stays.

    Raises:
      FresnetError: if `over` is not at least 1, or if another number is negative.
    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5, without restarts.
    """
    checked_numbers("cosine", peak=peak, end=end)
    _check_over("cosine", over)

    def schedule(step: Tensor) -> Tensor:
        progress = (step / over).clamp(max=1)
        return end + (peak - end) * (1 + torch.cos(torch.pi * progress)) / 2

    return schedule


def polynomial(
    peak: float | Tensor, *, over: int, power: float = 2.0, end: float | Tensor = 0.0
) -> Schedule:
    """A schedule that falls from `peak` to `end` in `over` steps, and then stays.

        end + (peak - end) (1 - step / over)^power

    >>> rate = polynomial(1.0, over=4)
    >>> [float(rate(torch.tensor(step))) for step in range(6)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]

    Raises:
      FresnetError: if `over` is not at least 1, or if another number is negative.
    Source: You, Gitman & Ginsburg 2017, arXiv:1708.03888, Sec. 5.
    """
    checked_numbers("polynomial", peak=peak, power=power, end=end)
    _check_over("polynomial", over)
    return lambda step: end + (peak - end) * (1 - step / over).clamp(min=0) ** power


def warm_up(schedule: Schedule, *, over: int, start: float = 0.0) -> Schedule:
    """Put `over` steps of linear warm-up before a schedule.

    The rate rises from `start` times the schedule's first value to that value. Then the schedule
    begins; it begins at once if `over` is 0.

    >>> rate = warm_up(cosine(1.0, over=4), over=2, start=0.5)
    >>> [round(float(rate(torch.tensor(step))), 3) for step in range(7)]
    [0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]

    Raises:
      FresnetError: if `over` or `start` is negative, or if `schedule` is no function.
    Source: Goyal et al. 2017, arXiv:1706.02677, Sec. 2.2.
    """
    check_type("warm_up", Callable, "a schedule, such as cosine(0.1, over=1000)", schedule=schedule)
    checked_numbers("warm_up", start=start)
    number = as_number(over)
    if number is None or number < 0:
        raise FresnetError(
            f"warm_up expects over to be a number of steps from 0 on; got {shown(over)}"
        )
    if number == 0:
        return schedule

    def warmed(step: Tensor) -> Tensor:
        after = schedule((step - over).clamp(min=0))
        return after * (start + (1 - start) * (step / over).clamp(max=1))

    return warmed


def _check_over(caller: str, over: int) -> None:
    if not (as_number(over) or 0) >= 1:
        raise FresnetError(f"{caller} expects over to be at least 1 step; got {shown(over)}")
