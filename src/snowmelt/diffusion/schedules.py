"""Schedules: time in [0, 1] -> log_snr, falling. The only place where time exists.

    linear, scaled_linear   tables of 1000 betas, read at t * 999 and interpolated between their entries
    cosine(t)  = -2 log tan(pi t / 2)
    sigmoid(t) = logit((s(3) - s(6t - 3)) / (s(3) - s(-3))),  s the logistic function
    laplace(t) = -sign(1/2 - t) log(1 - 2 |1/2 - t|) / 2
    flow(t)    = 2 log((1 - t) / t)          the levels of x = (1 - t) x0 + t noise
    edm(t)     = -2 log of EDM's sigmas, evenly spaced in sigma^(1/7)

A schedule serves twice: training draws its levels at random times, and a sampler visits the levels of evenly
spaced times. Formulas without ends are read on the part of [0, 1] where the level stays within +-BOUND.
(Ho et al. 2020; Nichol & Dhariwal 2021, arXiv:2102.09672; Jabri et al. 2022, arXiv:2212.11972, for sigmoid; Hang & Gu
2024, arXiv:2407.03297, for Laplace; Lipman et al. 2022, arXiv:2210.02747; Karras et al. 2022, arXiv:2206.00364.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.noise import BOUND
from snowmelt.diffusion.process import check_betas, linear_betas, log_snr_table, scaled_linear_betas
from snowmelt.errors import UserError
from snowmelt.shapes import Levels

Schedule: TypeAlias = Callable[[Tensor], Tensor]

LOWEST = -20.0
"""The level that stands for no picture at all (alpha = 4.5e-5) where a table of betas ends there."""


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points (xs, ys), xs rising; the end pieces go on outside."""
    xs, ys = xs.to(x), ys.to(x)
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])


@cache
def _levels_of(betas: tuple[float, ...]) -> Tensor:
    return log_snr_table(torch.tensor(betas, dtype=torch.float64)).clamp(min=LOWEST)


@cache
def ddpm_betas() -> tuple[float, ...]:
    """DDPM's 1000 betas."""
    return tuple(linear_betas().tolist())


def table(betas: Sequence[float]) -> Schedule:
    """The schedule of a table of betas: step k of it at time k / (steps - 1).

    Raises:
        UserError: it is no table (`check_betas`), or the levels do not fall at every step.
    """
    kept = tuple(betas)
    check_betas(torch.tensor(kept, dtype=torch.float64))
    levels = _levels_of(kept)
    if not (torch.isfinite(levels).all() and (levels.diff() < 0).all()):
        raise UserError("The betas are so small or so large that the levels do not fall at every step; give others.")
    return lambda time: interpolate(time, *_points_of(kept, time.device, time.dtype))


@cache
def _points_of(betas: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Times and their levels, where they are asked for: a GPU would have to wait for them at every step."""
    with torch.inference_mode(mode=False):
        levels = _levels_of(betas)
        times = torch.linspace(0, 1, len(levels), dtype=torch.float64)
        return times.to(device, dtype), levels.to(device, dtype, copy=True)


@cache
def _steps_of(betas: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rising levels and their steps, as `_points_of`."""
    with torch.inference_mode(mode=False):
        levels = _levels_of(betas).flip(0).to(device, dtype)
        return levels, torch.arange(len(levels) - 1, -1, -1, dtype=torch.float64).to(device, dtype)


def table_time(log_snr: Tensor, betas: tuple[float, ...]) -> Tensor:
    """The step 0, 1, ... of a table of betas that has this level, a fraction between steps, going on outside."""
    return interpolate(log_snr, *_steps_of(betas, log_snr.device, log_snr.dtype))


def ddpm_time(log_snr: Tensor) -> Tensor:
    """The step 0..999 of DDPM's linear table that has this level: `table_time`.

    Backbones are told this number, so that one trained here means the same by it as one trained elsewhere.
    """
    return table_time(log_snr, ddpm_betas())


def linear(time: Tensor) -> Tensor:
    """DDPM's linear betas; `linear(k / 999)` is step k of the 1000-step table."""
    return _linear()(time)


def scaled_linear(time: Tensor) -> Tensor:
    """Betas whose square roots rise linearly between the ends of DDPM's."""
    return _scaled_linear()(time)


@cache
def _linear() -> Schedule:
    return table(ddpm_betas())


@cache
def _scaled_linear() -> Schedule:
    return table(tuple(scaled_linear_betas().tolist()))


def cosine(time: Tensor) -> Tensor:
    """alpha = cos(pi t / 2): the levels spread evenly along the arc from picture to noise."""
    end = 2 / math.pi * math.atan(math.exp(-BOUND / 2))
    return -2 * torch.log(torch.tan(math.pi / 2 * (end + (1 - 2 * end) * time)))


def sigmoid(time: Tensor, steepness: float = 3.0) -> Tensor:
    """alpha^2 falls as a logistic function of the time does between -`steepness` and `steepness`."""
    top, bottom = 1 / (1 + math.exp(-steepness)), 1 / (1 + math.exp(steepness))
    # The times at which the level is +-BOUND, by solving for them.
    inner = [top - (top - bottom) / (1 + math.exp(-level)) for level in (BOUND, -BOUND)]
    first, last = ((math.log(value / (1 - value)) + steepness) / (2 * steepness) for value in inner)
    share = torch.sigmoid(2 * steepness * (first + (last - first) * time) - steepness)
    return torch.log(top - share) - torch.log(share - bottom)


def laplace(time: Tensor, scale: float = 0.5) -> Tensor:
    """Levels spread as Laplace's distribution around 0: most of them where picture and noise are equal."""
    end = math.exp(-BOUND / scale) / 2
    # From either end, so that small times keep their digits.
    early, late = end + (1 - 2 * end) * time, end + (1 - 2 * end) * (1 - time)
    level = scale * torch.log(2 * torch.minimum(early, late))
    return torch.where(time < 0.5, -level, level)


def flow(time: Tensor) -> Tensor:
    """The straight line from picture to noise (rectified flow)."""
    end = 1 / (1 + math.exp(BOUND / 2))
    t = end + (1 - 2 * end) * time
    return 2 * torch.log((1 - t) / t)


def edm(time: Tensor) -> Tensor:
    """EDM's sigmas, from 80 down to the cleanest level that is used here (theirs goes on to 0.002)."""
    first, last = (sigma ** (1 / 7) for sigma in (math.exp(-BOUND / 2), 80.0))
    return -14 * torch.log(first + (last - first) * time)


SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "laplace": laplace,
    "flow": flow,
    "edm": edm,
}


SAMPLED_ON: dict[str, str] = {"laplace": "cosine"}
"""Schedules that only say what to practise: their ends are so steep that the first of 50 even steps would cover a third
of all levels. Sampling takes its levels from the one named here, as their authors do."""


def shifted(schedule: Schedule, factor: float) -> Schedule:
    """The schedule with sigma / alpha `factor` times as large: more noise for larger pictures.

    A picture of d pixels needs d / 32 times the noise of one of 32 to be as hard to see, since neighbouring pixels
    say the same. (Hoogeboom et al. 2023, arXiv:2301.11093; the time shift of flow matching, Esser et al. 2024,
    arXiv:2403.03206, is the same.)
    """
    return lambda time: schedule(time) - 2 * math.log(factor)


def slope(schedule: Schedule, time: Levels) -> Levels:
    """-d log_snr / d time, above 0: how many units of log-SNR a unit of time covers."""
    with torch.enable_grad():
        moving = time.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(schedule(moving).sum(), moving)
    return -gradient
