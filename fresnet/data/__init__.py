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
        Augmentation,
        augment,
        augment_pixels,
        normalise,
        prepare,
        prepare_pixels,
        random_erase,
        relight,
    )
    from fresnet.data.crops import AreaCrop, ScaleCrop, area_crop, random_flip, scale_crop
    from fresnet.data.folder import Folder, scan
    from fresnet.data.loading import Batch, Broken, Example, Images, Reader, Transform, loader
    from fresnet.data.order import Order, Place, batch_at, batches, steps_per_epoch
    from fresnet.data.pixels import read_pixels
    from fresnet.data.preprocess import read_image
    from fresnet.data.shards import Shards, Span, scan_shards
    from fresnet.data.trivial import trivial_augment

HOMES = {
    "Augmentation": "augmentation",
    "augment": "augmentation",
    "augment_pixels": "augmentation",
    "normalise": "augmentation",
    "prepare": "augmentation",
    "prepare_pixels": "augmentation",
    "random_erase": "augmentation",
    "relight": "augmentation",
    "AreaCrop": "crops",
    "ScaleCrop": "crops",
    "area_crop": "crops",
    "random_flip": "crops",
    "scale_crop": "crops",
    "Folder": "folder",
    "scan": "folder",
    "Batch": "loading",
    "Broken": "loading",
    "Example": "loading",
    "Images": "loading",
    "Reader": "loading",
    "Transform": "loading",
    "loader": "loading",
    "Order": "order",
    "Place": "order",
    "batch_at": "order",
    "batches": "order",
    "steps_per_epoch": "order",
    "read_pixels": "pixels",
    "read_image": "preprocess",
    "Shards": "shards",
    "Span": "shards",
    "scan_shards": "shards",
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
    "Reader",
    "ScaleCrop",
    "Shards",
    "Span",
    "Transform",
    "area_crop",
    "augment",
    "augment_pixels",
    "batch_at",
    "batches",
    "loader",
    "normalise",
    "prepare",
    "prepare_pixels",
    "random_erase",
    "random_flip",
    "read_image",
    "read_pixels",
    "relight",
    "scale_crop",
    "scan",
    "scan_shards",
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
