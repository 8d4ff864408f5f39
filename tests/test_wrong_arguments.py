"""Every public function, called with something wrong in each place, takes it or says what it takes.

The right arguments are found by their names. One after the other is replaced by what users hand
over by mistake. Whatever is refused is refused in fresnet's words, which hold no value of a tensor.
"""

import inspect
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import fresnet
from fresnet import FresnetError, Spec, data, moments, optim, training, tree
from fresnet.network.nodes import Bottleneck

VALUE = 0.12345
"""What stands in every tensor that is handed over, and in no message."""

SPEC = Spec(Bottleneck, (1, 1, 1, 1), width=2)
PARAMS = tree.map(lambda leaf: torch.full_like(leaf, VALUE), fresnet.init(0, SPEC, num_classes=2))
W, X, Y = PARAMS.weights, torch.full((2, 3, 32, 32), VALUE), torch.tensor([0, 1])
SGD, ADAMW = optim.sgd(0.1, momentum=0.9), optim.adamw(0.1)
STATE = training.start(PARAMS, SGD, average=True)
_, MOMENTS = fresnet.forward_moments(PARAMS, X)
TARGETS = torch.full((2, 2), VALUE)
MASKS = training.draw_masks(torch.Generator(), W, len(X), drop_path=0.1, dropout=0.1)
FOLDER = data.Folder("nowhere", ("a", "b"), ("a/x.png", "b/y.png"), (0, 1))

Image.new("RGB", (20, 20)).save(FILE := io.BytesIO(), "jpeg")
PHOTO = FILE.getvalue()

BAD: Mapping[str, Any] = {
    "None": None,
    "a number": -1,
    "a part": 0.5,
    "a text": "nonsense",
    "nothing": (),
    "a list": [torch.full((3,), VALUE)],
    "a pair": (torch.full((3,), VALUE), torch.full((3,), VALUE)),
    "a dict": {"a": torch.full((3,), VALUE)},
    "a 0-d tensor": torch.tensor(VALUE),
    "a vector": torch.full((3,), VALUE),
    "classes": torch.tensor([0, 1, 0]),
    "an image alone": X[0],
    "images on meta": X.to("meta"),
    "an array": X.numpy(),
    "params": PARAMS,
    "params on meta": tree.map(lambda leaf: leaf.to("meta"), PARAMS),
    "weights": W,
    "stats": PARAMS.stats,
    "a module": nn.Linear(2, 2),
    "a type": Bottleneck,
    "a function": lambda: VALUE,
    "an optimizer": SGD,
}

RIGHT: Mapping[str, Any] = {
    "adapt_where": optim.kernels,
    "alpha": 1.0,
    "architecture": SPEC,
    "argnums": 0,
    "at": (1, 2),
    "atol": 1e-8,
    "augmentation": data.Augmentation(data.AreaCrop(8)),
    "average_decay": 0.9,
    "batch": (X, Y),
    "batches": [(X, Y)],
    "betas": (0.9, 0.99),
    "broken": "raise",
    "children": (1, 2),
    "chunk_size": 1,
    "classes": ("a", "b"),
    "correction": 0,
    "decay_where": optim.kernels,
    "device": "cpu",
    "drop_path": 0.1,
    "dropout": 0.1,
    "dtype": torch.float64,
    "end": 0.0,
    "entries": tree.named(W),
    "eps": 1e-3,
    "factor": 0.1,
    "file": FILE,
    "first": {"a": X, "b": ()},
    "folder": "states",
    "function": lambda *leaves: leaves[-1],
    "generator": torch.Generator(),
    "grads": W,
    "group": None,
    "image": Image.new("RGB", (20, 20)),
    "image_size": 32,
    "images": [Image.new("RGB", (20, 20))],
    "in_channels": 3,
    "keep": 3,
    "label_smoothing": 0.1,
    "labels": ["a", "b"],
    "layout": "torchvision",
    "learning_rate": 0.1,
    "like": W,
    "logits": TARGETS,
    "loss_fn": F.cross_entropy,
    "mapping": fresnet.to_state_dict(PARAMS),
    "masks": MASKS,
    "max_norm": 1.0,
    "micro_batches": 1,
    "mixing": training.mixup(1.0),
    "mixings": training.mixup(1.0),
    "moments": MOMENTS,
    "momentum": 0.1,
    "new": X,
    "new_leaves": tree.leaves(W),
    "norms": "running",
    "norms_across": 1,
    "notes": {},
    "num_classes": 2,
    "one": W,
    "opset": 18,
    "optimizer": SGD,
    "optimizers": {"*": SGD},
    "order": data.Order(size=8, batch=2, seed=0),
    "other": W,
    "output_stride": 4,
    "over": 2,
    "params": PARAMS,
    "parts": [(X,)],
    "path": "network.safetensors",
    "paths": ["shard.tar"],
    "patterns": "head",
    "peak": 1.0,
    "places": [],
    "power": 2.0,
    "precision": torch.float32,
    "preset": fresnet.Preset(16, 16, "bilinear"),
    "probability": 0.5,
    "processes": 2,
    "randomness": "error",
    "rank": 0,
    "ranks": 1,
    "rest": {"a": (), "b": X},
    "root": "images",
    "rtol": 1e-5,
    "schedule": optim.cosine(1.0, over=10),
    "seed": 0,
    "spec": SPEC,
    "start": 0,
    "state": STATE,
    "stats": PARAMS.stats,
    "std": 0.1,
    "step": 1,
    "stop": 2,
    "targets": TARGETS,
    "tree": W,
    "trees": [W, W],
    "trust": 0.1,
    "vector": tree.ravel(W),
    "weight_decay": 0.1,
    "weights": W,
    "where": optim.kernels,
    "workers": 0,
    "x": X,
    "y": Y,
}

ELSEWHERE: Mapping[str, Mapping[str, Any]] = {
    "data.area_crop": {"crop": data.AreaCrop(8)},
    "data.loader": {"images": data.Images(FOLDER, lambda image, generator: X[0], 0)},
    "data.normalise": {"x": X.to(torch.uint8), "like": "imagenet-v1"},
    "data.random_erase": {"x": X[0]},
    "data.relight": {"x": X[0]},
    "data.scale_crop": {"crop": data.ScaleCrop(8, (8, 10))},
    "fresnet.export": {"path": "network.pt2", "image_size": None, "opset": None},
    "fresnet.forward_head": {"x": fresnet.features(PARAMS, X)[-1]},
    "fresnet.init": {"generator": 0},
    "moments.merge": {"first": MOMENTS, "rest": MOMENTS},
    "moments.merge_across": {"moments": (), "group": None},
    "optim.adamw, a beta": {"beta": 0.9},
    "optim.adamw(0.1).update": {"state": ADAMW.init(W)},
    "optim.sgd(0.1).update": {"state": SGD.init(W)},
    "Spec, a depth": {"depth": 2},
    "Spec": {name: getattr(SPEC, name) for name in inspect.signature(Spec).parameters},
    "training.draw_masks": {"images": len(X)},
    "training.gradients": {"loss_fn": lambda weights, x: (tree.ravel(weights).sum(), ())},
    "training.make_train_step": {"loss_fn": training.cross_entropy},
    "training.restore_state": {"like": STATE},
    "training.share": {"images": 8},
    "tree.at": {"path": "head.bias"},
    "tree.map": {"rest": W},
    "tree.map_with_path": {"rest": W},
    "tree.unstack": {"tree": tree.stack([W, W])},
}
"""The right arguments of functions where a name means something else."""

NOT_CALLED = {
    "fresnet.keep_pages": "it takes nothing",
    "optim.all_but_norms": "it is handed paths by fresnet",
    "optim.everywhere": "it is handed paths by fresnet",
    "optim.kernels": "it is handed paths by fresnet",
    "training.joined": "it joins processes",
    "tree.dotted": "it is handed paths by fresnet",
    "tree.rebuild": "it is handed nodes and their children by fresnet",
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{room.__name__.rpartition('.')[2]}.{name}": getattr(room, name)
    for room in (fresnet, tree, optim, training, data, moments)
    for name in room.__all__
    if inspect.isfunction(getattr(room, name))
} | {
    "Spec": Spec,
    "Spec, a depth": lambda depth: Spec(depths=(1, depth)),
    "optim.adamw, a beta": lambda beta: optim.adamw(0.1, betas=(0.9, beta)),
    "optim.adamw(0.1).update": ADAMW.update,
    "optim.sgd(0.1).init": SGD.init,
    "optim.sgd(0.1).update": SGD.update,
    "training.cutmix(1.0)": training.cutmix(1.0),
    "training.make_train_step(sgd)": training.make_train_step(SGD),
    "training.make_train_step(sgd), x and y": lambda x, y: training.make_train_step(SGD)(
        STATE, (x, y)
    ),
    "training.mixup(1.0)": training.mixup(1.0),
}


def right_arguments(name: str) -> dict[str, Any]:
    """The right arguments of a function, but for switches, which Python reads as it reads any."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    known = {**RIGHT, **ELSEWHERE.get(name, {})}
    return {one.name: known[one.name] for one in parameters if not isinstance(one.default, bool)}


def call(name: str, arguments: Mapping[str, Any]) -> None:
    """Call a function; what gives things one by one gives them all."""
    bound = inspect.signature(FUNCTIONS[name]).bind_partial()
    several = inspect.Parameter.VAR_POSITIONAL
    for one in bound.signature.parameters.values():
        if one.name in arguments:
            value = arguments[one.name]
            bound.arguments[one.name] = (value,) if one.kind is several else value
    result = FUNCTIONS[name](*bound.args, **bound.kwargs)
    if inspect.isgenerator(result):
        list(result)


def mistakes(right: Any) -> list[str]:
    """What is handed over by mistake in this one's place.

    A function is not exchanged for another one, whose errors are its own. Tensors of several values
    are not compared with names, types and switches.
    """
    left_out = {name for name, bad in BAD.items() if bad is right}
    if callable(right) and not isinstance(right, type):
        left_out |= {name for name, bad in BAD.items() if callable(bad)}
    if isinstance(right, str | type | torch.dtype):
        left_out |= {"a vector", "classes", "an image alone", "images on meta", "an array"}
    if isinstance(right, list | tuple):
        left_out |= {"a 0-d tensor"}
    return [name for name in BAD if name not in left_out]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(f"images/{name}/x.png")
    with tarfile.open("shard.tar", "w") as tar:
        for name, content in ("a.jpg", PHOTO), ("a.cls", b"0"), ("b.jpg", PHOTO), ("b.cls", b"1"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore")  # of networks that are read
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NOT_CALLED])
def test_what_is_wrong_is_refused_in_words(name: str) -> None:
    if name in ("fresnet.load", "fresnet.notes"):
        fresnet.save(PARAMS, RIGHT["path"])
    right = right_arguments(name)
    if name not in TAKE_LONG:
        call(name, right)
    refused = 0
    for argument, value in right.items():
        for mistake in mistakes(value):
            try:
                call(name, {**right, argument: BAD[mistake]})
            except FresnetError as error:
                refused += 1
                message = str(error)
                assert "0.1234" not in message, (argument, mistake)
                assert "tensor(" not in message, (argument, mistake)
                assert len(message) < 1000, (argument, mistake)
            except Exception as error:
                raise AssertionError(f"{mistake} for {argument} of {name}") from error
    assert refused or name in TAKE_ANYTHING


TAKE_LONG = {"fresnet.compile_inference", "fresnet.export", "moments.merge_across"}
"""Functions that are not called with the right arguments, or that take several processes."""

TAKE_ANYTHING = {"tree.leaves", "tree.named", "tree.paths", "tree.pformat"}
"""Functions of any tree, where anything that is no node is a leaf."""


def test_the_lists_hold_no_more_than_is_needed() -> None:
    names = {one for name in FUNCTIONS for one in inspect.signature(FUNCTIONS[name]).parameters}
    assert {*RIGHT} <= names
    assert {*ELSEWHERE, *NOT_CALLED, *TAKE_ANYTHING, *TAKE_LONG} <= {*FUNCTIONS}
