"""Images read from files and augmented for training, on one core: fresnet beside torchvision.

    OMP_NUM_THREADS=1 python benchmarks/reading.py

The images are JPEGs of 500x375 and quality 90, made of scikit-learn's two photographs. All draw the
same crops and flips. Each run is a batch on the CPU in float32, so what is normalised after loading
counts too. torchvision reads as its references train: images of Pillow, or tensors and its
transforms v2. The latter have the decoder of the fast path, because torchvision's own does not run
beside a PyTorch without CUDA.
"""

import io
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Run, main
from PIL import Image
from simplejpeg import decode_jpeg
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import default_collate

from fresnet.data import (
    AreaCrop,
    Augmentation,
    Images,
    Place,
    augment,
    augment_pixels,
    loader,
    normalise,
    read_pixels,
    scan,
    scan_shards,
)
from fresnet.data.order import keyed_generator

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import torchvision

BATCH = 64
RECIPE = Augmentation(AreaCrop(224))
SEED = 0


def write(root: Path) -> None:
    """The same photographs in folders and in a shard, in one order."""
    with tarfile.open(root / "shard-000000.tar", "w") as tar:
        for label, photo in enumerate(load_sample_images().images):
            (root / "folder" / str(label)).mkdir(parents=True)
            for i in range(BATCH // 2):
                size = (500, 375)
                part = Image.fromarray(photo).resize(size, box=(i, i, 608 + i, 395 + i))
                file = root / "folder" / str(label) / f"{i:02}.jpg"
                part.save(file, quality=90)
                tar.add(file, f"{label}{i:02}.jpg")
                member = tarfile.TarInfo(f"{label}{i:02}.cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % label))


def torchvisions(root: Path) -> Mapping[str, Callable[[], Tensor]]:
    """torchvision's references, on images and on tensors."""
    from torchvision.transforms import v2 as new

    old = torchvision.transforms
    files = scan(root / "folder").files
    from_image = old.Compose(
        [
            old.RandomResizedCrop(224),
            old.RandomHorizontalFlip(),
            old.PILToTensor(),
            old.ConvertImageDtype(torch.float32),
            old.Normalize(RECIPE.mean, RECIPE.std),
        ]
    )
    from_tensor = new.Compose(
        [
            new.RandomResizedCrop(224, antialias=True),
            new.RandomHorizontalFlip(),
            new.ToDtype(torch.float32, scale=True),
            new.Normalize(RECIPE.mean, RECIPE.std),
        ]
    )

    def image(file: str) -> Any:
        with open(file, "rb") as opened:
            return Image.open(opened).convert("RGB")

    def tensor(file: str) -> Tensor:
        return torch.from_numpy(decode_jpeg(Path(file).read_bytes())).permute(2, 0, 1)

    def batch(read: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> Tensor:
        examples = []
        for i, file in enumerate(files):
            torch.set_rng_state(keyed_generator(SEED, 0, i).get_state())
            examples.append(transform(read(file)))
        x: Tensor = default_collate(examples)
        return x

    return {
        "torchvision": partial(batch, image, from_image),
        "torchvision v2, tensors": partial(batch, tensor, from_tensor),
    }


def ours(root: Path) -> Mapping[str, Callable[[], Tensor]]:
    folder, shards = scan(root / "folder"), scan_shards([root / "shard-000000.tar"])
    plain = partial(augment, augmentation=RECIPE)
    fast = partial(augment_pixels, augmentation=RECIPE)
    places = [[Place(0, i, i) for i in range(BATCH)]]

    def batch(images: Images) -> Tensor:
        x = next(loader(images, places)).x
        return normalise(x, RECIPE) if x.dtype == torch.uint8 else x

    return {
        "fresnet": partial(batch, Images(folder, plain, SEED)),
        "fresnet, pixels": partial(batch, Images(folder, fast, SEED)),
        "fresnet, shards": partial(batch, Images(shards, plain, SEED)),
        "fresnet fast": partial(batch, Images(folder, fast, SEED, read=read_pixels)),
        "fresnet fast, shards": partial(batch, Images(shards, fast, SEED, read=read_pixels)),
    }


def ready(run: Run) -> Callable[[], Run]:
    return lambda: run


def comparisons(full: bool) -> Iterator[Comparison]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        runs = {**torchvisions(Path(folder)), **ours(Path(folder))}
        exact = ("fresnet", "fresnet, pixels", "fresnet, shards")
        yield Comparison(
            "Reading images, JPEGs of 500x375",
            {name: ready(run) for name, run in runs.items()},
            BATCH,
            agree=0.02,  # of tensors; levels of 255 are rounded otherwise
            bounds=dict.fromkeys(exact, 0.0),
            rounds=9,
        )


if __name__ == "__main__":
    main(__doc__, comparisons)
