"""The only questions about hardware: which device, how many threads, which precision, layout and compiler."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from snowmelt.data.workers import cores
from snowmelt.errors import UserError, choose
from snowmelt.networks.kernels import multiplies_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}


AT_FIRST = torch.get_num_threads()
"""Threads that torch takes before anybody says how many: one for each core, though a core may have room for two, of a
Mac for each fast one, or as many as OMP_NUM_THREADS says."""

TINY = 12
"""Pixels on a side of pictures whose operations are too small to share."""


def threads_for(size: int) -> int:
    """CPU threads for pictures of so many pixels on a side.

    At 8 pixels two threads were no faster than one on a quiet machine, and seven times slower next to another
    process, since each operation waits for the slower of the two.
    """
    return 1 if size <= TINY else min(cores(), AT_FIRST)


def most_threads(size: int) -> int:
    """As many as might be faster than `threads_for`, where nobody has said how many: also a core's second thread, and
    slow cores."""
    return threads_for(size) if size <= TINY or os.environ.get("OMP_NUM_THREADS", "").isdecimal() else cores()


@dataclass(frozen=True)
class Precision:
    """Where, in which number format and how networks compute; weights and averages stay float32."""

    device: torch.device
    name: str = "fp32"
    layout: str = "default"
    """A name of `LAYOUTS`: how pictures and kernels lie in memory."""
    compiled: bool = False
    """Whether the network is compiled for training, where it can be."""
    recorded: bool = False
    """Whether what a GPU does for it in training is recorded once and played again, where that can be."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format."""
        return DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a network computes in this precision."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def assert_active(self, network: nn.Module, run: Callable[[], object]) -> None:
        """Run `run` once and check that the first convolution of `network` really answers in this precision.

        Asked and active can differ silently: autocast for a device that is not used does nothing.
        """
        seen: list[torch.dtype] = []
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        hook = first.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        try:
            run()
        finally:
            hook.remove()
        if not seen or seen[0] != self.dtype:
            raise RuntimeError(f"precision {self.name} was asked for but {seen} is active")


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes a GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"There is no device {name!r} on this machine; use --device cpu or leave it out.") from error
    device = torch.device(name)
    if device.type != "cpu" and ":" in name:
        # What is recorded, and what is waited for, is that of the current one.
        torch.accelerator.set_device_index(device.index)
    return device


def is_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU that CUDA's words are for: larger networks, the compiler and recording are worth a
    try there; others, such as a Mac's, train as a processor does."""
    return device.type == "cuda"


def make_precision(device: torch.device, name: str) -> Precision:
    """A checked `Precision`.

    Raises:
        UserError: an unknown name; fp16, which is hundreds of times slower on a CPU and overflows everywhere.
    """
    if name == "fp16":
        raise UserError("fp16 overflows in training and is very slow on a CPU; use --precision bf16 or fp32.")
    choose(DTYPES, name, "precision")
    return Precision(device, name)


TURNS = 4
"""Of each format, at most."""
PLAIN = 3.0
"""A difference in speed that neighbours hardly explain: processors without bf16 take far longer still."""


def convolution_ratio(device: torch.device) -> float:
    """How many times faster a small convolution and its gradient are in bf16 than in fp32: best of five each."""
    best = dict.fromkeys(DTYPES, float("inf"))
    for _ in range(5):
        for name, dtype in DTYPES.items():
            image = torch.ones(4, 32, 16, 16, device=device, dtype=dtype)
            kernel = torch.ones(32, 32, 3, 3, device=device, dtype=dtype, requires_grad=True)
            synchronize(device)
            start = time.perf_counter()
            torch.nn.functional.conv2d(image, kernel, padding=1).sum().backward()
            synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best["fp32"] / best["bf16"]


def imitated(device: torch.device) -> float | None:
    """`convolution_ratio` where it is so low that the device must imitate bf16, else None; without a look where the
    processor is known to multiply it."""
    if multiplies(device):
        return None
    ratio = convolution_ratio(device)
    return ratio if ratio < 1 / PLAIN else None


def multiplies(device: torch.device) -> bool:
    """Whether this is a processor that is known to multiply bf16."""
    return device.type == "cpu" and multiplies_bf16()


class Speed(NamedTuple):
    """What was measured of a step."""

    precision: str
    """The one to compute in."""
    ratio: float | None
    """How many times faster bf16 ran than fp32; None where only one of them was asked about."""
    seconds: float | None
    """Of a step in `precision`, at best; None where nobody asked for it and it need not be known."""


def faster_precision(
    device: torch.device,
    step: Callable[[Precision], object],
    *,
    names: tuple[str, ...] = tuple(DTYPES),
    timed: bool = True,
    seconds: float = 3.0,
    again: Callable[[float], float] = lambda _: 0.0,
    gain: float = 1.1,
) -> Speed:
    """The precision in which `step` is faster, or about as fast and expected to be.

    One of `names` follows the other, so that what one needs is gone before the next needs it, in two turns or, where
    steps are long, in one. Their best times are compared, since other processes can only make a time worse (one that is
    busy whenever one of them is timed can still mislead), and what is not expected must win by `gain` so that noise
    does not decide: bf16 is expected where the processor multiplies it itself, which then has up to `TURNS` to do so,
    and fp32 elsewhere. There steps in bf16 are not waited for where one convolution is `PLAIN` times slower in it.

    Args:
        timed: whether the time of a step is wanted too, or only the choice.
        seconds: that two turns take; longer where steps do, of which a warm-up and mostly `LEAST_STEPS` are made.
        again: how long all turns after the first may take where that is longer, by the seconds of a step.
    """
    expected = multiplies(device)
    ratio = imitated(device) if len(names) > 1 else None
    names = names if ratio is None else ("fp32",)
    if len(names) == 1 and not timed:
        (only,) = names
        return Speed(only, ratio, None)
    each = seconds / len(names) / 2
    best = {name: time_of(Precision(device, name), step, each) for name in names}
    for turn in range(1, TURNS):
        surprising = expected and len(best) > 1 and best["fp32"] * gain < best["bf16"]
        least = turn * (LEAST_STEPS + 1) * sum(best.values())
        if least > max(len(names) * each, again(min(best.values()))) or (turn > 1 and not surprising):
            break
        best = {name: min(time, time_of(Precision(device, name), step, each)) for name, time in best.items()}
    if len(best) > 1:
        ratio = best["fp32"] / best["bf16"]
        chosen = "bf16" if ratio >= (1 / gain if expected else gain) else "fp32"
    else:
        (chosen,) = best
    return Speed(chosen, ratio, best[chosen])


LEAST_COMPILED = 300.0
"""Seconds of training from which on it may pay to wait for the compiler, which takes a minute or two."""
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "layout": ("channels_last", {"layout": "channels_last"}),
    # The compiler leaves no work that is slow in that layout.
    "compile": ("compiled", {"compiled": True, "layout": "channels_last"}),
    "record": ("recorded", {"recorded": True}),
}
"""What is tried beyond the precision, one after the other: by the key of [training] that keeps it, its name and what
it changes."""


def changes_for(device: torch.device, seconds: float) -> list[str]:
    """Those of `CHANGES` that may pay on this device in a training of so many seconds."""
    if not is_gpu(device):
        return ["layout"]
    return [name for name in CHANGES if name != "compile" or seconds >= LEAST_COMPILED]


GAIN = 1.03
"""How many times faster a change must be, so that noise does not decide."""


class Tried(NamedTuple):
    """What came of trying `CHANGES`."""

    precision: Precision
    """With those that pay."""
    seconds: float
    """Of a step with them, at best."""
    reasons: list[str]
    """For and against each, in words."""


def improved(
    plain: Precision,
    step: Callable[[Precision], object],
    *,
    before: float,
    changes: Iterable[str] = tuple(CHANGES),
    given: Collection[str] = (),
    seconds: float = 1.0,
    gain: float = GAIN,
) -> Tried:
    """`plain` with those of `changes` that make a `step` faster; one that cannot be made here is left out.

    Args:
        before: seconds of a step without them.
        given: keys of [training] that stay as they are in `plain`.
        seconds: to time each for, after a warm-up.
        gain: how many times faster it must be.
    """
    best, reasons = plain, list[str]()
    for name in changes:
        words, changed = CHANGES[name]
        candidate = replace(best, **{key: value for key, value in changed.items() if key not in given})
        try:
            taken = time_of(candidate, step, seconds)
        except Exception as error:
            # Whatever a compiler, a driver or the memory has against it: training goes on without.
            reasons.append(f"{words}: no ({reason_of(error)})")
            continue
        chosen = before / taken >= gain
        reasons.append(f"{words}: {'yes' if chosen else 'no'} ({before / taken:.2f} times as fast)")
        if chosen:
            best, before = candidate, taken
    return Tried(best, before, reasons)


def reason_of(error: Exception) -> str:
    """The first line of an error; compilers write pages."""
    name, text = type(error).__name__, str(error).strip()
    first = text.splitlines()[0][:200] if text else ""
    return first if first and type(error) is RuntimeError else f"{name}: {first}" if first else name


LEAST_STEPS = 3
"""That are timed, but where that takes as many times the seconds allowed."""


def time_of(precision: Precision, step: Callable[[Precision], object], seconds: float) -> float:
    """Of a step, at best, after a warm-up."""
    step(precision)
    times, end = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < end or (len(times) < LEAST_STEPS and sum(times) <= LEAST_STEPS * seconds):
        synchronize(precision.device)
        start = time.perf_counter()
        step(precision)
        synchronize(precision.device)
        times.append(time.perf_counter() - start)
    return min(times)


def use_tensor_cores(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32 (10 bits of mantissa), as it does in convolutions anyway.

    Only training asks for it: what is left in float32 there is the small linear layers, or all in fp32.
    """
    if is_gpu(device):
        torch.set_float32_matmul_precision("high")


def keep_memory() -> None:
    """Have the C library keep what is freed for what is needed next, in this process.

    Otherwise the activations of every step go back to the system and are fetched again, page by page: up to 60,000
    pages a step, and 7 to 23 % of its time (docs/recipe.md). Blocks of 32 MiB and more still do, since glibc keeps no
    larger ones; another C library is left alone.
    """
    if (mallopt := _of_the_c_library("mallopt")) is not None:
        # <malloc.h>: M_MMAP_THRESHOLD, at the most it takes, and M_TRIM_THRESHOLD, which -1 switches off.
        mallopt(-3, 32 << 20)
        mallopt(-1, -1)


def give_back_memory() -> None:
    """Give back to the system what `keep_memory` has kept of what is freed by now, all over the heap."""
    if (malloc_trim := _of_the_c_library("malloc_trim")) is not None:
        malloc_trim(ctypes.c_size_t(0))


def _of_the_c_library(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


ROOM = 0.25
"""Share of a GPU's free memory that the training pictures may take."""


def has_room(device: torch.device, needed: int) -> bool:
    """Whether so many bytes of pictures may stay on the device all the time; never on one without its own memory."""
    return device.type == "cuda" and needed <= ROOM * torch.cuda.mem_get_info(device)[0]


def memory_in_use(device: torch.device) -> int:
    """Bytes: of the GPU's memory where there is one, else the process's largest resident size; 0 where the system does
    not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import sys

    try:
        import resource
    except ImportError:
        return 0

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
