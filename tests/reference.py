"""torchvision's ResNets: the truth that most tests compare with."""

import sys
from typing import Any

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

every_member = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("resnet18", "resnet50") else [pytest.mark.slow])
        for name in fresnet.SPECS
    ],
)
"""The five networks, one of each kind of block in the development loop."""


def module(
    spec: fresnet.Spec,
    seed: int,
    num_classes: int = 10,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> ResNet:
    """torchvision's network of this spec, its norms far from where they start."""
    block = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[spec.block.__name__]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(block, list(spec.depths), num_classes=num_classes, **kwargs)
        model.apply(_perturb)
    return model.to(dtype).to(memory_format=torch.channels_last)


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
    """The outputs of stem (pooled) and stages."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    outputs = [x]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        outputs.append(x := stage(x))
    return tuple(outputs)


def params(model: ResNet) -> fresnet.Params:
    return fresnet.from_state_dict(model.state_dict())


def gradients(model: ResNet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


__all__ = ["ResNet", "activations", "every_member", "gradients", "module", "params", "torchvision"]
