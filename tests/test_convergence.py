"""Every sampler against a mixture of Gaussians: the order of the deterministic ones, the moments of the others."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest

from samplers import moments, slope
from snowmelt.diffusion.grids import GRIDS
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SCHEDULES

PATHS = [name for name, method in SAMPLERS.items() if method.order is not None]
CHANCE = [name for name, method in SAMPLERS.items() if method.order is None]
SAME = {"euler": "ddim", "dpmpp_1s": "ddim", "euler_ancestral": "ddpm"}
"""Samplers of two names, but for their grids."""


@pytest.fixture(scope="module", autouse=True)
def shapes_unchecked() -> Iterator[None]:
    """Checking the shapes of so few numbers in each of many thousand steps takes longer than the steps;
    test_samplers.py does it for every sampler."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", SAME)
def test_samplers_of_two_names_are_one(name):
    one, other = SAMPLERS[name], SAMPLERS[SAME[name]]
    assert (one.how or one.sampler) == (other.how or other.sampler)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize("sampler", [name for name in PATHS if name not in SAME])
def test_the_order_of_convergence(sampler, schedule):
    """Between 256 and 512 steps of the sampler's own grid the slope is the order; no other whole number is near."""
    method = SAMPLERS[sampler]
    assert abs(slope(sampler, schedule, method.grid, (256, 512)) - method.order) < 0.15


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow", "edm"])
def test_the_order_at_even_times(schedule):
    """Of `heun`, whose own grid is another; that of `ddim` is this one."""
    assert SAMPLERS["heun"].grid != SAMPLERS["ddim"].grid == "time"
    assert abs(slope("heun", schedule, "time", (256, 512)) - SAMPLERS["heun"].order) < 0.15


@pytest.mark.parametrize("sampler", [name for name in CHANCE if name not in SAME])
def test_mean_and_covariance_are_those_of_the_data(sampler):
    """Within four standard errors of 10,000 draws, at 400 steps: what is left of the first order is below that."""
    assert moments(sampler, GRIDS[SAMPLERS[sampler].grid](SCHEDULES["cosine"], 400), 10_000) < 4
