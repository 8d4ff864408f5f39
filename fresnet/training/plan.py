"""What a run is, and the first state, the step and the order of images that follow from it."""

from functools import partial
from typing import NamedTuple

import torch

from fresnet import data, tree
from fresnet.data import Order
from fresnet.errors import FresnetError, shown
from fresnet.network.nodes import Params
from fresnet.network.rewrites import freeze
from fresnet.training.processes import Processes
from fresnet.training.recipes import Recipe, average_decay_of, mixing_of, optimizer_of
from fresnet.training.state import TrainState, start
from fresnet.training.step import TrainStep, make_train_step
from fresnet.training.targets import cross_entropy


class Run(NamedTuple):
    """All that a run's numbers depend on, apart from its images.

    A checkpoint of one run is refused by every other.
    """

    network: str  # the network to begin with, in words
    recipe: Recipe
    seed: int = 0
    precision: torch.dtype | None = None
    micro_batches: int = 1
    norms_across: int = 1  # processes; all of them where there are fewer


def assemble(
    run: Run, params: Params, images: int, processes: Processes, recompute: bool = False
) -> tuple[TrainState, TrainStep, Order]:
    """The state before the first step of a run on so many images, its step, and their order."""
    recipe, params = run.recipe, _frozen(params, run.recipe.frozen)
    order = Order(images, recipe.batch, run.seed, recipe.repeats)
    optimizer = optimizer_of(recipe, data.steps_per_epoch(order))
    train_step = make_train_step(
        optimizer,
        loss_fn=partial(cross_entropy, label_smoothing=recipe.label_smoothing),
        mixing=mixing_of(recipe),
        drop_path=recipe.drop_path,
        dropout=recipe.dropout,
        precision=run.precision,
        micro_batches=run.micro_batches,
        recompute=recompute,
        average_decay=average_decay_of(recipe),
        group=processes.group,
        norms_across=min(run.norms_across, processes.size),
    )
    state = start(params, optimizer, seed=run.seed, average=recipe.average > 0)
    return state, train_step, order


def _frozen(params: Params, patterns: tuple[str, ...]) -> Params:
    """The network with those norms frozen of which no weight is trained.

    Raises:
      FresnetError: if a pattern chooses no weight.
    """
    for pattern in patterns:
        if not any(map(tree.matching(pattern), tree.paths(params.weights))):
            raise FresnetError(
                "expected parts to freeze by the names of their weights, such as stem or stages.0; "
                f"got {shown(pattern)}"
            )
    still = tree.matching(*patterns)
    units = [path[:-1] for path in tree.paths(params.stats) if path[-1] == "mean"]
    norms = {
        (*unit, "norm")
        for unit in units
        if all(still((*unit, "norm", leaf)) for leaf in ("scale", "bias"))
    }
    return freeze(params, norms.__contains__) if norms else params
