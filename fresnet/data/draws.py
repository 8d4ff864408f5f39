"""Single draws from a generator, each as torchvision's transforms make it.

They are float32 on the CPU, whatever torch's defaults are.
"""

import torch
from torch import Generator


def uniform(low: float, high: float, generator: Generator) -> float:
    """From low to below high."""
    return _empty().uniform_(low, high, generator=generator).item()


def log_uniform(low: float, high: float, generator: Generator) -> float:
    """From low to below high, its logarithm uniform."""
    ends = torch.tensor((low, high), dtype=torch.float32, device="cpu").log().tolist()
    return _empty().uniform_(*ends, generator=generator).exp().item()


def integer(count: int, generator: Generator) -> int:
    """From 0 to below count."""
    return int(torch.randint(count, (1,), generator=generator, device="cpu").item())


def chance(probability: float, generator: Generator) -> bool:
    """Whether it happens."""
    return bool(_empty().uniform_(generator=generator) < probability)


def _empty() -> torch.Tensor:
    return torch.empty(1, dtype=torch.float32, device="cpu")
