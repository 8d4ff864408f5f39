"""A default device changes nothing: what is made inside is made on the CPU, or beside an input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same
from PIL import Image
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Spec, data, optim, training, tree
from fresnet.network.nodes import BasicBlock

PARAMS = fresnet.init(0, Spec(BasicBlock, (1, 1), width=8), num_classes=3)
X, Y = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
SGD = optim.sgd(optim.warm_up(optim.cosine(0.1, over=4), over=2), momentum=0.9)


def stepped(**options: Any) -> Any:
    state = training.start(PARAMS, SGD, average=True)
    state, _ = training.make_train_step(SGD, **options)(state, (X, Y))
    return state


def loaded(folder: Path) -> Any:
    for name in "ab":
        (folder / name).mkdir()
        for i in range(2):
            image = Image.fromarray(np.full((9, 8, 3), 30 * i, np.uint8))
            image.save(folder / name / f"{i}.png")
    images = data.Images(data.scan(folder), prepared, 0)
    order = data.Order(4, batch=2, seed=0)
    return [batch[:2] for batch in data.loader(images, data.batches(order, 0, 2))]


def prepared(image: Any, generator: torch.Generator) -> torch.Tensor:
    return data.prepare(image, generator, fresnet.Preset(8, 8, "bilinear"))


CALLS: dict[str, Callable[[Path], Any]] = {
    "init": lambda _: fresnet.init(0, fresnet.RESNET18, num_classes=3),
    "forward_train": lambda _: fresnet.forward_train(PARAMS, X),
    "step": lambda _: stepped(),
    "mixed step": lambda _: stepped(mixing=training.one_of(training.mixup(1), training.cutmix(1))),
    "micro-batches": lambda _: stepped(micro_batches=2, recompute=True, max_norm=1.0),
    "evaluate": lambda _: training.evaluate(PARAMS, [(X, Y)]).confusion,
    "per_sample_grads": lambda _: fresnet.per_sample_grads(
        cross_entropy, PARAMS, X, Y, norms="coupled"
    ),
    "clipped_grads": lambda _: fresnet.clipped_grads(cross_entropy, PARAMS, X, Y, max_norm=1.0),
    "compile_inference": lambda _: fresnet.compile_inference(PARAMS, X)(X),
    "recalibrate": lambda _: fresnet.recalibrate(PARAMS, [X]),
    "as_module": lambda _: fresnet.as_module(PARAMS).params(),
    "preprocess": lambda _: fresnet.preprocess([np.full((30, 30), 7, np.uint8)]),
    "state dict": lambda _: fresnet.from_state_dict(fresnet.to_state_dict(PARAMS)),
    "loader": loaded,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_changes_nothing(name: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    expected = CALLS[name](tmp_path / "a")
    with torch.device("meta"):
        found = CALLS[name](tmp_path / "b")
    assert {leaf.device.type for leaf in tree.leaves(found)} == {"cpu"}
    assert_same(found, expected)


@pytest.mark.parametrize("old", [False, True])
def test_files_too(old: bool, tmp_path: Path) -> None:
    torch.save(
        fresnet.to_state_dict(PARAMS), tmp_path / "a.pth", _use_new_zipfile_serialization=not old
    )
    with torch.device("meta"):
        fresnet.save(PARAMS, tmp_path / "a.safetensors")
        assert_same(fresnet.load(tmp_path / "a.safetensors"), PARAMS)
        assert_same(fresnet.load(tmp_path / "a.pth"), PARAMS)
