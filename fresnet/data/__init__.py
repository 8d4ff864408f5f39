"""Images for training: chosen for each step, read, augmented, and put together as batches.

train = scan("imagenet/train")
images = Images(train, partial(augment, augmentation=Augmentation(AreaCrop(224))), seed=0)
order = Order(len(images), batch=256, seed=0)
for x, y, *_ in loader(images, batches(order, start=0, stop=450_000), workers=8): ...

To go on from a state, pass start=int(state.position). `fresnet.training` takes these batches as
they are:

val = scan("imagenet/val", classes=train.classes)
images = Images(val, partial(prepare, preset="imagenet-v1"), seed=0)
order = Order(len(images), batch=256, seed=0)
evaluate(params, loader(images, batches(order, 0, steps_per_epoch(order)), workers=8))
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fresnet.data.augmentation import (
        AreaCrop,
        Augmentation,
        ScaleCrop,
        area_crop,
        augment,
        prepare,
        random_erase,
        random_flip,
        relight,
        scale_crop,
    )
    from fresnet.data.folder import Folder, scan
    from fresnet.data.loading import Batch, Broken, Example, Images, Transform, loader
    from fresnet.data.order import Order, Place, batch_at, batches, steps_per_epoch
    from fresnet.data.trivial import trivial_augment

HOMES = {
    "AreaCrop": "augmentation",
    "Augmentation": "augmentation",
    "ScaleCrop": "augmentation",
    "area_crop": "augmentation",
    "augment": "augmentation",
    "prepare": "augmentation",
    "random_erase": "augmentation",
    "random_flip": "augmentation",
    "relight": "augmentation",
    "scale_crop": "augmentation",
    "Folder": "folder",
    "scan": "folder",
    "Batch": "loading",
    "Broken": "loading",
    "Example": "loading",
    "Images": "loading",
    "Transform": "loading",
    "loader": "loading",
    "Order": "order",
    "Place": "order",
    "batch_at": "order",
    "batches": "order",
    "steps_per_epoch": "order",
    "trivial_augment": "trivial",
}
"""Where each name is defined, to be imported when it is asked for: most of it takes Pillow."""

__all__ = [
    "AreaCrop",
    "Augmentation",
    "Batch",
    "Broken",
    "Example",
    "Folder",
    "Images",
    "Order",
    "Place",
    "ScaleCrop",
    "Transform",
    "area_crop",
    "augment",
    "batch_at",
    "batches",
    "loader",
    "prepare",
    "random_erase",
    "random_flip",
    "relight",
    "scale_crop",
    "scan",
    "steps_per_epoch",
    "trivial_augment",
]


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{HOMES[name]}")
    except ImportError as error:
        if str(error.name).startswith("PIL"):
            raise ImportError("fresnet.data needs Pillow: pip install 'fresnet[io]'") from error
        raise
    return getattr(module, name)
