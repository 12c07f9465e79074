"""Numbers against known answers, against torchmetrics, and against a naive reading of their definitions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snowmelt.errors import UserError
from snowmelt.evaluation.metrics import METRICS, OF_FEATURES, frechet, frechet_of, kid, moments, spread
from snowmelt.evaluation.neighbours import Pair
from snowmelt.evaluation.patches import projections, pyramid, sliced_distance


def normal(count: int, dimension: int, seed: int) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def covariance(dimension: int, seed: int) -> Tensor:
    root = normal(dimension, dimension, seed).double()
    return root @ root.T / dimension


def test_frechet_of_gaussians_with_the_same_axes_is_that_of_their_spreads():
    """Where A and B commute the distance is |mean|^2 + sum (sqrt a - sqrt b)^2."""
    axes, _ = torch.linalg.qr(normal(8, 8, 0).double())
    a, b = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    mean = normal(1, 8, 2)[0].double()
    known = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet(mean, axes * a @ axes.T, torch.zeros(8), axes * b @ axes.T)
    assert found == pytest.approx(known.item(), abs=1e-6)


def test_frechet_of_a_linear_map_is_the_cost_of_moving_along_it():
    """y = S x with S symmetric and positive is the optimal map, so the distance is E|x - S x|^2."""
    a, stretch = covariance(12, 0), covariance(12, 1) + torch.eye(12)
    rest = torch.eye(12) - stretch
    known = (rest @ a @ rest).trace().item()
    assert frechet(torch.zeros(12), a, torch.zeros(12), stretch @ a @ stretch) == pytest.approx(known, abs=1e-6)


def test_frechet_is_symmetric_and_sees_no_distance_where_there_is_none():
    a, b, zero = covariance(9, 3), covariance(9, 4), torch.zeros(9)
    assert frechet(zero, a, zero, b) == pytest.approx(frechet(zero, b, zero, a), abs=1e-9)
    assert frechet(zero, a, zero, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_singular_covariances():
    """A line of variance 4 and a point: the distance is 4. Two lines at right angles: the sum of both."""
    zero, line, other = torch.zeros(3), torch.diag(torch.tensor([4.0, 0, 0])), torch.diag(torch.tensor([0, 9.0, 0]))
    assert frechet(zero, line, zero, torch.zeros(3, 3)) == pytest.approx(4, abs=1e-9)
    assert frechet(zero, line, zero, other) == pytest.approx(13, abs=1e-9)


@pytest.mark.parametrize(("real", "fake"), [(200, 150), (200, 10), (12, 200), (12, 9), (2, 2)])
def test_every_way_to_the_frechet_distance_agrees(real, fake):
    """More pictures than dimensions or fewer, and a dimension that is always 0, as a ReLU leaves it."""
    some, others = normal(real, 16, 0), normal(fake, 16, 1) * 1.5 + 0.2
    some[:, 3] = 0
    known = frechet(*moments(some), *moments(others))
    assert frechet_of(Pair(some, others)) == pytest.approx(known, rel=1e-6)  # roots of rounding: sqrt(1e-16) a value


class Same(nn.Module):
    """Features that are given, in the shape of pictures."""

    num_features = 24

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(1)


def test_frechet_and_kernel_distance_are_those_of_torchmetrics():
    warnings.simplefilter("ignore")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = normal(300, 24, 0), normal(300, 24, 1) * 1.2 + 0.3
    theirs = FrechetInceptionDistance(feature=Same(), input_img_size=(24, 1, 1), normalize=True)
    theirs.set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=300, normalize=True)
    for metric in (theirs, kernel):
        metric.used_custom_model = True
        metric.update(real[:, :, None, None], real=True)
        metric.update(fake[:, :, None, None], real=False)
    pair = Pair(real, fake)
    assert frechet_of(pair) == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert kid(pair) == pytest.approx(kernel.compute()[0].item(), rel=1e-3)


def naive(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage word by word."""

    def distance(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).norm().item()

    def reach(some: Tensor, k: int) -> list[float]:
        return [sorted(distance(a, b) for j, b in enumerate(some) if j != i)[k - 1] for i, a in enumerate(some)]

    between = [[distance(x, y) for y in fake] for x in real]
    three, of_fake, five = reach(real, 3), reach(fake, 3), reach(real, 5)
    n, m = len(real), len(fake)
    return {
        "precision": sum(any(between[i][j] <= three[i] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(between[i][j] <= of_fake[j] for j in range(m)) for i in range(n)) / n,
        "density": sum(between[i][j] <= five[i] for i in range(n) for j in range(m)) / (5 * m),
        "coverage": sum(any(between[i][j] <= five[i] for j in range(m)) for i in range(n)) / n,
    }


@pytest.mark.parametrize(("count", "others", "shift"), [(40, 50, 0.0), (50, 40, 1.0), (45, 45, 3.0)])
def test_neighbours_are_as_defined(count, others, shift):
    real, fake = normal(count, 4, 0) + 20, normal(others, 4, 1) * 0.8 + shift + 20
    pair = Pair(real, fake)
    for name, value in naive(real, fake).items():
        assert OF_FEATURES[name](pair) == pytest.approx(value, abs=1e-9), name


def test_two_pictures_are_enough_not_to_crash():
    pair = Pair(normal(2, 5, 0), normal(2, 5, 1))
    assert all(np.isfinite(measure(pair)) for measure in OF_FEATURES.values())


def test_the_same_pictures_are_at_no_distance():
    same = normal(60, 8, 0)
    pair = Pair(same, same.clone())
    assert frechet_of(pair) == pytest.approx(0, abs=1e-6)
    assert [OF_FEATURES[name](pair) for name in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_features_that_cannot_be_measured_are_told():
    with pytest.raises(UserError, match="not finite"):
        moments(torch.full((5, 3), float("nan")))
    with pytest.raises(UserError, match="two pictures"):
        moments(torch.zeros(1, 3))


def test_spread_is_the_distance_of_two_pictures():
    features = normal(30, 6, 0)
    pairs = torch.cdist(features, features).square().sum() / (30 * 29)
    assert spread(features) == pytest.approx(pairs.sqrt().item(), rel=1e-5)
    assert spread(torch.ones(30, 6)) == 0


def pictures(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random pictures."""
    small = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed)) * 255
    large = nn.functional.interpolate(small, (size, size), mode="bilinear")
    return large.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


def test_the_distance_of_patches_is_the_wasserstein_distance_of_projections():
    stats = pytest.importorskip("scipy.stats")
    real, fake = projections(pictures(12), pictures(12, seed=1), 0)
    known = [
        stats.wasserstein_distance(real[:, slice_].flatten().numpy(), fake[:, slice_].flatten().numpy())
        for slice_ in range(real.shape[1])
    ]
    assert sliced_distance(real, fake) == pytest.approx(np.mean(known), rel=1e-5)


def test_a_pyramid_loses_nothing():
    """The smallest picture, enlarged and with what each level kept added, is the picture."""
    from snowmelt.evaluation.patches import _enlarged

    images = torch.rand(2, 3, 64, 60, generator=torch.Generator().manual_seed(0))
    levels = pyramid(images)
    assert [tuple(level.shape[2:]) for level in levels] == [(64, 60), (32, 30), (16, 15)]
    whole = levels[-1]
    for level in levels[-2::-1]:
        whole = level + _enlarged(whole, level)
    assert torch.allclose(whole, images, atol=1e-5)
    flat = torch.full((1, 1, 32, 32), 0.5)
    assert pyramid(flat)[0].abs().max() < 1e-6, "an even picture has no detail"


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_see_blur_noise_and_lost_contrast(channels):
    real, others = pictures(80, channels=channels), pictures(80, channels=channels, seed=1)
    rng = np.random.default_rng(0)
    noisy = np.clip(others + rng.normal(0, 8, others.shape), 0, 255).astype(np.uint8)
    floor, grey, noise = (sliced_distance(*projections(real, fake, 0)) for fake in (others, others // 2 + 64, noisy))
    assert floor < grey / 2 < grey
    assert floor < noise / 2


def test_pictures_that_cannot_be_compared_are_told():
    with pytest.raises(UserError, match="cannot be compared"):
        projections(pictures(2), pictures(2, channels=1), 0)
    with pytest.raises(UserError, match="smaller than a patch"):
        projections(pictures(2, size=6), pictures(2, size=6), 0)


def test_the_table_of_numbers_is_complete():
    assert list(METRICS) == [*OF_FEATURES, "patches"]
    assert {metric.better for metric in METRICS.values()} == {"lower", "higher"}
    assert METRICS["frechet"].needed(128) == 256
    assert METRICS["frechet"].cap(2048) == 4096
