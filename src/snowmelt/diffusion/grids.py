"""Grids: how the levels of a sampler are spaced, and paths that go back over some of them.

    time      evenly in the schedule's time: as the network was trained
    log_snr   evenly in log-SNR
    karras    evenly in (sigma / alpha)^(1/7): fine steps where the picture is nearly clean

All run between the ends of the schedule. A path may fall: there the walk adds noise.
(Karras et al. 2022, equation 5; Lu et al. 2022, arXiv:2206.00927, for log-SNR.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from snowmelt.diffusion.schedules import Schedule
from snowmelt.errors import UserError
from snowmelt.shapes import Grid, Path


def _even(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def _ends(schedule: Schedule) -> tuple[float, float]:
    first, last = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    return first, last


def time_grid(schedule: Schedule, steps: int) -> Grid:
    """`steps` levels from noise to picture, evenly spaced in the schedule's time; float64, rising."""
    return schedule(1 - _even(steps))


def log_snr_grid(schedule: Schedule, steps: int) -> Grid:
    """Evenly spaced in log-SNR between the schedule's ends."""
    first, last = _ends(schedule)
    return first + (last - first) * _even(steps)


def karras_grid(schedule: Schedule, steps: int, rho: float = 7.0) -> Grid:
    """Evenly spaced in (sigma / alpha)^(1 / rho) between the schedule's ends."""
    first, last = (math.exp(-level / (2 * rho)) for level in _ends(schedule))
    return -2 * rho * torch.log(first + (last - first) * _even(steps))


FURTHEST = 25.0
"""Levels beyond which float32 tells nothing of the picture, or nothing of the noise."""
MOST_STEPS = 100_000

GRIDS: dict[str, Callable[[Schedule, int], Grid]] = {
    "time": time_grid,
    "log_snr": log_snr_grid,
    "karras": karras_grid,
}


def check_grid(log_snrs: Grid) -> Grid:
    """`log_snrs` itself.

    Raises:
        UserError: it is empty, leaves +-`FURTHEST`, does not rise, or has more steps than float32 tells apart.
    """
    if not len(log_snrs):
        raise UserError("0 steps make no picture; give at least 1.")
    if not (log_snrs.abs() <= FURTHEST).all():
        raise UserError(f"Levels lie between -{FURTHEST:g} and {FURTHEST:g}; give log-SNRs such as -8 or 6.")
    if (log_snrs.diff() <= 0).any():
        raise UserError("The levels do not rise from noise to picture; give log-SNRs in rising order.")
    if (log_snrs.float().diff() <= 0).any():
        raise UserError(f"{len(log_snrs)} steps are more than the levels distinguish; give fewer.")
    return log_snrs


def given_grid(levels: Sequence[float]) -> Grid:
    """A list of log-SNRs as it stands, rising.

    Raises:
        UserError: see `check_grid`.
    """
    return check_grid(torch.tensor(list(levels), dtype=torch.float64))


def churned(log_snrs: Grid, churn: float, *, noisiest: float = -7.8, cleanest: float = 6.0) -> Path:
    """EDM's churn: before every level in a range the path falls by as much noise as `churn` / steps of sigma / alpha.

    Args:
        churn: S_churn; sigma / alpha grows by min(churn / steps, sqrt(2) - 1).
        noisiest, cleanest: the range; the defaults are EDM's S_tmax = 50 and S_tmin = 0.05 as log-SNRs.
    """
    fall = 2 * math.log1p(min(churn / len(log_snrs), math.sqrt(2) - 1))
    path: list[float] = []
    for level in log_snrs.tolist():
        # The first level is where the noise starts, and the last only answers.
        inside = noisiest <= level <= cleanest and path and level != float(log_snrs[-1])
        path += [level, level - fall] if inside and fall else [level]
    return torch.tensor(path, dtype=torch.float64)


def restarted(log_snrs: Grid, times: int, *, noisiest: float = -2.0, cleanest: float = 5.0) -> Path:
    """The levels between `noisiest` and `cleanest` are walked `times` times more, each time from added noise."""
    levels = log_snrs.tolist()
    again = [level for level in levels if noisiest <= level <= cleanest]
    if len(again) < 2:
        return log_snrs
    end = levels.index(again[-1]) + 1
    return torch.tensor(levels[:end] + times * again + levels[end:], dtype=torch.float64)


def jumping(log_snrs: Grid, times: int, length: int = 1) -> Path:
    """RePaint: after every `length` steps the path falls back by as many, `times - 1` times (arXiv:2201.09865)."""
    levels = log_snrs.tolist()
    path = levels[:1]
    for start in range(0, len(levels) - 1, length):
        stretch = levels[start : start + length + 1]
        path += (stretch[1:] + stretch[:1]) * (times - 1) + stretch[1:]
    return torch.tensor(path, dtype=torch.float64)
