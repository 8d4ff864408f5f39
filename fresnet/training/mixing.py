"""Images mixed with their neighbours in the batch, and their labels with them.

A mixing is a function `(x, targets, generator) -> (x, targets)` of images `[b c h w]` and the
probabilities of their classes `[b k]`. Each image is mixed with the one before it, the first with
the last. The generator is on the CPU.
"""

from collections.abc import Callable
from functools import partial
from math import inf, sqrt
from typing import TypeAlias

import numpy
import torch
from einops import rearrange
from torch import Generator, Tensor

from fresnet.errors import FresnetError, check_type, describe, listed, shown
from fresnet.numbers import as_number

Mixing: TypeAlias = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]


def mixup(alpha: float) -> Mixing:
    """A weighted mean of both images. One weight for the batch is drawn from Beta(alpha, alpha).

    Raises:
      FresnetError: if alpha is not a positive number.
    Source: Zhang et al. 2018, arXiv:1710.09412.
    """
    return partial(_mixup, _positive("mixup", alpha))


def cutmix(alpha: float) -> Mixing:
    """A rectangle of one image laid over the other.

    The rectangle's share of the area is drawn from Beta(alpha, alpha).

    >>> import fresnet
    >>> from fresnet import training
    >>> mixing = training.one_of(training.mixup(0.2), training.cutmix(1.0))
    >>> train_step = training.make_train_step(fresnet.optim.sgd(0.1), mixing=mixing)

    Raises:
      FresnetError: if alpha is not a positive number.
    Source: Yun et al. 2019, arXiv:1905.04899.
    """
    return partial(_cutmix, _positive("cutmix", alpha))


def one_of(*mixings: Mixing) -> Mixing:
    """One of these mixings for each batch, all with the same probability.

    >>> mixing = one_of(mixup(0.2), cutmix(1.0))

    Raises:
      FresnetError: if there is none, or if one is no function.
    """
    if not mixings or not all(map(callable, mixings)):
        got = listed([*map(describe, mixings)]) if mixings else "none"
        raise FresnetError(f"one_of expects mixings, such as mixup(0.2); got {got}")
    return partial(_one_of, mixings)


def _mixup(alpha: float, x: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    _check(x, targets, generator)
    share = _share(alpha, generator)
    return _blend(x, share), _blend(targets, share)


def _cutmix(
    alpha: float, x: Tensor, targets: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    _check(x, targets, generator)
    share = _share(alpha, generator)
    height, width = x.shape[2:]
    column, row = (
        int(torch.randint(side, (1,), generator=generator, device="cpu"))
        for side in (width, height)
    )
    half = 0.5 * sqrt(1 - share)
    top, bottom = max(row - int(half * height), 0), min(row + int(half * height), height)
    left, right = max(column - int(half * width), 0), min(column + int(half * width), width)
    rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
    in_rows = rearrange((rows >= top) & (rows < bottom), "h -> h 1")
    inside = in_rows & (columns >= left) & (columns < right)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.where(inside, x.roll(1, 0), x), _blend(targets, share)


def _one_of(
    mixings: tuple[Mixing, ...], x: Tensor, targets: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    weights = torch.ones(len(mixings), dtype=torch.float32, device="cpu")
    chosen = int(torch.multinomial(weights, 1, generator=generator))
    return mixings[chosen](x, targets, generator)


def _check(x: Tensor, targets: Tensor, generator: Generator) -> None:
    check_type("a mixing", Generator, "a torch.Generator on the CPU", generator=generator)
    tensors = isinstance(x, Tensor) and isinstance(targets, Tensor)
    if not tensors or x.ndim != 4 or targets.ndim != 2 or len(x) != len(targets):
        raise FresnetError(
            "a mixing expects images [b c h w] and probabilities [b k]; "
            f"got {describe(x)} and {describe(targets)}"
        )


def _share(alpha: float, generator: Generator) -> float:
    """A draw from Beta(alpha, alpha).

    `torch.distributions` calls the same private function, but takes no generator. Where PyTorch has
    it no more, the draw is numpy's, from a seed that the generator gives.
    """
    if not hasattr(torch, "_sample_dirichlet"):
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        return float(numpy.random.default_rng(seed).beta(alpha, alpha))
    concentrations = torch.full((2,), alpha, dtype=torch.float32, device="cpu")
    return float(torch._sample_dirichlet(concentrations, generator=generator)[0])


def _blend(values: Tensor, share: float) -> Tensor:
    """The mean of each value, weighted by `share`, and the one before it."""
    return values.roll(1, 0) * (1 - share) + values * share


def _positive(caller: str, alpha: float) -> float:
    number = as_number(alpha)
    if number is None or not 0 < number < inf:
        raise FresnetError(f"{caller} expects alpha to be a positive number; got {shown(alpha)}")
    return float(number)
