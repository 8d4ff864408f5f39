"""Bad input gives one clear error that says what was expected and what came."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fresnet
from fresnet import FresnetError, Params, Spec, training, tree
from fresnet.network.nodes import (
    AveragedStage,
    AveragedStem,
    BareStem7x7,
    BasicBlock,
    Bias,
    Bottleneck,
    DeepStem,
    DilatedStage,
    Identity,
    Norm,
    NormStats,
    PooledProjection,
    PreActivation,
    Projection,
    SqueezeExcite,
    Stem3x3,
    ZeroPad,
)

PARAMS = fresnet.init(0, Spec(Bottleneck, (2, 2), width=4), num_classes=5)
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CALLS = [
    fresnet.forward,
    fresnet.forward_train,
    fresnet.features,
    fresnet.features_train,
    fresnet.embed,
]

every_call = pytest.mark.parametrize("call", CALLS)


def check(call: Callable[..., Any], params: Any, x: Any, message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        call(params, x)


@every_call
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], "[b 3 h w]; got (3, 16, 16) (one image? x[None])"),
        (X[None], "[b 3 h w]; got (1, 2, 3, 16, 16)"),
        (X[:, :1], "[b 3 h w]; got (2, 1, 16, 16) (grey images? x.expand(-1, 3, -1, -1))"),
        (X.repeat(1, 2, 1, 1), "[b 3 h w]; got (2, 6, 16, 16)"),
        (X.permute(0, 2, 3, 1), "[b 3 h w]; got (2, 16, 16, 3) (channels last? x.movedim(3, 1))"),
        (X.to(torch.uint8), "[b 3 h w] in the weights' torch.float32; got torch.uint8"),
        (X.double(), "[b 3 h w] in the weights' torch.float32; got torch.float64"),
        (X.to("meta"), "[b 3 h w] on the weights' device cpu; got meta"),
        (X[:, :, :0], "[b 3 h w] with at least one image and pixel; got (2, 3, 0, 16)"),
        (X[:, :, :, :0], "[b 3 h w] with at least one image and pixel; got (2, 3, 16, 0)"),
        (X[:0], "[b 3 h w] with at least one image and pixel; got (0, 3, 16, 16)"),
        (
            X.to_sparse(),
            "[b 3 h w] without gaps; got sparse_coo float32 (2, 3, 16, 16)",
        ),
        (X.numpy(), "to be a tensor [b c h w]; got a ndarray"),
        (None, "to be a tensor [b c h w]; got None"),
    ],
)
def test_images(call: Callable[..., Any], x: Any, message: str) -> None:
    check(call, PARAMS, x, f"{call.__name__} expects x {message}")


@pytest.mark.parametrize(
    ("channels", "shape", "hint"),
    [
        (1, (6, 8, 8), " (grey images? x[:, None])"),
        (1, (1, 8, 8), " (one image? x[None])"),
        (1, (8, 8), ""),
        (1, (6, 3, 8, 8), ""),
        (3, (6, 8, 8), ""),
    ],
)
def test_what_was_perhaps_meant_by_images(channels: int, shape: tuple[int, ...], hint: str) -> None:
    params = fresnet.init(0, Spec(Bottleneck, (1,), width=4), num_classes=5, in_channels=channels)
    message = f"forward expects x [b {channels} h w]; got {shape}{hint}"
    with pytest.raises(FresnetError, match=f"^{re.escape(message)}$"):
        fresnet.forward(params, torch.zeros(shape))


def with_stages(weights: Any = None, stats: Any = None) -> Params:
    """PARAMS with edited stages, in either tree or in both."""
    w, s = PARAMS
    return Params(
        w._replace(stages=weights(w.stages) if weights else w.stages),
        s._replace(stages=stats(s.stages) if stats else s.stages),
    )


def without_first_block(stages: Any) -> Any:
    return (stages[0], stages[1][1:])


def with_block(block: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda stages: (stages[0], (block(stages[1][0]), *stages[1][1:]))


def with_layer(layer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return with_block(lambda block: block._replace(layer2=layer(block.layer2)))


w, s = PARAMS


def with_stem(**changed: Any) -> Any:
    """The weights with another convolution or norm in the stem."""
    return w._replace(stem=w.stem._replace(layer=w.stem.layer._replace(**changed)))


class Unknown(NamedTuple):
    """A norm that fresnet does not know, with the fields of one that it knows."""

    scale: torch.Tensor
    bias: torch.Tensor


TREES: dict[str, tuple[Any, str]] = {
    "not params": ({"weights": w, "stats": s}, "expects Params(weights, stats); got a dict"),
    "weights alone": (w, "got a Weights: params._replace(weights=weights)?"),
    "a state of training": (
        training.start(PARAMS, fresnet.optim.sgd(0.1)),
        "expects Params(weights, stats); got a TrainState: its .params?",
    ),
    "a module of a network": (
        fresnet.as_module(PARAMS),
        "expects Params(weights, stats); got a Network: its .params()?",
    ),
    "another module": (
        torch.nn.Identity(),
        "got a Identity: fresnet.from_state_dict(module.state_dict())?",
    ),
    "a part of a tree": (
        PARAMS._replace(weights=tree.partition(w, tree.matching("head"))[0]),
        "got a tuple (a part of a tree? tree.combine(part, rest))",
    ),
    "an empty head": (
        PARAMS._replace(weights=w._replace(head=())),
        "expects weights.head to be Head or NoHead; got a tuple",
    ),
    "a shortcut as a block": (
        with_stages(weights=with_block(lambda b: b.shortcut)),
        "expects weights.stages[1][0] to be BasicBlock or Bottleneck or BottleneckV1 or "
        "PreActivationBasic or PreActivation; got a Projection",
    ),
    "a block as a shortcut": (
        with_stages(weights=with_block(lambda b: b._replace(shortcut=b))),
        "expects weights.stages[1][0].shortcut to be Identity or Projection or "
        "PooledProjection or ZeroPad or CentredZeroPad or NoShortcut; got a Bottleneck",
    ),
    "a projection as a stem": (
        PARAMS._replace(weights=w._replace(stem=Projection(*w.stem))),
        "expects weights.stem to be Stem7x7 or DeepStem or Stem3x3 or BareStem7x7 or BareDeepStem "
        "or FramedStem7x7 or AveragedStem or BlurredStem or StridedStem; got a Projection",
    ),
    "a norm that is missing": (
        with_stages(weights=with_layer(lambda layer: layer._replace(norm=()))),
        "expects weights.stages[1][0].layer2.norm to be Norm or FrozenNorm or GroupNorm or Bias or "
        "Rescale or NoNorm; got a tuple",
    ),
    "a norm of another type": (
        PARAMS._replace(weights=with_stem(norm=Unknown(*w.stem.layer.norm))),
        "expects weights.stem.layer.norm to be Norm or FrozenNorm or GroupNorm or Bias or Rescale "
        "or NoNorm; got a Unknown",
    ),
    "statistics beside a bias": (
        PARAMS._replace(weights=with_stem(norm=Bias(w.stem.layer.norm.bias))),
        "expects stats.stem.layer to be () beside Bias; got a NormStats",
    ),
    "no statistics beside a norm": (
        PARAMS._replace(stats=s._replace(stem=s.stem._replace(layer=()))),
        "expects stats.stem.layer to be NormStats beside Norm; got a tuple",
    ),
    "an even kernel": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=layer.conv[..., :2, :2]))),
        "expects a weight [o 8 k k], k odd; got (8, 8, 2, 2)",
    ),
    "a group without channels": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=layer.conv[:, :0]))),
        "expects a weight [o 8 k k], k odd; got (8, 0, 3, 3)",
    ),
    "a 3x3 that is a number": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=layer.conv.sum()))),
        "expects a weight [o 8 k k], k odd; got ()",
    ),
    "groups that do not divide the output": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=layer.conv[:7, :4]))),
        "expects a weight [o 8/2 k k], k odd; got (7, 4, 3, 3)",
    ),
    "a bare pair": ((w, s), "expects Params(weights, stats); got a tuple"),
    "stats first": (Params(s, w), "to hold Weights and Stats; got a Stats and a Weights"),  # type: ignore[arg-type]
    "a block missing": (
        with_stages(without_first_block, without_first_block),
        "of activations (2, 16, 4, 4) expects a weight [o 16 k k], k odd; got (8, 32, 1, 1)",
    ),
    "a block missing in weights": (
        with_stages(weights=without_first_block),
        "expects stats.stages[1] to be as long as weights.stages[1], 1; got 2",
    ),
    "a block missing in stats": (
        with_stages(stats=without_first_block),
        "expects stats.stages[1] to be as long as weights.stages[1], 2; got 1",
    ),
    "a stage missing in stats": (
        with_stages(stats=lambda stages: stages[:1]),
        "expects stats.stages to be as long as weights.stages, 2; got 1",
    ),
    "no stages": (
        with_stages(lambda _: (), lambda _: ()),
        "expects weights.stages to be a tuple, not empty; got a tuple",
    ),
    "a block that is None": (
        with_stages(weights=with_block(lambda _: None)),
        "expects weights.stages[1][0] to be BasicBlock or Bottleneck or BottleneckV1 or "
        "PreActivationBasic or PreActivation; got None",
    ),
    "stats of another block": (
        with_stages(stats=with_block(lambda b: b.shortcut)),
        "expects stats.stages[1][0] to be as weights.stages[1][0], a Bottleneck; got a Projection",
    ),
    "an identity where the size halves": (
        with_stages(
            with_block(lambda b: b._replace(shortcut=Identity())),
            with_block(lambda b: b._replace(shortcut=Identity())),
        ),
        "expects a shortcut of the same shape; got",
    ),
    "a leaf that is None": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=None))),
        "expects weights.stages[1][0].layer2.conv to be a tensor; got None",
    ),
    "a float64 leaf": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=layer.conv.double()))),
        "expects weights.stages[1][0].layer2.conv to be torch.float32 on cpu, "
        "to go with the stem; got torch.float64 on cpu",
    ),
    "a leaf with gaps": (
        with_stages(weights=with_layer(lambda layer: layer._replace(conv=layer.conv.to_sparse()))),
        "expects weights.stages[1][0].layer2.conv to be a tensor without gaps; got sparse_coo",
    ),
    "float64 stats": (
        PARAMS._replace(stats=tree.map(torch.Tensor.double, s)),
        "expects stats.stem.layer.mean to be torch.float32 on cpu",
    ),
    "a leaf on another device": (
        with_stages(stats=with_block(lambda b: tree.map(lambda t: t.to("meta"), b))),
        "expects stats.stages[1][0].layer1.mean to be torch.float32 on cpu, to go with "
        "the stem; got torch.float32 on meta",
    ),
    "an integer stem": (
        PARAMS._replace(weights=with_stem(conv=w.stem.layer.conv.int())),
        "expects the stem's first convolution to be a float tensor [o c k k]; "
        "got int32 (4, 3, 7, 7)",
    ),
    "no stem": (
        PARAMS._replace(weights=w._replace(stem=None)),
        "expects the stem's first convolution to be a float tensor [o c k k]; got None",
    ),
    "a norm of one channel beside many": (
        Params(
            with_stem(norm=Norm(torch.ones(1), torch.zeros(1))),
            s._replace(stem=s.stem._replace(layer=NormStats(torch.zeros(1), torch.ones(1)))),
        ),
        "a norm of activations (2, 4, 8, 8) expects scale, bias, mean and var [4] each; "
        "got (1,), (1,), (1,), (1,)",
    ),
    "a head without bias values": (
        PARAMS._replace(weights=w._replace(head=w.head._replace(bias=torch.zeros(1)))),
        "expects a weight [k 32] and a bias [k]; got (5, 32) and (1,)",
    ),
}


@pytest.mark.parametrize("call", [fresnet.forward, fresnet.forward_train])
@pytest.mark.parametrize("name", TREES)
def test_trees(call: Callable[..., Any], name: str) -> None:
    params, message = TREES[name]
    check(call, params, X, message)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 1, 1), (1, 3, 2, 8)])
def test_training_on_one_value_per_channel(shape: tuple[int, ...]) -> None:
    message = "training expects more than one value per channel at every norm"
    check(fresnet.forward_train, PARAMS, torch.ones(shape), message)
    assert fresnet.forward(PARAMS, torch.ones(shape)).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": "0"}, "init expects a torch.Generator or an int; got '0'"),
        ({"generator": 0, "spec": "resnet50"}, "got 'resnet50': fresnet.SPECS['resnet50']"),
        ({"generator": 0, "spec": "resnet5"}, "got 'resnet5'; did you mean 'resnet50', "),
        ({"generator": 0, "spec": 50}, "init expects a Spec, such as fresnet.RESNET50; got 50"),
        ({"generator": True}, "init expects a torch.Generator or an int; got True"),
        ({"generator": 0, "num_classes": 9.0}, "got num_classes=9.0, in_channels=3"),
        ({"generator": 0, "num_classes": -1}, "got num_classes=-1, in_channels=3"),
        ({"generator": 0, "in_channels": 0}, "got num_classes=1000, in_channels=0"),
        ({"generator": 0, "dtype": torch.int32}, "torch.float64); got torch.int32"),
        (
            {"generator": 0, "num_classes": 2**31},
            "from 1 on, below 2**31; got num_classes=2147483648",
        ),
        ({"generator": 0, "device": "nowhere"}, "a torch.device that is there; got 'nowhere'"),
        pytest.param(
            {"generator": 0, "device": "cuda"},
            "a torch.device that is there; got device(type='cuda')",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there"),
        ),
        ({"generator": 0, "dtype": "float32"}, "torch.float64); got 'float32'"),
        ({"generator": 2**70}, f"init expects a torch.Generator or an int; got {2**70}"),
    ],
)
def test_init(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.init(**arguments)


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        (w, {}, "with_head expects Params(weights, stats); got a Weights"),
        (PARAMS, {"num_classes": 0}, "num_classes to be an integer from 1 on, below 2**31; got 0"),
        (PARAMS, {"num_classes": 2**31}, "below 2**31; got 2147483648"),
        (PARAMS, {"num_classes": "ten"}, "below 2**31; got 'ten'"),
        (PARAMS, {"generator": None}, "with_head expects a torch.Generator or an int; got None"),
    ],
)
def test_with_head(params: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.with_head(params, **{"num_classes": 2, "generator": 0, **arguments})


@pytest.mark.parametrize(
    ("momentum", "got"),
    [
        (-0.1, "-0.1"),
        (2, "2"),
        (None, "None"),
        (True, "True"),
        (math.nan, "nan"),
        (torch.ones(1), "float32 (1,)"),
        (torch.tensor(1), "int64 ()"),
    ],
)
def test_momentum(momentum: Any, got: str) -> None:
    message = f"expects momentum to be a number from 0 to 1 or a 0-d float tensor; got {got}"
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.forward_train(PARAMS, X, momentum=momentum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (
                {"block": BasicBlock, "depths": depths},
                "Spec expects depths and stem_widths to be tuples of positive",
            )
            for depths in ((), (1, 0), [2, 2], (2, 1.5), 3)
        ),
        *(
            ({field: value}, "narrowing, projection to be positive integers; got")
            for field, value in (
                ("width", 0),
                ("groups", -1),
                ("reduction", 0),
                ("narrowing", 1.5),
                ("projection", None),
                ("stem_widths", (0,)),
                ("stem_widths", [64]),
            )
        ),
        (
            {"block": Norm},
            "Spec expects block BasicBlock or Bottleneck or BottleneckV1 or PreActivationBasic or "
            "PreActivation; got",
        ),
        (
            {"stem": Norm},
            "Spec expects stem Stem7x7 or DeepStem or Stem3x3 or BareStem7x7 or "
            "BareDeepStem or FramedStem7x7; got",
        ),
        (
            {"shortcut": Identity},
            "PooledProjection or ZeroPad or CentredZeroPad or NoShortcut; got",
        ),
        ({"block": BasicBlock, "groups": 2}, "Spec expects groups, group_width and narrowing of b"),
        ({"block": BasicBlock, "narrowing": 2}, "expects groups, group_width and narrowing of b"),
        ({"group_width": 1, "width": 32}, "Spec expects at least one channel in each group"),
        ({"groups": 32, "group_width": 4, "narrowing": 8}, "and narrowing to divide them; got"),
        ({"reduction": 4}, "Spec expects reduction of SqueezeExcite; got"),
        ({"projection": 2}, "Spec expects projection to be the odd side of a kernel"),
        ({"projection": 3, "shortcut": PooledProjection}, "more than 1 with Projection alone; got"),
        ({"stem_widths": (32, 64)}, "Spec expects stem_widths to be 1 numbers in a Stem7x7; got"),
        ({"stem": DeepStem, "stem_widths": (64,)}, "stem_widths to be 3 numbers in a DeepStem"),
        ({"stem_widths": (2**31,)}, "Spec expects fewer stages or a smaller width"),
        (
            {"block": BasicBlock, "shortcut": ZeroPad, "stem_widths": (65,)},
            "Spec expects a stem of at most as many channels as the first stage has",
        ),
        ({"stem": DeepStem, "width": 1}, "Spec expects width to be at least 2 with a deep stem"),
        ({"last": Norm}, "Spec expects last NoLastNorm or LastNorm; got"),
        ({"attention": Norm}, "Spec expects attention NoAttention or SqueezeExcite or Effic"),
        ({"stage": DilatedStage}, "Spec expects stage tuple or AveragedStage or BlurredStage; got"),
        ({"stem_pool": Stem3x3}, "expects stem_pool None or AveragedStem or BlurredStem or Strid"),
        (
            {"stem": Stem3x3, "stem_pool": AveragedStem},
            "Spec expects a stem that pools with AveragedStem; got",
        ),
        (
            {"block": PreActivation, "attention": SqueezeExcite},
            "Spec expects no attention in a PreActivation; got",
        ),
        ({"stem": BareStem7x7}, "Spec expects blocks that begin with a norm after BareStem7x7"),
        ({"depths": (1,) * 60}, "Spec expects fewer stages or a smaller width"),
    ],
)
def test_spec(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        Spec(**arguments)


RESNET8 = fresnet.init(0, Spec(BasicBlock, (1, 1), width=2), num_classes=2)
POOLED = fresnet.init(0, Spec(Bottleneck, (1, 1), width=2, shortcut=PooledProjection))


@pytest.mark.parametrize(
    ("params", "output_stride", "message"),
    [
        ((), 8, "dilate expects Params(weights, stats); got a tuple"),
        (RESNET8, 2, "dilate expects output_stride to be one of [4, 8]; got 2"),
        (RESNET8, 16, "dilate expects output_stride to be one of [4, 8]; got 16"),
        (RESNET8, 8.0, "dilate expects output_stride to be one of [4, 8]; got 8.0"),
        (RESNET8, None, "dilate expects output_stride to be one of [4, 8]; got None"),
        (POOLED, 4, "dilate expects stages that do not pool; got PooledProjection"),
        (
            fresnet.init(0, Spec(BasicBlock, (1, 1), 4, stage=AveragedStage), device="meta"),
            4,
            "dilate expects stages that do not pool; got AveragedStage",
        ),
        (
            fresnet.init(0, Spec(BasicBlock, (1, 1), 4, projection=3), device="meta"),
            4,
            "dilate expects projections of 1x1; got 3x3",
        ),
    ],
)
def test_dilate(params: Any, output_stride: Any, message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.dilate(params, output_stride=output_stride)


def test_tensors_without_values_are_refused_where_values_matter(tmp_path: Path) -> None:
    """Under FakeTensorMode a step can be measured; a file of such tensors would hold nothing."""
    optimizer = fresnet.optim.sgd(0.1)
    with FakeTensorMode():
        params = fresnet.init(0, Spec(Bottleneck, (1,), width=4), num_classes=5)
        x, y = torch.empty(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
        assert fresnet.forward(params, x).shape == (2, 5)
        step = training.make_train_step(optimizer)
        assert step(training.start(params, optimizer), (x, y))[1].loss.shape == ()
        for name, call in (
            ("save", lambda: fresnet.save(params, tmp_path / "a.safetensors")),
            ("export", lambda: fresnet.export(params, tmp_path / "a.pt2")),
            ("compile_inference", lambda: fresnet.compile_inference(params, x)),
            ("quantize", lambda: fresnet.quantize(params, [x])),
            ("evaluate", lambda: training.evaluate(params, [(x, y)])),
        ):
            with pytest.raises(FresnetError, match=f"{name} expects tensors with values; got some"):
                call()
    assert list(tmp_path.iterdir()) == []
