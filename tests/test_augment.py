"""Transforms equal torchvision's to the bit, and draw as much."""

import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_close, assert_same, global_generators_untouched
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from reference import torchvision
from sklearn.datasets import load_sample_images
from strategies import examples, rgb_images, seeds
from torch import Tensor

from fresnet import PRESETS, FresnetError, preprocess
from fresnet.data import (
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
    trivial_augment,
)
from fresnet.data.augmentation import EIGENVALUES, EIGENVECTORS
from fresnet.data.presets import Preset

T = torchvision.transforms
BILINEAR = T.InterpolationMode.BILINEAR
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO = Image.fromarray(load_sample_images().images[0]).resize((120, 80))
ROW, COLUMN = PHOTO.crop((0, 0, 120, 1)), PHOTO.crop((0, 0, 1, 80))

crop_sides = st.sampled_from([1, 8, 32, 64, 224])


def assert_draws_as(theirs: Callable[[Any], Any], ours: Any, x: Any, seed: int) -> None:
    """Both give the same image, and leave generators in the same state."""
    generator = torch.Generator().manual_seed(seed)
    with global_generators_untouched():
        actual = ours(x, generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = theirs(x)
        assert torch.equal(generator.get_state(), torch.get_rng_state())
    if isinstance(expected, Tensor):
        assert_same(actual, expected)
    else:
        assert actual == expected


@examples(60)
@given(rgb_images(), crop_sides, seeds)
@example(ROW, 32, 0)
@example(COLUMN, 32, 0)
@example(PHOTO, 1, 0)
def test_area_crop(image: Image.Image, side: int, seed: int) -> None:
    assert_draws_as(T.RandomResizedCrop(side), partial(area_crop, crop=AreaCrop(side)), image, seed)
    crop = AreaCrop(side, area=(0.9, 1), ratio=(1.2, 2))  # often the middle, after ten attempts
    theirs = T.RandomResizedCrop(side, scale=crop.area, ratio=crop.ratio)
    assert_draws_as(theirs, partial(area_crop, crop=crop), image, seed)


@examples(40)
@given(rgb_images(), crop_sides, st.tuples(st.integers(0, 9), st.integers(0, 9)), seeds)
@example(PHOTO.resize((32, 32)), 32, (0, 0), 0)
def test_scale_crop(image: Image.Image, side: int, more: tuple[int, int], seed: int) -> None:
    least, most = side + more[0], side + sum(more)

    def theirs(image: Image.Image) -> Any:
        return T.RandomCrop(side)(T.Resize(int(torch.randint(least, most + 1, (1,))))(image))

    ours = partial(scale_crop, crop=ScaleCrop(side, (least, most)))
    assert_draws_as(theirs, ours, image, seed)


@examples(30)
@given(rgb_images(), st.floats(0, 1), seeds)
def test_random_flip(image: Image.Image, probability: float, seed: int) -> None:
    theirs, ours = (
        T.RandomHorizontalFlip(probability),
        partial(random_flip, probability=probability),
    )
    assert_draws_as(theirs, ours, image, seed)


@examples(60)
@given(rgb_images(), seeds)
def test_trivial_augment(image: Image.Image, seed: int) -> None:
    assert_draws_as(T.TrivialAugmentWide(interpolation=BILINEAR), trivial_augment, image, seed)


@pytest.mark.slow
def test_trivial_augment_in_every_operation_and_strength() -> None:
    """There are some 500 different draws; 2,000 are taken."""
    for seed in range(2000):
        theirs = T.TrivialAugmentWide(interpolation=BILINEAR)
        assert_draws_as(theirs, trivial_augment, PHOTO.crop((40, 20, 73, 61)), seed)


@examples(80)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.5, 1), seeds)
def test_random_erase(height: int, width: int, probability: float, seed: int) -> None:
    x = torch.ones(3, height, width)
    ours = partial(random_erase, probability=probability)
    assert_draws_as(T.RandomErasing(probability), ours, x, seed)
    assert torch.equal(x, torch.ones(3, height, width))


@examples(30)
@given(rgb_images(), crop_sides, st.booleans(), seeds)
def test_as_the_references_train(image: Image.Image, side: int, trivial: bool, seed: int) -> None:
    theirs = T.Compose(
        [
            T.RandomResizedCrop(side),
            T.RandomHorizontalFlip(),
            *[T.TrivialAugmentWide(interpolation=BILINEAR)][:trivial],
            T.PILToTensor(),
            T.ConvertImageDtype(torch.float32),
            T.Normalize(MEAN, STD),
            T.RandomErasing(0.4),
        ]
    )
    recipe = Augmentation(AreaCrop(side), trivial_augment=trivial, erase=0.4)
    assert_draws_as(theirs, partial(augment, augmentation=recipe), image, seed)


@examples(30)
@given(rgb_images(), seeds)
def test_as_the_paper_trains(image: Image.Image, seed: int) -> None:
    """Lighting is Krizhevsky's, on values from 0 to 1. All else is torchvision's transforms."""
    recipe = Augmentation(ScaleCrop(32, (36, 64)), lighting=0.1)
    actual = augment(image, torch.Generator().manual_seed(seed), recipe)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = T.Resize(int(torch.randint(36, 65, (1,))))(image)
        x = T.ToTensor()(T.RandomHorizontalFlip()(T.RandomCrop(32)(x)))
        amounts = 0.1 * torch.randn(3) * torch.tensor(EIGENVALUES)
    light = torch.tensor(EIGENVECTORS) @ amounts
    expected = T.Normalize(MEAN, STD)(x + light[:, None, None])
    assert_close(actual, expected, 1e-6)


def test_lights_are_along_the_principal_components() -> None:
    axes = torch.tensor(EIGENVECTORS)
    assert_close(axes @ axes.mT, torch.eye(3), 1e-4)
    generator = torch.Generator().manual_seed(0)
    lights = torch.stack([relight(torch.zeros(3, 1, 1), generator, 0.1) for _ in range(4000)])
    principal = (lights.flatten(1) @ axes).std(0, correction=0)
    assert_close(principal, 0.1 * torch.tensor(EIGENVALUES), 0.05)


@pytest.mark.parametrize("preset", [*PRESETS, Preset(36, 32, "bilinear")])
def test_prepare_is_preprocess(preset: Any) -> None:
    generator = torch.Generator()
    before = generator.get_state()
    assert_same(prepare(PHOTO, generator, preset), preprocess([PHOTO], preset)[0])
    assert torch.equal(generator.get_state(), before)


RECIPES = (
    Augmentation(AreaCrop(24), trivial_augment=True, lighting=0.1, erase=0.9),
    Augmentation(ScaleCrop(24, (24, 40)), flip=0, trivial_augment=True, erase=0.9),
)


@examples(30)
@given(rgb_images(), st.sampled_from(RECIPES), seeds)
def test_a_function_of_image_and_generator(
    image: Image.Image, recipe: Augmentation, seed: int
) -> None:
    """It does not depend on torch's defaults, and it writes to nothing but the generator."""
    before = image.copy()
    transform = pickle.loads(pickle.dumps(partial(augment, augmentation=recipe)))
    expected = transform(image, torch.Generator().manual_seed(seed))
    assert expected.shape == (3, 24, 24)
    assert expected.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = augment(image, torch.Generator("cpu").manual_seed(seed), recipe)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(actual, expected)
    assert image == before


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (Augmentation(AreaCrop(0)), "a side of at least 1; got Augmentation(crop=AreaCrop(side=0"),
        (Augmentation(AreaCrop(8, area=(0, 1))), "an area from above 0 to 1"),
        (Augmentation(AreaCrop(8, area=(0.5, 0.4))), "an area from above 0 to 1"),
        (Augmentation(AreaCrop(8, area=(0.5, 1.1))), "an area from above 0 to 1"),
        (Augmentation(AreaCrop(8, ratio=(2, 1))), "a ratio from above 0"),
        (Augmentation(ScaleCrop(224, (200, 256))), "a shorter side from crop.side"),
        (Augmentation(ScaleCrop(224, (256, 250))), "a shorter side from crop.side"),
        (Augmentation(AreaCrop(8), flip=1.5), "a flip from 0 to 1"),
        (Augmentation(AreaCrop(8), lighting=-0.1), "a lighting of at least 0"),
        (Augmentation(AreaCrop(8), std=(1, 0, 1)), "a std above 0"),
        (Augmentation(AreaCrop(8), erase=-1), "an erase from 0 to 1"),
        (Augmentation(224), "an AreaCrop or a ScaleCrop; got a int"),  # type: ignore[arg-type]
    ],
)
def test_bad_augmentations(augmentation: Augmentation, message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(f"augment expects {message}")):
        augment(PHOTO, torch.Generator(), augmentation)


def test_long_and_thin_images() -> None:
    line = Image.fromarray(np.zeros((1, 1400, 3), np.uint8))
    with pytest.raises(FresnetError, match=r"it would be resized to .*, more pixels than"):
        augment(line, torch.Generator(), Augmentation(ScaleCrop(224)))
