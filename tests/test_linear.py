"""The linear estimate is what the mean and the covariance of pictures say, and no more than they can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from snowmelt.config import DataConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import Denoiser
from snowmelt.diffusion.linear import FINEST, PICTURES, LinearEstimate
from snowmelt.diffusion.noise import add_noise, alpha_sigma
from snowmelt.models import build_model
from snowmelt.presets import LINEAR, preset

LEVELS = (-9.0, -3.0, 0.0, 3.0, 9.0)


def gaussian(count: int, *, seed: int, size: int = 4) -> Tensor:
    """Pictures in [-1, 1] or nearly, whose pixels are alike the nearer they lie."""
    rng = torch.Generator().manual_seed(seed)
    places = torch.arange(size * size)
    apart = (places[:, None] - places[None]).abs()
    factor = torch.linalg.cholesky(torch.exp(-apart / 4.0) + 1e-3 * torch.eye(size * size))
    mean = torch.linspace(-0.5, 0.5, size * size)
    return (mean + 0.3 * torch.randn(count, size * size, generator=rng) @ factor.T).reshape(count, 1, size, size)


def fitted(x0: Tensor, labels: Tensor | None = None, *, classes: int = 0, directions: int = 10**6) -> LinearEstimate:
    estimate = LinearEstimate(channels=x0.shape[1], size=x0.shape[-1], classes=classes, directions=directions)
    halves = (slice(None, len(x0) // 2), slice(len(x0) // 2, None))
    estimate.fit((x0[half], None if labels is None else labels[half]) for half in halves)
    return estimate


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_the_posterior_mean_of_a_bell_curve(level: float):
    """By the textbook: m + alpha S (alpha^2 S + sigma^2)^-1 (x - alpha m), with the covariance S of these pictures.

    In float64 but for what was fitted in float32.
    """
    x0 = gaussian(512, seed=0)
    estimate, flat = fitted(x0), x0.flatten(1).double()
    covariance, mean = torch.cov(flat.T, correction=0), flat.mean(0)
    log_snr = torch.tensor(level, dtype=torch.float64)
    alpha, sigma = alpha_sigma(log_snr, log_snr)
    x = add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), log_snr).double()
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(16, dtype=torch.float64))
    expected = mean + (x.flatten(1) - alpha * mean) @ gain.T
    assert torch.allclose(estimate(x, log_snr).flatten(1), expected, atol=1e-4)


@pytest.mark.parametrize("directions", [0, 3, 16])
def test_it_errs_less_than_what_knows_less(directions: int):
    """Than the mean, than the noisy picture put right pixel by pixel, and than with fewer directions: on others."""
    estimate, others = fitted(gaussian(4096, seed=0), directions=directions), gaussian(512, seed=2)
    fewer = fitted(gaussian(4096, seed=0), directions=max(0, directions - 2))
    mean, variance = gaussian(4096, seed=0).mean(0), gaussian(4096, seed=0).var(0).mean()
    for level in LEVELS[1:]:
        log_snr = torch.tensor(level)
        alpha, sigma = alpha_sigma(log_snr, others)
        x = add_noise(others, torch.randn(others.shape, generator=torch.Generator().manual_seed(3)), log_snr)
        by_pixel = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

        def error(x0: Tensor) -> float:
            return (x0 - others).square().mean().item()

        assert error(estimate(x, log_snr)) <= 1.001 * error(by_pixel)
        assert error(estimate(x, log_snr)) <= 1.001 * error(fewer(x, log_snr))
        assert error(estimate(x, log_snr)) < error(mean.expand_as(x))


def test_a_level_for_each_and_one_for_all_are_alike():
    x0 = gaussian(64, seed=0)
    estimate = fitted(x0, directions=3)
    each = estimate(x0, torch.tensor([-2.0, 1.0] * 32))
    for place, level in enumerate((-2.0, 1.0)):
        assert torch.allclose(each[place::2], estimate(x0[place::2], torch.tensor(level)), atol=1e-6)


def test_nothing_but_noise_says_the_mean_of_the_class():
    """Two classes, bright and dark; without a class it is what lies between."""
    x0, labels = gaussian(512, seed=0) / 4, torch.arange(512) % 2
    x0 = x0 + (labels - 0.5).reshape(-1, 1, 1, 1)
    estimate = fitted(x0, labels, classes=2)
    noise, lowest = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(4)), torch.tensor(-16.0)
    means = torch.stack([x0[labels == label].mean(0) for label in (0, 1)])
    # At log-SNR -16 some 0.03 % of the noise is still believed.
    assert torch.allclose(estimate(noise, lowest, torch.tensor([0, 1])), means, atol=0.01)
    for none in (None, torch.tensor([2, 2])):
        assert torch.allclose(estimate(noise, lowest, none), x0.mean(0).expand_as(noise), atol=0.01)


def test_classes_that_differ_are_believed():
    """20 classes of eight pictures each, as far from each other as their pictures: most of what is true is left.

    The means of eight are themselves an eighth of a variance away from the truth.
    """
    rng = torch.Generator().manual_seed(7)
    true, labels = torch.randn(20, 1, 2, 2, generator=rng), torch.arange(160) % 20
    estimate = fitted(true[labels] + torch.randn(160, 1, 2, 2, generator=rng), labels, classes=20)
    centred = (true - true.mean(0)).flatten(1) @ estimate.basis
    assert (estimate.centre[:-1] - centred).square().mean() < 0.2 * centred.square().mean()
    assert estimate.variance[0].mean() < 0.7 * estimate.variance[-1].mean()


def test_classes_that_say_nothing_are_hardly_believed():
    """64 classes of four pictures each, by chance: of the squares of their means a third is left, as of chance."""
    x0, labels = gaussian(256, seed=0), torch.arange(256) % 64
    estimate = fitted(x0, labels, classes=64)
    true = torch.stack([x0[labels == label].mean(0) - x0.mean(0) for label in range(64)]).square().sum()
    assert 0.2 < estimate.centre[:-1].square().sum() / true < 0.45


def test_classes_of_one_picture_say_nothing():
    """Of one picture nobody knows how far the others of its class lie from it."""
    x0 = gaussian(64, seed=0)
    classes, none = fitted(x0, torch.randperm(64), classes=64), fitted(x0)
    assert classes.centre.eq(0).all() and torch.allclose(classes.variance[0], none.variance[-1], rtol=1e-4)


def test_large_pictures_are_looked_at_coarsely():
    """Squares of 2 x 2 pixels are directions of length 1: along them lies twice their mean, with as much noise."""
    x0 = gaussian(64, seed=0, size=FINEST)
    large = x0.repeat_interleave(2, 2).repeat_interleave(2, 3)
    coarse, doubled = fitted(large, directions=8), fitted(2 * x0, directions=8)
    assert coarse.basis.shape == doubled.basis.shape == (FINEST**2, 8)
    noise, log_snr = torch.randn(large.shape, generator=torch.Generator().manual_seed(5)), torch.tensor(-1.0)
    x = add_noise(large, noise, log_snr)
    found = 2 * torch.nn.functional.avg_pool2d(coarse(x, log_snr), 2).flatten(1)
    expected = doubled(2 * torch.nn.functional.avg_pool2d(x, 2), log_snr).flatten(1)
    # Beyond the directions the variance of a pixel is another one.
    parts = [answer @ one.basis @ one.basis.T for answer, one in ((found, coarse), (expected, doubled))]
    assert torch.allclose(*parts, atol=1e-3)


def test_the_mean_of_large_pictures_is_not_coarse():
    x0 = gaussian(64, seed=0, size=2 * FINEST)
    noise = torch.randn(1, 1, 2 * FINEST, 2 * FINEST, generator=torch.Generator().manual_seed(6))
    # At log-SNR -16 some 0.03 % of the noise is still believed.
    assert torch.allclose(fitted(x0, directions=4)(noise, torch.tensor(-16.0))[0], x0.mean(0), atol=0.01)


def test_few_pictures_have_few_directions():
    """As many zeros as it takes, so that a checkpoint fits whatever there was to see."""
    estimate = fitted(gaussian(5 * PICTURES, seed=0), directions=12)
    assert estimate.basis.shape == (16, 12)
    assert (estimate.basis.norm(dim=0) > 0).sum() == 5
    assert torch.allclose(estimate.basis[:, :5].T @ estimate.basis[:, :5], torch.eye(5), atol=1e-5)
    assert estimate.rest > 0 and (estimate.variance[0, :5].diff() <= 0).all()


def test_chance_elsewhere_does_not_matter():
    x0 = gaussian(256, seed=0)
    torch.manual_seed(1)
    first, drawn = fitted(x0, directions=3), torch.rand(1)
    torch.manual_seed(2)
    second = fitted(x0, directions=3)
    assert all(torch.equal(one, other) for one, other in zip(first.buffers(), second.buffers(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))


def test_the_network_is_shown_it_beside_the_noisy_picture():
    seen: list[Tensor] = []

    class Backbone(nn.Module):
        def forward(self, shown: Tensor, _time: Tensor, _cond: Tensor | None) -> Tensor:
            seen.append(shown)
            return torch.zeros_like(shown[:, :1])

    x0 = gaussian(64, seed=0)
    estimate, log_snr = fitted(x0), torch.tensor(-1.0)
    x0_hat = Denoiser(Backbone(), "velocity", first=estimate)(x0, log_snr)
    expected = torch.cat([x0, torch.sigmoid(-log_snr) * estimate(x0, log_snr)], 1)
    assert torch.allclose(seen[0], expected, atol=1e-6) and x0_hat.shape == x0.shape


def test_a_model_learns_it_once_and_its_weights_hold_it():
    """A fresh model with these weights needs no pictures; training does not move it."""
    data = DataConfig(8, 1, ("a", "b"), (128, 128), pictures=256)
    config = preset(data, "diffusion")
    assert config.diffusion.linear == LINEAR
    model = build_model(config, Precision(torch.device("cpu")))
    x0, labels = gaussian(256, seed=0, size=8), torch.arange(256) % 2
    model.study([Batch(x0, labels)])
    fresh = build_model(config, Precision(torch.device("cpu")))
    fresh.load_state_dict(model.state_dict())
    first, second = (one.denoiser.first for one in (model, fresh))  # type: ignore[union-attr]
    log_snr = torch.tensor(0.0)
    assert torch.equal(first(x0, log_snr, labels), second(x0, log_snr, labels))
    unfitted = LinearEstimate(channels=1, size=8, classes=2, directions=64)
    assert not torch.equal(first(x0, log_snr, labels), unfitted(x0, log_snr, labels))
    assert not list(first.parameters())
