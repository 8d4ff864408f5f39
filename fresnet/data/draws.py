"""Single draws from a generator, as torchvision's transforms make them, and what these refuse.

Draws are made in float32 on the CPU, whatever PyTorch's defaults are.
"""

import torch
from PIL.Image import Image
from torch import Generator, Tensor

from fresnet.errors import FresnetError, check_type, describe, shown
from fresnet.numbers import as_number


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


def check_image(caller: str, image: Image, generator: Generator) -> None:
    """Refuse what is no RGB image, and what is no generator; without one the global one would draw.

    Raises:
      FresnetError: saying what came.
    """
    check_type(caller, Image, "an image of Pillow", image=image)
    check_type(caller, Generator, "a torch.Generator", generator=generator)
    if image.mode != "RGB":
        raise FresnetError(f"{caller} expects an RGB image; got {image.mode}: image.convert('RGB')")


def check_values(caller: str, x: Tensor, generator: Generator) -> None:
    """The same of values `[3 h w]`."""
    check_type(caller, Generator, "a torch.Generator", generator=generator)
    if not isinstance(x, Tensor) or x.ndim != 3 or len(x) != 3 or not x.is_floating_point():
        raise FresnetError(f"{caller} expects x to be a float tensor [3 h w]; got {describe(x)}")


def check_numbers(caller: str, most: float, **values: float) -> None:
    """Refuse what is no number from 0 to `most`."""
    for name, value in values.items():
        number = as_number(value)
        if number is None or not 0 <= number <= most:
            raise FresnetError(f"{caller} expects {name} from 0 to {most}; got {shown(value)}")
