"""What `init` builds: the family's members, one line each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fresnet.errors import FresnetError
from fresnet.types import BasicBlock, Bottleneck


@dataclass(frozen=True)
class Spec:
    """A network before it has weights.

    Args:
      block: the type of every block, `fresnet.types.BasicBlock` or `fresnet.types.Bottleneck`.
      depths: the number of blocks in each stage.
      width: the channels of the stem and of the first stage's inner convolutions; each further
        stage doubles them.
    Raises:
      FresnetError: if a stage has no block or the width is not positive.
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    width: int = 64

    def __post_init__(self) -> None:
        if self.block not in (BasicBlock, Bottleneck):
            raise FresnetError(f"Spec expects block BasicBlock or Bottleneck; got {self.block!r}")
        sizes = (*self.depths, self.width) if isinstance(self.depths, tuple) else ()
        if len(sizes) < 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise FresnetError(
                "Spec expects depths to be a tuple of positive integers and width to be one; "
                f"got depths {self.depths!r} and width {self.width!r}"
            )


RESNET18 = Spec(BasicBlock, (2, 2, 2, 2))
RESNET34 = Spec(BasicBlock, (3, 4, 6, 3))
RESNET50 = Spec(Bottleneck, (3, 4, 6, 3))
RESNET101 = Spec(Bottleneck, (3, 4, 23, 3))
RESNET152 = Spec(Bottleneck, (3, 8, 36, 3))

SPECS: Mapping[str, Spec] = MappingProxyType(
    {
        "resnet18": RESNET18,
        "resnet34": RESNET34,
        "resnet50": RESNET50,
        "resnet101": RESNET101,
        "resnet152": RESNET152,
    }
)
