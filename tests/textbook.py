"""A bottleneck or basic network written out as in the papers: no fused kernels, no fresnet.

It is slow, and right under every derivative. It is the truth for transforms that torchvision's
modules lack.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv1d, conv2d, max_pool2d, pad, relu

EPS = 1e-5


def normalise(x: Tensor, norm: Any, stats: Any, train: bool) -> Tensor:
    """Ioffe & Szegedy 2015, Alg. 1 in training, Alg. 2 in inference; or Wu & He 2018, Eq. 7."""
    if norm.scale.ndim == 2:
        groups = x.unflatten(1, norm.scale.shape)
        mean = groups.mean((2, 3, 4), keepdim=True)
        var = ((groups - mean) ** 2).mean((2, 3, 4), keepdim=True)
        y = ((groups - mean) / torch.sqrt(var + EPS)).flatten(1, 2)
        scale, bias = (leaf.flatten()[:, None, None] for leaf in norm)
        grouped: Tensor = y * scale + bias
        return grouped
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
    stem = getattr(weights.stem, "stem", weights.stem)
    x = conv2d(x, kernel(stem.layer), stride=2, padding=3)
    if not v2:
        stem_stats = getattr(stats.stem, "stem", stats.stem)
        x = relu(normalise(x, stem.layer.norm, stem_stats.layer, train))
    match type(weights.stem).__name__:
        case "FramedStem7x7":
            x = max_pool2d(pad(x, (1, 1, 1, 1)), 3, 2)
        case "AveragedStem":
            x = avg_pool2d(x, 2)
        case "BlurredStem":
            x = blur(max_pool2d(x, 3, 1, 1))
        case _:
            x = max_pool2d(x, 3, 2, 1)
    for stage, (node, node_stats) in enumerate(zip(weights.stages, stats.stages, strict=True)):
        pool = {"AveragedStage": avg_pool, "BlurredStage": blur}.get(type(node).__name__)
        blocks, blocks_stats = (getattr(one, "blocks", one) for one in (node, node_stats))
        for i, (w, s) in enumerate(zip(blocks, blocks_stats, strict=True)):
            stride = 2 if stage > 0 and i == 0 else 1
            w, keep = w if type(w).__name__ == "DropPath" else (w, x.new_ones(len(x)))
            if v2:
                y, x = preactivated(w, s, x, stride, train)
                x = y * keep[:, None, None, None] + x
            else:
                y, x = block(w, s, x, stride, train, pool if stride == 2 else None)
                x = relu(y * keep[:, None, None, None] + x)
    if v2:
        x = relu(normalise(x, weights.last.normed.norm, stats.last.normed, train))
    means = x.mean((2, 3))
    head, keep = weights.head if type(weights.head).__name__ == "Dropout" else (weights.head, 1)
    result: Tensor = (means * keep) @ head.weight.T + head.bias
    return result


def kernel(layer: Any) -> Tensor:
    """Qiao et al. 2019, Sec. 3, where weights are standardised."""
    weight: Tensor = layer.conv
    if type(layer).__name__ != "StandardisedLayer":
        return weight
    mean = weight.mean((1, 2, 3), keepdim=True)
    var = ((weight - mean) ** 2).mean((1, 2, 3), keepdim=True)
    return (weight - mean) / torch.sqrt(var + 1e-8)


def avg_pool(x: Tensor) -> Tensor:
    return avg_pool2d(x, 2)


def blur(x: Tensor) -> Tensor:
    """Zhang 2019, Sec. 3.3: a binomial kernel over maps reflected at their edges."""
    side = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype)
    weight = (side[:, None] * side).expand(x.shape[1], 1, 3, 3)
    return conv2d(pad(x, (1, 1, 1, 1), "reflect"), weight, stride=2, groups=x.shape[1])


def block(
    w: Any, s: Any, x: Tensor, stride: int, train: bool, pool: Any = None
) -> tuple[Tensor, Tensor]:
    """He et al. 2015, Fig. 5, with attention if the block has any, and what pools, not strides.

    These are branch and shortcut, before their sum.
    """
    wide = hasattr(w, "layer3")
    of_3x3 = 1 if pool else stride
    y = conv2d(x, kernel(w.layer1), stride=1 if wide else of_3x3, padding=0 if wide else 1)
    y = relu(normalise(y, w.layer1.norm, s.layer1, train))
    y = pool(y) if pool and not wide else y
    y = conv2d(y, kernel(w.layer2), stride=of_3x3 if wide else 1, padding=1)
    y = normalise(y, w.layer2.norm, s.layer2, train)
    if wide:
        y = pool(relu(y)) if pool else relu(y)
        y = normalise(conv2d(y, kernel(w.layer3)), w.layer3.norm, s.layer3, train)
    if len(w.attention):
        y = y * gates(w.attention, y)
    if len(w.shortcut):
        x = conv2d(x, kernel(w.shortcut.layer), stride=stride)
        x = normalise(x, w.shortcut.layer.norm, s.shortcut.layer, train)
    return y, x


def gates(w: Any, y: Tensor) -> Tensor:
    """Hu et al. 2018, Eq. 2 and 3, or Wang et al. 2020, Sec. 3.2."""
    means = y.mean((2, 3))
    if hasattr(w, "along"):
        row = w.along.conv[0]
        return torch.sigmoid(conv1d(means[:, None], row, padding="same"))[:, 0, :, None, None]
    (squeeze, (squeeze_bias,)), (excite, (excite_bias,)) = w
    z = relu(means @ squeeze[:, :, 0, 0].T + squeeze_bias)
    return torch.sigmoid(z @ excite[:, :, 0, 0].T + excite_bias)[:, :, None, None]


def preactivated(w: Any, s: Any, x: Tensor, stride: int, train: bool) -> tuple[Tensor, Tensor]:
    """He et al. 2016, Fig. 4e: branch and shortcut, before their sum."""
    active = relu(normalise(x, w.before.norm, s.before, train))
    y = relu(normalise(conv2d(active, kernel(w.layer1)), w.layer1.norm, s.layer1, train))
    y = conv2d(y, kernel(w.layer2), stride=stride, padding=1)
    y = conv2d(relu(normalise(y, w.layer2.norm, s.layer2, train)), kernel(w.layer3))
    if len(w.shortcut):
        x = conv2d(active, kernel(w.shortcut.layer), stride=stride)
    return y, x
