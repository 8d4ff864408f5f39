"""A whole network: stem, stages, what stands before the head, and the head, as two trees."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fresnet import tree
from fresnet.network.nodes.blocks import last_layer
from fresnet.network.nodes.fields import AnyLast, AnyStage, AnyStem
from fresnet.network.nodes.layers import UNITS, Pair, kinds, over
from fresnet.network.nodes.masks import MASKS, DropPath, bare
from fresnet.network.nodes.protocols import Drawer, Names, Regime
from fresnet.network.nodes.stages import blocks_of


class NoLastNorm(NamedTuple):
    """Nothing stands between the last block and the head."""

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "NoLastNorm"]:
        return x, self

    @staticmethod
    def draw(d: Drawer, channels: int) -> "NoLastNorm":
        return NoLastNorm()

    @staticmethod
    def names() -> Names:
        return Names()

    @staticmethod
    def note() -> str:
        return ""


class Head(NamedTuple):
    """The classifier of the mean of each map: weight `[k c]`, bias `[k]`."""

    weight: Tensor
    bias: Tensor

    def run(self, x: Tensor, do: Regime) -> Tensor:
        return do.head(self, do.mean(x))

    def note(self) -> str:
        classes, channels = self.weight.shape
        return f"average pool, {channels} to {classes}"


class NoHead(NamedTuple):
    """The mean of each map is what the network returns: it is an encoder."""

    def run(self, x: Tensor, do: Regime) -> Tensor:
        return do.mean(x)

    def note(self) -> str:
        return "average pool"


class Weights(NamedTuple):
    """Everything that is trained: what gradients, optimizers and weight decay see."""

    stem: AnyStem
    stages: tuple[AnyStage, ...]
    last: AnyLast
    head: Head | Any  # a `Head` or `NoHead`


class Stats(NamedTuple):
    """Everything that training carries along: the running moments of every norm.

    The nodes are those of `Weights`, with `NormStats` where that has a layer with a `Norm`, and
    `()` where a layer has no statistics.
    """

    stem: Any
    stages: tuple[Any, ...]
    last: Any


class Params(NamedTuple):
    """A whole network."""

    weights: Weights
    stats: Stats

    def __str__(self) -> str:
        """What network it is, in a line, by which larger trees tell it too."""
        weights, _ = self
        known = type(weights) is Weights and isinstance(weights.stages, tuple)
        return f"Params({', '.join(_told(weights) if known else map(tree.pformat, self))})"


class Quantized(NamedTuple):
    """A network in int8, for inference alone.

    Args:
      weights: folded; convolutions are int8 `[o c/groups k k]`, each beside its `Rescale`; the head
        is as it was.
      ranges: the least and the greatest of each layer's results, `[2]`, in the layer's place.
      images: the same of what the network is given.
    """

    weights: Weights
    ranges: Stats
    images: Tensor


def _told(weights: Weights) -> list[str]:
    """Of what kind a network is, and how large; of trees like one, what can be said."""
    stages = [
        [bare(block) for block in blocks_of(stage)]
        for stage in weights.stages
        if isinstance(stage, tuple)
    ]
    head = bare(weights.head)
    names = dict.fromkeys(type(block).__name__ for blocks in stages for block in blocks)
    told = [f"ResNet of {' and '.join(names)} {tuple(map(len, stages))}"]
    if not kinds(weights).isdisjoint(MASKS):
        told.append("masked")
    bias = getattr(head, "bias", None)
    if isinstance(bias, Tensor) and bias.ndim:
        told.append(f"{bias.shape[-1]} classes")
    leaves = tree.leaves((weights.stem, stages, weights.last, head))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if tensors:
        told.append(f"{sum(leaf.numel() for leaf in tensors):,} parameters")
    dtypes = (str(leaf.dtype).removeprefix("torch.") for leaf in tensors)
    return [*told, *dict.fromkeys(dtypes), *dict.fromkeys(str(leaf.device) for leaf in tensors)]


def features_in(weights: Weights) -> int:
    """The channels of the last stage: how many features a head sees."""
    block = bare(blocks_of(weights.stages[-1])[-1])
    return len(getattr(block, last_layer(block)).conv)


def beside(
    function: Callable[..., Any],
    weights: Weights,
    *rest: Stats,
    units: tuple[type, ...] = UNITS,
) -> Stats:
    """What the function makes of each unit of a network and of what stands beside it."""
    body = (weights.stem, weights.stages, weights.last)
    return Stats(*(over(function, *at, units=units) for at in zip(body, *rest, strict=True)))


def replaced(function: Callable[..., Any], weights: Weights, *rest: Stats) -> Weights:
    """The network with each unit replaced by what the function makes of it."""
    return Weights(*beside(function, weights, *rest), weights.head)


def paired(weights: Weights, stats: Stats) -> Stats:
    """The tree that runs: beside each unit what stands in its place in the other tree."""
    return beside(_pair, weights, stats, units=(*UNITS, DropPath))


def _pair(node: Any, beside: Any) -> Any:
    """A unit and what is beside it, or a mask around a block of such pairs."""
    if isinstance(node, DropPath):
        return node._replace(block=over(Pair, node.block, beside))
    return Pair(node, beside)
