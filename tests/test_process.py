"""The process as the paper writes it: steps make the jump, Bayes' rule the posterior, the terms the bound; and the
log-SNR core agrees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, rescale_zero_terminal_snr
from torch.distributions import Normal, kl_divergence

from snowmelt.diffusion import process, variance
from snowmelt.diffusion.noise import add_noise, alpha_sigma
from snowmelt.errors import UserError

BETAS = process.linear_betas()
ALPHA_BARS = process.alpha_bars(BETAS)
ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_table_is_the_one_of_the_paper():
    assert BETAS.shape == (1000,) and BETAS.dtype == torch.float64
    beta = [1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]
    torch.testing.assert_close(BETAS, torch.tensor(beta, dtype=torch.float64), rtol=1e-14, atol=0)  # one rounding each
    # A sum of logarithms instead of a product; 1000 roundings of 1.1e-16.
    last = math.exp(math.fsum(math.log1p(-b) for b in beta))
    assert math.isclose(ALPHA_BARS[-1], last, rel_tol=2e-13)
    assert last < 5e-5, "so little of the picture is left that sampling may start from pure noise"


def test_alpha_bars_agree_with_diffusers():
    reference = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod
    # The reference multiplies 1000 float32 numbers: 1000 roundings of 6e-8.
    torch.testing.assert_close(reference.double(), ALPHA_BARS, rtol=6e-5, atol=0)


def test_steps_make_the_jump_exactly():
    """Both are affine in x and the noise, so scale and variance can be carried along without drawing."""
    scale, variance = ONE, ZERO
    for beta, alpha_bar in zip(BETAS, ALPHA_BARS, strict=True):
        scale = process.forward_step(scale, beta, ZERO)
        variance = process.forward_step(ONE, beta, ZERO) ** 2 * variance + process.forward_step(ZERO, beta, ONE) ** 2
        # Up to 1000 steps of a few roundings of 1.1e-16.
        torch.testing.assert_close(scale, process.forward_jump(ONE, alpha_bar, ZERO), rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, process.forward_jump(ZERO, alpha_bar, ONE) ** 2, rtol=1e-12, atol=0)


def test_drawn_steps_have_the_moments_of_the_jump():
    betas, count = process.linear_betas(20, 0.01, 0.3), 100_000
    x = torch.full((count,), 0.7, dtype=torch.float64)
    for step, beta in enumerate(betas):
        x = process.forward_step(x, beta, draws(count, seed=step))
    alpha_bar = process.alpha_bars(betas)[-1]
    variance = 1 - alpha_bar
    # Four standard errors, of a mean and of a variance.
    assert abs(x.mean() - 0.7 * alpha_bar.sqrt()) < 4 * (variance / count).sqrt()
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / count)


def test_posterior_is_bayes_rule():
    """q(x_t-1 | x_t, x_0) is likelihood q(x_t | x_t-1) times prior q(x_t-1 | x_0): precisions add."""
    x0, x = draws(2, 5)
    for t in range(1, 1000):
        beta, alpha_bar, previous = BETAS[t], ALPHA_BARS[t], ALPHA_BARS[t - 1]
        mean, variance = process.posterior(x0, x, beta=beta, alpha_bar=alpha_bar, alpha_bar_previous=previous)
        precision = (1 - beta) / beta + 1 / (1 - previous)
        expected = ((1 - beta).sqrt() / beta * x + previous.sqrt() / (1 - previous) * x0) / precision
        # 1 - alpha_bar is 1e-4 at first, so roundings of 1.1e-16 are 1e-12 of it.
        torch.testing.assert_close(variance, 1 / precision, rtol=1e-11, atol=0)
        torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-11)


def test_the_first_step_goes_back_to_the_picture():
    x0, x = draws(2, 5)
    mean, variance = process.posterior(x0, x, beta=BETAS[0], alpha_bar=ALPHA_BARS[0], alpha_bar_previous=1.0)
    torch.testing.assert_close(mean, x0, rtol=1e-11, atol=0)  # beta / (1 - alpha_bar) is 1 up to 1.1e-16 / 1e-4
    assert variance == 0


def test_reverse_mean_is_the_posterior_of_the_predicted_picture():
    x, noise = draws(2, 5)
    for t in range(1, 1000):
        beta, alpha_bar, previous = BETAS[t], ALPHA_BARS[t], ALPHA_BARS[t - 1]
        x0 = process.x0_from_noise(x, alpha_bar, noise)
        expected, _ = process.posterior(x0, x, beta=beta, alpha_bar=alpha_bar, alpha_bar_previous=previous)
        # x0 is up to 1 / sqrt(4e-5) = 158 and cancels again; 1 - alpha_bar as above.
        torch.testing.assert_close(
            process.reverse_mean(x, noise, beta=beta, alpha_bar=alpha_bar), expected, rtol=1e-10, atol=1e-11
        )


def test_the_jump_is_undone_by_its_noise():
    x0, noise = draws(2, 5)
    for alpha_bar in ALPHA_BARS:
        x = process.forward_jump(x0, alpha_bar, noise)
        # Divided by sqrt(alpha_bar) >= 0.0063: a rounding of 1e-16 becomes 2e-14.
        torch.testing.assert_close(process.x0_from_noise(x, alpha_bar, noise), x0, rtol=0, atol=2e-13)


def test_log_snr_says_the_same_as_the_table():
    """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), and adding noise at a level is the jump."""
    levels = process.log_snr_table(BETAS)
    assert (levels.diff() < 0).all()
    x0, noise = draws(2, 1000, 1, 1, 1)
    alpha, sigma = alpha_sigma(levels, x0)
    # A rounding of a level up to 10 is 1e-15, and so is the relative change of alpha and sigma.
    torch.testing.assert_close(alpha.flatten() ** 2, ALPHA_BARS, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma.flatten() ** 2, 1 - ALPHA_BARS, rtol=1e-12, atol=0)
    jump = process.forward_jump(x0, ALPHA_BARS.reshape(-1, 1, 1, 1), noise)
    torch.testing.assert_close(add_noise(x0, noise, levels), jump, rtol=1e-12, atol=1e-12)


THEIRS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}


@pytest.mark.parametrize("name", process.BETAS)
@pytest.mark.parametrize("steps", [10, 1000])
def test_every_table_is_the_one_of_diffusers(name, steps):
    ours = process.BETAS[name](steps)
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=THEIRS[name]).betas
    # Float32, and squared or subtracted from 1 there: a few roundings of 6e-8 of a number up to 1.
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=2e-7)
    assert ours.dtype == torch.float64 and ((ours > 0) & (ours < 1)).all()


@pytest.mark.parametrize("name", process.BETAS)
def test_zero_terminal_snr_is_the_one_of_diffusers(name):
    betas = process.BETAS[name](1000)
    ours = process.zero_terminal_snr(betas)
    # The same algorithm in the same precision, but for the order of the operations: 1000 roundings of 1.1e-16, divided
    # by sqrt(alpha_bar) of the last step but one, which is 1.5e-3 at the least.
    torch.testing.assert_close(ours, rescale_zero_terminal_snr(betas), rtol=0, atol=1e-10)
    assert process.check_betas(ours)[-1] == 1 and process.alpha_bars(ours)[-1] == 0
    torch.testing.assert_close(ours[0], betas[0], rtol=1e-11, atol=0)
    x0, noise = draws(2, 5)
    assert torch.equal(process.forward_jump(x0, process.alpha_bars(ours)[-1], noise), noise), "pure noise"


@pytest.mark.parametrize(
    ("betas", "said"),
    [
        ([0.1], "shape (1,)"),
        ([], "shape (0,)"),
        ([[0.1, 0.2]], "shape (1, 2)"),
        ([0.0, 0.1], "Step 1 of 2 has beta 0"),
        ([0.1, 1.0, 0.2], "Step 2 of 3 has beta 1"),
        ([0.1, 1.5], "Step 2 of 2 has beta 1.5"),
        ([0.1, -0.1], "Step 2 of 2 has beta -0.1"),
        ([0.1, math.nan], "beta nan"),
    ],
)
def test_what_is_no_table_is_refused(betas, said):
    for use in (process.check_betas, process.zero_terminal_snr):
        with pytest.raises(UserError) as refused:
            use(torch.tensor(betas, dtype=torch.float64))
        assert said in str(refused.value)


def test_a_table_may_end_with_one():
    process.check_betas(torch.tensor([0.1, 1.0]))


def test_kl_of_two_gaussians():
    mean, other = draws(2, 100)
    variance_, other_variance = draws(2, 100, seed=1).exp()
    expected = kl_divergence(Normal(mean, variance_.sqrt()), Normal(other, other_variance.sqrt()))
    torch.testing.assert_close(
        process.gaussian_kl(mean, variance_, other, other_variance), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", process.BETAS)
def test_the_step_term_is_the_weighted_error_of_the_noise(name):
    """Equation 12, and what another variance adds to it: the KL of the variances alone."""
    betas = process.BETAS[name](1000)
    x0, noise, guess = draws(3, 5)
    for t in range(2, 1001, 7):
        at = process.moment(betas, t)
        x = process.forward_jump(x0, at.alpha_bar, noise)
        smallest = process.posterior_variance(at)
        for chosen in (smallest, process.forward_variance(at), 1.7 * smallest):
            nothing = process.gaussian_kl(ZERO, smallest, ZERO, chosen)
            expected = nothing + process.noise_weight(at, chosen) * (guess - noise) ** 2
            # 1 - alpha_bar is 9e-5 at the least, so that a rounding of 1.1e-16 is 1e-12 of it.
            torch.testing.assert_close(process.step_term(x0, x, guess, at, chosen), expected, rtol=1e-10, atol=1e-12)


def test_the_simple_loss_is_the_error_without_its_weight():
    noise, guess = draws(2, 50)
    at = process.moment(BETAS, 400)
    x0 = draws(50, seed=3)
    x = process.forward_jump(x0, at.alpha_bar, noise)
    smallest = process.posterior_variance(at)
    term = process.step_term(x0, x, guess, at, smallest).mean()
    torch.testing.assert_close(
        process.simple_loss(noise, guess) * process.noise_weight(at, smallest), term, rtol=1e-10, atol=0
    )


MEAN, STD = 0.3, 0.5


def known_gaussian(at: process.Moment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of data N(MEAN, STD^2): the moments of x0 and of the noise at the points of a quadrature that is exact for
    polynomials of degree 9, the weights of the points, and Var(x_0 | x_t)."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(5))
    x0, noise = torch.meshgrid(MEAN + STD * points, points, indexing="ij")
    share = torch.outer(weights, weights) / (2 * math.pi)
    return x0, noise, share, STD**2 * (1 - at.alpha_bar) / (at.alpha_bar * STD**2 + 1 - at.alpha_bar)


def perfect_noise(x: torch.Tensor, at: process.Moment) -> torch.Tensor:
    """E[noise | x_t]."""
    variance_ = at.alpha_bar * STD**2 + 1 - at.alpha_bar
    return (1 - at.alpha_bar).sqrt() * (x - at.alpha_bar.sqrt() * MEAN) / variance_


@pytest.mark.parametrize("betas", [process.linear_betas(20, 0.01, 0.3), process.cosine_betas(50)])
def test_a_perfect_denoiser_reaches_the_bound(betas):
    """The terms of known Gaussian data sum to its entropy, and to what q(x_T) lacks of a standard normal."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(1, len(betas) + 1):
        at = process.moment(betas, t)
        x0, noise, share, unknown = known_gaussian(at)
        x = process.forward_jump(x0, at.alpha_bar, noise)
        best = process.analytic_variance(at, unknown)
        guess = perfect_noise(x, at)
        if t == 1:  # the data are continuous here: their density takes the place of the bins
            mean = process.reverse_mean(x, guess, beta=at.beta, alpha_bar=at.alpha_bar)
            term = (torch.log(2 * math.pi * best) + (x0 - mean) ** 2 / best) / 2
        else:
            term = process.step_term(x0, x, guess, at, best)
        total += (share * term).sum()
    x0, _, share, _ = known_gaussian(at)
    total += (share * process.prior_term(x0, at.alpha_bar)).sum()
    entropy = math.log(2 * math.pi * math.e * STD**2) / 2
    last = at.alpha_bar * STD**2 + 1 - at.alpha_bar
    lack = process.gaussian_kl(at.alpha_bar.sqrt() * MEAN, last, ZERO, ONE)
    torch.testing.assert_close(total, entropy + lack[0], rtol=0, atol=1e-10)


def test_the_analytic_variance_is_the_best_one():
    """And the variance of x_t-1 given x_t, which for Gaussian data follows from Bayes' rule; the two bounds enclose
    it for data of variance up to 1, and are it at 1 and at 0."""
    for t in range(2, 1001, 11):
        at = process.moment(BETAS, t)
        x0, noise, share, unknown = known_gaussian(at)
        best = process.analytic_variance(at, unknown)
        before = at.alpha_bar_previous * STD**2 + 1 - at.alpha_bar_previous
        torch.testing.assert_close(best, 1 / (1 / before + (1 - at.beta) / at.beta), rtol=1e-10, atol=0)

        x = process.forward_jump(x0, at.alpha_bar, noise)
        guess = perfect_noise(x, at)
        bounds = [(share * process.step_term(x0, x, guess, at, best * f)).sum() for f in (0.99, 1.0, 1.01)]
        assert bounds[1] < min(bounds[0], bounds[2])

        smallest, largest = process.posterior_variance(at), process.forward_variance(at)
        assert smallest < best < largest
        torch.testing.assert_close(process.analytic_variance(at, ZERO), smallest * ONE, rtol=1e-12, atol=0)
        torch.testing.assert_close(process.analytic_variance(at, 1 - at.alpha_bar), largest, rtol=1e-10, atol=0)


def test_the_learned_variance_lies_between_the_bounds():
    at = process.moment(BETAS, 3)
    share = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    low, high = process.posterior_variance(at), process.forward_variance(at)
    expected = torch.stack([low, (low * high).sqrt(), high])
    torch.testing.assert_close(process.learned_variance(at, share), expected, rtol=1e-12, atol=0)


def test_the_variances_of_levels_are_those_of_the_table():
    levels, x = process.log_snr_table(BETAS), draws(1, 1, 1, 1)
    for t in range(2, 1001, 13):
        at = process.moment(BETAS, t)
        for ours, theirs in (
            (process.forward_variance, variance.forward),
            (process.posterior_variance, variance.posterior),
        ):
            # Levels that differ by 2e-2 at the least and are up to 10: a rounding of 1e-15 is 1e-13 of the difference.
            torch.testing.assert_close(theirs(x, levels[t - 1], levels[t - 2]), ours(at), rtol=1e-10, atol=0)


def test_the_prior_term_is_the_kl_to_a_standard_normal():
    x0 = draws(10)
    for alpha_bar in ALPHA_BARS[::100]:
        expected = kl_divergence(
            Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt()), Normal(torch.zeros_like(x0), torch.ones_like(x0))
        )
        torch.testing.assert_close(process.prior_term(x0, alpha_bar), expected, rtol=0, atol=1e-12)


VALUES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.0, 0.7, 1.0, 40.0])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.5, 20.0])
def test_the_probabilities_of_all_values_sum_to_one(mean, std):
    term = process.data_term(VALUES, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    assert torch.isfinite(term).all() and (term >= 0).all()
    # 256 terms, each right to a few roundings of its logarithm, which is up to 1e9 where it contributes nothing.
    assert math.isclose(torch.exp(-term).sum(), 1, rel_tol=1e-12)


def test_a_bin_holds_the_integral_of_its_gaussian():
    mean, std, half = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64), 1 / 255
    inside = VALUES[1:-1]
    expected = Normal(mean, std).cdf(inside + half) - Normal(mean, std).cdf(inside - half)
    # The difference of two numbers up to 1 is right to 2e-16, and is 1e-4 at the least here.
    torch.testing.assert_close(torch.exp(-process.data_term(inside, mean, std)), expected, rtol=1e-11, atol=0)


def test_tails_keep_their_digits():
    """Far out at a distance a the integral over a bin of width w is density(a) (1 - exp(-a w)) / a, but for a share of
    a^-2; a difference of distribution functions is 0 from 8.3 standard deviations on one side and 38 on the other."""
    std = torch.tensor(0.01, dtype=torch.float64)
    for mean, value in ((0.0, VALUES[200]), (0.0, VALUES[55]), (-0.9, VALUES[-2]), (0.9, VALUES[1])):
        near = (abs(value - mean) - 1 / 255) / std
        width = 2 / 255 / std
        expected = near**2 / 2 + math.log(2 * math.pi) / 2 - torch.log(-torch.expm1(-near * width) / near)
        found = process.data_term(value, torch.tensor(mean, dtype=torch.float64), std)
        torch.testing.assert_close(found, expected, rtol=0, atol=float(2 / near**2))
