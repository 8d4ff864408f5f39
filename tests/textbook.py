"""A bottleneck or basic network written out as in the papers: no fused kernels, no fresnet.

It is slow, and right under every derivative. It is the truth for transforms that torchvision's
modules lack.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, relu

EPS = 1e-5


def normalise(x: Tensor, norm: Any, stats: Any, train: bool) -> Tensor:
    """Ioffe & Szegedy 2015, Alg. 1 in training, Alg. 2 in inference."""
    mean, var = stats.mean, stats.var
    if train:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + EPS)
    normalised: Tensor = y * norm.scale[:, None, None] + norm.bias[:, None, None]
    return normalised


def logits(params: Any, x: Tensor, train: bool) -> Tensor:
    """He et al. 2015, Table 1, with the stride of a bottleneck in its 3x3 convolution.

    If blocks begin with a norm, the network is that of He et al. 2016.
    """
    weights, stats = params
    v2 = hasattr(weights.stages[0][0], "before")
    x = conv2d(x, weights.stem.layer.conv, stride=2, padding=3)
    if not v2:
        x = relu(normalise(x, weights.stem.layer.norm, stats.stem.layer, train))
    x = max_pool2d(x, 3, 2, 1)
    for stage, (blocks, blocks_stats) in enumerate(zip(weights.stages, stats.stages, strict=True)):
        for i, (w, s) in enumerate(zip(blocks, blocks_stats, strict=True)):
            stride = 2 if stage > 0 and i == 0 else 1
            x = (preactivated if v2 else block)(w, s, x, stride, train)
    if v2:
        x = relu(normalise(x, weights.last.normed.norm, stats.last.normed, train))
    result: Tensor = x.mean((2, 3)) @ weights.head.weight.T + weights.head.bias
    return result


def block(w: Any, s: Any, x: Tensor, stride: int, train: bool) -> Tensor:
    """He et al. 2015, Fig. 5, with squeeze and excitation if the block has them."""
    wide = hasattr(w, "layer3")
    y = conv2d(x, w.layer1.conv, stride=1 if wide else stride, padding=0 if wide else 1)
    y = relu(normalise(y, w.layer1.norm, s.layer1, train))
    y = conv2d(y, w.layer2.conv, stride=stride if wide else 1, padding=1)
    y = normalise(y, w.layer2.norm, s.layer2, train)
    if wide:
        y = normalise(conv2d(relu(y), w.layer3.conv), w.layer3.norm, s.layer3, train)
    if len(w.attention):
        y = y * gates(w.attention, y)
    if len(w.shortcut):
        x = conv2d(x, w.shortcut.layer.conv, stride=stride)
        x = normalise(x, w.shortcut.layer.norm, s.shortcut.layer, train)
    return relu(y + x)


def gates(w: Any, y: Tensor) -> Tensor:
    """Hu et al. 2018, Eq. 2 and 3."""
    means = y.mean((2, 3))
    (squeeze, (squeeze_bias,)), (excite, (excite_bias,)) = w
    z = relu(means @ squeeze[:, :, 0, 0].T + squeeze_bias)
    return torch.sigmoid(z @ excite[:, :, 0, 0].T + excite_bias)[:, :, None, None]


def preactivated(w: Any, s: Any, x: Tensor, stride: int, train: bool) -> Tensor:
    """He et al. 2016, Fig. 4e."""
    active = relu(normalise(x, w.before.norm, s.before, train))
    y = relu(normalise(conv2d(active, w.layer1.conv), w.layer1.norm, s.layer1, train))
    y = conv2d(y, w.layer2.conv, stride=stride, padding=1)
    y = conv2d(relu(normalise(y, w.layer2.norm, s.layer2, train)), w.layer3.conv)
    if len(w.shortcut):
        x = conv2d(active, w.shortcut.layer.conv, stride=stride)
    return y + x
