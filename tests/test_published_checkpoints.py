"""Checkpoints load under the names that those who publish them write, and give their numbers.

Each is rebuilt here as its own code builds it, of torchvision's network an eighth as wide.
"""

import pickle
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import reference
import torch
from assertions import assert_close
from reference import BasicBlock, Bottleneck, Narrow
from timm.models.resnet import Bottleneck as TimmBlock
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

import fresnet
from fresnet import FresnetError, Spec, nodes

X = torch.randn(2, 3, 71, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SMALL = X[:, :, :12, :10]


def network(seed: int = 0, block: Any = Bottleneck, num_classes: int = 5, **kwargs: Any) -> Narrow:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Narrow(block, (1, 2, 1, 1), num_classes, **kwargs)
    model.eval()
    return reference.perturbed(model, seed)


def encoder(model: Any, last: nn.Module | None = None) -> Any:
    """The network with something else in place of its last layer."""
    model = deepcopy(model)
    model.fc = last or nn.Identity()
    return model


def with_head(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """An encoder's entries, and a head as `docs/checkpoints.md` adds one."""
    return {**state, "fc.weight": model.fc.weight.detach(), "fc.bias": model.fc.bias.detach()}


def names(**children: Any) -> dict[str, Any]:
    """The state dict of a module of these children, each of which may be one of its own."""
    state: dict[str, Any] = module(**children).double().state_dict()
    return state


def module(**children: Any) -> nn.ModuleDict:
    return nn.ModuleDict(children)


def mlp(*sizes: int, norms: bool = False) -> nn.Sequential:
    """A projection as they are made: the last layer has no ReLU."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norms else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def check(checkpoint: dict[str, Any], model: Any, x: Tensor = X, **kwargs: Any) -> fresnet.Params:
    params = fresnet.from_state_dict(checkpoint, **kwargs)
    with torch.no_grad():
        assert_close(fresnet.forward(params, x), model(x), 1e-12)
    return params


@contextmanager
def telling(*messages: str) -> Iterator[None]:
    """There are these warnings, in this order, and no others."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    for message, one in zip(messages, told, strict=True):
        assert re.search(message, str(one.message)), one


MODEL, OTHER = network(0), network(1)
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(8, 3, 7, 7)}}, "param_groups": [{"lr": 0.1}]}


def moco_v2() -> tuple[dict[str, Any], str]:
    state = names(
        module=module(
            encoder_q=encoder(MODEL, mlp(256, 256, 8)), encoder_k=encoder(OTHER, mlp(256, 256, 8))
        )
    )
    queues = {"module.queue": torch.zeros(8, 9), "module.queue_ptr": torch.zeros(1).long()}
    state = with_head({**state, **queues}, MODEL)
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": OPTIMIZER}, (
        "module.encoder_q.fc.0.weight"
    )


def moco_v3() -> tuple[dict[str, Any], str]:
    state = names(
        module=module(
            base_encoder=encoder(MODEL, mlp(256, 16, 8, norms=True)),
            momentum_encoder=encoder(OTHER, mlp(256, 16, 8, norms=True)),
            predictor=mlp(8, 16, 8, norms=True),
        )
    )
    return {"epoch": 100, "state_dict": with_head(state, MODEL), "scaler": {"scale": 1.0}}, (
        "module.base_encoder.fc.0.weight"
    )


def simsiam() -> tuple[dict[str, Any], str]:
    state = names(
        module=module(
            encoder=encoder(MODEL, mlp(256, 256, 256, 8, norms=True)), predictor=mlp(8, 4, 8)
        )
    )
    return {"state_dict": with_head(state, MODEL)}, "module.encoder.fc.0.weight"


def swav() -> tuple[dict[str, Any], str]:
    model = encoder(MODEL)
    model.projection_head = mlp(256, 16, 8, norms=True)
    model.prototypes = nn.Linear(8, 30, bias=False)
    return with_head(names(module=model), MODEL), "module.projection_head.0.weight"


def dino() -> tuple[dict[str, Any], str]:
    def crops(model: Any) -> dict[str, Any]:
        last = nn.ParameterDict({"weight_g": torch.ones(9, 1), "weight_v": torch.ones(9, 4)})
        head = module(mlp=mlp(256, 16, 4), last_layer=last)
        return with_head(names(module=module(backbone=encoder(model), head=head)), model)

    return {
        "student": crops(OTHER),
        "teacher": crops(MODEL),
        "optimizer": OPTIMIZER,
        "epoch": 300,
        "args": Namespace(arch="resnet50"),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }, "module.head.mlp.0.weight"


def simclr() -> tuple[dict[str, Any], str]:
    state = names(backbone=encoder(MODEL, mlp(256, 256, 8)))
    return {"epoch": 200, "arch": "resnet50", "state_dict": with_head(state, MODEL)}, (
        "backbone.fc.0.weight"
    )


def vicreg() -> tuple[dict[str, Any], str]:
    state = names(module=module(backbone=encoder(MODEL), projector=mlp(256, 16, 8, norms=True)))
    return {"epoch": 1000, "model": with_head(state, MODEL), "optimizer": OPTIMIZER}, (
        "module.projector.0.weight"
    )


def barlow_twins() -> tuple[dict[str, Any], str]:
    state = names(
        module=module(
            backbone=encoder(MODEL),
            projector=mlp(256, 16, 8, norms=True),
            bn=nn.BatchNorm1d(8, affine=False),
        )
    )
    return {"epoch": 1000, "model": with_head(state, MODEL)}, "module.projector.0.weight"


def torchvisions_detection() -> tuple[dict[str, Any], str]:
    vision = reference.torchvision
    body = network(norm_layer=vision.ops.FrozenBatchNorm2d)
    body.load_state_dict(MODEL.state_dict(), strict=False)
    fpn = vision.models.detection.backbone_utils.BackboneWithFPN(
        body, {f"layer{i}": str(i) for i in (1, 2, 3, 4)}, [32, 64, 128, 256], 8
    )
    state = vision.models.detection.FasterRCNN(fpn, num_classes=3).double().state_dict()
    assert "backbone.body.bn1.num_batches_tracked" not in state
    return with_head(state, MODEL), "backbone.fpn.inner_blocks.0.0.weight"


ENCODERS = (
    *(moco_v2, moco_v3, simsiam, swav, dino, simclr, vicreg, barlow_twins),
    torchvisions_detection,
)


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.__name__)
def test_encoders_load_and_what_stands_behind_them_is_told(
    kind: Callable[[], tuple[dict[str, Any], str]],
) -> None:
    checkpoint, behind = kind()
    average = ["an average of the weights, 'teacher', stands beside"] if kind is dino else []
    with telling(*average, f"left out: .*{behind}"):
        check(checkpoint, MODEL)


def test_byol_keeps_two_networks_and_one_of_them_twice() -> None:
    """Of children in a list. Which of its state dicts is meant has to be said."""

    def byol(model: Any) -> dict[str, Any]:
        return names(encoder=nn.Sequential(*list(model.children())[:-1]), projetion=mlp(256, 8, 4))

    online, target = byol(MODEL), byol(OTHER)
    encoders = {"online_network_state_dict": online, "target_network_state_dict": target}
    bare = {n.removeprefix("encoder."): v for n, v in online.items() if n.startswith("encoder.")}
    with pytest.raises(FresnetError, match="'online_network_state_dict' and 'encoder_state_dict'"):
        fresnet.from_state_dict({**encoders, "encoder_state_dict": bare})
    encoders["online_network_state_dict"] = with_head(online, MODEL)
    with telling(
        "state dicts of copies are left out: 'target_network_state_dict'",
        "left out: projetion.0.weight",
    ):
        check(encoders, MODEL)
    check(with_head(bare, MODEL), MODEL)


def test_a_projection_is_left_out_unless_the_head_stands_in_it() -> None:
    """A norm before a last layer belongs to the head, and changes the logits."""
    model = encoder(MODEL, nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 5)))
    with pytest.raises(FresnetError, match=r"fc.0.weight is unexpected"):
        fresnet.from_state_dict(names(module=model))
    dropout = encoder(MODEL, nn.Sequential(nn.Dropout(), MODEL.fc))
    check(names(module=dropout), MODEL)


def test_the_projection_of_an_average_is_told_too() -> None:
    def projected(model: Any) -> Any:
        model = deepcopy(model)
        model.projector = mlp(256, 8, 4)
        return model

    with telling(
        "an average of the weights, 'ema_model.', stands beside",
        r"left out: ema_model.projector.0.weight, .* and 1 more",
    ):
        check(names(model=projected(OTHER), ema_model=projected(MODEL)), MODEL)


@pytest.mark.parametrize("at", ["", "module.encoder_q."])
def test_a_head_may_be_added_beside_a_projection(at: str) -> None:
    """Under no prefix, or under the encoder's own, where the projection stands too."""
    state = names(module=module(encoder_q=encoder(MODEL, mlp(256, 256, 8))))
    head = {f"{at}{name}": value for name, value in with_head({}, MODEL).items()}
    with telling("left out: module.encoder_q.fc.0.weight"):
        check({**state, **head}, MODEL)


def classified() -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Checkpoints of the whole network, with what is told of them."""
    model, copy = deepcopy(MODEL), deepcopy(OTHER)
    yield (
        "MoCo v1, whose projection is one layer",
        {"state_dict": names(module=module(encoder_q=model, encoder_k=copy))},
        ("left out: module.encoder_k.conv1.weight",),
    )
    yield (
        "solo-learn's BYOL",
        {
            "state_dict": names(
                backbone=encoder(MODEL),
                classifier=MODEL.fc,
                momentum_backbone=encoder(OTHER),
                projector=mlp(256, 16, 8, norms=True),
                momentum_projector=mlp(256, 16, 8, norms=True),
                predictor=mlp(8, 16, 8),
            ),
            "hyper_parameters": {"method": "byol"},
            "pytorch-lightning_version": "2.1.2",
        },
        ("left out: momentum_backbone.conv1.weight",),
    )
    normalizer = {"new_mean": torch.zeros(3, 1, 1), "new_std": torch.ones(3, 1, 1)}
    yield (
        "robustness, whose attacker holds the network again",
        {
            "model": names(
                module=module(
                    normalizer=nn.ParameterDict(normalizer),
                    model=model,
                    attacker=module(normalize=nn.ParameterDict(normalizer), model=model),
                )
            ),
            "optimizer": OPTIMIZER,
            "epoch": 90,
        },
        ("left out: module.normalizer.new_mean",),
    )
    yield (
        "Lightning, an average among its callbacks",
        {
            "state_dict": names(model=copy),
            "callbacks": {
                "EMA": {"ema_state_dict": names(model=model), "decay": 0.999},
                "ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.ones(())},
            },
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [OPTIMIZER],
            "lr_schedulers": [],
            "loops": {"fit_loop": {"state_dict": {}}},
        },
        ("an average of the weights, 'callbacks.EMA.ema_state_dict', stands beside",),
    )
    yield (
        "Lightning, the average in the weights' place",
        {
            "state_dict": names(model=model),
            "current_model_state": names(model=copy),
            "averaging_state": {"n_averaged": torch.tensor(7)},
        },
        ("the average under 'state_dict' is taken",),
    )
    yield "torch.compile", names(_orig_mod=model), ()
    yield "torch.compile in DataParallel", names(module=module(_orig_mod=model)), ()
    yield (
        "mmpretrain",
        {
            "meta": {"mmpretrain_version": "1.0.0"},
            "state_dict": names(backbone=encoder(MODEL), head=module(fc=MODEL.fc)),
        },
        (),
    )


CLASSIFIED = {name: (checkpoint, told) for name, checkpoint, told in classified()}


@pytest.mark.parametrize("name", CLASSIFIED)
def test_whole_networks_load(name: str) -> None:
    checkpoint, told = CLASSIFIED[name]
    with telling(*told):
        check(checkpoint, MODEL)


@pytest.mark.parametrize("as_modules", [True, False])
@pytest.mark.parametrize("avg_down", [True, False])
def test_open_mmlabs_deep_stem(as_modules: bool, avg_down: bool) -> None:
    """A list of layers, as mmsegmentation's, or of modules of conv and bn, as mmpretrain's."""
    sizes: Any = {"channels": (4, 8, 8, 8), "stem_width": 4}
    made = TimmResNet(TimmBlock, (1, 2, 1, 1), 5, stem_type="deep", avg_down=avg_down, **sizes)
    model = reference.perturbed(made, 0).eval()
    layers = [*model.conv1, model.bn1, model.act1]
    parts = [module(conv=conv, bn=bn) for conv, bn in zip(layers[::3], layers[1::3], strict=True)]
    theirs = deepcopy(model)
    first = theirs.layer1[0]
    first.downsample = nn.Sequential(*list(first.downsample)[avg_down:])  # timm has an Identity
    stages = {f"layer{i}": getattr(theirs, f"layer{i}") for i in (1, 2, 3, 4)}
    body = module(stem=nn.Sequential(*(parts if as_modules else layers)), **stages)
    state = names(backbone=body, head=module(fc=model.fc))
    assert ("backbone.stem.2.bn.weight" if as_modules else "backbone.stem.7.weight") in state
    params = check({"state_dict": state}, model)
    pools = type(params.weights.stages[1][0].shortcut) is nodes.PooledProjection
    assert pools is avg_down


def detectron2(model: Any) -> nn.ModuleDict:
    """A ResNet as detectron2 builds it: every convolution holds the norm after it."""

    def conv(conv: nn.Module, norm: nn.Module) -> nn.Module:
        conv.add_module("norm", norm)
        return conv

    def block(block: Any) -> nn.ModuleDict:
        shortcut = {} if block.downsample is None else {"shortcut": conv(*block.downsample)}
        pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        return module(
            **shortcut, **{a: conv(getattr(block, a), getattr(block, b)) for a, b in pairs}
        )

    model = deepcopy(model)
    stages = [nn.Sequential(*map(block, getattr(model, f"layer{i}"))) for i in (1, 2, 3, 4)]
    return module(
        stem=module(conv1=conv(model.conv1, model.bn1), fc=model.fc),
        **{f"res{i}": stage for i, stage in enumerate(stages, start=2)},
    )


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_detectron2(block: Any) -> None:
    model = network(block=block)
    whole = names(**detectron2(model))
    assert {
        *("stem.conv1.norm.running_var", "stem.fc.bias", "res2.0.conv1.norm.weight"),
        *("res3.0.shortcut.weight", "res3.0.shortcut.norm.bias", "res5.0.conv2.weight"),
    } <= whole.keys()
    check(whole, model)
    linear = {name.replace("stem.fc.", "linear."): value for name, value in whole.items()}
    check({"model": linear, "iteration": 9}, model)


def test_detectron2s_detection_of_the_papers_resnet() -> None:
    """Of MSRA's weights: bottlenecks stride in their first convolution."""
    model = reference.v1(network())
    body = detectron2(model)
    del body.get_submodule("stem").fc
    fpn = module(bottom_up=body, fpn_lateral2=nn.Conv2d(32, 8, 1))
    state = names(backbone=fpn, roi_heads=module(box_predictor=nn.Linear(8, 3)))
    spec = Spec(nodes.BottleneckV1, (1, 2, 1, 1))
    with telling("left out: backbone.fpn_lateral2.weight"):
        check({"model": with_head(state, model)}, model, architecture=spec)


def test_an_entry_of_detectron2_is_named_as_it_came() -> None:
    whole = names(**detectron2(MODEL))
    for name in ("stem.conv1.norm.bias", "res4.0.conv2.weight", "res3.1.conv3.norm.weight"):
        with pytest.raises(FresnetError, match=f"\n  {name} is missing: expected"):
            fresnet.from_state_dict({n: value for n, value in whole.items() if n != name})


def cifar(option: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = reference.Cifar((2, 1, 1), option, 4, 100)
    return reference.perturbed(model, 0).eval()


def test_chenyaofos_networks_for_cifar() -> None:
    """`cifar100_resnet20` has torchvision's names, a 3x3 stem and projections."""
    model = cifar("B")
    assert "layer2.0.downsample.0.weight" in model.state_dict()
    check(model.state_dict(), model, SMALL)


@pytest.mark.parametrize("wrapped", [True, False])
def test_kuangliu_calls_projections_shortcuts_and_the_head_linear(wrapped: bool) -> None:
    """kuangliu saves `{"net": ..., "acc": ..., "epoch": ...}` of a network in DataParallel."""
    model = cifar("B")
    renamed = {
        name.replace("downsample", "shortcut").replace("fc.", "linear."): value
        for name, value in model.state_dict().items()
    }
    parallel = {f"module.{name}": value for name, value in renamed.items()}
    check({"net": parallel, "acc": 95.5, "epoch": 199} if wrapped else renamed, model, SMALL)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """x at every second place, with half as many channels of zeros before and after."""
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *2 * (x.shape[1] // 2,)))


def test_akamasters_networks_for_cifar() -> None:
    """Their shortcuts have no entries; the head is `linear`, behind `module.`."""
    model = cifar("A")
    for stage in model.stages[1:]:
        stage[0].downsample = Centred()
    state = {
        f"module.{name.replace('fc.', 'linear.')}": value
        for name, value in model.state_dict().items()
    }
    spec = Spec(nodes.BasicBlock, (2, 1, 1), stem=nodes.Stem3x3, shortcut=nodes.CentredZeroPad)
    check({"state_dict": state, "best_prec1": 91.7}, model, SMALL, architecture=spec)


def test_fastais_body_in_a_list_and_a_head_behind_it() -> None:
    body = nn.Sequential(*list(MODEL.children())[:-2])
    head = nn.Sequential(nn.Identity(), nn.Flatten(), nn.BatchNorm1d(512), nn.Linear(512, 5))
    state: dict[str, Any] = nn.Sequential(body, head).double().state_dict()
    assert {"0.0.weight", "0.1.running_mean", "0.4.0.conv1.weight", "1.3.bias"} <= state.keys()
    with telling("left out: 1.2.weight"):
        check({"model": with_head(state, MODEL), "opt": {"hypers": []}}, MODEL)
    check(with_head(body.state_dict(), MODEL), MODEL)
    del state["0.6.0.bn1.bias"]
    with (
        telling("left out: 1.2.weight"),
        pytest.raises(FresnetError, match=r"\n  6.0.bn1.bias is missing"),
    ):
        fresnet.from_state_dict(with_head(state, MODEL))


@pytest.mark.parametrize(
    "state",
    [
        MODEL.state_dict(),
        names(**detectron2(MODEL)),
        with_head(nn.Sequential(*list(MODEL.children())[:-2]).state_dict(), MODEL),
    ],
    ids=["torchvision", "detectron2", "a list"],
)
def test_a_stage_without_a_stem_is_no_second_network(state: dict[str, Any]) -> None:
    """Such as a decoder's, or the head of a detector."""
    state = {f"encoder.{name}": value for name, value in state.items()}
    if "encoder.fc.weight" not in state and "encoder.stem.fc.weight" not in state:
        state = with_head(state, MODEL)
    decoders = {f"decoder.{at}.0.conv1.weight": torch.ones(4) for at in ("layer1", "res2", "4")}
    with telling("left out: decoder.layer1.0.conv1.weight, decoder.res2.0.conv1.weight and dec"):
        check({**state, **decoders}, MODEL)


def test_torchvisions_segmentation_dilates_what_its_names_do_not_tell() -> None:
    vision = reference.torchvision
    dilated = network(replace_stride_with_dilation=[False, True, True])
    getter = vision.models._utils.IntermediateLayerGetter(dilated, {"layer4": "out"})
    classifier = vision.models.segmentation.fcn.FCNHead(256, 3)
    state = vision.models.segmentation.FCN(getter, classifier).double().state_dict()
    with telling("left out: classifier.0.weight"):
        params = fresnet.from_state_dict(with_head(state, dilated))
    params = fresnet.dilate(params, output_stride=8)
    with torch.no_grad():
        assert_close(fresnet.forward(params, X), dilated(X), 1e-12)


Pickler: Any = pickle._Pickler


class Python2(Pickler):  # type: ignore[misc]
    """Writes texts as Python 2 wrote its own: as bytes, with their length in one byte."""

    dispatch: ClassVar[dict[Any, Any]] = dict(Pickler.dispatch)

    def save_str(self, text: str) -> None:
        self.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode())
        self.memoize(text)

    dispatch[str] = save_str


PYTHON_2 = SimpleNamespace(
    __name__="cPickle",
    Pickler=Python2,
    dump=lambda value, file, protocol: Python2(file, protocol).dump(value),
)


def test_places365_is_a_file_of_python_2(tmp_path: Path) -> None:
    """It has 365 classes, no counters of batches, and the layout of files before PyTorch 1.6."""
    model = network(num_classes=365)
    state = {
        f"module.{name}": value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / "resnet50_places365.pth.tar"
    torch.save(
        {"epoch": 90, "arch": "resnet50", "state_dict": state, "best_prec1": torch.tensor(54.0)},
        path,
        PYTHON_2,
        pickle_protocol=2,
        _use_new_zipfile_serialization=False,
    )
    assert b"U\x13module.conv1.weight" in path.read_bytes()
    params = fresnet.load(path)
    with torch.no_grad():
        assert_close(fresnet.forward(params, X), model(X), 1e-12)
