"""What a training step draws: how its images are mixed, and what is dropped of each."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fresnet.data.order import keyed_generator
from fresnet.errors import FresnetError
from fresnet.pytorch import transform_stack
from fresnet.training.masks import Masks, NoMasks, draw_masks
from fresnet.training.mixing import Mixing
from fresnet.training.state import TrainState


def drawn(
    mixing: Mixing | None,
    rates: Sequence[float],
    rank: int,
    state: TrainState,
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Masks | NoMasks, Tensor]:
    """Images and targets, mixed; masks of the images; and the generator's state after that.

    Processes mix in the same way, and each draws masks of its own. Their shares may differ in size,
    but the generator's state stays the same on all.

    Args:
      mixing: as for `make_train_step`.
      rates: of stochastic depth, and of dropout.
      rank: this process among those that train together.
    """
    masks: Masks | NoMasks = ()
    if mixing is None and not any(rates):
        return x, y, masks, state.rng
    if transform_stack.READABLE and transform_stack.active():
        raise FresnetError(
            "a train step that mixes or drops does not map: a generator's state does not"
        )
    generator = torch.Generator("cpu")
    generator.set_state(state.rng.cpu())
    weights = state.params.weights
    if mixing is not None:
        probabilities = y if y.ndim == 2 else F.one_hot(y, len(weights.head.bias))
        x, y = mixing(x, probabilities.to(x.dtype), generator)
    if any(rates):
        key = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        own, (drop_path, dropout) = keyed_generator(key, rank), rates
        masks = draw_masks(own, weights, len(x), drop_path=drop_path, dropout=dropout)
    return x, y, masks, generator.get_state().to(state.rng.device)
