"""How published networks were trained: recipes as values, and what follows from them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fresnet import optim, tree
from fresnet.data import AreaCrop, Augmentation, ScaleCrop
from fresnet.data.presets import PRESETS, Preset
from fresnet.errors import FresnetError
from fresnet.training.mixing import Mixing, cutmix, mixup, one_of


class Recipe(NamedTuple):
    """How to train; `recipe._replace(epochs=30)` is another recipe."""

    epochs: int

    batch: int
    """Images in a step, over all processes together."""

    rate: float
    """The highest learning rate."""

    augmentation: Augmentation

    preset: Preset
    """How images are prepared for an evaluation."""

    drops: tuple[float, ...] = ()
    """Epochs after which the rate falls to a tenth. Without any, it falls all the time."""

    power: float | None = None
    """It falls as this power of what is left of the run, if not along half a cosine."""

    warm_up: int = 0
    """For how many epochs the rate rises at first."""

    momentum: float | None = None
    """The momentum, if it is not 0.9."""

    trust: float = 0.0
    """LARS's trust coefficient, as in `optim.lars`; 0 is SGD."""

    weight_decay: float = 1e-4
    decay_norms: bool = True
    """Whether SGD decays norms; LARS decays neither these nor any bias."""

    label_smoothing: float = 0.0

    mixup: float = 0.0
    cutmix: float = 0.0
    """Alpha of their Beta distributions; 0 leaves one out. If both mix, each batch draws one."""

    drop_path: float = 0.0
    dropout: float = 0.0
    """The rates of stochastic depth and of dropout before the head, as for `draw_masks`."""

    repeats: int = 1
    """How often an epoch repeats an image. It then holds fewer different images."""

    average: float = 0.0
    """Sets how fast the average of weights moves, see `average_decay_of`; 0 keeps no average."""

    head_rate: float | None = None
    """The highest learning rate of the head, if it is not `rate`."""

    frozen: tuple[str, ...] = ()
    """Patterns of the weights that stay as they are, as in `tree.matching`.

    A norm whose weights are all among them keeps its running statistics too, and goes by them.
    """


LARS = Recipe(
    epochs=44,
    batch=8192,
    rate=17.0,
    power=2.0,
    warm_up=5,
    trust=0.001,
    weight_decay=2e-4,
    label_smoothing=0.1,
    augmentation=Augmentation(AreaCrop(224)),
    preset=PRESETS["imagenet-v1"],
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "paper": Recipe(
            epochs=120,
            batch=256,
            rate=0.1,
            drops=(30, 60, 90),
            augmentation=Augmentation(ScaleCrop(224), lighting=0.1),
            preset=PRESETS["imagenet-v1"],
        ),
        "v1": Recipe(
            epochs=90,
            batch=256,
            rate=0.1,
            drops=(30, 60),
            augmentation=Augmentation(AreaCrop(224)),
            preset=PRESETS["imagenet-v1"],
        ),
        "v2": Recipe(
            epochs=600,
            batch=1024,
            rate=0.5,
            warm_up=5,
            weight_decay=2e-5,
            decay_norms=False,
            label_smoothing=0.1,
            mixup=0.2,
            cutmix=1.0,
            repeats=4,
            average=2e-5,
            augmentation=Augmentation(AreaCrop(176), trivial_augment=True, erase=0.1),
            preset=PRESETS["imagenet-v2"],
        ),
        "lars-4k": LARS._replace(epochs=42, batch=4096, rate=10.0),
        "lars-8k": LARS,
        "lars-32k": LARS._replace(
            epochs=58, batch=32768, rate=21.2, warm_up=16, momentum=0.94, weight_decay=2.5e-5
        ),
    }
)
"""Recipes by name. "v1" and "v2" are those of torchvision's weights V1 and V2.

In the paper the rate drops "when the error plateaus"; here it drops after the epochs that became
customary. In torchvision's references the rate changes with each epoch; here it changes with each
step. "lars-4k" to "lars-32k" are MLPerf's for large batches, which reach 75.9% in somewhat fewer
epochs. MLPerf notes the steps of decay with the warm-up or without; here an epoch count is the one
of both that is not below what training took. Rates stand outside of the velocity (`optim.lars`).

Source: He et al. 2015, arXiv:1512.03385, Sec. 3.4; torchvision, references/classification;
MLPerf Training 2.0, reference convergence points of ResNet, Google's.
"""


def schedule_of(recipe: Recipe, steps_per_epoch: int) -> optim.Schedule:
    """The learning rate as a function of the step."""
    warm_up = recipe.warm_up * steps_per_epoch
    if recipe.drops:
        drops = [round(drop * steps_per_epoch) - warm_up for drop in recipe.drops]
        after = optim.steps(recipe.rate, at=drops)
    else:
        over = recipe.epochs * steps_per_epoch - warm_up
        if recipe.power is None:
            after = optim.cosine(recipe.rate, over=over)
        else:
            after = optim.polynomial(recipe.rate, over=over, power=recipe.power)
    return optim.warm_up(after, over=warm_up, start=0.01) if warm_up else after


def momentum_of(recipe: Recipe) -> float:
    """The momentum of SGD or LARS."""
    return 0.9 if recipe.momentum is None else recipe.momentum


def optimizer_of(recipe: Recipe, steps_per_epoch: int) -> optim.Optimizer:
    """SGD or LARS; if the recipe asks for it another rate for the head, none for frozen parts."""
    momentum, decay = momentum_of(recipe), recipe.weight_decay
    decaying = optim.everywhere if recipe.decay_norms else optim.all_but_norms

    def by(rate: float) -> optim.Optimizer:
        schedule = schedule_of(recipe._replace(rate=rate), steps_per_epoch)
        if recipe.trust:
            return optim.lars(schedule, momentum=momentum, weight_decay=decay, trust=recipe.trust)
        return optim.sgd(schedule, momentum=momentum, weight_decay=decay, decay_where=decaying)

    parts: dict[str | optim.Where, optim.Optimizer] = {}
    if recipe.frozen:
        parts[tree.matching(*recipe.frozen)] = optim.frozen
    if recipe.head_rate is not None:
        parts["head.*"] = by(recipe.head_rate)
    rest = by(recipe.rate)
    return optim.by_path({**parts, "*": rest}) if parts else rest


def mixing_of(recipe: Recipe) -> Mixing | None:
    """How batches are mixed: by one mixing, by one of two for each batch, or not at all."""
    kinds = ((mixup, recipe.mixup), (cutmix, recipe.cutmix))
    mixings = [mixing(alpha) for mixing, alpha in kinds if alpha]
    return one_of(*mixings) if len(mixings) > 1 else mixings[0] if mixings else None


def average_decay_of(recipe: Recipe) -> float:
    """The share of the old average in the new one at each step: 1 - average batch / epochs."""
    return max(0.0, 1 - recipe.average * recipe.batch / recipe.epochs)


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe made longer or shorter. Its drops move in proportion, its warm-up stays as long.

    >>> with_epochs(RECIPES["paper"], 20).drops
    (5.0, 10.0, 15.0)

    Raises:
      FresnetError: if the recipe would end before it has warmed up.
    """
    if not epochs > recipe.warm_up:
        raise FresnetError(
            f"expected more epochs than the {recipe.warm_up} that the recipe warms up; got {epochs}"
        )
    drops = tuple(drop * epochs / recipe.epochs for drop in recipe.drops)
    return recipe._replace(epochs=epochs, drops=drops)


def with_batch(recipe: Recipe, batch: int) -> Recipe:
    """The recipe for batches of another size. Its rate changes in proportion, LARS's with the root.

    >>> with_batch(RECIPES["v1"], 512).rate, with_batch(RECIPES["lars-8k"], 2048).rate
    (0.2, 8.5)

    Source: Goyal et al. 2017, arXiv:1706.02677, Sec. 2.1; You et al. 2020, arXiv:1904.00962.
    """
    growth = (batch / recipe.batch) ** (0.5 if recipe.trust else 1)
    return recipe._replace(batch=batch, rate=recipe.rate * growth)


def with_crop(recipe: Recipe, side: int) -> Recipe:
    """The recipe for images of another size: squares of this side in training and evaluation.

    >>> recipe = with_crop(RECIPES["v1"], 32)
    >>> recipe.augmentation.crop.side, recipe.preset.crop, recipe.preset.resize
    (32, 32, 37)
    """
    crop, preset = recipe.augmentation.crop, recipe.preset
    if not isinstance(preset.resize, int) or not isinstance(preset.crop, int):
        raise FresnetError(f"expected an evaluation of squares that squashes none; got {preset}")
    if isinstance(crop, ScaleCrop):
        low, high = (round(length * side / crop.side) for length in crop.shorter)
        crop = crop._replace(shorter=(low, high))
    return recipe._replace(
        augmentation=recipe.augmentation._replace(crop=crop._replace(side=side)),
        preset=preset._replace(resize=round(preset.resize * side / preset.crop), crop=side),
    )
