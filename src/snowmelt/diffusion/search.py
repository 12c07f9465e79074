"""A searched grid: which few levels a sampler should visit, found on trajectories of the denoiser itself.

Along a trajectory of many levels l_0 < ... < l_N keep x_i and x0_i. Every step of a multistep sampler, from any of
these levels to any other with answers at earlier ones, is a combination of them, so its error is a quadratic form:

    x_j(step) - x_j = sum_n c_n b_n,    b = (x_0, ..., x_N, x0_0, ..., x0_N),    error^2 = c^T G c / alpha_j^2

with G the mean of b b^T over pictures and pixels. No step asks the network again. The path of K levels with the
smallest sum of errors is found by dynamic programming over pairs of neighbours, so that a step may use two answers.
(Chen et al. 2024, "On the trajectory regularity of diffusion-based generative models", arXiv:2405.11326, who take
Euler's steps only.) An error made at much noise is partly undone on the way, so errors are weighed by

    (1 + e^-l / s^2)^(-discount / 2),     s the spread of the pictures

which is what an error is multiplied by later on where pictures are Gaussian; the discount is tried out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float64

from snowmelt.diffusion.multistep import Form
from snowmelt.diffusion.walk import Step

CHUNK = 8
"""Pictures of a walk that are in memory in double precision."""
Matrix = Float64[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class Trajectories:
    """Levels that were visited, and the mean products of what was seen there."""

    levels: list[float]
    gram: Matrix
    """(2 N + 2, 2 N + 2): of all x, then of all x0."""

    @staticmethod
    def of(walks: Iterable[Sequence[Step]]) -> Trajectories:
        """From walks over the same levels, each a batch of pictures."""
        levels, total, values = list[float](), torch.zeros(0, dtype=torch.float64), 0
        for walk in walks:
            levels = [float(step.log_snr) for step in walk]
            rows = [step.x for step in walk] + [step.x0 for step in walk]
            for start in range(0, len(rows[0]), CHUNK):
                # In double precision: errors are small differences of these products.
                basis = torch.stack([row[start : start + CHUNK].flatten().cpu().double() for row in rows])
                part = basis @ basis.T
                total = part if not values else total + part
                values += basis.shape[1]
        assert values, "there is a trajectory at least"
        return Trajectories(levels, (total / values).numpy())

    def error(self, form: Form, answers: Sequence[int], end: int) -> float:
        """Root mean square of the step from level `answers[0]` to `end`, with answers at all of `answers`, over alpha.

        Relative to alpha, so that errors at different levels are of the same unit: that of the picture.
        """
        count, start = len(self.levels), answers[0]
        nodes = [self.levels[one] for one in answers]
        weights = form.weights(nodes, self.levels[start], self.levels[end], 0.0)
        parts = {start: weights.decay, end: -1.0}
        for one, weight in zip(answers, weights.parts, strict=True):
            of_x, of_x0 = form.linear(self.levels[one])
            parts[one] = parts.get(one, 0.0) + weight * of_x
            parts[count + one] = parts.get(count + one, 0.0) + weight * of_x0
        return self._size(parts) * float(np.sqrt(1 + np.exp(-self.levels[end])))

    def last_error(self, end: int) -> float:
        """Root mean square of stopping at level `end`: its x0 against that of the cleanest level."""
        count = len(self.levels)
        return 0.0 if end == count - 1 else self._size({count + end: 1.0, 2 * count - 1: -1.0})

    def _size(self, parts: dict[int, float]) -> float:
        rows, values = list(parts), np.array(list(parts.values()))
        return float(np.sqrt(max(0.0, values @ self.gram[np.ix_(rows, rows)] @ values)))


@dataclass(frozen=True)
class Costs:
    """What every step between the levels of trajectories costs."""

    levels: list[float]
    first: Matrix
    """[i, j]: from i to j with the one answer at i; infinite where j is not after i."""
    following: Float64[np.ndarray, "before start end"]
    """[k, i, j]: from i to j with the answers at i and k."""
    last: Float64[np.ndarray, " start"]
    """[i]: of stopping at i."""

    @staticmethod
    def of(found: Trajectories, form: Form, *, answers: int) -> Costs:
        """Of a sampler that uses one answer or, from two on, two."""
        count = len(found.levels)
        first = np.full((count, count), np.inf)
        for start, end in combinations(range(count), 2):
            first[start, end] = found.error(form, [start], end)
        following = np.broadcast_to(first, (count, count, count)).copy()
        if answers > 1:
            for before, start, end in combinations(range(count), 3):
                following[before, start, end] = found.error(form, [start, before], end)
        return Costs(found.levels, first, following, np.array([found.last_error(end) for end in range(count)]))

    def discounted(self, spread: float, discount: float) -> Costs:
        """What is left of the errors at the end of the way, for pictures of this standard deviation."""
        kept = (1 + np.exp(-np.array(self.levels)) / spread**2) ** (-discount / 2)
        return Costs(self.levels, self.first * kept, self.following * kept, self.last)

    def best(self, count: int) -> list[int]:
        """The `count` > 1 places, the first of them 0, with the smallest sum of costs."""
        # reached[k, i]: the least cost of having come to i from k.
        reached = np.full_like(self.first, np.inf)
        reached[0] = self.first[0]
        ways: list[np.ndarray] = []
        for _ in range(count - 2):
            through = reached[:, :, None] + self.following
            ways.append(through.argmin(0))
            reached = through.min(0)
        before, place = np.unravel_index((reached + self.last).argmin(), reached.shape)
        path = [int(place), int(before)]
        for way in reversed(ways):
            path.append(int(way[path[-1], path[-2]]))
        return path[::-1]
