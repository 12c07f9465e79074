"""Schedules fall, stay within bounds, and are the curves they are called after."""

from __future__ import annotations

import math

import pytest
import torch

from snowmelt.diffusion.grids import (
    GRIDS,
    check_grid,
    churned,
    given_grid,
    jumping,
    karras_grid,
    log_snr_grid,
    restarted,
    time_grid,
)
from snowmelt.diffusion.noise import BOUND, alpha_sigma
from snowmelt.diffusion.process import linear_betas, log_snr_table, scaled_linear_betas, zero_terminal_snr
from snowmelt.diffusion.schedules import (
    SCHEDULES,
    ddpm_time,
    flow,
    linear,
    scaled_linear,
    shifted,
    slope,
    table,
    table_time,
)
from snowmelt.errors import UserError

TIMES = torch.linspace(0, 1, 10_001, dtype=torch.float64)
TABLE = log_snr_table(linear_betas())
TABLE_TIMES = torch.arange(1000, dtype=torch.float64) / 999


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_within_bounds(name):
    levels = SCHEDULES[name](TIMES)
    assert (levels.diff() < 0).all()
    scaled = log_snr_table(scaled_linear_betas())
    ends = {
        "linear": (TABLE[0], TABLE[-1]),
        "scaled_linear": (scaled[0], scaled[-1]),
        "edm": (BOUND, -2 * math.log(80)),
    }
    first, last = ends.get(name, (BOUND, -BOUND))
    # The argument of the logarithm is known to 1e-16 of 1, and is e^-10 = 5e-5 at the ends (sigmoid).
    assert math.isclose(levels[0], first, abs_tol=1e-11) and math.isclose(levels[-1], last, abs_tol=1e-11)


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


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_rise_from_noise_to_picture(name, spacing, steps):
    grid = check_grid(GRIDS[spacing](SCHEDULES[name], steps))
    assert grid.shape == (steps,) and grid.dtype == torch.float64
    ends = SCHEDULES[name](torch.tensor([1.0, 0.0], dtype=torch.float64))
    # A few roundings of a level of 10 through exp and log.
    assert math.isclose(grid[0], ends[0], abs_tol=1e-12)
    assert steps == 1 or math.isclose(grid[-1], ends[1], abs_tol=1e-12)


def test_grids_are_even_in_what_they_say():
    assert log_snr_grid(linear, 20).diff().diff().abs().max() < 1e-13
    assert torch.exp(-karras_grid(linear, 20) / 14).diff().diff().abs().max() < 1e-14


def test_sigmoid_is_a_logistic_share_of_the_picture():
    """logit(alpha^2) is not even, but alpha^2 is a shifted, stretched logistic function of time between -3 and 3."""
    levels = SCHEDULES["sigmoid"](TIMES)
    top, bottom = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))
    argument = torch.logit(top - (top - bottom) * torch.sigmoid(levels))
    assert argument.diff().diff().abs().max() < 1e-9  # logit near its ends magnifies 1e-16 by e^6 / differences
    assert -3 < argument[0] < argument[-1] < 3


def test_laplace_levels_are_spread_like_laplace():
    """Time is the chance of a higher level: P(level > x) = exp(-2 x) / 2 for x above 0, and mirrored below."""
    levels = SCHEDULES["laplace"](TIMES)
    chance = torch.where(levels > 0, torch.exp(-2 * levels.abs()) / 2, 1 - torch.exp(-2 * levels.abs()) / 2)
    # Its ends are cut off at levels that come once in 10^9 draws.
    torch.testing.assert_close(chance, TIMES, rtol=0, atol=2e-9)


def test_edm_is_even_in_the_seventh_root_of_sigma():
    root = torch.exp(-SCHEDULES["edm"](TIMES) / 14)
    assert root.diff().diff().abs().max() < 1e-14


def test_a_table_of_betas_is_its_schedule():
    betas = scaled_linear_betas()
    schedule = table(tuple(betas.tolist()))
    torch.testing.assert_close(schedule(TABLE_TIMES), log_snr_table(betas), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled_linear(TABLE_TIMES), schedule(TABLE_TIMES), rtol=0, atol=0)
    steps = table_time(schedule(TABLE_TIMES), tuple(betas.tolist()))
    torch.testing.assert_close(steps, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_table_that_ends_in_pure_noise_ends_at_a_finite_level():
    levels = table(tuple(zero_terminal_snr(linear_betas()).tolist()))(TABLE_TIMES)
    assert torch.isfinite(levels).all() and (levels.diff() < 0).all() and levels[-1] == -20


@pytest.mark.parametrize("betas", [(0.1, 1.5), (0.0, 0.1), (-0.1, 0.2), (0.1,), (float("nan"), 0.1)])
def test_tables_that_are_none_are_refused(betas):
    with pytest.raises(UserError):
        table(betas)


def test_a_shift_is_noise_times_a_factor():
    levels, moved = linear(TIMES), shifted(linear, 3.0)(TIMES)
    torch.testing.assert_close(torch.exp(-moved / 2), 3 * torch.exp(-levels / 2), rtol=1e-13, atol=0)


def test_the_shift_of_flow_is_that_of_its_time():
    """t' = s t / (1 + (s - 1) t), as flow matching writes the same shift."""
    factor, t = 3.0, torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    later = factor * t / (1 + (factor - 1) * t)
    torch.testing.assert_close(
        2 * torch.log((1 - later) / later), 2 * torch.log((1 - t) / t) - 2 * math.log(factor), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_slope_is_the_derivative(name):
    middle = (torch.arange(50, 950, 50, dtype=torch.float64) + 0.5) / 999  # between the entries of the tables
    step = 1e-6
    differences = (SCHEDULES[name](middle - step) - SCHEDULES[name](middle + step)) / (2 * step)
    # Second-order differences.
    torch.testing.assert_close(slope(SCHEDULES[name], middle), differences, rtol=1e-5, atol=1e-5)


def test_given_levels_must_rise():
    assert given_grid([-8.0, 0.0, 3.5]).tolist() == [-8, 0, 3.5]
    for levels in ([], [1.0, 1.0], [2.0, 1.0], [0.0, float("inf")]):
        with pytest.raises(UserError):
            given_grid(levels)
    with pytest.raises(UserError, match="distinguish"):
        check_grid(torch.linspace(8, 8.00001, 1000, dtype=torch.float64))


def test_paths_that_go_back():
    grid = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    again = [-2.0, 0.0, 2.0]
    assert restarted(grid, 1, cleanest=3.0).tolist() == [-4, -2, 0, 2, *again, 4]
    assert restarted(grid, 2, cleanest=3.0).tolist() == [-4, -2, 0, 2, *again, *again, 4]
    assert restarted(grid, 2, noisiest=3.0).tolist() == grid.tolist()
    assert jumping(grid, 2).tolist() == [-4, -2, -4, -2, 0, -2, 0, 2, 0, 2, 4, 2, 4]
    assert jumping(grid, 1).tolist() == grid.tolist()
    path = churned(grid, 40.0)
    # Five steps, so sigma / alpha grows by sqrt(2) before each but the first and the last: by log 2 in log-SNR.
    assert path.tolist()[0] == -4 and path.tolist()[-1] == 4
    torch.testing.assert_close(
        path[1:-1:2] - path[2::2], torch.full((3,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert churned(grid, 0.0).tolist() == grid.tolist()
