"""Single draws from a generator, each made as torchvision's transforms make it.

Draws are made in float32 on the CPU, whatever PyTorch's defaults are.
"""

import torch
from torch import Generator


def uniform(low: float, high: float, generator: Generator) -> float:
    """A number from low to below high."""
    return _empty().uniform_(low, high, generator=generator).item()


def log_uniform(low: float, high: float, generator: Generator) -> float:
    """A number from low to below high, whose logarithm is uniform."""
    ends = torch.tensor((low, high), dtype=torch.float32, device="cpu").log().tolist()
    return _empty().uniform_(*ends, generator=generator).exp().item()


def integer(count: int, generator: Generator) -> int:
    """An integer from 0 to below count."""
    return int(torch.randint(count, (1,), generator=generator, device="cpu").item())


def chance(probability: float, generator: Generator) -> bool:
    """True with this probability."""
    return bool(_empty().uniform_(generator=generator) < probability)


def _empty() -> torch.Tensor:
    return torch.empty(1, dtype=torch.float32, device="cpu")
