"""A setting of the C library's allocator that spares PyTorch on a CPU from waiting for pages."""

import ctypes
import platform

# mallopt's parameters, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_pages() -> bool:
    """Let this process keep the memory that it frees, for its next tensors.

    glibc gives every large block back to the system. For the next block the system makes fresh
    pages of zeros, with a fault for each 4 KiB. That takes up to half of the time of a ResNet on a
    CPU. After this call freed blocks are used again, and the process keeps the memory of its peak.
    Results do not change. Call it once, before anything else.

    >>> import fresnet
    >>> kept = fresnet.keep_pages()

    Returns:
      Whether the C library accepted the setting. Without glibc nothing is done, and this is False.
    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))
