"""Every sampler against a mixture of Gaussians: the order of the deterministic ones, the moments of the others."""

from __future__ import annotations

import pytest

from samplers import moments, slope
from snowmelt.diffusion.grids import GRIDS
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SCHEDULES

PATHS = [name for name, method in SAMPLERS.items() if method.order is not None]
CHANCE = [name for name, method in SAMPLERS.items() if method.order is None]
SAME = {"euler": "ddim", "dpmpp_1s": "ddim", "euler_ancestral": "ddpm"}
"""Samplers of two names, but for their grids."""


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
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_order_at_even_times(sampler, schedule):
    assert abs(slope(sampler, schedule, "time", (256, 512)) - SAMPLERS[sampler].order) < 0.15


@pytest.mark.parametrize("sampler", [name for name in CHANCE if name not in SAME])
def test_mean_and_covariance_are_those_of_the_data(sampler):
    """Within four standard errors of 10,000 draws, at 400 steps: what is left of the first order is below that."""
    assert moments(sampler, GRIDS[SAMPLERS[sampler].grid](SCHEDULES["cosine"], 400), 10_000) < 4
