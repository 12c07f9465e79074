"""Precision, recall, density and coverage: who lies among whose nearest neighbours.

Precision is the share of generated pictures within reach of a real one, where a picture reaches as far as its k-th
nearest neighbour in its own set, recall the share of real pictures within reach of a generated one (Kynkaanniemi et
al. 2019, arXiv:1904.06991, k = 3). Density counts in how many reaches of real pictures a generated one lies, divided
by k, and coverage is the share of real pictures with a generated one in reach (Naeem et al. 2020, arXiv:2002.09797,
k = 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from snowmelt.shapes import Features

REACH = 3
"""Neighbours for precision and recall."""
WIDE_REACH = 5
"""Neighbours for density and coverage."""


@dataclass(frozen=True)
class Pair:
    """Real and generated features, and what several numbers need of the two, computed once."""

    real: Float[Tensor, "real values"]
    fake: Float[Tensor, "fake values"]

    @cached_property
    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both sets about the mean of the real ones, so that differences keep their digits, and that mean."""
        middle = self.real.mean(0)
        return self.real - middle, self.fake - middle, middle

    @cached_property
    def real_products(self) -> Tensor:
        """Inner products of all real features."""
        return self.real @ self.real.T

    @cached_property
    def fake_products(self) -> Tensor:
        """Inner products of all generated features."""
        return self.fake @ self.fake.T

    @cached_property
    def products(self) -> Tensor:
        """Inner products, (real, fake)."""
        return self.real @ self.fake.T

    @cached_property
    def between(self) -> Tensor:
        """Squared distances, (real, fake)."""
        real, fake, _ = self.centred
        return squared_distances(real, fake)

    @cached_property
    def real_reach(self) -> Tensor:
        """Squared distances to the nearest `WIDE_REACH` neighbours among the real pictures, increasing."""
        return _reach(self.centred[0], WIDE_REACH)

    @cached_property
    def fake_reach(self) -> Tensor:
        """Likewise to the nearest `REACH` among the generated ones."""
        return _reach(self.centred[1], REACH)


def squared_distances(
    some: Float[Tensor, "some values"], others: Float[Tensor, "others values"]
) -> Float[Tensor, "some others"]:
    """Squared Euclidean distances of all pairs, by inner products."""
    lengths = some.square().sum(1, keepdim=True) + others.square().sum(1)
    return lengths.addmm_(some, others.T, alpha=-2).clamp_(min=0)


def _reach(features: Features, most: int) -> Tensor:
    distances = squared_distances(features, features).fill_diagonal_(float("inf"))
    return distances.topk(min(most, len(features) - 1), largest=False).values


def precision(pair: Pair) -> float:
    """The share of generated pictures that could be real ones."""
    return ((pair.between - _kth(pair.real_reach, REACH)[:, None]).amin(0) <= 0).double().mean().item()


def recall(pair: Pair) -> float:
    """The share of real pictures that could be generated ones."""
    return ((pair.between - _kth(pair.fake_reach, REACH)).amin(1) <= 0).double().mean().item()


def density(pair: Pair) -> float:
    """In how many reaches of real pictures a generated one lies, over `WIDE_REACH`; about 1 where they are alike."""
    inside = (pair.between <= _kth(pair.real_reach, WIDE_REACH)[:, None]).sum().item()
    return inside / (WIDE_REACH * len(pair.fake))


def coverage(pair: Pair) -> float:
    """The share of real pictures that have a generated one in reach."""
    return (pair.between.amin(1) <= _kth(pair.real_reach, WIDE_REACH)).double().mean().item()


def _kth(reach: Tensor, neighbours: int) -> Tensor:
    """The k-th column, or the last where there are too few pictures."""
    return reach[:, min(neighbours, reach.shape[1]) - 1]
