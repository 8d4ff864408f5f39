"""What is asked of PyTorch's compilers."""

from collections.abc import Callable

import torch

TELLS = hasattr(torch.compiler, "is_exporting")
"""Whether PyTorch tells that a call becomes an exported program. PyTorch 2.6 does not."""

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)
"""Whether this call becomes an exported program; False where PyTorch does not tell."""
