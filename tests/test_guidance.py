"""Guidance: the algebra of its scale, and what it does to data whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import stirred
from snowmelt.config import Config, DataConfig, UNetConfig
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.exact import GaussianMixture, gaussian_denoiser
from snowmelt.diffusion.grids import time_grid
from snowmelt.diffusion.guidance import (
    GUIDANCES,
    THRESHOLDS,
    autoguided,
    clamped,
    classifier,
    classifier_free,
    dynamic,
    once,
    projected,
    rescaled,
    within,
)
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import cosine
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.seeds import noise_source

STD = torch.tensor(0.4, dtype=torch.float64)
X = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LEVEL = torch.tensor(0.5, dtype=torch.float64)


def gaussian(mean: float) -> Denoise:
    return gaussian_denoiser(torch.tensor(mean, dtype=torch.float64), STD)


WITH, WITHOUT = gaussian(0.6), gaussian(-0.1)


def counted(denoise: Denoise) -> tuple[Denoise, list[int]]:
    calls: list[int] = []

    def counting(x: Tensor, log_snr: Tensor) -> Tensor:
        calls.append(len(x))
        return denoise(x, log_snr)

    return counting, calls


def level(log_snr: float) -> Tensor:
    return torch.tensor(log_snr, dtype=torch.float64)


def rms(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3)).sqrt()


def forbidden(*asked: object) -> Tensor:
    raise AssertionError("an evaluation too many")


def test_a_scale_of_one_is_no_guidance_and_one_evaluation():
    assert classifier_free(WITH, forbidden, 1.0) is WITH


def test_a_scale_of_zero_is_without_the_class():
    for guide in GUIDANCES.values():
        assert guide(forbidden, WITHOUT, 0.0) is WITHOUT


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
    for log_snr in (level(-8.0), level(0.0), level(8.0)):
        torch.testing.assert_close(guided(X, log_snr), exact(X, log_snr), rtol=0, atol=1e-13)
    *_, last = SAMPLERS["ddim"](guided, X, time_grid(cosine, 20), forbidden)
    *_, expected = SAMPLERS["ddim"](exact, X, time_grid(cosine, 20), forbidden)
    torch.testing.assert_close(last.x0, expected.x0, rtol=0, atol=1e-12)  # 20 steps of it


def test_autoguidance_goes_away_from_the_weaker_model():
    """The same line through two estimates, so that what is known of it holds."""
    assert autoguided(WITH, forbidden, 1.0) is WITH
    assert torch.equal(autoguided(WITH, WITHOUT, 0.0)(X, LEVEL), WITHOUT(X, LEVEL))
    assert torch.equal(autoguided(WITH, WITHOUT, 2.5)(X, LEVEL), classifier_free(WITH, WITHOUT, 2.5)(X, LEVEL))


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_guidance_leaves_a_scale_of_one_alone(name):
    assert GUIDANCES[name](WITH, forbidden, 1.0) is WITH


# intervals


def test_outside_the_interval_only_the_plain_estimate_is_asked():
    limited = within(forbidden, WITH, -1.0, 2.0)
    for outside in (-1.001, 2.001, -9.0, 9.0):
        assert torch.equal(limited(X, level(outside)), WITH(X, level(outside)))
    limited = within(WITH, forbidden, -1.0, 2.0)
    for inside in (-1.0, 0.0, 2.0):
        assert torch.equal(limited(X, level(inside)), WITH(X, level(inside)))


def test_an_interval_holds_for_each_image_by_its_own_level():
    levels = torch.tensor([-5.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    mixed, guided, plain = (one(X, levels) for one in (within(WITH, WITHOUT, -1.0, 2.0), WITH, WITHOUT))
    assert torch.equal(mixed[[1, 2]], guided[[1, 2]]) and torch.equal(mixed[[0, 3]], plain[[0, 3]])


def test_a_walk_pays_for_guidance_in_the_interval_only():
    without, calls = counted(WITHOUT)
    grid = time_grid(cosine, 21)
    low, high = float(grid[5]) - 1e-3, float(grid[9]) + 1e-3  # levels 5 to 9: five of them
    for _ in SAMPLERS["ddim"](within(classifier_free(WITH, without, 3.0), WITH, low, high), X, grid, forbidden):
        pass
    assert len(calls) == 5


# contrast


def test_rescaling_brings_the_contrast_back():
    guided = classifier_free(WITH, lambda x, _: 0.2 * x, 5.0)
    plain, whole, half = WITH(X, LEVEL), rescaled(guided, WITH, 1.0)(X, LEVEL), rescaled(guided, WITH, 0.5)(X, LEVEL)
    # One division and one product in float64.
    torch.testing.assert_close(whole.std((1, 2, 3)), plain.std((1, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(half, (whole + guided(X, LEVEL)) / 2, rtol=1e-12, atol=1e-14)
    assert rescaled(guided, WITH, 0.0) is guided and rescaled(WITH, WITH, 0.7) is WITH


def test_once_saves_the_third_evaluation():
    (with_class, calls), (without, others) = counted(WITH), counted(WITHOUT)
    alone = once(with_class)
    x0 = rescaled(classifier_free(alone, without, 3.0), alone, 0.7)(X, LEVEL)
    assert (len(calls), len(others)) == (1, 1)
    assert torch.equal(x0, rescaled(classifier_free(WITH, WITHOUT, 3.0), WITH, 0.7)(X, LEVEL))
    alone(X.clone(), LEVEL)
    alone(X, level(1.0))
    assert len(calls) == 3, "other tensors are other questions"


# APG


@pytest.mark.parametrize("scale", [0.0, 2.0, 9.0])
def test_apg_with_nothing_taken_away_is_classifier_free(scale):
    plain = projected(WITH, WITHOUT, scale, parallel=1.0, norm=float("inf"), momentum=0.0)
    # Sums of products of order 10 in float64, in another order.
    torch.testing.assert_close(plain(X, LEVEL), classifier_free(WITH, WITHOUT, scale)(X, LEVEL), rtol=0, atol=1e-13)


def test_apg_moves_across_the_estimate_and_no_further_than_allowed():
    def without(x: Tensor, _: Tensor) -> Tensor:
        return 0.3 * x.flip(3)

    x0 = WITH(X, LEVEL)
    moved = projected(WITH, without, 6.0, norm=float("inf"), momentum=0.0)(X, LEVEL) - x0
    torch.testing.assert_close((moved * x0).sum((1, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-11)
    assert (moved.abs() > 0.01).any()
    short = projected(WITH, without, 6.0, parallel=1.0, norm=0.05, momentum=0.0)(X, LEVEL) - x0
    torch.testing.assert_close(rms(short), torch.full((4,), 5 * 0.05, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_momentum_of_apg_is_of_one_walk():
    """A difference that is always d becomes d, d + m d, d + m (d + m d), ...; it starts anew where the level falls."""
    momentum, difference = -0.5, WITH(X, LEVEL) - 0.1
    guided = projected(
        lambda *_: difference + 0.1, lambda *_: 0 * X + 0.1, 2.0, parallel=1.0, norm=float("inf"), momentum=momentum
    )

    def share(log_snr: float) -> float:
        return float(((guided(X, level(log_snr)) - difference - 0.1) / difference).mean())

    expected = [1.0, 0.5, 0.5, 0.75, 1.0, 0.5]
    # The level 0.0 is asked about twice, as Heun does, and counts once; -1.0 after 1.0 is a new walk.
    assert [share(at) for at in (-1.0, 0.0, 0.0, 1.0, -1.0, 0.5)] == pytest.approx(expected, abs=1e-12)


# classifiers


def test_classifier_guidance_of_scale_one_is_the_rule_of_bayes():
    """All data a mixture of two Gaussians, the classifier exact: guided is the exact denoiser of one of them."""
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([0.6, -0.1], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 3, 3)
    everything = GaussianMixture(weights, means, torch.tensor([0.4, 0.3], dtype=torch.float64))
    one = GaussianMixture(weights[:1] / weights[0], means[:1], everything.stds[:1])

    def log_prob(x: Tensor, log_snr: Tensor) -> Tensor:
        return weights[0].log() + one.log_density(x, log_snr) - everything.log_density(x, log_snr)

    with torch.no_grad():
        for log_snr in (level(-6.0), level(0.0), level(4.0)):
            guided = classifier(everything.denoise, log_prob, 1.0)(X, log_snr)
            # 1 / alpha = 20 at -6 multiplies the rounding of float64.
            torch.testing.assert_close(guided, one.denoise(X, log_snr), rtol=0, atol=1e-12)
    assert classifier(everything.denoise, forbidden, 0.0) == everything.denoise


# a model


def test_a_trained_model_is_guided_between_its_class_and_none():
    """A scale of 0 draws as without labels, bit for bit; neither it nor 1 costs a second evaluation."""
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
    (without, one), (zero, other), (with_class, alone) = drawn(None, 1.0), drawn(labels, 0.0), drawn(labels, 1.0)
    assert torch.equal(zero, without) and not torch.equal(with_class, without)
    assert (one, other, alone) == (3, 3, 3)
    wild, _ = drawn(labels, 1000.0)
    assert wild.abs().max() == 1, "every guess is cut off at [-1, 1]"


def test_clamped_keeps_pictures_and_cuts_the_rest():
    inside = X.clamp(-1, 1)
    assert torch.equal(clamped(lambda x, _: inside)(X, LEVEL), inside)
    assert torch.equal(clamped(lambda x, _: 5 * x)(X, LEVEL), (5 * X).clamp(-1, 1))
    assert clamped(lambda x, _: 100 * x)(X, LEVEL).abs().max() == 1


def test_dynamic_thresholds_divide_when_much_is_outside():
    x0 = torch.full((1, 1, 10, 10), 0.5, dtype=torch.float64)
    few, many = x0.clone(), x0.clone()
    few.view(-1)[:5], many.view(-1)[:20] = 3.0, -3.0

    def threshold(image: Tensor) -> Tensor:
        return dynamic(lambda x, _: x, share=0.9)(image, LEVEL)

    assert torch.equal(threshold(few), few.clamp(-1, 1)), "5 of 100 are cut off"
    assert torch.equal(threshold(many), many / 3), "20 of 100 make the picture smaller"


@pytest.mark.parametrize("name", THRESHOLDS)
def test_every_threshold_leaves_pictures_alone(name):
    inside = X.clamp(-1, 1)
    assert torch.equal(THRESHOLDS[name](lambda *_: inside)(X, LEVEL), inside)
    if name != "none":
        assert THRESHOLDS[name](lambda *_: 100 * X)(X, LEVEL).abs().max() <= 1
