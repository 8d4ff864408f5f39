"""numpy's numbers are taken wherever Python's are, and bools, texts and tensors are not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Spec, optim, training
from fresnet.network.nodes import BasicBlock
from fresnet.training import mixing

SPEC = Spec(BasicBlock, (1, 1), width=4)
PARAMS = fresnet.init(0, SPEC, num_classes=3)
X, Y = torch.ones(2, 3, 16, 16), torch.tensor([0, 2])


def updated(optimizer: optim.Optimizer) -> Any:
    weights = (torch.tensor([1.0, 2.0]),)
    state = optimizer.init(weights)
    for _ in range(2):
        weights, state = optimizer.update((torch.ones(2),), state, weights)
    return weights, state


def stepped(**options: Any) -> Any:
    optimizer = optim.sgd(0.1)
    state = training.start(PARAMS, optimizer, average=True)
    return training.make_train_step(optimizer, **options)(state, (X, Y))


def mixed(mix: Callable[[Any], Any], alpha: Any) -> Any:
    return mix(alpha)(X, torch.eye(3)[Y], torch.Generator().manual_seed(0))


REALS: dict[str, Callable[[Any], Any]] = {
    "sgd learning_rate": lambda n: updated(optim.sgd(n)),
    "sgd momentum": lambda n: updated(optim.sgd(0.1, momentum=n)),
    "sgd weight_decay": lambda n: updated(optim.sgd(0.1, weight_decay=n)),
    "adamw learning_rate": lambda n: updated(optim.adamw(n)),
    "adamw eps": lambda n: updated(optim.adamw(0.1, eps=n)),
    "adamw betas": lambda n: updated(optim.adamw(0.1, betas=(n, n))),
    "adam": lambda n: updated(optim.adam(n, betas=(n, n), eps=n, weight_decay=n)),
    "lamb": lambda n: updated(optim.lamb(n, betas=(n, n), eps=n, weight_decay=n)),
    "lars": lambda n: updated(optim.lars(n, momentum=n, weight_decay=n, trust=n)),
    "clip_by_norm": lambda n: optim.clip_by_norm((torch.ones(4),), n),
    "cosine": lambda n: updated(optim.sgd(optim.cosine(n, over=4))),
    "steps": lambda n: updated(optim.sgd(optim.steps(n, at=(1,), factor=n))),
    "forward_train": lambda n: fresnet.forward_train(PARAMS, X, momentum=n),
    "max_norm": lambda n: fresnet.clipped_grads(cross_entropy, PARAMS, X, Y, max_norm=n),
    "train step momentum": lambda n: stepped(momentum=n),
    "train step average": lambda n: stepped(average_decay=n),
    "train step max_norm": lambda n: stepped(max_norm=n),
    "mixup": partial(mixed, mixing.mixup),
    "cutmix": partial(mixed, mixing.cutmix),
}
INTEGERS: dict[str, Callable[[Any], Any]] = {
    "seed": lambda n: fresnet.init(n, SPEC, num_classes=2),
    "num_classes": lambda n: fresnet.init(0, SPEC, num_classes=n),
    "in_channels": lambda n: fresnet.init(0, SPEC, num_classes=2, in_channels=n),
    "width": lambda n: fresnet.init(0, Spec(BasicBlock, (1, 1), width=n), num_classes=2),
    "depths": lambda n: fresnet.init(0, Spec(BasicBlock, (n, 1), width=4), num_classes=2),
    "groups": lambda n: fresnet.init(0, Spec(depths=(1,), groups=n, group_width=64)),
    "image_size": lambda n: str(fresnet.summary(PARAMS, n)),
    "image sizes": lambda n: str(fresnet.summary(PARAMS, (n, 32))),
    "output_stride": lambda n: fresnet.dilate(PARAMS, output_stride=2 * n),
    "chunk_size": lambda n: fresnet.per_sample_grads(
        cross_entropy, PARAMS, X, Y, norms="running", chunk_size=n
    ),
    "micro_batches": lambda n: stepped(micro_batches=n // 2),
}


@pytest.mark.parametrize("name", REALS)
def test_reals(name: str) -> None:
    call, expected = REALS[name], REALS[name](0.25)
    for number in (np.float64(0.25), np.float32(0.25), np.float16(0.25)):
        assert_same(call(number), expected)


@pytest.mark.parametrize("name", ["sgd learning_rate", "max_norm", "mixup", "train step momentum"])
@pytest.mark.parametrize("value", [True, np.True_, "0.1", None, np.array(0.1), torch.ones(2)])
def test_what_is_no_real(name: str, value: Any) -> None:
    with pytest.raises(FresnetError, match="expects"):
        REALS[name](value)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    call, expected = INTEGERS[name], INTEGERS[name](4)
    for number in (np.int64(4), np.int32(4), np.uint8(4)):
        if isinstance(expected, str):
            assert call(number) == expected
        else:
            assert_same(call(number), expected)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, np.True_, 4.0, np.float64(4), "4", np.array([4, 4])])
def test_what_is_no_integer(name: str, value: Any) -> None:
    if name in ("output_stride", "micro_batches"):  # of which the call makes another number
        return
    with pytest.raises(FresnetError, match="expects"):
        INTEGERS[name](value)


def test_sizes_of_tensors_are_sizes(tmp_path: Path) -> None:
    for size in (X.shape[2:], [16, 16], np.int64(16)):
        assert str(fresnet.summary(PARAMS, size)) == str(fresnet.summary(PARAMS, 16))  # type: ignore[arg-type]
    state = training.start(PARAMS, optim.sgd(0.1))
    path = training.save_state(state, tmp_path, step=np.int64(3), keep=np.int64(1))  # type: ignore[arg-type]
    assert path.name == "step-000000000003.safetensors"
    restored = training.restore_state(state, tmp_path)
    assert restored is not None
    assert restored.step == 3


def test_a_message_shows_the_value_and_its_type() -> None:
    with pytest.raises(FresnetError, match=r"got np.float64\(-0.1\)"):
        optim.sgd(np.float64(-0.1))
    with pytest.raises(FresnetError, match="num_classes='4'"):
        fresnet.init(0, SPEC, num_classes="4")  # type: ignore[arg-type]
