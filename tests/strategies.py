"""Every Hypothesis strategy of the suite."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import fresnet
from fresnet import Spec
from fresnet.data import Order, steps_per_epoch
from fresnet.network.check import DTYPES
from fresnet.network.nodes import (
    BARE_STEMS,
    BLOCKS,
    LASTS,
    PLACES,
    POOLED,
    POOLED_STEMS,
    PREACTIVATIONS,
    SHORTCUTS,
    STEMS,
    BasicBlock,
    Bottleneck,
    Geometry,
    GroupNorm,
    Identity,
    Layer,
    NoAttention,
    Norm,
    PooledProjection,
    PreActivationBasic,
    Projection,
    SqueezeExcite,
    StandardisedLayer,
)
from fresnet.training import TrainState, start

LOOP = "FRESNET_DEVELOPMENT_LOOP"
"""The environment variable by which `make test-fast` asks for fewer examples."""


def examples(count: int) -> settings:
    """Run this many examples, however long each takes; in the development loop, a quarter of them.

    A failing example is reported as it was drawn. Shrinking would build hundreds of networks, and
    each failure on the way would keep its network alive.
    """
    return settings(
        max_examples=-(-count // (4 if os.environ.get(LOOP) else 1)),
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


seeds = st.integers(0, 2**32 - 1)
class_counts = st.integers(1, 40)
sides = st.integers(1, 67)
batch_sizes = st.integers(1, 4)


@st.composite
def images(
    draw: st.DrawFn,
    *,
    batch: st.SearchStrategy[int] = batch_sizes,
    side: st.SearchStrategy[int] = sides,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Batches `[b 3 h w]`, seldom square, in either memory format."""
    shape = (draw(batch), 3, draw(side), draw(side))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(shape, generator=generator, dtype=dtype)
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return x.contiguous(memory_format=layout)


def training_images(dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Batches with several values per channel at every norm, as training needs."""
    return images(batch=st.integers(2, 4), side=st.integers(33, 57), dtype=dtype)


class Convolution(NamedTuple):
    """Several x, each `[b c h w]`, as many weights, each `[o c/groups k k]`, and their geometry."""

    x: Tensor
    weight: Tensor
    geometry: Geometry


@st.composite
def convolutions(
    draw: st.DrawFn, sizes: Sequence[tuple[int, int]] = ((3, 4), (9, 8), (40, 18))
) -> Convolution:
    """One to three convolutions. Maps may be smaller than the kernel, or have many positions.

    They are in either memory format, and have any stride that `Tensor.unsqueeze` gives a batch of
    one.
    """
    groups, k = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 3, 7]))
    geometry = Geometry(draw(st.integers(1, 2)), draw(st.integers(1, 2)), groups)
    count, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size = draw(st.sampled_from(sizes))
    generator = torch.Generator().manual_seed(draw(seeds))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    x, weight = (
        torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, inputs, *size), (outputs, inputs // groups, k, k))
    )
    if draw(st.booleans()):
        x, weight = (v.movedim(2, 4).contiguous().movedim(4, 2) for v in (x, weight))
        x = x.squeeze(1).unsqueeze(1) if batch == 1 else x
    return Convolution(x, weight, geometry)


def labels(x: Tensor, classes: int) -> Tensor:
    return torch.arange(len(x)) * 7 % classes


def targets(params: fresnet.Params, x: Tensor) -> Tensor:
    """A class for each image. Where there is no head, features pass for logits."""
    return labels(x, fresnet.forward(params, x).shape[1])


groupings = st.sampled_from([(1, 64), (2, 32), (4, 32), (32, 4), (1, 128)])
"""A bottleneck's groups, and a group's channels for each 64 of the stage: plain, ResNeXt, wide."""


@st.composite
def small_specs(draw: st.DrawFn, block: type | None = None) -> Spec:
    """Architectures that torchvision has too, with its stem, width and shortcuts."""
    block = block or draw(st.sampled_from([BasicBlock, Bottleneck]))
    groups, group_width = draw(groupings) if block is Bottleneck else (1, 64)
    depths = draw(st.tuples(*[st.integers(1, 2)] * 4))
    return Spec(block, depths, groups=groups, group_width=group_width)


@st.composite
def tiny_specs(draw: st.DrawFn, attention: bool = True, grouped: bool = True) -> Spec:
    """Architectures of every node type and any number of stages, but with few channels.

    They are for laws that need no reference. Some have norms in groups, which have no statistics.
    Their widths are such that a group has three channels or more: in a group of one value rounding
    alone would remain, many times as large after each norm.
    """
    norm = draw(st.sampled_from([Norm, Norm, GroupNorm] if grouped else [Norm]))
    block = draw(st.sampled_from(BLOCKS))
    stems: list[Any] = [kind for kind in STEMS if kind not in (*POOLED_STEMS, *BARE_STEMS)]
    stem = draw(st.sampled_from([*stems, *BARE_STEMS] if block in PREACTIVATIONS else stems))
    pools = [None, None, *(kind for kind in POOLED_STEMS if stem in PLACES[kind]["stem"])]
    attentions = PLACES[block].get("attention", ()) if attention else ()
    width = 6 if norm is GroupNorm else 2 * draw(st.integers(1, 3))
    fits = groupings.filter(lambda grouping: grouping[1] * width % 64 == 0)
    basic = block in (BasicBlock, PreActivationBasic)
    groups, group_width = (1, 64) if basic else draw(fits)
    narrows = not basic and group_width * width % 128 == 0
    shortcut = draw(st.sampled_from([kind for kind in SHORTCUTS if kind is not Identity]))
    attention_type = draw(st.sampled_from(attentions or (NoAttention,)))
    least = width if norm is GroupNorm else 1
    widths = st.tuples(*[st.integers(least, width)] * len(stem._fields))
    return Spec(
        block,
        tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=4))),
        width,
        stem=stem,
        stem_widths=draw(st.just(()) | widths),
        shortcut=shortcut,
        projection=draw(st.sampled_from([1, 1, 3])) if shortcut is Projection else 1,
        narrowing=draw(st.sampled_from([1, 2])) if narrows else 1,
        last=draw(st.sampled_from(LASTS)),
        attention=attention_type,
        reduction=draw(st.sampled_from([16, 1])) if attention_type is SqueezeExcite else 16,
        groups=groups,
        group_width=group_width,
        stage=draw(st.sampled_from([tuple, tuple, *POOLED])),
        stem_pool=draw(st.sampled_from(pools)),
        layer=draw(st.sampled_from([Layer, Layer, StandardisedLayer])),
        norm=norm,
    )


@st.composite
def tiny_params(
    draw: st.DrawFn,
    dilated: bool = True,
    attention: bool = True,
    grouped: bool = True,
    headed: bool = False,
) -> fresnet.Params:
    """Networks of `tiny_specs` in float64, with every leaf away from where `init` puts it.

    Some have stages that dilate instead of striding. One in four has no head, unless all are to be
    headed.
    """
    generator = torch.Generator().manual_seed(draw(seeds))
    spec = draw(tiny_specs(attention, grouped))
    has_head = headed or draw(st.integers(0, 3)) > 0
    classes = draw(class_counts) if has_head else 0
    params = fresnet.init(generator, spec, num_classes=classes, dtype=torch.float64)
    pools = spec.shortcut is PooledProjection or spec.stage in POOLED
    if dilated and not pools and spec.projection == 1 and draw(st.booleans()):
        strides = [spec.stem.stride() << stage for stage in range(len(spec.depths))]
        params = fresnet.dilate(params, output_stride=draw(st.sampled_from(strides)))

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    return fresnet.Params(
        weights=fresnet.tree.map(lambda w: w + 0.1 * noise(w), params.weights),
        # A mean starts at 0 and a variance at 1. Means have either sign, or ReLU would make all 0.
        stats=fresnet.tree.map(
            lambda s: 0.3 * noise(s) * (1 - s) + s * (0.5 + noise(s).abs()), params.stats
        ),
    )


@st.composite
def train_states(draw: st.DrawFn, params: fresnet.Params | None = None) -> TrainState:
    """States of tiny networks, with every leaf away from where `start` puts it.

    Some have frozen norms, and some have an average.
    """
    params = draw(tiny_params(headed=True)) if params is None else params
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    params = fresnet.tree.map(lambda leaf: leaf.to(dtype), params)
    if draw(st.booleans()) and fresnet.tree.leaves(params.stats):
        params = fresnet.freeze(params, lambda path: path[-2] == "layer1")
    optimizer = draw(st.sampled_from(OPTIMIZERS))
    state = start(params, optimizer, seed=draw(seeds), average=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(seeds))

    def moved(leaf: Tensor) -> Tensor:
        return leaf * (1 + torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype))

    moments = fresnet.tree.map(lambda leaf: moved(leaf + 1), state.optimizer.moments)
    return state._replace(
        step=torch.tensor(draw(st.integers(0, 2**63 - 1))),
        optimizer=state.optimizer._replace(step=state.optimizer.step + 7, moments=moments),
        average=fresnet.tree.map(moved, state.average),
        position=torch.tensor(draw(st.integers(0, 2**63 - 1))),
    )


OPTIMIZERS = (
    fresnet.optim.sgd(0.1),
    fresnet.optim.sgd(0.1, momentum=0.9),
    fresnet.optim.adamw(0.1),
    fresnet.optim.lamb(0.1),
    fresnet.optim.lars(0.1),
    fresnet.optim.by_path(
        {
            "stem": fresnet.optim.frozen,
            "head": fresnet.optim.adamw(0.1),
            "*": fresnet.optim.sgd(0.1, momentum=0.9),
        }
    ),
)


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """Tensors of many dtypes and any layout, with any bits, infinities and NaNs among them.

    None has gaps of more than 64 times its values, which `save_state` closes.
    """
    dtype = draw(st.sampled_from([*DTYPES, torch.int64, torch.uint8, torch.bool]))
    shape = draw(st.lists(st.integers(0, 4) | st.just(1), max_size=4))
    generator = torch.Generator().manual_seed(draw(seeds))
    size = (*(2 * n for n in shape), dtype.itemsize)
    noise = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    x = noise[..., 0] < 128 if dtype is torch.bool else noise.view(dtype)[..., 0]
    for dim, length in enumerate(shape):  # every second, the first half, or one of them repeated
        once = x.narrow(dim, 0, min(length, 1)).expand(*x.shape[:dim], length, *x.shape[dim + 1 :])
        halves = [x.unflatten(dim, (length, 2)).select(dim + 1, 0), x.narrow(dim, 0, length), once]
        x = draw(st.sampled_from(halves)) if length else x
    x = draw(st.sampled_from([x, x.contiguous()]))
    steps = [(n, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n and stride]
    last = sum((n - 1) * stride for n, stride in steps)
    x = x if last < 64 * math.prod(n for n, _ in steps) else x.contiguous()
    return x.permute(draw(st.permutations(range(len(shape)))))


class Pair(NamedTuple):
    first: Any
    second: Any


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Trees of tuples, NamedTuples, lists and dicts."""
    return st.recursive(
        leaves,
        lambda nodes: (
            st.lists(nodes, max_size=3)
            | st.lists(nodes, max_size=3).map(tuple)
            | st.builds(Pair, nodes, nodes)
            | st.dictionaries(names | st.integers(0, 9), nodes, max_size=3)
        ),
        max_leaves=8,
    )


@st.composite
def tensor_trees(draw: st.DrawFn) -> Any:
    """Trees with leaves that may share memory. Every leaf has a name of its own."""
    owners = draw(st.lists(strided(), min_size=1, max_size=3))
    views = [x.movedim(0, -1) for x in owners if x.ndim]
    drawn = draw(trees(st.sampled_from([*owners, *views, owners[0]])))
    leaf_names = [".".join(map(str, path)) for path in fresnet.tree.paths(drawn)]
    assume(len({*leaf_names}) == len(leaf_names))  # unlike those of {1: x, "1": y}
    return drawn


@st.composite
def pixels(draw: st.DrawFn, *channels: int) -> np.ndarray:
    """uint8 noise `[h w *channels]`: tiny, long and thin, or larger than a network's input."""
    short = draw(st.integers(1, 40) | st.integers(150, 300))
    size = (short, draw(st.integers(short, min(64 * short, 500))))
    rng = np.random.default_rng(draw(seeds))
    return rng.integers(0, 256, (*draw(st.sampled_from([size, size[::-1]])), *channels), np.uint8)


@st.composite
def pil_images(draw: st.DrawFn) -> Image.Image:
    """Images of every mode that files come in, except 16-bit grey."""
    mode = draw(st.sampled_from(["RGB", "L", "1", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"]))
    noise = draw(pixels(len(Image.new(mode, (1, 1)).getbands())))
    size = (noise.shape[1], noise.shape[0])
    if mode == "1":
        return Image.frombytes("L", size, noise.tobytes()).convert(mode)
    image = Image.frombytes(mode, size, noise.tobytes())
    if mode in ("P", "PA"):
        image.putpalette(np.random.default_rng(draw(seeds)).bytes(768))
    transparent: dict[str, list[Any]]
    transparent = {"P": [None, 7, bytes(range(256))], "L": [None, 7], "RGB": [None, (1, 2, 3)]}
    colour = draw(st.sampled_from(transparent.get(mode, [None])))
    if colour is not None:
        image.info["transparency"] = colour
    return image


@st.composite
def rgb_images(draw: st.DrawFn) -> Image.Image:
    """Noise of any size, or smoother images, which are noise of a few pixels enlarged."""
    noise = Image.fromarray(draw(pixels(3)))
    if draw(st.booleans()):
        return noise
    return noise.crop((0, 0, 5, 4)).resize(noise.size, Image.Resampling.BICUBIC)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Orders with batches smaller or larger than the set."""
    size = draw(st.integers(1, 200))
    return Order(size, draw(st.integers(1, 220)), draw(seeds), draw(st.integers(1, 4)))


def rank_counts(order: Order) -> st.SearchStrategy[int]:
    """Numbers of processes that all get an image of each batch."""
    return st.integers(1, min(order.size // steps_per_epoch(order), 8))


names = st.text("abB1 -.é", min_size=1, max_size=4).filter(lambda name: name.strip("."))
suffixes = st.sampled_from([".jpg", ".JPEG", ".png", ".webp", ".Tif", ".txt", ".gif", ""])


@st.composite
def image_trees(draw: st.DrawFn) -> set[str]:
    """Paths of files, with an image in each class, and others anywhere below it."""
    paths = set()
    for label in draw(st.sets(names.map("c{}".format), min_size=2, max_size=4)):
        paths.add(f"{label}/{draw(names)}.png")
        for folders in draw(st.lists(st.lists(names.map("d{}.d".format), max_size=2), max_size=4)):
            paths.add("/".join([label, *folders, draw(names) + draw(suffixes)]))
    return paths


@st.composite
def relaid(draw: st.DrawFn, params: fresnet.Params) -> fresnet.Params:
    """A network whose leaves are views of other memory: strided, transposed, expanded, overlapping.

    Expanded and overlapping leaves have other values than the network's.
    """

    def view(leaf: Tensor) -> Tensor:
        match draw(st.sampled_from(LAYOUTS)):
            case "member along the last dimension":
                return torch.stack([leaf, -leaf], -1)[..., 0]
            case "transposed":
                return leaf.transpose(0, -1).contiguous().transpose(0, -1)
            case "every second":
                return torch.stack([leaf, -leaf], 1).flatten(0, 1)[::2]
            case "expanded":
                return leaf.mean(0, keepdim=True).expand(leaf.shape)
            case "overlapping" if leaf.ndim == 1:
                return torch.cat([leaf, leaf]).unfold(0, len(leaf), 1)[0]
            case "channels last" if leaf.ndim == 4:
                return leaf.contiguous(memory_format=torch.channels_last)
        return leaf.contiguous()

    return fresnet.tree.map(view, params)


LAYOUTS = (
    "contiguous",
    "channels last",
    "member along the last dimension",
    "transposed",
    "every second",
    "expanded",
    "overlapping",
)
