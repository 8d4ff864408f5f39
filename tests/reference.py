"""torchvision's ResNets, the truth that most tests compare with."""

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

try:
    import torchvision
except RuntimeError:
    # torchvision's wheel is built for CUDA; beside a CPU-only torch its operators are missing.
    # Their schemas are enough to import it, and the ResNets use none of them.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fresnet
from fresnet import nodes
from fresnet.network.nodes import POOLED_STEMS, attention_of, kinds
from fresnet.weights.untold import UNTOLD

Module = TypeVar("Module", bound=nn.Module)

PAPERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
GROUPED = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
WIDE = ("wide_resnet50_2", "wide_resnet101_2")
TORCHVISION = (*PAPERS, *GROUPED, *WIDE)
"""The members that torchvision has."""

every_member = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name not in ("resnet18", "resnet50"))
            + [pytest.mark.long] * (name in ("resnet101", "resnet152")),
        )
        for name in PAPERS
    ],
)
"""The paper's five for ImageNet, one of each kind of block in the development loop."""


def module(
    spec: fresnet.Spec,
    seed: int,
    num_classes: int = 10,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> ResNet:
    """torchvision's network of this spec, with norms far from where they start."""
    block = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[spec.block.__name__]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(
            block,
            list(spec.depths),
            num_classes=num_classes,
            groups=spec.groups,
            width_per_group=spec.group_width,
            **kwargs,
        )
    return perturbed(model, seed, dtype)


def v1(model: ResNet) -> ResNet:
    """torchvision's network with the stride of bottlenecks moved to their first convolution."""
    for layer in model.modules():
        if isinstance(layer, Bottleneck):
            layer.conv1.stride, layer.conv2.stride = layer.conv2.stride, (1, 1)
    return model


class Cifar(ResNet):  # type: ignore[misc]
    """The paper's Sec. 4.2, made of torchvision's blocks: option "A", option "B" or "plain"."""

    def __init__(self, depths: Sequence[int], option: str, width: int, num_classes: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        del self.layer1, self.layer2, self.layer3, self.layer4
        self.stages, channels = [], width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride, wider = (2 if stage > 0 and i == 0 else 1), width << stage
                shortcut = None
                if stride == 2:
                    projection = (
                        nn.Conv2d(channels, wider, 1, 2, bias=False),
                        nn.BatchNorm2d(wider),
                    )
                    shortcut = nn.Sequential(*projection) if option == "B" else OptionA()
                kind = PlainBlock if option == "plain" else BasicBlock
                blocks.append(kind(channels, wider, stride, shortcut))
                channels = wider
            self.stages.append(nn.Sequential(*blocks))
            self.add_module(f"layer{stage + 1}", self.stages[-1])
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class Narrow(ResNet):  # type: ignore[misc]
    """torchvision's network, an eighth as wide."""

    def __init__(self, block: Any, depths: Sequence[int], num_classes: int, **kwargs: Any) -> None:
        super().__init__(block, depths, num_classes, **kwargs)
        self.conv1 = nn.Conv2d(3, 8, 7, 2, padding=3, bias=False)
        self.bn1 = self._norm_layer(8)
        self.fc = nn.Linear(64 * block.expansion, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 8
        stage: nn.Sequential = super()._make_layer(block, planes // 8, *args, **kwargs)
        return stage


class OptionA(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """x at every second place, with as many channels of zeros beside its own."""
        x = nn.functional.max_pool2d(x, 1, 2)
        return torch.cat([x, torch.zeros_like(x)], 1)


class PlainBlock(BasicBlock):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        relu: Tensor = self.relu(y)
        return relu


def perturbed(model: Module, seed: int, dtype: torch.dtype = torch.float64) -> Module:
    """The same network, channels last, with norms far from where they start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.apply(_perturb)
    model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _perturb(layer: nn.Module) -> None:
    if isinstance(layer, nn.BatchNorm2d):
        nn.init.uniform_(layer.weight, -1.0, 1.5)
        nn.init.normal_(layer.bias, std=0.5)
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        nn.init.normal_(mean, std=2.0)
        nn.init.uniform_(var, 0.3, 5.0)


def activations(model: ResNet, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the stem (pooled) and of the stages."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    outputs = [x]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        outputs.append(x := stage(x))
    return tuple(outputs)


def params(model: nn.Module) -> fresnet.Params:
    return fresnet.from_state_dict(model.state_dict())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


__all__ = [
    "GROUPED",
    "PAPERS",
    "TORCHVISION",
    "WIDE",
    "BasicBlock",
    "Bottleneck",
    "Cifar",
    "Narrow",
    "ResNet",
    "activations",
    "every_member",
    "gradients",
    "module",
    "params",
    "perturbed",
    "torchvision",
    "v1",
]


def architecture(params: fresnet.Params) -> fresnet.Spec | None:
    """What the names of a network's entries do not tell, if there is anything."""
    weights = params.weights
    stages = [nodes.blocks_of(stage) for stage in weights.stages]
    pool = type(weights.stem) if isinstance(weights.stem, POOLED_STEMS) else None
    if kinds(weights).isdisjoint((*UNTOLD, nodes.GroupNorm)):
        return None
    shortcuts = [type(block.shortcut) for stage in stages for block in stage]
    changing = [kind for kind in shortcuts if kind is not nodes.Identity]
    return fresnet.Spec(
        type(stages[0][0]),
        tuple(map(len, stages)),
        shortcut=changing[0] if changing else nodes.Projection,
        stem=type(weights.stem.stem if pool else weights.stem),
        attention=type(attention_of(stages[0][0])),
        last=type(weights.last),
        stage=type(weights.stages[-1]) if len(stages) > 1 else tuple,
        stem_pool=pool,
        layer=type(stages[0][0].layer1),
        norm=nodes.GroupNorm if nodes.GroupNorm in kinds(weights) else nodes.Norm,
    )
