"""Images for training: which ones at each step, read, augmented and put together to batches.

train = scan("imagenet/train")
images = Images(train, partial(augment, augmentation=Augmentation(AreaCrop(224))), seed=0)
order = Order(len(images), batch=256, seed=0)
for x, y, *_ in loader(images, batches(order, start=0, stop=450_000), workers=8): ...

Going on from a state, start=int(state.position). `fresnet.training` takes such batches as they are:

val = scan("imagenet/val", classes=train.classes)
images = Images(val, partial(prepare, preset="imagenet-v1"), seed=0)
order = Order(len(images), batch=256, seed=0)
evaluate(params, loader(images, batches(order, 0, steps_per_epoch(order)), workers=8))
"""

try:
    import PIL  # noqa: F401
except ImportError as error:
    raise ImportError("fresnet.data needs Pillow: pip install 'fresnet[io]'") from error

from fresnet.data.augment import (
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
