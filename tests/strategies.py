"""Every Hypothesis strategy of the suite."""

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

import fresnet
from fresnet import Spec
from fresnet.types import BasicBlock, Bottleneck


def examples(count: int) -> settings:
    """This many examples, however long each takes.

    A failing one is reported as drawn: shrinking would build hundreds of networks, and each
    failure on the way keeps its own alive.
    """
    return settings(
        max_examples=count,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


seeds = st.integers(0, 2**32 - 1)
class_counts = st.integers(1, 40)
sides = st.integers(1, 75)
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
    return images(batch=st.integers(2, 5), side=st.integers(33, 75), dtype=dtype)


def labels(x: Tensor, classes: int) -> Tensor:
    return torch.arange(len(x)) * 7 % classes


small_specs = st.builds(
    Spec,
    block=st.sampled_from([BasicBlock, Bottleneck]),
    depths=st.tuples(*[st.integers(1, 2)] * 4),
)
"""Architectures that torchvision has too, at its width of 64."""

tiny_specs = st.builds(
    Spec,
    block=st.sampled_from([BasicBlock, Bottleneck]),
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=4).map(tuple),
    width=st.integers(1, 6),
)
"""Architectures of any number of stages and few channels, for laws that need no reference."""


@st.composite
def tiny_params(draw: st.DrawFn) -> fresnet.Params:
    """Networks of `tiny_specs` in float64, every leaf away from where `init` puts it."""
    generator = torch.Generator().manual_seed(draw(seeds))
    params = fresnet.init(
        generator, draw(tiny_specs), num_classes=draw(class_counts), dtype=torch.float64
    )
    return fresnet.Params(
        weights=fresnet.tree.map(
            lambda w: w + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype),
            params.weights,
        ),
        stats=fresnet.tree.map(
            lambda s: s * torch.rand(s.shape, generator=generator, dtype=s.dtype) + 0.5,
            params.stats,
        ),
    )
