"""The loss: the textbook's in every parameterization, least at the exact denoiser, and able to learn."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import Answer
from snowmelt.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from snowmelt.data.pixels import to_images
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import PREDICTS, Denoiser
from snowmelt.diffusion.exact import gaussian_denoiser
from snowmelt.diffusion.loss import WEIGHTS, censored, denoising_loss
from snowmelt.diffusion.noise import add_noise, alpha_sigma
from snowmelt.models import build_learner
from snowmelt.models.base import Drawing
from snowmelt.seeds import generator, noise_source

RNG = torch.Generator().manual_seed(1)
LEVELS = torch.linspace(-8, 8, 33, dtype=torch.float64)
X0, NOISE, ESTIMATE = torch.randn(3, len(LEVELS), 2, 3, 3, generator=RNG, dtype=torch.float64)


def loss_of(predicts: str, weight: str) -> Tensor:
    """The loss of a denoiser that believes `ESTIMATE`, whatever its network has to say for that."""
    x = add_noise(X0, NOISE, LEVELS)
    _, c_skip, c_out = Denoiser(Answer(x), predicts).coefficients(LEVELS, x)
    denoiser = Denoiser(Answer((ESTIMATE - c_skip * x) / c_out), predicts)
    return denoising_loss(denoiser, X0, LEVELS, NOISE, weight=WEIGHTS[weight])


def test_noise_and_constant_is_the_simple_loss_of_ddpm():
    """Mean |noise - F(x_t, t)|^2, equation 14 of the paper, for a real network."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)

        def forward(self, x: Tensor, time: Tensor, cond: None) -> Tensor:
            return self.conv(x) + time.double()[:, None, None, None] / 999

    denoiser = Denoiser(Network(), "noise")
    loss = denoising_loss(denoiser, X0, LEVELS, NOISE, weight=WEIGHTS["constant"])
    said = denoiser.network(add_noise(X0, NOISE, LEVELS), LEVELS)
    # The target is computed as (x0 - x / alpha) / (-sigma / alpha): float64, magnified by e^4 = 55 at most.
    torch.testing.assert_close(loss, ((said - NOISE) ** 2).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_weights_by_snr_do_not_depend_on_the_prediction(predicts):
    """One estimate of the picture, one loss: SNR or min(SNR, 5) times its squared error."""
    error, snr = (ESTIMATE - X0) ** 2, LEVELS.exp()[:, None, None, None]
    # float64; the error is found from differences that cancel by a factor of up to 55.
    torch.testing.assert_close(loss_of(predicts, "simple"), (snr * error).mean(), rtol=1e-11, atol=0)
    torch.testing.assert_close(loss_of(predicts, "min_snr"), (snr.clamp(max=5) * error).mean(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_other_weights_by_snr(predicts):
    """EDM's, the bound's, the sigmoid's and P2's, each from its own formula for the error of the image."""
    error, snr = (ESTIMATE - X0) ** 2, LEVELS.exp()[:, None, None, None]
    noisier = 1 / (1 + snr)
    wanted = {
        "edm": (snr + 1 / 0.5**2) * error,
        "bound": snr * error,  # levels given by hand count as evenly drawn
        "sigmoid": torch.sigmoid(2 - snr.log()) * snr * error,
        "p2": noisier * snr * error,
    }
    for weight, losses in wanted.items():
        torch.testing.assert_close(loss_of(predicts, weight), losses.mean(), rtol=1e-11, atol=0)


def test_edm_weighs_its_own_prediction_evenly():
    torch.testing.assert_close(loss_of("edm", "edm"), loss_of("edm", "constant"), rtol=1e-11, atol=0)


def test_simple_is_the_error_of_the_noise():
    alpha, sigma = alpha_sigma(LEVELS, X0)
    believed = (add_noise(X0, NOISE, LEVELS) - alpha * ESTIMATE) / sigma
    torch.testing.assert_close(loss_of("v", "simple"), ((believed - NOISE) ** 2).mean(), rtol=1e-11, atol=0)


def test_image_and_constant_is_the_error_of_the_picture():
    torch.testing.assert_close(loss_of("image", "constant"), ((ESTIMATE - X0) ** 2).mean(), rtol=1e-12, atol=0)


def test_the_exact_denoiser_has_the_variance_of_the_posterior_as_its_loss():
    """For Gaussian data E|x0 - E[x0 | x]|^2 = std^2 sigma^2 / (alpha^2 std^2 + sigma^2), which nothing can beat."""
    count, std = 200_000, 0.5
    for value in (-3.0, 0.0, 3.0):
        rng = torch.Generator().manual_seed(int(value))
        x0 = std * torch.randn(count, 1, 1, 1, generator=rng)
        noise = torch.randn(count, 1, 1, 1, generator=rng)
        levels = torch.full((count,), value)
        exact = gaussian_denoiser(torch.tensor(0.0), torch.tensor(std))(add_noise(x0, noise, levels), levels)
        loss = denoising_loss(Denoiser(Answer(exact), "image"), x0, levels, noise, weight=WEIGHTS["constant"])
        alpha, sigma = (float(a) for a in alpha_sigma(torch.tensor(value), x0))
        least = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
        assert abs(loss - least) < 4 * least * math.sqrt(2 / count), "four standard errors of a variance"


@pytest.mark.parametrize("predicts", PREDICTS)
def test_beyond_an_end_of_the_range_there_is_no_error(predicts):
    """Of pixels that are there; whatever the network predicts, whose own error has the sign of c_out."""
    x0 = X0.clamp(-1, 1)
    assert 0.2 < (x0.abs() == 1).double().mean() < 0.5, "a third of a normal distribution lies beyond 1"
    x = add_noise(x0, NOISE, LEVELS)
    _, c_skip, c_out = Denoiser(Answer(x), predicts).coefficients(LEVELS, x)
    believed = 2 * ESTIMATE
    denoiser = Denoiser(Answer((believed - c_skip * x) / c_out), predicts, censored=True)
    loss = denoising_loss(denoiser, x0, LEVELS, NOISE, weight=WEIGHTS["simple"])
    error = torch.where(x0 == 1, believed.clamp(max=1), torch.where(x0 == -1, believed.clamp(min=-1), believed)) - x0
    torch.testing.assert_close(loss, (LEVELS.exp()[:, None, None, None] * error**2).mean(), rtol=1e-11, atol=0)


def test_only_the_last_colours_are_ends():
    """254 of 255 is a colour like another."""
    x0 = to_images(torch.tensor([0, 1, 254, 255], dtype=torch.uint8).reshape(1, 1, 4, 1))
    for error, wanted in ((0.1, [0.1, 0.1, 0.1, 0]), (-0.1, [0, -0.1, -0.1, -0.1])):
        assert censored(torch.full_like(x0, error), x0).flatten().tolist() == pytest.approx(wanted)


def test_the_best_estimate_of_what_may_be_an_end_is_still_its_mean():
    """Seven of ten pixels are white, three grey; and where all are white, none is better than another beyond it."""
    for grey, best in ((3, (7 + 3 * 0.2) / 10), (0, None)):
        x0 = torch.tensor([1.0] * (10 - grey) + [0.2] * grey).reshape(10, 1, 1, 1)
        level, estimates = torch.zeros(10), torch.linspace(0, 2, 201)
        losses = torch.stack(
            [
                denoising_loss(
                    Denoiser(Answer(estimate.expand_as(x0)), "image", censored=True),
                    x0, level, torch.zeros_like(x0), weight=WEIGHTS["constant"],
                )
                for estimate in estimates
            ]
        )  # fmt: skip
        if best is None:
            assert (losses[estimates >= 1] == 0).all() and (losses[estimates < 1] > 0).all()
        else:
            assert abs(estimates[losses.argmin()] - best) < 0.006, "to half of what estimates lie apart"


def test_a_censored_run_learns_no_more_once_it_is_beyond():
    """White pictures and a network that says 2 of everything: its loss is 0, and so is its held-out error."""
    network = UNetConfig(channels=(8,), attention=(False,), middle_attention=False)
    data = DataConfig(8, 1, std=0.5)
    for is_censored in (True, False):
        config = Config(data, network=network, diffusion=DiffusionConfig(predicts="image", censored=is_censored))
        learner = build_learner(config, Precision(torch.device("cpu")))
        backbone = learner.model.denoiser.backbone
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.zero_()
            backbone.conv_out.bias.fill_(2.0)
        batch = Batch(torch.ones(4, 1, 8, 8), None)
        loss = learner.update(batch, generator(0, "step"), 1e-3).losses["loss"]
        errors = learner.held_out(batch, generator(0, "held out"))
        wanted = 0.0 if is_censored else 1.0
        assert loss == pytest.approx(wanted, abs=1e-3), "the first step of the optimizer comes after it"
        assert errors["error at log-SNR +0"].mean() == pytest.approx(wanted, abs=0.05)


def test_eight_pictures_are_learnt_by_heart():
    """A small network on eight pictures: their noise is predictable, and new draws are those pictures."""
    pictures = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(2)).round() * 2 - 1
    config = Config(
        DataConfig(size=8, channels=1, std=1.0),
        network=UNetConfig(channels=(16, 32), attention=(False, True)),
        diffusion=DiffusionConfig(schedule="cosine", predicts="edm"),
        training=TrainingConfig(),
    )
    learner = build_learner(config, Precision(torch.device("cpu")))
    chance, steps = torch.Generator().manual_seed(0), 300
    for step in range(1, steps + 1):
        batch = Batch(pictures[torch.randint(8, (32,), generator=chance)], None)
        rate = 5e-3 * min(1.0, step / 20, 2 * (steps + 1 - step) / steps)
        assert learner.update(batch, generator(0, "train", step), rate).finite
    *_, last = learner.model.sample(noise_source([0] * 32, range(32), (1, 8, 8)), None, Drawing(steps=25))
    nearest, which = (torch.cdist(last.x0.flatten(1), pictures.flatten(1)) / 8).min(1)
    # Root mean squares per pixel. The pictures are more than 1 apart; so short a training comes within 0.1 of one of
    # them, but for a draw in twenty that has not settled between two. Of 32 draws some two may be missed by chance.
    assert torch.pdist(pictures.flatten(1)).min() / 8 > 1
    assert nearest.median() < 0.2 and (nearest < 0.4).float().mean() > 0.8
    assert len(which.unique()) >= 6


def test_the_loop_in_the_docs_learns():
    """The reader's own loop: short, and what it draws after its few steps is on the way from noise to digits."""
    pytest.importorskip("sklearn", reason="the page uses the digits that come with scikit-learn")
    page = (Path(__file__).parent.parent / "docs" / "own-loop.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 18
    torch.manual_seed(0)
    space: dict[str, Tensor] = {}
    exec(code, space)  # noqa: S102 our own page
    drawn, images = space["pictures"].flatten(1), space["images"].flatten(1)
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    # 80 steps halve the distance to the nearest digit; and no two draws are the same grey average of all digits.
    nearest, of_noise = (torch.cdist(x, images).min(1).values.mean() for x in (drawn, noise))
    assert nearest < 0.65 * of_noise
    assert torch.pdist(drawn).mean() > 0.5 * torch.pdist(images[:100]).mean()
