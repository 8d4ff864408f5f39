"""`keep_pages` in processes of their own, because it lasts as long as the process."""

import platform
import subprocess
import sys
from statistics import median_low

import pytest

import fresnet

FAULTS = """
import resource
import sys
import torch
import fresnet

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    assert fresnet.keep_pages()
for _ in range(3):
    torch.ones(2**24)
for _ in range(11):
    before = page_faults()
    torch.ones(2**24)
    print(page_faults() - before)
"""


def faults(setting: str) -> int:
    """The page faults of a tensor of 64 MiB: the median, as a small block may lie in its way."""
    command = [sys.executable, "-c", FAULTS, setting]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return median_low(map(int, printed.split()))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_freed_pages_are_used_again() -> None:
    """64 MiB are 16,384 pages of 4 KiB, or 32 that are huge."""
    assert faults("kept") < 10 < faults("default")


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not fresnet.keep_pages()
