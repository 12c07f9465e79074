"""The table of predictions: every row, at every level, asks for what its name says and gives the picture back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import Answer
from snowmelt.diffusion.denoiser import PREDICTS, Denoiser, beginning_with
from snowmelt.diffusion.exact import GaussianMixture, dataset_denoiser, gaussian_denoiser
from snowmelt.diffusion.noise import BOUND, add_noise, alpha_sigma
from snowmelt.diffusion.schedules import ddpm_time
from snowmelt.errors import UserError

DATA_STD = 0.3
LEVELS = torch.linspace(-BOUND, BOUND, 41, dtype=torch.float64)
RNG = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(2, len(LEVELS), 1, 2, 2, generator=RNG, dtype=torch.float64)
X = add_noise(X0, NOISE, LEVELS)


def textbook_target(predicts: str) -> Tensor:
    """What the network should say, from the papers and not from the table."""
    alpha, sigma = alpha_sigma(LEVELS, X0)
    if predicts == "edm":
        # Karras et al. 2022, table 1, for x_ve = x0 + s noise: F* = (x0 - c_skip(s) x_ve) / c_out(s).
        s = sigma / alpha
        x_ve = X0 + s * NOISE
        c_skip, c_out = DATA_STD**2 / (s**2 + DATA_STD**2), s * DATA_STD / (s**2 + DATA_STD**2).sqrt()
        return (X0 - c_skip * x_ve) / c_out
    return {"noise": NOISE, "image": X0, "v": alpha * NOISE - sigma * X0, "velocity": NOISE - X0}[predicts]


@pytest.mark.parametrize("predicts", PREDICTS)
def test_the_right_answer_gives_the_picture(predicts):
    denoiser = Denoiser(Answer(textbook_target(predicts)), predicts, DATA_STD)
    # The noise row divides by alpha >= e^-5 = 1/148: a rounding of 1e-16 becomes a few 1e-14.
    torch.testing.assert_close(denoiser(X, LEVELS), X0, rtol=0, atol=2e-13)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_a_censored_answer_ends_where_pictures_do(predicts):
    denoiser = Denoiser(Answer(textbook_target(predicts)), predicts, DATA_STD, censored=True)
    assert X0.abs().max() > 1
    torch.testing.assert_close(denoiser(X, LEVELS), X0.clamp(-1, 1), rtol=0, atol=2e-13)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_the_target_of_the_loss_is_the_right_answer(predicts):
    _, c_skip, c_out = Denoiser(Answer(X), predicts, DATA_STD).coefficients(LEVELS, X)
    # Divided by c_out, which is e^-5 = 1/148 at the clean end.
    torch.testing.assert_close((X0 - c_skip * X) / c_out, textbook_target(predicts), rtol=0, atol=2e-13)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_float32_is_exact_enough_within_the_bounds(predicts):
    target, x, level = textbook_target(predicts).float(), X.float(), LEVELS.float()
    denoiser = Denoiser(Answer(target), predicts, DATA_STD)
    _, c_skip, c_out = denoiser.coefficients(level, x)
    # float32 rounds values of up to 4 by 2e-7; rows magnify by at most e^5 = 148, a few roundings at a time.
    assert (denoiser(x, level) - X0).abs().max() < 2e-4
    assert ((X0.float() - c_skip * x) / c_out - target).abs().max() < 2e-4


@pytest.mark.parametrize("predicts", PREDICTS)
def test_what_the_network_is_shown(predicts):
    """x itself, but for edm, whose network sees Karras' c_in(s) (x0 + s noise); and the DDPM time of the level."""
    backbone = Answer(X)
    labels = torch.arange(len(LEVELS))
    Denoiser(backbone, predicts, DATA_STD)(X, LEVELS, labels)
    alpha, sigma = alpha_sigma(LEVELS, X)
    s = sigma / alpha
    seen = (X0 + s * NOISE) / (s**2 + DATA_STD**2).sqrt() if predicts == "edm" else X
    torch.testing.assert_close(backbone.x, seen, rtol=0, atol=1e-13)  # float64, values of order 1
    assert torch.equal(backbone.time, ddpm_time(LEVELS.float())) and backbone.cond is labels


def test_edm_keeps_unit_variance_at_every_level():
    """For data of standard deviation `data_std`, input and target have variance 1 and are uncorrelated."""
    c_in, c_skip, c_out = Denoiser(Answer(X), "edm", DATA_STD).coefficients(LEVELS, X)
    alpha, sigma = alpha_sigma(LEVELS, X)
    # Both are sums of x0 / data_std and noise, which are independent and of variance 1; here with which shares.
    seen = c_in * alpha * DATA_STD, c_in * sigma
    target = (1 - c_skip * alpha) * DATA_STD / c_out, -c_skip * sigma / c_out
    one = torch.ones_like(alpha)
    # float64; 1 - c_skip alpha cancels down to 5e-4 at the clean end.
    torch.testing.assert_close(seen[0] ** 2 + seen[1] ** 2, one, rtol=0, atol=1e-11)
    torch.testing.assert_close(target[0] ** 2 + target[1] ** 2, one, rtol=0, atol=1e-11)
    torch.testing.assert_close(seen[0] * target[0] + seen[1] * target[1], 0 * one, rtol=0, atol=1e-11)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_one_level_for_all_is_that_level_for_each(predicts):
    backbone = Answer(NOISE)
    denoiser = Denoiser(backbone, predicts, DATA_STD)
    for level in LEVELS[::10]:
        together = denoiser(X, level)
        assert backbone.time.shape == (len(X),)
        assert torch.equal(together, denoiser(X, level.expand(len(X))))


def test_an_unknown_prediction_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'velocity'"):
        Denoiser(Answer(X), "velocty")


def test_of_nothing_but_noise_the_answer_is_the_mean():
    """As of the exact denoiser: a share of 4e-6 of x is picture, and moves its answer by less than 1e-4."""
    mixture = GaussianMixture(
        torch.tensor([0.7, 0.3]), torch.tensor([-0.5, 0.9]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2])
    )
    noise, start = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(-25.0)
    mean = torch.tensor([0.7 * -0.5 + 0.3 * 0.9]).reshape(1, 1, 1, 1)
    denoise = beginning_with(mean, mixture.denoise)
    first = denoise(noise, start)
    torch.testing.assert_close(first, mixture.denoise(noise, start), rtol=0, atol=1e-4)
    assert (first == mean).all() and first.shape == noise.shape
    # Only once, also where a walk comes back to where it began.
    assert torch.equal(denoise(noise, start), mixture.denoise(noise, start))


def test_exact_denoisers_agree():
    """A finite set that fills a Gaussian evenly is that Gaussian, as long as the noise is wider than its gaps."""
    mean, std, count = 0.2, 0.5, 4001
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    images = (mean + std * torch.special.ndtri(quantiles)).reshape(-1, 1, 1, 1)
    finite = dataset_denoiser(images)
    exact = gaussian_denoiser(torch.tensor(mean), torch.tensor(std))
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for level in LEVELS[abs(LEVELS) <= 4]:
        # The midpoint rule cuts the tails beyond the 1/8002 quantile, 3.7 standard deviations out.
        torch.testing.assert_close(finite(x, level), exact(x, level), rtol=0, atol=2e-3)
