"""What is refused is told in few words: whose it looks like, what tells so, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import timm
import torch
from assertions import assert_same
from torch import nn

import fresnet
from fresnet import FresnetError, Spec
from fresnet.network.nodes import BasicBlock, NoHead
from fresnet.weights import formats, hub

PARAMS = fresnet.init(0, Spec(BasicBlock, (1, 1, 1, 1), width=4), num_classes=3)
STATE: dict[str, Any] = fresnet.to_state_dict(PARAMS)
THEIRS: dict[str, Any] = fresnet.to_state_dict(PARAMS, "huggingface")


def refusal(state: Any, **kwargs: Any) -> str:
    """What `from_state_dict` says, in ten lines of a terminal at most."""
    with pytest.raises(FresnetError) as caught:
        fresnet.from_state_dict(state, **kwargs)
    message = str(caught.value)
    lines = message.splitlines()
    assert len(lines) <= 10
    assert len(message) <= 1000
    assert len(lines) == 1 or max(map(len, lines)) <= 105
    return message


def of_timm(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        state: dict[str, Any] = timm.create_model(name).state_dict()
    return state


def of_torchvision(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        state: dict[str, Any] = reference.torchvision.models.get_model(name).state_dict()
    return state


def with_entries(*names: str) -> dict[str, Any]:
    return {**STATE, **{name: torch.zeros(4) for name in names}}


FAMILIES: dict[str, tuple[str, Callable[[str], dict[str, Any]], str]] = {
    name: (family, make, entry)
    for name, family, make, entry in (
        (
            "skresnet18",
            "a ResNet with selective kernels",
            of_timm,
            "layer1.0.conv1.paths.0.conv.weight",
        ),
        ("resnest14d", "a ResNeSt", of_timm, "layer1.0.conv2.bn0.weight"),
        ("res2net50_26w_4s", "a Res2Net", of_timm, "layer1.0.convs.0.weight"),
        ("resnetv2_50d_frn", "a ResNet V2 with FRN or EvoNorm", of_timm, "norm1.tau"),
        ("resnetv2_50d_evos", "a ResNet V2 with FRN or EvoNorm", of_timm, "norm1.v"),
        ("legacy_seresnet18", "a SENet under the names of", of_timm, "layer1.0.se_module.fc1"),
        ("hrnet_w18_small", "an HRNet", of_timm, "stage2.0.fuse_layers.0.1.0.weight"),
        ("resnet50_clip", "a network of timm's byobnet", of_timm, "conv2_kxk.conv.weight"),
        ("test_vit", "a vision transformer (ViT)", of_timm, "  cls_token: float32 (1, 1, "),
        ("vit_b_16", "a vision transformer (ViT)", of_torchvision, "  class_token: float32"),
        ("swin_tiny_patch4_window7_224", "a Swin transformer", of_timm, "relative_position_bias"),
        ("convnext_atto", "a ConvNeXt", of_timm, "stages.0.blocks.0.gamma"),
        ("convnext_tiny", "a ConvNeXt", of_torchvision, "features.1.0.layer_scale"),
        ("efficientnet_b0", "an EfficientNet or a MobileNet", of_timm, "conv_stem.weight"),
        ("mobilenet_v2", "an EfficientNet or a MobileNet", of_torchvision, "features.1.conv.0.0"),
        ("regnetx_002", "a RegNet", of_timm, "s1.b1.conv1.conv.weight"),
        ("densenet121", "a DenseNet", of_torchvision, "features.denseblock1.denselayer1.norm1"),
        ("vgg11", "a VGG or an AlexNet", of_torchvision, "features.0.weight"),
        ("squeezenet1_0", "a SqueezeNet", of_torchvision, "features.3.squeeze.weight"),
        ("shufflenet_v2_x0_5", "a ShuffleNet", of_torchvision, "stage2.0.branch1.0.weight"),
        ("r3d_18", "a network for videos", of_torchvision, "float32 (64, 3, 3, 7, 7)"),
    )
}
SLOW = {"vit_b_16", "swin_tiny_patch4_window7_224", "convnext_tiny", "res2net50_26w_4s"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES]
)
def test_other_families_are_named_with_entries_that_tell(name: str) -> None:
    family, make, entry = FAMILIES[name]
    state = make(name)
    for wrapped in (state, {"epoch": 3, "state_dict": state}):
        message = refusal(wrapped)
        assert message.startswith(f"from_state_dict expects a ResNet; got what looks like {family}")
        assert entry in message
        assert "load it with the library that it comes from" in message


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        (
            "CLIP's ResNet",
            [
                "conv2.weight",
                "conv3.weight",
                "attnpool.positional_embedding",
                "attnpool.q_proj.bias",
            ],
        ),
        ("a quantized network", ["conv1.zero_point", "fc._packed_params.dtype"]),
        ("an IResNet for faces", ["layer1.0.prelu.weight", "layer2.0.prelu.weight"]),
        ("a vision transformer", ["cls_token", "blocks.0.attn.qkv.weight"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_a_resnet_with_entries_of_another_family(
    family: str, entries: list[str], prefix: str
) -> None:
    state = {f"{prefix}{name}": value for name, value in with_entries(*entries).items()}
    message = refusal(state)
    assert f"got what looks like {family}" in message
    assert f"{entries[-1]}: float32 (4,)" in message
    assert "pass the entries of the ResNet alone" in message


def test_one_entry_tells_of_no_family() -> None:
    assert "\n  cls_token is unexpected: got float32 (4,)" in refusal(with_entries("cls_token"))


def test_other_families_that_stand_elsewhere_hinder_nothing() -> None:
    """A ResNet within a larger model loads, and a fault of its own is told as such."""
    detr = {f"backbone.0.body.{name}": value for name, value in STATE.items()}
    detr["transformer.encoder.layers.0.self_attention.weight"] = torch.zeros(4)
    with pytest.warns(UserWarning, match=r"left out: transformer.encoder.layers.0.self_attention"):
        assert_same(fresnet.from_state_dict(detr), PARAMS)
    del detr["backbone.0.body.bn1.bias"]
    with pytest.warns(UserWarning, match="left out"):
        assert "\n  bn1.bias is missing: expected float (4,)" in refusal(detr)


def test_a_tensor_of_five_dimensions_is_told_by_its_shape() -> None:
    """As in I3D, whose names may be a ResNet's."""
    state = {name: value[:, :, None] if value.ndim == 4 else value for name, value in STATE.items()}
    message = refusal(state)
    assert "got what looks like a network for videos" in message
    assert "  conv1.weight: float32 (4, 3, 1, 7, 7)" in message


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", ["torchvision", "huggingface"])
def test_a_network_without_a_stage_in_between(layout: str, prefix: str) -> None:
    state = fresnet.to_state_dict(PARAMS, layout)
    place, name = {
        "torchvision": ("layer3.", "layer3.0.conv1.weight"),
        "huggingface": ("stages.2.", "resnet.encoder.stages.2.layers.0.layer.0.convolution.weight"),
    }[layout]
    missing = {f"{prefix}{n}": value for n, value in state.items() if place not in n}
    assert refusal(missing) == (
        f"from_state_dict expects every stage of a network; got the last without {name}"
    )


def test_halves_of_a_network() -> None:
    names = [name for name in STATE if "num_batches" not in name]
    first, last = (dict.fromkeys(part) for part in (names[:30], names[30:]))
    assert "layer3.0.conv1.weight" in last
    for prefix in ("", "module.encoder."):
        half = {f"{prefix}{name}": STATE[name] for name in last}
        assert refusal(half).endswith(
            "the last without layer1.0.conv1.weight and layer2.0.conv1.weight"
        )
    whole = fresnet.to_state_dict(fresnet.init(0, fresnet.RESNET18, num_classes=0))
    half = {n: v for n, v in whole.items() if not n.startswith(("layer3.", "layer4."))}
    with pytest.warns(UserWarning, match="entries of 2 stages and of no head"):
        params = fresnet.from_state_dict(half)
    assert len(params.weights.stages) == 2
    assert "expects stages of (2, 2, 2, 2)" in refusal(
        {name: STATE[name] for name in first}, architecture="resnet18"
    )
    ends = {n: v for n, v in STATE.items() if not n.startswith(("layer3.", "layer4."))}
    assert "fc.weight: a head on activations (0, 8) expects a weight [k 8]" in refusal(ends)


def test_names_of_two_libraries() -> None:
    behind = refusal({**STATE, **THEIRS})
    assert "one network; got entries behind no name and 'resnet.': pass those of one" in behind
    bare = {name.removeprefix("resnet."): value for name, value in THEIRS.items()}
    assert "expects the names of one library; got two entries that are conv1.weight, one" in (
        refusal({**{n: v for n, v in STATE.items() if "fc" not in n}, **bare})
    )


@pytest.mark.parametrize("empty", [{}, {"state_dict": {}}])
def test_nothing_is_no_network(empty: Any) -> None:
    assert "expects the names of torchvision, timm or Hugging Face" in refusal(empty)


def test_an_architecture_of_other_sizes() -> None:
    for architecture, message in (
        ("resnet18", r"expects stages of (2, 2, 2, 2), as architecture says; got entries of (1, 1"),
        ("resnet50", r"expects stages of (3, 4, 6, 3)"),
    ):
        assert message in refusal(STATE, architecture=architecture)
    params = fresnet.init(0, Spec(BasicBlock, (2, 2, 2, 2), width=4), num_classes=3)
    assert "expects conv1.weight to be (64, 3, 7, 7), as architecture says" in refusal(
        fresnet.to_state_dict(params), architecture="resnet18"
    )
    assert "expects blocks BasicBlock" in refusal(
        fresnet.to_state_dict(fresnet.init(0, Spec(depths=(2, 2, 2, 2), width=4))),
        architecture="resnet18",
    )


def test_the_encoder_of_a_detection_model_loads_and_what_else_there_is_is_told() -> None:
    with torch.device("meta"):
        model = reference.torchvision.models.detection.retinanet_resnet50_fpn(weights_backbone=None)
    with pytest.warns(UserWarning, match=r"left out: backbone.fpn.inner_blocks.0.0.* no head"):
        params = fresnet.from_state_dict(model.state_dict())
    assert isinstance(params.weights.head, NoHead)
    assert params.weights.stem.layer.conv.shape[0] == 64


CONTENTS = {
    "resnet50.caffemodel": b"\x0a\x08ResNet-50",
    "resnet50.h5": b"\x89HDF\r\n\x1a\n" + bytes(8),
    "resnet50.keras": b"PK\x05\x06" + bytes(18),
    "model.ckpt.index": bytes(16),
    "flax_model.msgpack": b"\x81\xa6params\x80" + bytes(8),
    "resnet50.onnx": b"\x08\x08\x12\x07pytorch",
    "R-50.pkl": b"\x80\x04}\x94.",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_of_other_frameworks_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    paths = [tmp_path / name, tmp_path]
    if name.endswith(".index"):
        paths.append(tmp_path / "model.ckpt")
    for path in paths:
        with pytest.raises(FresnetError) as caught:
            fresnet.load(path)
        message = str(caught.value)
        writer, reader = formats.FORMATS[name[name.index(".") :]]
        assert (
            f"{name} is a file of {writer}, which fresnet does not read. {reader} gives" in message
        )
        assert "save them by torch.save" in message


def test_arrays_of_numpy_and_a_saved_model_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "BiT-M-R50x1.npz", conv=np.zeros(3))
    with pytest.raises(FresnetError, match=r"BiT-M-R50x1.npz is a file of NumPy.*timm.create_mode"):
        fresnet.load(tmp_path / "BiT-M-R50x1.npz")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(FresnetError, match=r"saved_model.pb is a file of TensorFlow"):
        fresnet.load(tmp_path / "saved")


def test_a_name_alone_refuses_nothing(tmp_path: Path) -> None:
    """What `torch.save` wrote is read, whatever its name, and so is a folder that has it too."""
    torch.save(STATE, tmp_path / "net.pkl")
    assert_same(fresnet.load(tmp_path / "net.pkl"), PARAMS)
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "tf_model.h5").write_bytes(CONTENTS["resnet50.h5"])
    assert_same(fresnet.load(tmp_path), PARAMS)
    torch.save({**STATE, "fc.bias": torch.zeros(2)}, tmp_path / "net.h5")
    with pytest.raises(FresnetError, match=r"fc.bias: expected float"):
        fresnet.load(tmp_path / "net.h5")
    with pytest.raises(FresnetError, match="No such file"):
        fresnet.load(tmp_path / "nothing.onnx")
    assert not hub.is_repository("models/resnet50.onnx")


def test_what_is_nobodys_is_named_as_it_came() -> None:
    """Lists of layers and stems are a ResNet's only beside blocks of a ResNet."""
    children = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 4))).state_dict()
    assert refusal(children).endswith("got 4 entries: 0.weight, 0.bias, 1.0.weight and 1 more")
    stem = {"stem.0.weight": torch.zeros(4), "stem.7.bias": torch.zeros(4)}
    assert refusal(stem).endswith("got 2 entries: stem.0.weight and stem.7.bias")
