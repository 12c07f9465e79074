"""How far generated pictures are from real ones: the numbers, as pure functions of features, and what each is called.

Frechet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Heusel et al. 2017, arXiv:1706.08500), KID,
the unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018,
arXiv:1801.01401), precision and recall, density and coverage (`neighbours.py`), and the sliced Wasserstein distance of
patches (`patches.py`). A number alone says little: `statistics.py` gives it an interval and a floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from snowmelt.errors import UserError
from snowmelt.evaluation.neighbours import Pair, coverage, density, precision, recall
from snowmelt.shapes import Features


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation, or the reason why there is none."""

    metric: str
    title: str
    space: str
    better: str
    """lower or higher."""
    value: float | None
    low: float | None
    """The 95 % interval of `value`."""
    high: float | None
    floor: float | None
    """The same number of real pictures against other real ones, at the same counts: what a perfect model gets."""
    floor_low: float | None
    """The range that holds 95 % of such floors."""
    floor_high: float | None
    samples: int
    """How many generated pictures each draw compares, with..."""
    real: int
    """...how many real ones; the floor has the same counts."""
    reason: str
    """Empty, or a sentence that says why there is no number."""
    error: float | None
    """Half the width of the interval of `value` before it was cut to what values there can be."""


@dataclass(frozen=True)
class Metric:
    """What is to be known about a number before it is taken."""

    title: str
    better: str
    least: int
    """Pictures a side below which the number means nothing..."""
    least_per_dimension: int
    """...and the same for each dimension of the feature space."""
    most: int
    """Pictures a side that one draw compares at most: more would cost much and say little more..."""
    range: tuple[float, float]
    """What values there can be."""
    because: str
    """Why fewer mean nothing."""

    def needed(self, dimension: int) -> int:
        """Pictures a side needed in a space of that many dimensions."""
        return max(self.least, self.least_per_dimension * dimension)

    def cap(self, dimension: int) -> int:
        """Pictures a side that one draw compares at most."""
        return max(self.most, self.needed(dimension))


_ANY = (-float("inf"), float("inf"))
_SHARE = (0.0, 1.0)
_POSITIVE = (0.0, float("inf"))
_BIAS = "a covariance of fewer is mostly chance, and the distance mostly bias"
_FEW = "of fewer the interval is as wide as what there is to tell apart"
_HOLES = "the neighbourhoods of fewer cover next to nothing of what the pictures look like"

METRICS: dict[str, Metric] = {
    "frechet": Metric("Fréchet distance", "lower", 20, 2, 2000, _POSITIVE, _BIAS),
    "kid": Metric("Kernel distance (KID)", "lower", 10, 0, 1000, _ANY, _FEW),
    "precision": Metric("Precision", "higher", 20, 0, 1000, _SHARE, _HOLES),
    "recall": Metric("Recall", "higher", 20, 0, 1000, _SHARE, _HOLES),
    "density": Metric("Density", "higher", 20, 0, 1000, _POSITIVE, _HOLES),
    "coverage": Metric("Coverage", "higher", 20, 0, 1000, _SHARE, _HOLES),
    "patches": Metric("Patch distance (sliced Wasserstein)", "lower", 10, 0, 1000, _POSITIVE, _FEW),
}
"""Every number that is taken; `patches` of pixels, the others of features."""

Vector = Float[Tensor, " values"]
Square = Float[Tensor, "values values"]


def frechet(mean_a: Vector, cov_a: Square, mean_b: Vector, cov_b: Square) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians, computed in float64, at least 0.

    Covariances may be singular: roots are taken by symmetric eigendecompositions, in which what rounding makes
    negative is 0, so that nothing is ever imaginary.
    """
    mean_a, cov_a, mean_b, cov_b = (part.double() for part in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return _gaussians(mean_a - mean_b, cov_a.trace() + cov_b.trace(), root @ cov_b @ root)


def frechet_of(pair: Pair) -> float:
    """The Frechet distance of the Gaussians fitted to two sets of features: `frechet` of their `moments`, sooner.

    A factor L of A = L L^T takes the place of the root, since L^T B L has the eigenvalues of A^1/2 B A^1/2: Cholesky's,
    or, where there are fewer pictures than dimensions, the pictures themselves.
    """
    (mean_a, real), (mean_b, fake) = _scaled(pair.real), _scaled(pair.fake)
    traces = real.square().sum() + fake.square().sum()
    if len(real) < real.shape[1]:
        products = real @ fake.T
        return _gaussians(mean_a - mean_b, traces, products @ products.T)
    cov_a, cov_b = real.T @ real, fake.T @ fake
    factor, failed = torch.linalg.cholesky_ex(cov_a)
    if failed.item():
        return frechet(mean_a, cov_a, mean_b, cov_b)
    return _gaussians(mean_a - mean_b, traces, factor.T @ cov_b @ factor)


def moments(features: Features) -> tuple[Vector, Square]:
    """Mean and unbiased covariance in float64; a `UserError` for fewer than two pictures or features not finite."""
    mean, rest = _scaled(features)
    return mean, rest.T @ rest


def _scaled(features: Features) -> tuple[Vector, Features]:
    """The mean, and the differences from it so scaled that their products are the covariance; float64."""
    if len(features) < 2:
        raise UserError(f"A covariance needs two pictures or more, and there are {len(features)}; measure more.")
    if not features.isfinite().all():
        raise UserError("Some features are not finite; look at the pictures, and at the weights they come from.")
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _gaussians(shift: Vector, traces: Tensor, product: Float[Tensor, "size size"]) -> float:
    product = (product + product.T) / 2
    roots = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    return max(0.0, (shift.square().sum() + traces - 2 * roots.sum()).item())


def kid(pair: Pair) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, kernel (x.y / d + 1)^3; it may be below 0."""
    dimension = pair.real.shape[1]

    def total(products: Tensor) -> float:
        base = products.div(dimension).add_(1)
        return (base * base).mul_(base).sum(1).double().sum().item()  # `pow` takes ten times as long

    def among(products: Tensor) -> float:
        count = len(products)
        return (total(products) - total(products.diagonal()[None])) / (count * (count - 1))

    cross = 2 * total(pair.products) / pair.products.numel()
    return among(pair.real_products) + among(pair.fake_products) - cross


OF_FEATURES: dict[str, Callable[[Pair], float]] = {
    "frechet": frechet_of,
    "kid": kid,
    "precision": precision,
    "recall": recall,
    "density": density,
    "coverage": coverage,
}
"""How each number is taken from features; two pictures a side, or k + 1 where there are neighbours, are enough."""


def spread(features: Features) -> float:
    """The root mean square distance of two different pictures: it falls to 0 where a generator draws only one."""
    return features.double().var(0).sum().mul(2).sqrt().item() if len(features) > 1 else 0.0
