"""C++ of ours, compiled for this processor and called.

The files take half a second to compile, for they include nothing of PyTorch. So each process does
it anew, when it first needs one, and nothing is kept on disk.
"""

import os
import shlex
import shutil
import subprocess
from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fresnet.errors import FresnetError, reason

COMPILERS = ("g++", "c++", "clang++")
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


def call(source: Path, function: str, *arguments: Tensor | int | None) -> None:
    """Call a function of a C++ file in as many threads as PyTorch has.

    Args:
      source: the file.
      function: its name, which is `extern "C"`. It takes a pointer for a tensor or None, an
        `int64_t` for a number, and then the number of threads.
    """
    getattr(library(source), function)(*map(_as_c, arguments), c_int64(torch.get_num_threads()))


def _as_c(argument: Tensor | int | None) -> c_int64 | c_void_p:
    if isinstance(argument, int):
        return c_int64(argument)
    return c_void_p(None if argument is None else argument.data_ptr())


@cache
def library(source: Path) -> CDLL:
    """The compiled file.

    Raises:
      FresnetError: if there is no compiler, or if it does not compile the file.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise FresnetError(f"CXX names no C++ compiler ({reason(error)})") from error
    command = named or [*filter(shutil.which, COMPILERS)][:1]
    if not command:
        raise FresnetError(f"there is no C++ compiler ({', '.join(COMPILERS)}; or name one in CXX)")
    try:
        with TemporaryDirectory(prefix="fresnet-", ignore_cleanup_errors=True) as folder:
            target = Path(folder) / f"{source.stem}.so"
            subprocess.run(
                [*command, *OPTIONS, "-o", str(target), str(source)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
            )
            return CDLL(str(target))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().partition("\n")[0]
        raise FresnetError(f"{command[0]} does not compile {source.name} ({said})") from error
    except OSError as error:  # such as where nothing can be written, or what is written not run
        raise FresnetError(f"{source.name} cannot be compiled ({reason(error)})") from error
