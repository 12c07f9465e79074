"""Samplers: the textbook's posterior, the measured order, exact answers where they are known, and `diffusers`' path."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor, nn

from snowmelt.diffusion import process
from snowmelt.diffusion.denoiser import Denoise, Denoiser
from snowmelt.diffusion.exact import dataset_denoiser, gaussian_denoiser
from snowmelt.diffusion.grids import churned, time_grid
from snowmelt.diffusion.multistep import NOISE
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.samplers import SAMPLERS, Multistep, ancestral, heun, multistep
from snowmelt.diffusion.schedules import SCHEDULES, linear
from snowmelt.diffusion.walk import NoiseSource, Step
from snowmelt.seeds import noise_source

MEAN, STD = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
GAUSSIAN = gaussian_denoiser(MEAN, STD)
STEPS = (64, 128, 256, 512)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise(step: int) -> Tensor:
    raise AssertionError(f"noise was asked for, at step {step}")


def ending(steps: Iterator[Step]) -> Tensor:
    """The noisy image of the last step."""
    *_, last = steps
    return last.x


def order(errors: list[float]) -> float:
    """The slope of -log(error) over log(steps), by least squares."""
    x = torch.tensor(STEPS, dtype=torch.float64).log()
    y = -torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def test_ancestral_is_the_posterior_of_ddpm():
    """Mean and variance at each of the 1000 steps of the table, from the response to no noise and to noise of 1."""
    betas = process.linear_betas()
    alpha_bars, levels = process.alpha_bars(betas), process.log_snr_table(betas)
    x0, x = draws(2, 1, 1, 2, 2)
    pair = x.expand(2, 1, 2, 2)
    zero_and_one = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand_as(pair)
    for t in range(1, 1000):
        grid = torch.stack([levels[t], levels[t - 1]])
        still, moved = ending(ancestral(lambda x, _: x0.expand_as(x), pair, grid, lambda _: zero_and_one))
        mean, variance = process.posterior(
            x0, x, beta=betas[t], alpha_bar=alpha_bars[t], alpha_bar_previous=alpha_bars[t - 1]
        )
        # Levels up to 10 in float64 are rounded by 2e-15; a few such roundings.
        torch.testing.assert_close(still[None], mean, rtol=0, atol=1e-12)
        torch.testing.assert_close((moved - still) ** 2, variance.expand_as(moved), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", [*(Multistep(eta=eta) for eta in (0.0, 0.3, 0.7, 1.0)), Multistep(late=2.0)])
def test_all_fresh_noise_keeps_the_marginal(how):
    """A noisy image alpha x0 + sigma noise becomes one of the next level: picture by alpha', variance by sigma'^2."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def step(x: Tensor, x0: Tensor, fresh: Tensor) -> Tensor:
        return ending(multistep(lambda x, _: x0, x, grid, lambda _: fresh, how))

    # The last one's middle is 0, but for the rounding of grids.
    for pair in ([-9.0, -8.0], [-1.0, 0.5], [3.0, 9.0], [-1.0 - 1e-13, 1.0]):
        grid = torch.tensor(pair, dtype=torch.float64)
        (alpha, sigma), (alpha_next, sigma_next) = (alpha_sigma(level, one) for level in grid)
        # float64, one step.
        torch.testing.assert_close(step(alpha * one, one, zero), alpha_next * one, rtol=1e-13, atol=0)
        fresh = step(zero, zero, one)
        variance = step(sigma * one, zero, zero) ** 2 + fresh**2
        torch.testing.assert_close(variance, sigma_next**2 * one, rtol=1e-13, atol=0)
        # Equation 16 of the DDIM paper: eta times the standard deviation of DDPM's posterior; and with tau of
        # SA-Solver, e^(-2 tau) of the old noise's variance is left for every unit of log(alpha / sigma).
        expected = how.eta * (sigma_next / sigma) * (1 - alpha**2 / alpha_next**2).sqrt()
        if how.late and sum(pair) >= -1e-12:
            expected = sigma_next * (1 - ((alpha / sigma) / (alpha_next / sigma_next)) ** (2 * how.late)).sqrt()
        torch.testing.assert_close(fresh, expected * one, rtol=1e-11, atol=0)  # alphas near 1 cancel at the clean end


def responses(steps: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of ddpm's result, exactly: it is affine in the noises, so one image stands for each."""
    grid = time_grid(SCHEDULES["cosine"], steps)

    def noise(step: int) -> Tensor:
        # Image i is moved by the noise of step i alone, the last image by none.
        rows = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
        rows[step] = 1
        return rows

    result = ending(SAMPLERS["ddpm"](GAUSSIAN, noise(0), grid, noise)).flatten()
    still = result[-1]
    return still, ((result[:-1] - still) ** 2).sum()


def test_ddpm_reaches_the_moments_of_the_data_with_first_order():
    alpha, sigma = alpha_sigma(time_grid(SCHEDULES["cosine"], 2)[-1], MEAN)
    errors = []
    for steps in STEPS:
        mean, variance = responses(steps)
        errors.append(float((variance - alpha**2 * STD**2 - sigma**2).abs()))
        # It starts from noise alone, where the first level still has e^-5 = 0.0067 of the picture, and forgets that.
        assert abs(mean - alpha * MEAN) < 0.0067 * MEAN
    assert abs(order(errors) - 1) < 0.15, errors


def test_ddpm_draws_the_distribution_of_the_data():
    count, steps = 20_000, 200
    *_, last = SAMPLERS["ddpm"](
        GAUSSIAN,
        draws(count, 1, 1, 1),
        time_grid(SCHEDULES["cosine"], steps),
        lambda step: draws(count, 1, 1, 1, seed=step),
    )
    _, variance = responses(steps)
    # Four standard errors of a mean and of a variance; 0.007 of the mean is missing at the start.
    assert abs(last.x.mean() - MEAN) < 4 * STD / math.sqrt(count) + 0.007 * MEAN
    assert abs(last.x.var() - variance) < 4 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [(name, "cosine") for name in SAMPLERS] + [("ddim", schedule) for schedule in SCHEDULES if schedule != "cosine"],
)
def test_samplers_land_on_the_pictures_of_a_finite_set(sampler, schedule):
    """Where the denoiser is exact for eight pictures, those eight are all there is to draw."""
    pictures = draws(8, 1, 4, 4, seed=1).clamp(-1, 1)
    count = 64
    noise = noise_source([5] * count, range(count), (1, 4, 4))
    *_, last = SAMPLERS[sampler](
        dataset_denoiser(pictures),
        noise(0).double(),
        time_grid(SCHEDULES[schedule], 100),
        lambda step: noise(step).double(),
    )
    distance, which = torch.cdist(last.x0.flatten(1), pictures.flatten(1)).min(1)
    # At the last level sigma is below 0.011 and pictures are more than 1 apart: the share of any other is e^-4000.
    assert torch.pdist(pictures.flatten(1)).min() > 1 and distance.max() < 1e-6
    # Every one has its chance of 1/8: that 64 draws miss one has a chance of 8 (7/8)^64 = 0.0016.
    assert len(which.unique()) == 8


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_evaluation_for_each_level_and_noise_only_between(eta):
    grid, seen, asked = time_grid(linear, 6), [], []

    def denoise(x: Tensor, log_snr: Tensor) -> Tensor:
        seen.append(float(log_snr))
        return GAUSSIAN(x, log_snr)

    def noise(step: int) -> Tensor:
        asked.append(step)
        return draws(2, 1, 1, 1, seed=step)

    steps = list(multistep(denoise, draws(2, 1, 1, 1), grid, noise, Multistep(eta=eta)))
    assert seen == [float(step.log_snr) for step in steps] == grid.tolist()
    assert asked == ([1, 2, 3, 4, 5] if eta else [])


def test_late_noise_is_drawn_where_the_picture_outweighs_it():
    """Steps whose middle is below log-SNR 0 are those of `dpmpp_2m`."""
    grid, asked = torch.tensor([-6.0, -3.0, -1.0, 0.5, 2.0, 5.0], dtype=torch.float64), list[int]()

    def noise(step: int) -> Tensor:
        asked.append(step)
        return draws(2, 1, 1, 1, seed=step)

    x = draws(2, 1, 1, 1)
    late, plain = (list(SAMPLERS[name](GAUSSIAN, x, grid, noise)) for name in ("dpmpp_2m_late", "dpmpp_2m"))
    assert asked == [1, 2], "of five steps the middle of two is cleaner"
    alike = [torch.equal(one.x, other.x) for one, other in zip(late, plain, strict=True)]
    assert alike == [True, True, True, True, False, False]


def test_a_step_says_what_the_denoiser_said():
    grid = time_grid(linear, 5)
    for step in ancestral(GAUSSIAN, draws(2, 1, 1, 1), grid, lambda n: draws(2, 1, 1, 1, seed=n)):
        assert torch.equal(step.x0, GAUSSIAN(step.x, step.log_snr))


def test_stopping_early_costs_nothing_more():
    def denoise(x: Tensor, log_snr: Tensor) -> Tensor:
        calls.append(log_snr)
        return x

    calls: list[Tensor] = []
    for number, _ in enumerate(SAMPLERS["ddim"](denoise, draws(1, 1, 1, 1), time_grid(linear, 50), no_noise), 1):
        if number == 3:
            break
    assert len(calls) == 3


def test_one_level_is_one_guess():
    (only,) = SAMPLERS["ddpm"](GAUSSIAN, draws(2, 1, 1, 1), time_grid(linear, 1), no_noise)
    assert torch.equal(only.x0, GAUSSIAN(only.x, only.log_snr))


class Toy(nn.Module):
    """Stands for a trained network: smooth in the image and in the step it is told."""

    def forward(self, x: Tensor, time: Tensor, cond: None = None) -> Tensor:
        return 0.5 * x + 0.3 * torch.sin(3 * x + time.to(x.dtype).reshape(-1, 1, 1, 1) / 300)


def of_diffusers(kind: type, **options: object) -> DDPMScheduler | DDIMScheduler:
    """A reference on the same betas, read in float64 so that the comparison sees the arithmetic alone."""
    reference = kind(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, **options)
    reference.alphas_cumprod = process.alpha_bars(process.linear_betas())
    return reference


def followed(reference: DDPMScheduler | DDIMScheduler, x: Tensor, **options: object) -> list[Tensor]:
    """The images the reference passes through, and its result."""
    images = [x]
    for time in reference.timesteps:
        images.append(reference.step(Toy()(images[-1], time[None]), time, images[-1], **options).prev_sample)
    return images


def walked(sampler: str, predicts: str, x: Tensor, steps: int, noise: NoiseSource) -> list[Tensor]:
    """The same of ours, at every (1000 / steps)th level of the table from the first on."""
    grid = process.log_snr_table(process.linear_betas())[:: 1000 // steps].flip(0)
    denoise: Denoise = Denoiser(Toy(), predicts)
    visited = list(SAMPLERS[sampler](denoise, x, grid, noise))
    return [step.x for step in visited] + [visited[-1].x0]


KINDS = {"noise": "epsilon", "image": "sample", "v": "v_prediction"}


@pytest.mark.parametrize(("steps", "predicts"), [(50, "noise"), (50, "image"), (50, "v"), (1000, "v")])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_path_of_diffusers(sampler, steps, predicts):
    """The same network, levels and noise give the same image at every step of the way."""
    reference = of_diffusers(DDPMScheduler if sampler == "ddpm" else DDIMScheduler, prediction_type=KINDS[predicts])
    reference.set_timesteps(steps)
    rng, x = torch.Generator(), draws(2, 1, 3, 3)
    theirs = followed(reference, x, generator=rng.manual_seed(7))
    rng.manual_seed(7)
    ours = walked(sampler, predicts, x, steps, lambda _: torch.randn(x.shape, generator=rng, dtype=x.dtype))
    assert len(ours) == len(theirs) == steps + 1
    # Up to 1000 steps in float64; sigma / alpha up to 158 magnifies what the first of them round off.
    for mine, reference_image in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference_image, rtol=1e-10, atol=1e-10)


SOLVERS = {
    # name: (theirs, its settings, ours)
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"solver_order": 2}, Multistep(order=2)),
    "dpmpp_2m_sde": (
        DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        Multistep(order=2, eta=1.0),
    ),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}, Multistep(order=2, corrected=True)),
    "deis": (DEISMultistepScheduler, {"solver_order": 2}, Multistep(order=2, form=NOISE)),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [20, 60])
def test_the_path_of_the_solvers_of_diffusers(name, steps):
    """The same network at the same steps of the table gives the same image all the way, to 1e-4 of a pixel.

    They keep levels in float32. Their last step goes down to no noise at all, which is where our last guess is.
    """
    kind, settings, ours = SOLVERS[name]
    reference = kind(num_train_timesteps=1000, beta_schedule="linear", prediction_type="v_prediction", **settings)
    reference.set_timesteps(steps)
    rng, x = torch.Generator(), draws(2, 1, 3, 3)
    options = {"generator": rng.manual_seed(7)} if "sde" in name else {}
    theirs = [x]
    for time in reference.timesteps:
        answer = Toy()(theirs[-1], time[None])
        theirs.append(reference.step(answer, time, theirs[-1], **options).prev_sample)
    rng.manual_seed(7)
    grid = process.log_snr_table(process.linear_betas())[reference.timesteps]
    visited = list(
        multistep(Denoiser(Toy(), "v"), x, grid, lambda _: torch.randn(x.shape, generator=rng).double(), ours)
    )
    mine = [step.x for step in visited] + [visited[-1].x0]
    # DEIS goes to the table's first level at the end, where the others and ours go on to no noise at all.
    pairs = list(zip(mine, theirs, strict=True))[: steps if name == "deis" else steps + 1]
    for image, reference_image in pairs:
        torch.testing.assert_close(image, reference_image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 28])
def test_the_path_of_heun_of_diffusers(steps):
    """Theirs keeps x / alpha, and every level twice. 9 and 27 divide 999, so its times are entries of the table."""
    reference = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    reference.set_timesteps(steps)
    times = reference.timesteps[::2].round().long()
    grid = process.log_snr_table(process.linear_betas())[times]
    x = draws(2, 1, 3, 3)
    image, theirs = x / alpha_sigma(grid[0], x)[0], []
    for index, time in enumerate(reference.timesteps):
        if index % 2 == 0:
            theirs.append(image)
        answer = Toy()(reference.scale_model_input(image, time), time[None])
        image = reference.step(answer, time, image).prev_sample
    for step, image in zip(heun(Denoiser(Toy(), "v"), x, grid, no_noise), theirs, strict=True):
        torch.testing.assert_close(step.x, image * alpha_sigma(step.log_snr, x)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "how", [Multistep(order=3, corrected=True), Multistep(order=2), Multistep(order=4, form=NOISE)]
)
def test_a_path_that_falls_forgets(how):
    """Where noise is added before every step no answer is left to remember: what remains is the first order."""
    grid = churned(time_grid(SCHEDULES["cosine"], 100), 40.0)

    def spread(how: Multistep) -> Tensor:
        start = draws(500, 1, 1, 1)
        *_, last = multistep(GAUSSIAN, start, grid, lambda number: draws(500, 1, 1, 1, seed=number), how)
        return last.x.std()

    # Beyond the range of churn, at both ends, a few steps are of higher order.
    assert abs(spread(how) / spread(Multistep()) - 1) < 0.02
