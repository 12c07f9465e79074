"""Figures: a number with its 95 % interval and its floor, real against real at the same counts.

Few pictures make a Frechet distance large and a coverage small whatever they show, so a value is compared with a floor
of the same counts. Of M real pictures and n generated ones, n' = min(n, M // 2) generated are compared with
m' = min(M - n') real ones, both below a cap:

    value   mean over draws of (m' real, n' generated)
    floor   mean over draws of (m' real, n' other real)

and the interval is value +- 2.13 error (Student's for the 16 draws), where

    error^2 = max(halves^2, share * scatter^2) + 2 scatter^2 / 16

`scatter` is the standard deviation of the floor's draws, `share` how much of a side a draw compares, max(n' / n,
m' / M), since draws of less are averaged, and the last term what is left of chance in the two means. `halves` is the
error of the value by half-sampling: cut both sides in disjoint halves and measure each pair; their difference d has
four times the variance of the whole where variance falls as 1 / n (eight times where it falls as 1 / n^2, as near
equality), and the bias of small counts, the same in both, cancels: halves^2 = mean(d^2) / 4. Drawing with replacement
would not do: pictures that appear twice inflate every one of these numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from snowmelt.errors import UserError, choose
from snowmelt.evaluation.metrics import METRICS, OF_FEATURES, Figure, Metric
from snowmelt.evaluation.neighbours import Pair
from snowmelt.evaluation.patches import projections, sliced_distance
from snowmelt.seeds import generator
from snowmelt.shapes import Features

WIDTH = 2.13
"""Errors on each side of a 95 % interval: Student's t with 15 degrees of freedom."""
HALVES = 12
"""Random cuts in two for the error; each gives two values."""
DRAWS = 16
"""Random draws for the floor, and for the value where halves are smaller than its counts."""

Pictures = UInt8[np.ndarray, "pictures height width channels"]
Others = UInt8[np.ndarray, "others rows columns colours"]
Compare = Callable[[Tensor, Tensor], dict[str, float]]
"""Real and generated things, pictures first -> numbers by name."""


@dataclass(frozen=True)
class Counts:
    """How many pictures a draw compares."""

    real: int
    fake: int
    same: bool = False
    """Whether both sides must be equally many, halves too."""


def counts(real: int, fake: int, cap: int, same: bool = False) -> Counts:
    """The counts of value and floor for `real` and `fake` pictures; with `same`, as many on both sides."""
    drawn = min(fake, real // 2, cap)
    return Counts(drawn if same else min(real - drawn, cap), drawn, same)


@dataclass(frozen=True)
class Sets:
    """Two sets of pictures (features, or anything with pictures first), and how to draw from them."""

    real: Tensor
    fake: Tensor
    counts: Counts
    seed: int

    def _order(self, count: int, purpose: str, number: int) -> Tensor:
        return torch.randperm(count, generator=generator(self.seed, purpose, number))

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Real and generated pictures for a value."""
        real = self._order(len(self.real), "value, real", number)[: self.counts.real]
        fake = self._order(len(self.fake), "value, generated", number)[: self.counts.fake]
        return self.real[real], self.fake[fake]

    def split(self, number: int) -> tuple[Tensor, Tensor]:
        """Real and other real pictures for a floor."""
        order = self._order(len(self.real), "floor", number)
        used = self.counts.real + self.counts.fake
        return self.real[order[: self.counts.real]], self.real[order[self.counts.real : used]]

    @property
    def half(self) -> Counts:
        """The counts of one half: of each side, or as many as a draw has."""
        real, fake = min(len(self.real) // 2, self.counts.real), min(len(self.fake) // 2, self.counts.fake)
        least = min(real, fake)
        return Counts(least, least, True) if self.counts.same else Counts(real, fake)

    def share(self, drawn: Counts) -> float:
        """How much of a side that many pictures are, of the side of which they are more."""
        return max(drawn.real / len(self.real), drawn.fake / len(self.fake))

    def halves(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Two disjoint halves."""
        real = self._order(len(self.real), "half, real", number)
        fake = self._order(len(self.fake), "half, generated", number)
        half = self.half
        for part in range(2):
            rows = real[part * half.real : (part + 1) * half.real]
            yield self.real[rows], self.fake[fake[part * half.fake : (part + 1) * half.fake]]


@dataclass(frozen=True)
class Draws:
    """What was measured, each by name."""

    values: list[dict[str, float]]
    floors: list[dict[str, float]]
    halves: list[tuple[dict[str, float], dict[str, float]]]
    share: float
    """How much of a side a draw compares..."""
    half_share: float
    """...and a half: 1/2, or less where a draw is capped."""


def take(sets: Sets, compare: Compare) -> Draws:
    """All the draws of a figure."""
    halves: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(HALVES):
        first, second = (compare(*pair) for pair in sets.halves(number))
        halves.append((first, second))
    floors = [compare(*sets.split(number)) for number in range(DRAWS)]
    values = [value for pair in halves for value in pair]
    if sets.half != sets.counts:
        values = [compare(*sets.draw(number)) for number in range(DRAWS)]
    return Draws(values, floors, halves, sets.share(sets.counts), sets.share(sets.half))


def measure(
    real: Features,
    fake: Float[Tensor, "others dimensions"],
    space: str,
    *,
    seed: int,
    names: Sequence[str] = tuple(OF_FEATURES),
) -> list[Figure]:
    """The named numbers of features of real pictures and of generated ones, in the order of `METRICS`.

    Each has a value, an interval and a floor, or the reason why it has none. The same input gives the same figures.
    """
    if real.shape[1] != fake.shape[1]:
        raise UserError(f"Features of {real.shape[1]} and {fake.shape[1]} values cannot be compared; take one space.")
    asked = {name: choose(OF_FEATURES, name, "metric of features") for name in names}
    dimension = real.shape[1]
    caps = {name: metric.cap(dimension) for name, metric in METRICS.items() if name in asked}
    found: dict[str, Figure] = {}
    for cap in sorted(set(caps.values())):
        sets = Sets(real, fake, counts(len(real), len(fake), cap), seed)
        group = [name for name in caps if caps[name] == cap]
        found |= {figure.metric: figure for figure in _figures(group, sets, space, _of_features)}
    return [found[name] for name in caps]


def measure_patches(real: Pictures, fake: Others, *, seed: int) -> list[Figure]:
    """The distance of patches, of uint8 pixels (n, h, w, c): a list of one figure."""
    drawn = counts(len(real), len(fake), METRICS["patches"].most, same=True)
    sides = projections(real, fake, seed) if drawn.fake else (torch.empty(len(real), 1), torch.empty(len(fake), 1))
    return _figures(["patches"], Sets(*sides, drawn, seed), "pixels", lambda names: _of_patches)


def seconds_expected(real: int, fake: int, dimension: int, names: Sequence[str] = tuple(OF_FEATURES)) -> float:
    """About how long `measure` takes on one core of 2023, within a factor of two; 0 where nothing is measured."""
    seconds = 0.0
    for cap in {METRICS[name].cap(dimension) for name in names}:
        drawn = counts(real, fake, cap)
        group = [name for name in names if METRICS[name].cap(dimension) == cap]
        group = [name for name in group if drawn.fake >= METRICS[name].needed(dimension)]
        both, pairs = drawn.real + drawn.fake, (drawn.real + drawn.fake) ** 2
        draws = 2 * HALVES + DRAWS * (1 if 2 * drawn.fake <= fake and 2 * drawn.real <= real else 2)
        if "frechet" in group:
            seconds += draws * (1e-4 * both / 100 + 1e-10 * both * dimension**2 + 2e-10 * dimension**3)
        if set(group) - {"frechet"}:
            seconds += draws * pairs * (1.4e-8 + 2.5e-11 * dimension)
    return seconds


def seconds_expected_patches(real: int, fake: int, values: int) -> float:
    """The same for `measure_patches`, of pictures with `values` numbers each."""
    drawn = counts(real, fake, METRICS["patches"].most, same=True)
    return (real + fake) * (3e-4 + 1e-7 * values) + (2 * HALVES + 2 * DRAWS) * 6e-5 * drawn.fake


def _of_features(names: Sequence[str]) -> Compare:
    def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
        pair = Pair(real, fake)
        return {name: OF_FEATURES[name](pair) for name in names}

    return compare


def _of_patches(real: Tensor, fake: Tensor) -> dict[str, float]:
    return {"patches": sliced_distance(real, fake)}


def _figures(names: Sequence[str], sets: Sets, space: str, compare: Callable[[Sequence[str]], Compare]) -> list[Figure]:
    """A figure for each name; what has a reason to be left out costs nothing."""
    reasons = {name: _reason(METRICS[name], sets) for name in names}
    taken = [name for name in names if not reasons[name]]
    draws = take(sets, compare(taken)) if taken else Draws([], [], [], 0.0, 0.0)
    return [
        _blank(name, space, sets.counts, reasons[name]) if reasons[name] else _figure(name, space, sets.counts, draws)
        for name in names
    ]


def _reason(metric: Metric, sets: Sets) -> str:
    """Why there can be no number, a sentence; empty where there can be one."""
    for side, what in ((sets.real, "real"), (sets.fake, "generated")):
        if not side.isfinite().all():
            return f"Some features of the {what} pictures are not finite; look at the pictures and at the weights."
    dimension = sets.real.shape[1]
    needed = metric.needed(dimension)
    if sets.counts.fake >= needed:
        return ""
    where = f" in {dimension} dimensions" if metric.least_per_dimension else ""
    return (
        f"{needed:,} generated and {2 * needed:,} real pictures are needed{where}, since {metric.because}; "
        f"there are {len(sets.fake):,} and {len(sets.real):,}."
    )


def _blank(name: str, space: str, drawn: Counts, reason: str) -> Figure:
    metric = METRICS[name]
    nothing = (None, None, None, None, None, None)
    return Figure(name, metric.title, space, metric.better, *nothing, drawn.fake, drawn.real, reason, None)


def _figure(name: str, space: str, drawn: Counts, draws: Draws) -> Figure:
    floors = [floor[name] for floor in draws.floors]
    value, floor = statistics.fmean(draw[name] for draw in draws.values), statistics.fmean(floors)
    if not (math.isfinite(value) and math.isfinite(floor)):
        return _blank(name, space, drawn, "The features are too large to compute with; look at the weights.")
    scatter = statistics.stdev(floors)
    halves = (
        statistics.fmean((first[name] - second[name]) ** 2 for first, second in draws.halves) * draws.half_share / 2
    )
    error = (max(halves, draws.share * scatter**2) + 2 * scatter**2 / len(floors)) ** 0.5
    metric = METRICS[name]

    def interval(middle: float, error: float) -> tuple[float, float]:
        least, most = metric.range
        return max(least, middle - WIDTH * error), min(most, middle + WIDTH * error)

    low, high = interval(value, error)
    floor_low, floor_high = interval(floor, scatter)
    numbers = (value, low, high, floor, floor_low, floor_high)
    return Figure(name, metric.title, space, metric.better, *numbers, drawn.fake, drawn.real, "", WIDTH * error)
