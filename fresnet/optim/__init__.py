"""Optimizers and schedules as pure functions of trees.

    optimizer = fresnet.optim.sgd(0.1, momentum=0.9, weight_decay=1e-4)
    state = optimizer.init(weights)
    weights, state = optimizer.update(grads, state, weights)

A learning rate or a weight decay is a number, a 0-d tensor or a schedule. An ensemble can map over
0-d tensors. A schedule is a function of the step, which is 0 at the first update.
"""

from fresnet.optim.adam import adam, adamw, lamb
from fresnet.optim.interface import (
    Optimizer,
    Rate,
    State,
    Update,
    all_but_norms,
    everywhere,
    kernels,
)
from fresnet.optim.optimizers import clip_by_norm, lars, sgd
from fresnet.optim.parts import by_path, frozen
from fresnet.optim.schedules import Schedule, cosine, polynomial, steps, warm_up
from fresnet.tree import Where

__all__ = [
    "Optimizer",
    "Rate",
    "Schedule",
    "State",
    "Update",
    "Where",
    "adam",
    "adamw",
    "all_but_norms",
    "by_path",
    "clip_by_norm",
    "cosine",
    "everywhere",
    "frozen",
    "kernels",
    "lamb",
    "lars",
    "polynomial",
    "sgd",
    "steps",
    "warm_up",
]
