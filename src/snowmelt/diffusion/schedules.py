"""Schedules: time in [0, 1] -> log_snr, falling. The only place where time exists.

    linear(t)   DDPM's table of 1000 betas, read at t * 999 and interpolated between its entries
    cosine(t) = -2 log tan(pi t / 2)
    flow(t)   = 2 log((1 - t) / t)        the levels of x = (1 - t) x0 + t noise

A schedule serves twice: training draws its levels at random times, and a sampler visits the levels of evenly
spaced times. Cosine and flow are read on the part of [0, 1] where the level stays within +-BOUND.
(Ho et al. 2020; Nichol & Dhariwal 2021, arXiv:2102.09672; Lipman et al. 2022, arXiv:2210.02747.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.noise import BOUND
from snowmelt.diffusion.process import linear_betas, log_snr_table
from snowmelt.shapes import Grid

Schedule: TypeAlias = Callable[[Tensor], Tensor]


@cache
def _table() -> Tensor:
    return log_snr_table(linear_betas())


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points (xs, ys), xs rising; the end pieces go on outside."""
    xs, ys = xs.to(x), ys.to(x)
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])


def linear(time: Tensor) -> Tensor:
    """DDPM's linear betas; `linear(k / 999)` is step k of the 1000-step table."""
    table = _table()
    return _interpolate(time, torch.linspace(0, 1, len(table), dtype=torch.float64), table)


def cosine(time: Tensor) -> Tensor:
    """alpha = cos(pi t / 2): the levels spread evenly along the arc from picture to noise."""
    end = 2 / math.pi * math.atan(math.exp(-BOUND / 2))
    return -2 * torch.log(torch.tan(math.pi / 2 * (end + (1 - 2 * end) * time)))


def flow(time: Tensor) -> Tensor:
    """The straight line from picture to noise (rectified flow)."""
    end = 1 / (1 + math.exp(BOUND / 2))
    t = end + (1 - 2 * end) * time
    return 2 * torch.log((1 - t) / t)


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "flow": flow}


def time_grid(schedule: Schedule, steps: int) -> Grid:
    """`steps` levels from noise to picture, evenly spaced in the schedule's time; float64, rising."""
    return schedule(torch.linspace(1, 0, steps, dtype=torch.float64))


def ddpm_time(log_snr: Tensor) -> Tensor:
    """The step 0..999 of DDPM's linear table that has this level, a fraction between steps, going on outside.

    Backbones are told this number, so that one trained here means the same by it as one trained elsewhere.
    """
    table = _table()
    return _interpolate(log_snr, table.flip(0), torch.arange(len(table) - 1, -1, -1, dtype=torch.float64))
