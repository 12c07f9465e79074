"""Guidance: the algebra of its scale, and what it does to data whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import stirred
from snowmelt.config import Config, DataConfig, UNetConfig
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.exact import gaussian_denoiser
from snowmelt.diffusion.guidance import clamped, classifier_free
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import cosine, time_grid
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.seeds import noise_source

STD = torch.tensor(0.4, dtype=torch.float64)
X = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LEVEL = torch.tensor(0.5, dtype=torch.float64)


def gaussian(mean: float) -> Denoise:
    return gaussian_denoiser(torch.tensor(mean, dtype=torch.float64), STD)


WITH, WITHOUT = gaussian(0.6), gaussian(-0.1)


def forbidden(*asked: object) -> Tensor:
    raise AssertionError("an evaluation too many")


def test_a_scale_of_one_is_no_guidance_and_one_evaluation():
    assert classifier_free(WITH, forbidden, 1.0) is WITH


def test_a_scale_of_zero_is_without_the_class():
    assert torch.equal(classifier_free(WITH, WITHOUT, 0.0)(X, LEVEL), WITHOUT(X, LEVEL))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
def test_guidance_is_linear_in_its_scale(scale):
    guided = classifier_free(WITH, WITHOUT, scale)(X, LEVEL)
    # float64, values of order 10.
    torch.testing.assert_close(guided, (1 - scale) * WITHOUT(X, LEVEL) + scale * WITH(X, LEVEL), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
def test_guiding_the_picture_is_guiding_the_noise(scale):
    """The paper's (1 + w) noise_with - w noise_without with w = scale - 1, since noise is affine in x0 at a fixed x."""
    alpha, sigma = alpha_sigma(LEVEL, X)

    def noise(denoise: Denoise) -> Tensor:
        return (X - alpha * denoise(X, LEVEL)) / sigma

    paper = scale * noise(WITH) - (scale - 1) * noise(WITHOUT)
    torch.testing.assert_close(noise(classifier_free(WITH, WITHOUT, scale)), paper, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_between_gaussians_moves_the_mean(scale):
    """Two classes of one width, means a and b: guided is the exact denoiser of mean b + scale (a - b), everywhere."""
    guided, exact = classifier_free(WITH, WITHOUT, scale), gaussian(-0.1 + scale * 0.7)
    for level in (-8.0, 0.0, 8.0):
        log_snr = torch.tensor(level, dtype=torch.float64)
        torch.testing.assert_close(guided(X, log_snr), exact(X, log_snr), rtol=0, atol=1e-13)
    *_, last = SAMPLERS["ddim"](guided, X, time_grid(cosine, 20), forbidden)
    *_, expected = SAMPLERS["ddim"](exact, X, time_grid(cosine, 20), forbidden)
    torch.testing.assert_close(last.x0, expected.x0, rtol=0, atol=1e-12)  # 20 steps of it


def test_a_trained_model_is_guided_between_its_class_and_none():
    """A scale of 0 draws as without labels, bit for bit; only scales other than 1 cost a second evaluation."""
    config = Config(
        DataConfig(size=8, channels=1, classes=("a", "b")),
        network=UNetConfig(channels=(8, 16), attention=(False, True), head_channels=8),
    )
    model = stirred(DiffusionModel(config, Precision(torch.device("cpu"))))
    calls: list[int] = []
    model.denoiser.backbone.register_forward_hook(lambda *_: calls.append(1))

    def drawn(labels: Tensor | None, scale: float) -> tuple[Tensor, int]:
        calls.clear()
        noise = noise_source([0, 0], [0, 1], (1, 8, 8))
        *_, last = model.sample(noise, labels, Drawing(steps=3, guidance=scale))
        return last.x0, len(calls)

    labels = torch.tensor([0, 1])
    (without, one), (zero, two), (with_class, alone) = drawn(None, 1.0), drawn(labels, 0.0), drawn(labels, 1.0)
    assert torch.equal(zero, without) and not torch.equal(with_class, without)
    assert (one, two, alone) == (3, 6, 3)
    wild, _ = drawn(labels, 1000.0)
    assert wild.abs().max() == 1, "every guess is cut off at [-1, 1]"


def test_clamped_keeps_pictures_and_cuts_the_rest():
    inside = X.clamp(-1, 1)
    assert torch.equal(clamped(lambda x, _: inside)(X, LEVEL), inside)
    assert torch.equal(clamped(lambda x, _: 5 * x)(X, LEVEL), (5 * X).clamp(-1, 1))
    assert clamped(lambda x, _: 100 * x)(X, LEVEL).abs().max() == 1
