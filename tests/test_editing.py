"""Editing: what is known stays, noise keeps its length, sampling undoes inversion, observations obey Bayes' rule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from snowmelt.diffusion.editing import (
    FILLS,
    anderson,
    blurred,
    conjugate_gradients,
    cut,
    greyed,
    inpainted,
    inversion,
    observed,
    psnr,
    shown,
    shrunk,
    slerp,
)
from snowmelt.diffusion.exact import GaussianMixture, dataset_denoiser, gaussian_denoiser
from snowmelt.diffusion.grids import GRIDS, jumping, time_grid
from snowmelt.diffusion.noise import add_noise, alpha_sigma
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SCHEDULES, cosine
from snowmelt.diffusion.walk import Step


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise(number: int) -> Tensor:
    raise AssertionError("no noise is wanted here")


MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    0.5 * draws(3, 1, 4, 4, seed=1),
    torch.tensor([0.15, 0.2, 0.3], dtype=torch.float64),
)
PICTURES = torch.sign(draws(6, 1, 4, 4, seed=2))
TOP = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
TOP[:, :, 2:] = 1  # the lower half is to be filled in


def walked(sampler: str, denoise, x: Tensor, grid: Tensor, shape: tuple[int, ...] | None = None) -> list[Step]:
    noise = (lambda number: draws(*shape, seed=100 + number)) if shape else no_noise
    return list(SAMPLERS[sampler](denoise, x, grid, noise))


# filling in


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_known_pixels_come_out_as_they_went_in(name, sampler):
    fill, known = FILLS[name], PICTURES[:1]
    denoise = fill.denoise(MIXTURE.denoise, known, TOP, 0.5)
    x = draws(3, 1, 4, 4)
    last = walked(sampler, denoise, x, fill.path(time_grid(cosine, 12)), tuple(x.shape))[-1].x0
    assert torch.equal(last[:, :, :2], known[:, :, :2].expand(3, 1, 2, 4))
    assert not torch.isclose(last[:, :, 2:], known[:, :, 2:]).all()


def test_the_posterior_fill_knows_the_spread_of_the_data():
    """Data of deviation 0.1 whose pixels are all alike: what is known of one half is Bayes' rule for the other."""
    level, spread, x = torch.tensor(0.0, dtype=torch.float64), 0.1, draws(1, 1, 4, 4)
    known = torch.full((1, 1, 4, 4), 0.2, dtype=torch.float64)
    alpha, sigma = alpha_sigma(level, x)

    def alike(x: Tensor, _log_snr: Tensor) -> Tensor:
        share = alpha * spread**2 / (16 * alpha**2 * spread**2 + sigma**2)
        return (share * x.sum()).expand_as(x)

    found = FILLS["posterior"].denoise(alike, known, TOP, spread)(x, level)
    by_hand = observed(alike, shown(1 - TOP), known * (1 - TOP), 0.02, spread=spread)(x, level)
    torch.testing.assert_close(found[:, :, 2:], by_hand[:, :, 2:])
    other = FILLS["posterior"].denoise(alike, known, TOP, 0.5)(x, level)
    assert (found - other)[:, :, 2:].abs().min() > 1e-3


def test_a_known_pixel_keeps_its_noise_along_the_walk():
    """Why one line is replacement: at every level DDIM's known pixels are alpha x0 + sigma (their first noise)."""
    known, noise, grid = PICTURES[:2], draws(2, 1, 4, 4), time_grid(cosine, 15)
    for step in walked("ddim", inpainted(MIXTURE.denoise, known, TOP), add_noise(known, noise, grid[0]), grid):
        expected = add_noise(known, noise, step.log_snr)
        # 15 steps in float64.
        torch.testing.assert_close(step.x[:, :, :2], expected[:, :, :2], rtol=0, atol=1e-12)


def test_half_known_masks_mix():
    half = inpainted(lambda x, _: 0 * x + 1, PICTURES[:1], 0.5 * torch.ones_like(TOP))
    torch.testing.assert_close(half(draws(1, 1, 4, 4), torch.tensor(0.0)), (PICTURES[:1] + 1) / 2)


def test_repaint_finds_the_picture_that_fits():
    """Six pictures, the upper half of one known: the only picture of the set that goes with it is that one."""
    grid = jumping(time_grid(cosine, 20), 4, 4)
    x = draws(16, 1, 4, 4, seed=5)
    denoise = inpainted(dataset_denoiser(PICTURES), PICTURES[3:4], TOP)
    last = walked("ddpm", denoise, x, grid, tuple(x.shape))[-1].x0
    # At the last level, +10, a denoiser of a finite set gives its picture but for exp(-thousands).
    torch.testing.assert_close(last, PICTURES[3:4].expand_as(last), rtol=0, atol=1e-6)


# variation


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_cut_schedule_is_the_clean_end_of_it(name):
    schedule, times = SCHEDULES[name], torch.linspace(0, 1, 7, dtype=torch.float64)
    assert torch.equal(cut(schedule, 1.0)(times), schedule(times))
    assert torch.equal(cut(schedule, 0.25)(times), schedule(times / 4))


def test_a_variation_keeps_the_share_alpha_of_a_gaussian():
    """Of unit Gaussian data the flow moves nothing, so what was alpha x0 + sigma noise is the variation itself."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    grid = time_grid(cut(cosine, 0.4), 400)
    start = add_noise(draws(2, 1, 4, 4), draws(2, 1, 4, 4, seed=7), grid[0])
    last = walked("dpmpp_2m", gaussian_denoiser(zero, one), start, grid)[-1]
    # The error of 400 steps of second order, and 1 - alpha at the level +10.
    torch.testing.assert_close(last.x0, start, rtol=0, atol=3e-3)


# interpolation


def test_slerp_keeps_lengths_and_ends_and_divides_the_angle():
    start, end = draws(3, 1, 4, 4), draws(3, 1, 4, 4, seed=1)
    end = end * (start.flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    points = [slerp(start, end, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    # float64
    torch.testing.assert_close(points[0], start, rtol=0, atol=1e-14)
    torch.testing.assert_close(points[-1], end, rtol=0, atol=1e-14)
    steps = [(one - other).flatten(1).norm(dim=1) for one, other in pairwise(points)]
    for point, step in zip(points[:-1], steps, strict=True):
        torch.testing.assert_close(point.flatten(1).norm(dim=1), start.flatten(1).norm(dim=1), rtol=1e-13, atol=0)
        torch.testing.assert_close(step, steps[0], rtol=1e-12, atol=0)


def test_slerp_between_lengths_and_along_one_direction():
    start = draws(2, 1, 4, 4)
    torch.testing.assert_close(slerp(start, 3 * start, 0.5), 2 * start, rtol=1e-12, atol=0)
    torch.testing.assert_close(slerp(start, start, 0.3), start, rtol=0, atol=1e-14)


# inversion


def clean_pictures() -> Tensor:
    return MIXTURE.sample(4, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [20, 100])
def test_inversion_then_sampling_returns_the_picture(grid, steps):
    images, levels = clean_pictures(), GRIDS[grid](cosine, steps)
    *_, last = inversion(MIXTURE.denoise, images, levels)
    assert last.log_snr == levels[0]
    again = walked("ddim", MIXTURE.denoise, last.x, levels)[-1].x0
    # The tolerance of 1e-5 at each of the levels, against a range of 2: 106 dB, less what the walk makes of it.
    assert psnr(again, images).min() > 70


def test_inversion_is_the_inverse_also_of_the_noise():
    noise, levels = draws(4, 1, 4, 4, seed=9), time_grid(cosine, 50)
    images = walked("ddim", MIXTURE.denoise, noise, levels)[-1].x0
    *_, last = inversion(MIXTURE.denoise, images, levels, rounds=30, tolerance=1e-10)
    # Directions in which the data hardly vary are stretched on the way to the noise, and rounding with them.
    torch.testing.assert_close(last.x, noise, rtol=0, atol=1e-3)


def test_one_round_a_level_is_one_evaluation_and_less_exact():
    calls: list[int] = []

    def counting(x: Tensor, log_snr: Tensor) -> Tensor:
        calls.append(1)
        return MIXTURE.denoise(x, log_snr)

    images, levels = clean_pictures(), time_grid(cosine, 100)

    def quality(rounds: int) -> float:
        calls.clear()
        *_, last = inversion(counting, images, levels, rounds=rounds)
        assert len(calls) <= rounds * 100
        return float(psnr(walked("ddim", MIXTURE.denoise, last.x, levels)[-1].x0, images).min())

    once = quality(1)
    assert len(calls) == 100
    assert 25 < once < quality(8) - 20


def test_anderson_solves_what_putting_in_again_cannot():
    """x -> b - 20 x runs away from its fixed point; in n dimensions n + 1 differences of a linear map say all."""
    rates = torch.tensor([-20.0, -3.0, 0.5, 0.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    asked, changes = [draws(1, 1, 2, 2)], []
    for _ in range(5):
        changes.append(1 + rates * asked[-1] - asked[-1])
        asked.append(anderson(asked, changes))
    # The ridge of 1e-10 against rates of 20.
    torch.testing.assert_close(asked[-1], 1 / (1 - rates), rtol=0, atol=1e-6)


def test_psnr():
    assert psnr(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)).item() == pytest.approx(20 * math.log10(20))
    assert psnr(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item() == math.inf


# inverse problems

OPERATORS = {
    "shrunk": (shrunk(2), 1),
    "blurred": (blurred(0.8), 1),
    "shown": (shown(1 - TOP), 1),
    "greyed": (greyed, 3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_linear_and_keeps_grey_grey(name):
    operator, channels = OPERATORS[name]
    one, other = draws(2, channels, 4, 4), draws(2, channels, 4, 4, seed=1)
    torch.testing.assert_close(operator(2 * one - other), 2 * operator(one) - operator(other), rtol=0, atol=1e-13)
    if name != "shown":
        flat = operator(torch.full((1, channels, 4, 4), 0.3, dtype=torch.float64))
        torch.testing.assert_close(flat, torch.full_like(flat, 0.3), rtol=0, atol=1e-14)  # one sum in float64


@pytest.mark.parametrize("width", [0.8, 2.0])
def test_a_blur_is_that_of_scipy(width):
    images = draws(2, 1, 9, 9)
    reach = math.ceil(3 * width)
    wanted = gaussian_filter(images.numpy(), (0, 0, width, width), mode="nearest", radius=(0, 0, reach, reach))
    torch.testing.assert_close(blurred(width)(images), torch.from_numpy(wanted), rtol=0, atol=1e-13)


def test_grey_is_the_luma_of_the_colours():
    colours = torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1)
    assert greyed(colours).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def matrix_of(operator, channels: int) -> Tensor:
    """(outputs, inputs)"""
    basis = torch.eye(channels * 16, dtype=torch.float64).reshape(-1, channels, 4, 4)
    return operator(basis).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("log_snr", [-6.0, 0.0, 5.0])
def test_an_observation_is_bayes_rule_for_gaussian_data(name, log_snr):
    """Prior N(0.1, 0.5^2), x = alpha x0 + sigma noise, y = A x0 + 0.1 noise: all Gaussian, so the answer is known."""
    operator, channels = OPERATORS[name]
    level, std, spread = torch.tensor(log_snr, dtype=torch.float64), 0.1, 0.5
    x = draws(3, channels, 4, 4)
    value = operator(draws(1, channels, 4, 4, seed=4))
    prior = gaussian_denoiser(*(torch.tensor(one, dtype=torch.float64) for one in (0.1, spread)))
    with torch.no_grad():
        guided = observed(prior, operator, value, std, spread=spread)(x, level)
    matrix = matrix_of(operator, channels)
    alpha, sigma = alpha_sigma(level, x)
    precision = torch.eye(channels * 16).double() * (1 / spread**2 + alpha**2 / sigma**2) + matrix.T @ matrix / std**2
    known = 0.1 / spread**2 + alpha / sigma**2 * x.flatten(1) + value.flatten(1) @ matrix / std**2
    # The tolerance of conjugate gradients, 1e-6 of the surprise.
    torch.testing.assert_close(guided.flatten(1), known @ torch.linalg.inv(precision), rtol=0, atol=1e-5)


def test_what_was_observed_is_found_in_the_picture():
    """A walk with a mixture that never saw the picture: its small version is met within the noise allowed."""
    value = shrunk(2)(clean_pictures())
    denoise = observed(MIXTURE.denoise, shrunk(2), value, std=0.02, spread=0.5)
    x = draws(4, 1, 4, 4)
    last = walked("ddim", denoise, x, time_grid(cosine, 40))[-1].x0
    assert (shrunk(2)(last) - value).square().mean().sqrt() < 0.04
    alone = walked("ddim", MIXTURE.denoise, x, time_grid(cosine, 40))[-1].x0
    assert (shrunk(2)(alone) - value).square().mean().sqrt() > 0.2


def test_conjugate_gradients_solve_each_image_by_itself():
    root = draws(16, 16)
    matrix = root @ root.T + torch.eye(16, dtype=torch.float64)
    wanted = draws(3, 1, 4, 4)
    wanted[1] = 0

    def times(images: Tensor) -> Tensor:
        return (images.flatten(1) @ matrix).reshape(images.shape)

    found = conjugate_gradients(times, wanted, 40, tolerance=1e-12)
    # The condition of the matrix, about 60, times float64's rounding.
    torch.testing.assert_close(times(found), wanted, rtol=0, atol=1e-10)
    assert (found[1] == 0).all()
