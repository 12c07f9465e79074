"""Kernels in C for a processor, compiled by the C compiler of the machine, or not there at all.

Each process compiles what it needs, which takes a second or two, and nothing that is compiled is kept, so nobody else's
code can be loaded. `begin` lets the compiler work while torch is still being imported. Where there is no compiler, or
it fails, `library` is None and torch computes the same.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock

COMPILE = ("cc", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-c")
BF16 = ("-DBF16",)
"""What the compiler is told for maps of bfloat16."""
GRADIENTS = ("-DGRADIENTS",)
"""And for the functions of a file that compute gradients, instead of those that compute answers."""
SECONDS = 40.0
"""That compiling may take, and linking."""
CALM = 5
"""Priority of a compiler, below that of those who compute, at least."""
GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""What is there where a GPU is, which makes it unlikely that the processor computes."""

Functions = tuple[tuple[str, tuple[type, ...]], ...]
POINTER, COUNT, NUMBER, SWITCH = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
"""What functions are told."""


class _Build:
    """A C file of this folder on its way to a library."""

    def __init__(self, name: str, flags: tuple[str, ...]) -> None:
        self.folder = TemporaryDirectory(prefix="snowmelt-", ignore_cleanup_errors=True)
        self.object, self.library = (Path(self.folder.name) / f"{name}.{ending}" for ending in ("o", "so"))
        # The compiler's own files go where ours go, also when nobody waits for it.
        self.environment = {**os.environ, "TMPDIR": self.folder.name}
        source = Path(__file__).with_name(f"{name}.c")
        self.until = time.monotonic() + SECONDS
        try:
            self.compiler = subprocess.Popen(  # noqa: S603
                [*COMPILE, *flags, str(source), "-o", str(self.object)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self.environment,
                # Of its own, so that Ctrl-C leaves it to us and its helpers end with it.
                process_group=0,
            )
        except OSError:
            self.folder.cleanup()
            raise
        # Whoever waits for all of them has other work until then.
        with suppress(OSError):
            os.setpriority(os.PRIO_PGRP, self.compiler.pid, max(CALM, os.getpriority(os.PRIO_PROCESS, 0)))
        atexit.register(self.end)

    def loaded(self) -> ctypes.CDLL | None:
        """The library, once torch is there: it is not linked with OpenMP, but takes that of torch and its threads."""
        try:
            if self.compiler.wait(max(0.0, self.until - time.monotonic())):
                return None
            link = ["cc", "-shared", str(self.object), "-lm", "-o", str(self.library)]
            subprocess.run(link, check=True, capture_output=True, timeout=SECONDS, env=self.environment)  # noqa: S603
            return ctypes.CDLL(str(self.library))
        except (OSError, subprocess.SubprocessError):
            return None
        finally:
            self.end()

    def end(self) -> None:
        """Stop the compiler where it still works, and remove what it made."""
        atexit.unregister(self.end)
        if self.compiler.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.compiler.pid, signal.SIGKILL)
            self.compiler.wait()
        self.folder.cleanup()


@cache
def _build(name: str, flags: tuple[str, ...]) -> _Build | None:
    if sys.platform != "linux":
        return None
    try:
        return _Build(name, flags)
    except OSError:
        return None


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself, as Linux tells of those of the kind of x86; else False."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def drawn_in(asked: str, trained: str, device: str = "cpu") -> str:
    """The number format that pictures are drawn in on a kind of device: as `asked`, and for "auto" as `trained`.

    Training by itself measures what pays. Pictures of bfloat16 are a hundredth farther from real ones, within the
    chance of thousands, and hardly to be told from those of float32 (docs/recipe.md). Where a processor does not
    multiply bfloat16, and on a GPU, where all that was not measured, "auto" is float32.
    """
    if asked != "auto":
        return asked
    return "bf16" if trained == "bf16" and device == "cpu" and multiplies_bf16() else "fp32"


_one_at_a_time = RLock()


def begin(flags: tuple[str, ...] = (), *, gradients: bool = True) -> None:
    """Have the kernels compiled that maps need, without waiting for them (but for another thread that does); not where
    there is a GPU.

    Args:
        flags: what the compiler is told for maps of another type than float32.
        gradients: whether those for gradients are going to be needed too.
    """
    if not any(Path(gpu).exists() for gpu in GPUS):
        with _one_at_a_time:
            for kind in ((), GRADIENTS) if gradients else ((),):
                for name in ("convolution", "group_norm"):
                    _build(name, (*flags, *kind))


@cache
def _library(name: str, functions: Functions, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    build = _build(name, flags)
    found = build and build.loaded()
    for function, types in functions if found else ():
        getattr(found, function).argtypes = types
    return found


def library(name: str, functions: Functions, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """What `name`.c of this folder defines, compiled with these flags; None where it cannot be. Needs torch.

    Args:
        functions: those that are called, and what each is told.
    """
    with _one_at_a_time:
        return _library(name, functions, flags)


def forget() -> None:
    """What was compiled: the next call of `library` compiles again."""
    with _one_at_a_time:
        _library.cache_clear()
        _build.cache_clear()
