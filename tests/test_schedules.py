"""Schedules fall, stay within bounds, and are the curves they are called after."""

from __future__ import annotations

import math

import pytest
import torch

from snowmelt.diffusion.noise import BOUND, alpha_sigma
from snowmelt.diffusion.process import linear_betas, log_snr_table
from snowmelt.diffusion.schedules import SCHEDULES, ddpm_time, flow, linear, time_grid

TIMES = torch.linspace(0, 1, 10_001, dtype=torch.float64)
TABLE = log_snr_table(linear_betas())
TABLE_TIMES = torch.arange(1000, dtype=torch.float64) / 999


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_within_bounds(name):
    levels = SCHEDULES[name](TIMES)
    assert (levels.diff() < 0).all()
    first, last = (TABLE[0], TABLE[-1]) if name == "linear" else (BOUND, -BOUND)
    # The argument of the logarithm is known to 1e-16 of 1, and is e^-5 = 0.007 at the ends.
    assert math.isclose(levels[0], first, abs_tol=1e-12) and math.isclose(levels[-1], last, abs_tol=1e-12)


def test_the_bounds_hold_the_whole_table():
    """Within 0.2: the table ends at 9.21 = log(0.9999 / 0.0001) and near -log(1 / 4.04e-5) = -10.12."""
    assert math.isclose(TABLE[0], math.log(9999), rel_tol=1e-11)  # 1 - 0.9999 has 12 good digits
    assert -BOUND - 0.2 < TABLE[-1] < -BOUND < BOUND and TABLE[0] < BOUND


def test_linear_is_the_table():
    # k / 999 is rounded by 1e-16, and the level changes by at most 0.8 * 999 per unit of time.
    torch.testing.assert_close(linear(TABLE_TIMES), TABLE, rtol=0, atol=1e-12)
    torch.testing.assert_close(time_grid(linear, 1000), TABLE.flip(0), rtol=0, atol=1e-12)


def test_linear_between_the_entries():
    middles = (TABLE_TIMES[:-1] + TABLE_TIMES[1:]) / 2
    torch.testing.assert_close(linear(middles), (TABLE[:-1] + TABLE[1:]) / 2, rtol=0, atol=1e-12)


def test_ddpm_time_is_the_inverse_of_linear():
    # Levels up to 10 are rounded by 2e-15 and change by 0.01 at least from step to step: 2e-13 steps; times 999.
    torch.testing.assert_close(ddpm_time(linear(TIMES)), 999 * TIMES, rtol=0, atol=1e-9)
    torch.testing.assert_close(ddpm_time(TABLE), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9)


def test_ddpm_time_goes_on_outside_the_table():
    levels = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    times = ddpm_time(levels)
    assert (times.diff() < 0).all() and times[0] > 999 and times[-1] < 0
    # The end pieces are straight lines.
    outside = times[(levels > TABLE[0]) | (levels < TABLE[-1])]
    curvature = outside.diff().diff().abs()
    assert (curvature > 1e-9).sum() <= 2, "only where the two ends were joined"


def test_ddpm_time_in_float32():
    levels = torch.linspace(-BOUND, BOUND, 2001, dtype=torch.float64)
    # Both the level and the table, up to 10, are rounded by 5e-7; the smallest gap of the table is 0.0095.
    assert -TABLE.diff().max() > 0.0095
    error = ddpm_time(levels.float()).double() - ddpm_time(levels)
    assert error.abs().max() < 4 * 5e-7 / 0.0095


def test_cosine_spreads_levels_evenly_along_the_arc():
    """The angle of (alpha, sigma) is pi t / 2 over the inner part of [0, 1]: linear in time, ends equally far off."""
    alpha, sigma = alpha_sigma(SCHEDULES["cosine"](TIMES), TIMES)
    angle = torch.atan2(sigma, alpha)
    # Angles of order 1 in float64, from levels up to 10.
    assert angle.diff().diff().abs().max() < 1e-14
    assert math.isclose(angle[0] + angle[-1], math.pi / 2, abs_tol=1e-14) and angle[0] < 0.01


def test_flow_is_the_straight_line():
    """x / (alpha + sigma) = (1 - t) x0 + t noise, with t linear in time over the inner part of [0, 1]."""
    alpha, sigma = alpha_sigma(flow(TIMES), TIMES)
    t = sigma / (alpha + sigma)
    assert t.diff().diff().abs().max() < 1e-14
    assert math.isclose(t[0] + t[-1], 1, abs_tol=1e-14) and t[0] < 0.01


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_rise_from_noise_to_picture(name, steps):
    grid = time_grid(SCHEDULES[name], steps)
    assert grid.shape == (steps,) and grid.dtype == torch.float64 and (grid.diff() > 0).all()
    ends = SCHEDULES[name](torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert grid[0] == ends[0] and (steps == 1 or grid[-1] == ends[1])
