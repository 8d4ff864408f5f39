"""What is asked of PyTorch's compilers."""

from collections.abc import Callable

import torch

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)
"""Whether this call becomes an exported program. PyTorch 2.6 cannot tell, and then it is False."""
