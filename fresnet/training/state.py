"""All that training carries from one step to the next, as one tree."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fresnet import optim, tree
from fresnet.errors import FresnetError, check_type, shown
from fresnet.network.check import check_params, first_conv
from fresnet.network.nodes import Params
from fresnet.numbers import as_integer
from fresnet.optim.interface import check_optimizer
from fresnet.tree.text import register

NoAverage: TypeAlias = tuple[()]


class TrainState(NamedTuple):
    """What a step takes and returns. Apart from it, the rest of a run depends on data alone."""

    step: Tensor
    """The number of updates so far, int64 `[]`."""

    params: Params
    optimizer: optim.State

    average: Params | NoAverage
    """An exponential moving average of weights and statistics; `()` if none is kept."""

    rng: Tensor
    """The state of the generator on the CPU that steps draw from, uint8 `[bytes]`."""

    position: Tensor
    """The number of batches so far, int64 `[]`, which says where in the data to go on."""


register(TrainState)


def start(
    params: Params, optimizer: optim.Optimizer, *, seed: int = 0, average: bool = False
) -> TrainState:
    """The state before the first step.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> state = fresnet.training.start(params, fresnet.optim.sgd(0.1))
    >>> state.step
    tensor(0)

    Args:
      params: the network to train, in float32 or float64.
      optimizer: the one that the steps will take.
      seed: seeds the generator that steps draw from.
      average: whether steps keep an average of the network as well.
    Raises:
      FresnetError: if params is not a network or optimizer is none, or if the network's dtype is
        too narrow for small updates.
    """
    check_params("start", params)
    check_optimizer("start", optimizer)
    stem = first_conv(params.weights)
    if stem.dtype not in (torch.float32, torch.float64):
        raise FresnetError(
            f"start expects weights in float32 or float64; got {stem.dtype}: make_train_step(..., "
            "precision=torch.bfloat16) computes in it, with float32 weights behind"
        )
    check_type("start", optim.Optimizer, "one of fresnet.optim", optimizer=optimizer)
    number = as_integer(seed)
    if number is None or not -(2**63) <= number < 2**64:
        raise FresnetError(f"start expects seed to be an integer; got {shown(seed)}")
    zero = torch.zeros((), dtype=torch.int64, device=stem.device)
    return TrainState(
        step=zero,
        params=params,
        optimizer=optimizer.init(params.weights),
        average=tree.map(Tensor.clone, params) if average else (),
        rng=torch.Generator().manual_seed(number).get_state(),
        position=zero,
    )
