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
      block: the type of every block.
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
            raise FresnetError(f"Spec expects block BasicBlock or Bottleneck; got {self.block}")
        if not self.depths or min(self.depths) < 1 or self.width < 1:
            raise FresnetError(
                f"Spec expects at least one block in each stage and a positive width; "
                f"got depths {self.depths} and width {self.width}"
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
