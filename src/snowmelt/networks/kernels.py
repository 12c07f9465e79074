"""Kernels in C for a processor, compiled by the C compiler of the machine, or not there at all.

Each process compiles what it needs, which takes about a second, and nothing that is compiled is kept, so nobody else's
code can be loaded. `begin` lets the compiler work while torch is still being imported. Where there is no compiler, or
it fails, `library` is None and torch computes the same.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

COMPILE = ("cc", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-c")
SECONDS = 20.0
"""That compiling may take."""


class _Build:
    """A C file of this folder on its way to a library."""

    def __init__(self, name: str, flags: tuple[str, ...]) -> None:
        self.folder = TemporaryDirectory(prefix="snowmelt-", ignore_cleanup_errors=True)
        self.object, self.library = (Path(self.folder.name) / f"{name}.{ending}" for ending in ("o", "so"))
        source = Path(__file__).with_name(f"{name}.c")
        self.compiler = subprocess.Popen(  # noqa: S603
            [*COMPILE, *flags, str(source), "-o", str(self.object)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # The compiler's own files go where ours go, also when nobody waits for it.
            env={**os.environ, "TMPDIR": self.folder.name},
        )
        atexit.register(self.compiler.kill)

    def loaded(self) -> ctypes.CDLL | None:
        """The library, once torch is there: it is not linked with OpenMP, but takes that of torch and its threads."""
        try:
            if self.compiler.wait(SECONDS):
                return None
            link = ["cc", "-shared", str(self.object), "-lm", "-o", str(self.library)]
            subprocess.run(link, check=True, capture_output=True, timeout=SECONDS)  # noqa: S603
            return ctypes.CDLL(str(self.library))
        except (OSError, subprocess.SubprocessError):
            return None
        finally:
            self.compiler.kill()
            self.folder.cleanup()


@cache
def _build(name: str, flags: tuple[str, ...]) -> _Build | None:
    if sys.platform != "linux":
        return None
    try:
        return _Build(name, flags)
    except OSError:
        return None


def begin() -> None:
    """Have the kernels compiled that float32 maps need, without waiting for them."""
    for name in ("convolution", "group_norm"):
        _build(name, ())


@cache
def library(name: str, *flags: str) -> ctypes.CDLL | None:
    """What `name`.c of this folder defines, compiled with these flags; None where it cannot be. Needs torch."""
    build = _build(name, flags)
    return build and build.loaded()


def forget() -> None:
    """What was compiled: the next call of `library` compiles again."""
    library.cache_clear()
    _build.cache_clear()
