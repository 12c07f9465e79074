"""Training levels: drawn as often as they say they are, and an even mean whatever was drawn more often on purpose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from snowmelt.config import Config, DataConfig, DiffusionConfig, UNetConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import Denoiser, share
from snowmelt.diffusion.exact import gaussian_denoiser
from snowmelt.diffusion.levels import LEVELS, Drawn, Importance
from snowmelt.diffusion.noise import add_noise
from snowmelt.diffusion.process import linear_betas, log_snr_table
from snowmelt.diffusion.schedules import cosine, linear
from snowmelt.diffusion.variance import analytic, forward, interpolated, noise_power, posterior
from snowmelt.models import build_learner
from snowmelt.models.diffusion import DiffusionLearner, Uncertainty, variance_losses
from snowmelt.seeds import generator

COUNT = 40_000


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def taught(name: str) -> Drawn:
    """Draws of a distribution of levels that has seen large losses at times under a quarter."""
    levels = LEVELS[name](cosine)
    for step in range(40):
        drawn = levels.draw(256, rng(step))
        levels.observe(drawn, torch.where(drawn.place < 0.25, 9.0, 1.0))
    return levels.draw(COUNT, rng(99))


@pytest.mark.parametrize("name", LEVELS)
def test_levels_come_as_often_as_their_density_says(name):
    """Between two levels: the share of draws, corrected, is the integral of the density."""
    drawn = taught(name)
    order = drawn.log_snr.argsort()
    levels, density = drawn.log_snr[order].double(), drawn.density[order].double()
    for low, high in ((-2.0, 0.0), (0.0, 3.0), (-4.0, 4.0)):
        inside = (levels > low) & (levels < high)
        integral = torch.trapezoid(density[inside], levels[inside])
        found = drawn.correction[order][inside].double().sum() / COUNT
        # Four standard errors of a share of at most 1, weighed by corrections of at most 10.
        assert abs(found - integral) < 4 * math.sqrt(0.25 * 3 / COUNT)


@pytest.mark.parametrize("name", LEVELS)
def test_corrections_leave_the_mean_as_it_was(name):
    drawn = taught(name)
    values = torch.sin(3 * drawn.log_snr)
    even = LEVELS["uniform" if name == "importance" else name](cosine).draw(COUNT, rng(5)).log_snr
    # Four standard errors of the mean of values of at most 1.
    assert abs((drawn.correction * values).mean() - torch.sin(3 * even).mean()) < 4 * 1.5 / math.sqrt(COUNT)


def test_lognormal_is_that_of_edm():
    log_sigma = -LEVELS["lognormal"](cosine).draw(COUNT, rng()).log_snr.double() / 2
    # One from every slice: mean and deviation are nearly exact, but for the tails beyond five deviations.
    assert abs(log_sigma.mean() + 1.2) < 1e-3 and abs(log_sigma.std() - 1.2) < 2e-3


def test_logitnormal_times_are_logistic():
    drawn = LEVELS["logitnormal"](lambda time: -time).draw(COUNT, rng())
    logit = torch.logit(-drawn.log_snr.double())
    assert abs(logit.mean()) < 1e-3 and abs(logit.std() - 1) < 2e-3


def test_importance_goes_where_the_loss_is():
    """Losses of 9 against 1: a tenth of the draws stays even, of the others 9/12 go to the first quarter of time."""
    share_there = float((taught("importance").place < 0.25).float().mean())
    assert abs(share_there - (0.1 * 0.25 + 0.9 * 9 / 12)) < 0.01


def test_a_learner_teaches_the_losses_as_they_are():
    """What was drawn more often counts less in the mean, but the levels are told the loss itself."""
    config = Config(
        DataConfig(size=8, channels=1, std=0.6),
        network=UNetConfig(channels=(8, 8), attention=(False, False), head_channels=8),
        diffusion=DiffusionConfig(levels="importance", weight="simple", predicts="v"),
    )
    learner = build_learner(config, Precision(torch.device("cpu")))
    levels = learner.levels
    assert isinstance(levels, Importance)
    levels.squares = torch.where(torch.arange(64) < 32, 1.0, 81.0).double()
    told: list[tuple[Drawn, Tensor]] = []
    levels.observe = lambda drawn, losses: told.append((drawn, losses))
    images = torch.zeros(64, 1, 8, 8)
    loss = learner.update(Batch(images, None), generator(0, "t", 1), 1e-9).losses["loss"]
    drawn, losses = told[0]
    assert drawn.correction.max() / drawn.correction.min() > 5
    # A fresh network says 0, so with v the loss of grey pictures is known: SNR c_out^2 |alpha noise|^2.
    torch.testing.assert_close(torch.tensor(loss), (drawn.correction * losses).mean(), rtol=1e-5, atol=0)
    expected = drawn.log_snr.exp() * torch.sigmoid(-drawn.log_snr) * torch.sigmoid(drawn.log_snr)
    # |noise|^2 over 64 pixels: 1 within four of its standard deviations, sqrt(2 / 64).
    assert ((losses / expected - 1).abs() < 4 * math.sqrt(2 / 64)).all()


def test_importance_follows_what_is_learned_from():
    """Where the model learns how large the loss usually is, and divides by that, what is left."""
    config = Config(
        DataConfig(size=8, channels=1, std=0.6),
        network=UNetConfig(channels=(8, 8), attention=(False, False), head_channels=8),
        diffusion=DiffusionConfig(levels="importance", weight="learned"),
    )
    learner = build_learner(config, Precision(torch.device("cpu")))
    assert isinstance(learner, DiffusionLearner)
    told: list[Tensor] = []
    learner.levels.observe = lambda _drawn, losses: told.append(losses)
    learner.model.uncertainty.forward = lambda log_snr: torch.full_like(log_snr, math.log(4))
    batch = Batch(torch.zeros(64, 1, 8, 8), None)
    loss = learner.update(batch, generator(0, "t", 1), 1e-9).losses["loss"]
    assert float(told[0].mean()) == pytest.approx(loss / 4, rel=1e-5)


@pytest.mark.parametrize("wanted", [0.0, 0.1, 1.0])
def test_as_many_labels_are_hidden_as_is_asked(wanted):
    """Else no network would know what a picture of no class is, which guidance goes away from."""
    config = Config(
        DataConfig(size=8, channels=1, std=0.6, classes=("a", "b"), counts=(1, 1)),
        network=UNetConfig(channels=(8,), attention=(False,), groups=4, head_channels=8),
        diffusion=DiffusionConfig(label_dropout=wanted),
    )
    learner, given = build_learner(config, Precision(torch.device("cpu"))), list[Tensor]()
    assert isinstance(learner, DiffusionLearner)
    learner.model.denoiser.backbone.register_forward_pre_hook(lambda _, told: given.append(told[2]))
    labels = torch.arange(2000) % 2
    learner.update(Batch(torch.zeros(2000, 1, 8, 8), labels), generator(0, "t", 1), 1e-9)
    hidden = given[0] == 2
    assert torch.equal(given[0][~hidden], labels[~hidden])
    # Four standard errors.
    assert abs(float(hidden.float().mean()) - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / 2000)


def test_dropout_has_random_numbers_of_its_own():
    """Those of the noise would be hidden by themselves; and they are a function of the step as well."""
    config = Config(
        DataConfig(size=8, channels=1, std=0.6),
        network=UNetConfig(channels=(8, 8), attention=(False, False), head_channels=8, dropout=0.5),
    )
    learner, seeds = build_learner(config, Precision(torch.device("cpu"))), list[int]()
    for step in (1, 2, 1):
        step_rng = generator(0, "t", step)
        learner.update(Batch(torch.zeros(4, 1, 8, 8), None), step_rng, 1e-9)
        seeds += [torch.initial_seed(), step_rng.initial_seed()]
    assert seeds[0] == seeds[4] and len(set(seeds)) == 4


def test_importance_is_even_until_it_has_seen_all():
    assert Importance(cosine).draw(64, rng()).correction.eq(1).all()


def test_a_learner_resumes_its_levels(tmp_path):
    config = Config(
        DataConfig(size=8, channels=1, std=0.6),
        network=UNetConfig(channels=(8, 8), attention=(False, False), head_channels=8),
        diffusion=DiffusionConfig(levels="importance", weight="learned", variance="learned"),
    )
    batch = Batch(torch.rand(64, 1, 8, 8, generator=rng()) * 2 - 1, None)
    first, second = (build_learner(config, Precision(torch.device("cpu"))) for _ in range(2))
    for step in range(4):
        assert first.update(batch, generator(0, "t", step), 1e-3).finite
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer({name: tensor.clone() for name, tensor in first.optimizer_tensors().items()})
    for learner in (first, second):
        learner.update(batch, generator(0, "t", 4), 1e-3)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_learned_uncertainty_settles_at_the_usual_loss():
    """loss / e^u + u is least where e^u is the mean loss of the level: 4 below 0 and 0.25 above."""
    doubt = Uncertainty()
    optimizer = torch.optim.Adam(doubt.parameters(), 0.05)
    for step in range(400):
        levels = torch.rand(256, generator=rng(step)) * 16 - 8
        losses = torch.where(levels < 0, 4.0, 0.25)
        u = doubt(levels)
        (losses / u.exp() + u).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Away from the jump; the last steps still move it by some 5 %.
    settled = doubt(torch.tensor([-7.0, -5.0, -3.0, 3.0, 5.0, 7.0])).exp().reshape(2, 3).log().mean(1).exp()
    assert abs(settled[0] / 4 - 1) < 0.25 and abs(settled[1] / 0.25 - 1) < 0.25


STD = 0.5


def test_the_analytic_variance_is_that_of_gaussian_data():
    """For x0 ~ N(0, std^2) the reverse step is Gaussian itself; its variance follows from the joint distribution."""
    x0 = STD * torch.randn(20_000, 1, 2, 2, generator=rng(), dtype=torch.float64)
    levels = torch.linspace(-6, 6, 25, dtype=torch.float64)
    denoise = gaussian_denoiser(torch.zeros(()).double(), torch.tensor(STD).double())
    powers = noise_power(denoise, x0, levels, lambda n: torch.randn(x0.shape, generator=rng(n + 1), dtype=x0.dtype))
    variance = analytic(levels, powers)
    for index in (4, 12, 20):
        level, following = levels[index], levels[index + 1]
        alpha, sigma = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()
        alpha_next, sigma_next = torch.sigmoid(following).sqrt(), torch.sigmoid(-following).sqrt()
        here, there = alpha**2 * STD**2 + sigma**2, alpha_next**2 * STD**2 + sigma_next**2
        joint = alpha / alpha_next * there
        exact = there - joint**2 / here
        found = variance(x0, level, following)
        # The power is a mean of 80,000 squares; four standard errors of it, carried to the variance.
        reach = (alpha_next * -torch.expm1(level - following)) ** 2 * torch.exp(-level)
        assert abs(found - exact) < 4 * reach * math.sqrt(2 / 80_000)
        assert posterior(x0, level, following) <= found <= forward(x0, level, following) * (1 + 1e-12)


def test_interpolated_runs_between_the_bounds():
    x, level, following = torch.zeros(2, 1, 2, 2), torch.tensor(-1.0), torch.tensor(0.5)
    for part, bound in ((0.0, posterior), (1.0, forward)):
        found = interpolated(torch.full_like(x, part), x, level, following)
        torch.testing.assert_close(found, bound(x, level, following).expand_as(x), rtol=1e-5, atol=0)


def test_bounds_are_the_textbook_s():
    betas, levels = linear_betas(), log_snr_table(linear_betas())
    x, t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), 300
    bars = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(forward(x, levels[t], levels[t - 1]), betas[t], rtol=1e-11, atol=0)
    tilde = betas[t] * (1 - bars[t - 1]) / (1 - bars[t])
    torch.testing.assert_close(posterior(x, levels[t], levels[t - 1]), tilde, rtol=1e-11, atol=0)


class TwoParts(torch.nn.Module):
    """Says the clean image, and a share in the second half of its channels."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0, self.raw = x0, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, cond: None) -> Tensor:
        return torch.cat([self.x0, self.raw.expand_as(x)], dim=1)


def test_the_hybrid_loss_teaches_the_best_variance():
    """Data of variance 1, of which a guess takes the most: the best variance of a step is then its upper bound."""
    x0 = torch.randn(4096, 1, 1, 1, generator=rng())
    level = torch.full((4096,), -1.0)
    x = add_noise(x0, torch.randn(x0.shape, generator=rng(1)), level)
    backbone = TwoParts(torch.sigmoid(level).sqrt().reshape(-1, 1, 1, 1) * x)
    denoiser = Denoiser(backbone, "image")
    optimizer = torch.optim.Adam(backbone.parameters(), 0.05)
    for _ in range(200):
        variance_losses(denoiser, x0, level, x, denoiser.answer(x, level)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = float(share(x, denoiser.answer(x, level)).mean())
    # For data of variance 1 the exact reverse variance of so small a step is the upper bound.
    assert found > 0.9


def test_linear_steps_are_told_apart():
    """The next cleaner level of the table, from any level."""
    times = torch.tensor([0.3, 0.9])
    assert (linear(times - 1 / 999) > linear(times)).all()
