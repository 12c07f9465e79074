"""The process as the paper writes it: steps make the jump, Bayes' rule the posterior, and the log-SNR core agrees."""

from __future__ import annotations

import math

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from snowmelt.diffusion import process
from snowmelt.diffusion.noise import add_noise, alpha_sigma

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
