"""Likelihood: both roads lead to the known answer of data whose density is known, and their errors are honest."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from snowmelt.diffusion import process
from snowmelt.diffusion.exact import GaussianMixture, dataset_denoiser, gaussian_denoiser
from snowmelt.diffusion.likelihood import bound, exact_trace, hutchinson, ode_bits
from snowmelt.diffusion.noise import add_noise, alpha_sigma, fresh_share
from snowmelt.diffusion.variance import VARIANCES, posterior
from snowmelt.diffusion.walk import NoiseSource

SHAPE = (1, 3, 3)
COUNT = 1000


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source(like: Tensor, seed: int) -> NoiseSource:
    return lambda number: torch.randn(like.shape, generator=rng(seed * 1_000_003 + number + 500_000), dtype=like.dtype)


def grid(count: int) -> Tensor:
    return torch.linspace(-10, 10, count, dtype=torch.float64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Four standard deviations lie within [-1, 1], so that cutting off there changes nothing that shows.
GAUSSIAN = GaussianMixture(doubles(1), torch.zeros(1, *SHAPE, dtype=torch.float64), doubles(0.25))
MIXTURE = GaussianMixture(
    doubles(0.5, 0.3, 0.2),
    0.2 * torch.randn(3, *SHAPE, generator=rng(0), dtype=torch.float64),
    0.05 + 0.1 * torch.rand(3, *SHAPE, generator=rng(1), dtype=torch.float64),
)
KNOWN = {"gaussian": GAUSSIAN, "mixture": MIXTURE}


def pictures(data: GaussianMixture, count: int = COUNT) -> Tensor:
    """As an image file would keep them: 256 values."""
    return (data.sample(count, rng(2)).clamp(-1, 1).add(1).mul(127.5)).round().div(127.5).sub(1)


def true_bits(data: GaussianMixture, x0: Tensor) -> Tensor:
    """-log2 of the probability of each picture, per value, from those of the bins."""
    stds = data.stds.reshape(-1, *[1] * len(SHAPE)) if data.stds.ndim == 1 else data.stds
    each = [-process.data_term(x0, mean, std).flatten(1).sum(1) for mean, std in zip(data.means, stds, strict=True)]
    return -torch.logsumexp(torch.stack(each, 1) + data.weights.log(), 1) / (x0[0].numel() * math.log(2))


def error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def best_of_gaussian(x: Tensor, log_snr: Tensor, following: Tensor) -> Tensor:
    """The variance that x_m given x_l really has for `GAUSSIAN`."""
    alpha, sigma = alpha_sigma(log_snr, x)
    unknown = 0.25**2 * sigma**2 / (alpha**2 * 0.25**2 + sigma**2)
    alpha_next, _ = alpha_sigma(following, x)
    share = fresh_share(log_snr, following).reshape(-1, 1, 1, 1)
    return posterior(x, log_snr, following) + (alpha_next * share) ** 2 * unknown


# The mixture itself


def test_one_component_is_the_gaussian_denoiser():
    mean, std = 0.3 * torch.randn(1, *SHAPE, generator=rng(3), dtype=torch.float64), doubles(0.4)
    one = GaussianMixture(doubles(1), mean, std)
    x = torch.randn(5, *SHAPE, generator=rng(4), dtype=torch.float64)
    for level in grid(9):
        expected = gaussian_denoiser(mean, std)(x, level)
        torch.testing.assert_close(one.denoise(x, level), expected, rtol=0, atol=1e-12)


def test_narrow_components_are_the_dataset():
    images = torch.rand(4, *SHAPE, generator=rng(3), dtype=torch.float64) * 2 - 1
    narrow = GaussianMixture(torch.full((4,), 0.25).double(), images, torch.full((4,), 1e-9).double())
    x = torch.randn(5, *SHAPE, generator=rng(4), dtype=torch.float64)
    for level in grid(9)[:7]:  # at log-SNR 5 the noise is still 1e7 times as wide as the components
        torch.testing.assert_close(narrow.denoise(x, level), dataset_denoiser(images)(x, level), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 4, 2)])
def test_the_mixture_is_what_torch_says(shape):
    """Its density by torch's distributions at one level for each image, its denoiser by Tweedie's formula."""
    means = torch.randn(3, *shape, generator=rng(5), dtype=torch.float64)
    stds = 0.1 + torch.rand(3, *shape, generator=rng(6), dtype=torch.float64)
    weights, levels = doubles(0.2, 0.5, 0.3), grid(7)
    data = GaussianMixture(weights, means, stds)
    x = torch.randn(7, *shape, generator=rng(7), dtype=torch.float64, requires_grad=True)
    alphas, sigmas = alpha_sigma(levels, x)
    for index, (alpha, sigma) in enumerate(zip(alphas, sigmas, strict=True)):
        parts = Independent(Normal(alpha * means, (alpha**2 * stds**2 + sigma**2).sqrt()), len(shape))
        expected = MixtureSameFamily(Categorical(weights), parts).log_prob(x[index])
        torch.testing.assert_close(data.log_density(x, levels)[index], expected, rtol=1e-12, atol=0)
    (score,) = torch.autograd.grad(data.log_density(x, levels).sum(), x)
    # Roundings of 1e-16 are divided by alpha, 7e-3 at the least.
    torch.testing.assert_close(data.denoise(x, levels), (x + sigmas**2 * score) / alphas, rtol=0, atol=1e-10)
    alone = torch.cat([data.denoise(x[i : i + 1], level) for i, level in enumerate(levels)])
    torch.testing.assert_close(alone, data.denoise(x, levels), rtol=0, atol=1e-12)
    assert data.denoise(x.float(), levels[0]).dtype == torch.float32


def test_drawn_pictures_have_the_moments_of_the_mixture():
    drawn = MIXTURE.sample(40_000, rng(8))
    share = MIXTURE.weights.reshape(-1, 1, 1, 1)
    mean = (share * MIXTURE.means).sum(0)
    variance = (share * (MIXTURE.stds**2 + MIXTURE.means**2)).sum(0) - mean**2
    assert (abs(drawn.mean(0) - mean) < 4.5 * (variance / 40_000).sqrt()).all()
    # A variance is right to sqrt(2 / n) for a Gaussian, and flatter data have less.
    assert (abs(drawn.var(0) / variance - 1) < 4.5 * math.sqrt(3 / 40_000)).all()
    noise = torch.randn(drawn.shape, generator=rng(9), dtype=drawn.dtype)
    error_now = [(MIXTURE.denoise(add_noise(drawn, noise, level), level) - drawn).square().mean() for level in grid(5)]
    assert all(later < earlier for earlier, later in pairwise(error_now))


# Both likelihoods


@pytest.mark.parametrize("name", KNOWN)
def test_both_roads_find_the_known_bits(name):
    """Within half a percent; the decoder, wider than a bin, costs 0.004 bits of that, and 1000 steps of forward
    variance about 0.01."""
    data = KNOWN[name]
    x0 = pictures(data)
    expected = true_bits(data, x0).mean()
    one = bound(data.denoise, x0, grid(1000), source(x0, 1), variance=VARIANCES["forward"], terms=200)
    ode = ode_bits(data.denoise, x0, grid(31), source(x0, 1), trace=hutchinson(source(x0, 2)))
    for found in (one.total, ode):
        excess = found - true_bits(data, x0)
        assert error(excess) < 0.004 * expected, "few enough errors to tell"
        assert abs(found.mean() / expected - 1) < 0.005
        assert excess.mean() > -3 * error(excess), "neither falls below the truth"
    difference = one.total - ode
    assert abs(difference.mean()) < 0.02 + 3 * error(difference), "and they agree"
    assert (one.prior >= 0).all() and (one.prior < 1e-4).all() and (one.steps >= 0).all() and (one.data > 0).all()


def test_the_bound_falls_to_the_exact_as_steps_grow():
    """With the best variance every number of steps is exact, for a Gaussian; with another what is lost is in
    proportion to 1 / steps."""
    x0 = pictures(GAUSSIAN, 64)
    lost: list[float] = []
    for steps in (50, 100, 200):
        best, usual = (
            bound(GAUSSIAN.denoise, x0, grid(steps + 1), source(x0, 3), variance=variance)
            for variance in (best_of_gaussian, posterior)
        )
        excess = best.total - true_bits(GAUSSIAN, x0)
        assert abs(excess.mean() - 0.004) < 4 * error(excess)
        lost.append(float((usual.total - best.total).mean()))
    # The same noise in both; halving holds but for terms of second order in the step.
    assert all(0.4 < later / earlier < 0.55 for earlier, later in pairwise(lost))


def test_the_bound_is_the_sum_of_the_terms_of_the_paper():
    betas = process.linear_betas(60, 1e-4, 0.3)
    x0 = pictures(MIXTURE, 4)
    noise = source(x0, 4)
    found = bound(MIXTURE.denoise, x0, process.log_snr_table(betas).flip(0), noise)
    steps = torch.zeros(4, dtype=torch.float64)
    for t in range(60, 0, -1):
        at = process.moment(betas, t)
        level = process.log_snr_table(betas)[t - 1]
        x = process.forward_jump(x0, at.alpha_bar, noise((61 - t) % 60))
        x0_hat = MIXTURE.denoise(x, level)
        if t > 1:
            guess = (x - at.alpha_bar.sqrt() * x0_hat) / (1 - at.alpha_bar).sqrt()
            steps += process.step_term(x0, x, guess, at, process.posterior_variance(at)).flatten(1).sum(1)
        else:
            std = ((1 - at.alpha_bar) / at.alpha_bar).sqrt()
            data = process.data_term(x0, x0_hat, std).flatten(1).sum(1)
    prior = process.prior_term(x0, process.alpha_bars(betas)[-1]).flatten(1).sum(1)
    for ours, theirs in zip(found, (prior, steps, data), strict=True):
        torch.testing.assert_close(ours, theirs / (9 * math.log(2)), rtol=1e-10, atol=1e-12)


def test_a_few_steps_by_chance_estimate_all_of_them_without_bias():
    """400 copies of one picture, so that chance is all there is; more terms, less of it."""
    x0 = pictures(MIXTURE, 1).expand(400, *SHAPE)
    every = bound(MIXTURE.denoise, x0, grid(101), source(x0, 5)).steps
    few, some = (bound(MIXTURE.denoise, x0, grid(101), source(x0, 6), terms=terms).steps for terms in (4, 25))
    for estimate in (few, some):
        assert abs(estimate.mean() - every.mean()) < 4 * math.hypot(error(estimate), error(every))
    assert error(some) < error(few) / 1.5, "a factor of 2.5 but for what every step has of noise"
    one_each = bound(MIXTURE.denoise, x0, grid(101), source(x0, 5), terms=100).steps
    assert torch.equal(one_each, every), "as many terms as steps is every step"


@pytest.mark.parametrize("road", ["bound", "ode"])
def test_the_standard_error_is_honest(road):
    """What 60 trials of 30 pictures find differs from the truth by as many errors as a normal number is large."""
    x0 = pictures(GAUSSIAN, 1800)
    if road == "bound":
        found = bound(GAUSSIAN.denoise, x0, grid(200), source(x0, 7), variance=best_of_gaussian, terms=20).total
    else:
        found = ode_bits(GAUSSIAN.denoise, x0, grid(11), source(x0, 7), trace=hutchinson(source(x0, 8)))
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    probability = torch.exp(-process.data_term(values, torch.tensor(0.0), torch.tensor(0.25)))
    truth = torch.special.entr(probability).sum() / math.log(2) + 0.004  # the decoder's loss
    trials = found.reshape(60, 30)
    scores = (trials.mean(1) - truth) / (trials.std(1) / math.sqrt(30))
    # The root mean square of 60 scores is 1 with an error of 1 / sqrt(120); Student's t adds a thirtieth.
    assert abs(float(scores.square().mean().sqrt()) - 1) < 0.35


def test_the_ode_converges_with_order_four():
    """Halving the steps divides the error by 16 in the end; the error is that of the path and of the trace."""
    data = GaussianMixture(doubles(0.4, 0.6), doubles(-0.5, 0.4).reshape(2, 1, 1, 1), doubles(0.1, 0.2))
    x0 = data.sample(32, rng(2)).clamp(-1, 1)
    found = {
        steps: ode_bits(data.denoise, x0, grid(steps + 1), source(x0, 9), trace=exact_trace) for steps in (20, 40, 160)
    }
    coarse, fine = (float(abs(found[steps] - found[160]).mean()) for steps in (20, 40))
    assert coarse / fine > 10
    assert fine < 1e-3, "40 steps are enough for what a standard error shows"


def test_probes_are_unbiased_and_their_chance_falls():
    x = torch.randn(1, *SHAPE, generator=rng(10), dtype=torch.float64).expand(2000, *SHAPE)
    level = torch.tensor(1.0, dtype=torch.float64)
    x0, expected = exact_trace(MIXTURE.denoise, x[:1], level, 0)
    torch.testing.assert_close(x0, MIXTURE.denoise(x[:1], level), rtol=0, atol=1e-14)
    slope = torch.autograd.functional.jacobian(lambda y: MIXTURE.denoise(y[None], level)[0], x[0]).reshape(9, 9)
    torch.testing.assert_close(expected, slope.trace()[None], rtol=1e-12, atol=0)
    spread: list[float] = []
    for probes in (1, 4):
        _, found = hutchinson(source(x, 11), probes)(MIXTURE.denoise, x, level, 3)
        assert abs(found.mean() - expected) < 4 * error(found)
        spread.append(float(found.std()))
    # The deviation of 2000 is right to 2 %.
    assert abs(spread[0] / spread[1] - 2) < 0.2


def test_single_precision_is_enough():
    """Networks compute in it; sums are in double all the same."""
    x0 = pictures(MIXTURE, 8)
    single = lambda number: source(x0, 12)(number).float()  # noqa: E731
    for road in (
        lambda x0, noise: bound(MIXTURE.denoise, x0, grid(50), noise).total,
        lambda x0, noise: ode_bits(MIXTURE.denoise, x0, grid(21), noise, trace=exact_trace),
    ):
        rough, fine = road(x0.float(), single), road(x0, source(x0, 12))
        assert rough.dtype == torch.float64
        # A rounding of 6e-8 of z is 1e-5 of the noise of the cleanest level, 7e-3.
        torch.testing.assert_close(rough, fine, rtol=0, atol=1e-4)


def test_answers_do_not_depend_on_the_batch():
    x0 = pictures(MIXTURE, 6)
    alone = slice(4, 5)
    noise = source(x0, 13)
    for road in (
        lambda x0, noise: bound(MIXTURE.denoise, x0, grid(50), noise, terms=5).total,
        lambda x0, noise: ode_bits(MIXTURE.denoise, x0, grid(6), noise, trace=hutchinson(noise)),
    ):
        one = road(x0[alone], lambda number: noise(number)[alone])
        torch.testing.assert_close(one, road(x0, noise)[alone], rtol=0, atol=1e-12)
