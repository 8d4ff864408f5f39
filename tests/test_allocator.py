"""`keep_pages` in processes of their own, since it lasts."""

import platform
import subprocess
import sys

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
before = page_faults()
for _ in range(20):
    torch.ones(2**24)
print(page_faults() - before)
"""


def faults(setting: str) -> int:
    command = [sys.executable, "-c", FAULTS, setting]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_freed_pages_are_used_again() -> None:
    """Twenty tensors of 64 MiB in turn are 330,000 pages of 4 KiB, or fewer that are huge.

    A small block that comes to lie within a freed one may cost one tensor fresh pages, seldom.
    """
    assert 4 * faults("kept") < faults("default")


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not fresnet.keep_pages()
