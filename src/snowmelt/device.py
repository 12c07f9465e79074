"""The only questions about hardware: which device, how many threads, which precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from snowmelt.errors import UserError, choose

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Where and in which number format networks compute; weights and averages stay float32."""

    device: torch.device
    name: str = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a network computes in this precision."""
        dtype = DTYPES[self.name]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

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
        if not seen or seen[0] != DTYPES[self.name]:
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
    return torch.device(name)


def make_precision(device: torch.device, name: str) -> Precision:
    """A checked `Precision`.

    Raises:
        UserError: an unknown name; fp16, which is hundreds of times slower on a CPU and overflows everywhere.
    """
    if name == "fp16":
        raise UserError("fp16 overflows in training and is very slow on a CPU; use --precision bf16 or fp32.")
    choose(DTYPES, name, "precision")
    return Precision(device, name)


PLAIN = 3.0
"""A difference in speed that no neighbour on the machine explains: processors without bf16 take far longer still."""


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
    gain: float = 1.1,
) -> Speed:
    """The precision in which `step` is faster.

    All of `names` run in turn, after one warm-up each, for about `seconds`. Their best times are compared, since other
    processes can only make a time worse, and bf16 must win by `gain` so that noise does not decide. Where one
    convolution is `PLAIN` times slower in bf16 its steps are not waited for.

    Args:
        timed: whether the time of a step is wanted too, or only the choice.
    """
    ratio: float | None = None
    if len(names) > 1:
        ratio = convolution_ratio(device)
        names = ("fp32",) if ratio < 1 / PLAIN else names
    if len(names) == 1 and not timed:
        (only,) = names
        return Speed(only, ratio, None)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        step(Precision(device, name))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, taken in times.items():
            synchronize(device)
            start = time.perf_counter()
            step(Precision(device, name))
            synchronize(device)
            taken.append(time.perf_counter() - start)
    best = {name: min(taken) for name, taken in times.items()}
    if len(best) > 1:
        ratio = best["fp32"] / best["bf16"]
        chosen = "bf16" if ratio >= gain else "fp32"
    else:
        (chosen,) = best
    return Speed(chosen, ratio, best[chosen])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


ROOM = 0.25
"""Share of a GPU's free memory that the training pictures may take."""


def has_room(device: torch.device, needed: int) -> bool:
    """Whether so many bytes of pictures may stay on the device all the time; never on one without its own memory."""
    return device.type == "cuda" and needed <= ROOM * torch.cuda.mem_get_info(device)[0]


def memory_in_use(device: torch.device) -> int:
    """Bytes: of the GPU's memory where there is one, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
