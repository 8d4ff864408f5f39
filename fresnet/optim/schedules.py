"""Schedules: learning rates and weight decays as functions of the step."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[Tensor], float | Tensor]
"""From the step, `[]`, to a rate. The step is 0 at the first update."""


def steps(peak: float | Tensor, *, at: Sequence[int], factor: float = 0.1) -> Schedule:
    """A schedule that begins at the peak and is multiplied by `factor` at each step of `at`.

    The paper trains by such a schedule (He et al. 2015, arXiv:1512.03385).

    >>> rate = steps(1.0, at=(2, 4))
    >>> [round(float(rate(torch.tensor(step))), 3) for step in range(5)]
    [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    return lambda step: peak * factor ** sum((step >= a) * 1.0 for a in at)


def cosine(peak: float | Tensor, *, over: int, end: float | Tensor = 0.0) -> Schedule:
    """A schedule that falls from `peak` to `end` by half a cosine in `over` steps, and then stays.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5, without restarts.
    """

    def schedule(step: Tensor) -> Tensor:
        progress = (step / over).clamp(max=1)
        return end + (peak - end) * (1 + torch.cos(torch.pi * progress)) / 2

    return schedule


def warm_up(schedule: Schedule, *, over: int, start: float = 0.0) -> Schedule:
    """Put `over` steps of linear warm-up before a schedule.

    The rate rises from `start` times the schedule's first value to that value. Then the schedule
    begins.

    >>> rate = warm_up(cosine(1.0, over=4), over=2, start=0.5)
    >>> [round(float(rate(torch.tensor(step))), 3) for step in range(7)]
    [0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]

    Source: Goyal et al. 2017, arXiv:1706.02677, Sec. 2.2.
    """

    def warmed(step: Tensor) -> Tensor:
        after = schedule((step - over).clamp(min=0))
        return after * (start + (1 - start) * (step / over).clamp(max=1))

    return warmed
