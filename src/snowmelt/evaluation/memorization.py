"""Does a model repeat its training pictures? Copies among its samples, and errors lower on training pictures.

A sample is flagged as a copy where it is much nearer to a training picture than held-out pictures, which cannot be
copies, ever are: where its ratio (`nearest.py`) is below 0.6 of the least of theirs (0.8 from 200 pictures on, one in
200 left out), or where no region differs by 2 grey levels. Held-out pictures of which the latter is true (mirrored
twins, the same drawing twice) say nothing about what is usual: they are set aside and counted.

How often the test is wrong is known by cross-fitting: each half of the held-out pictures is tested with the limits that
the other half sets, since those that set a limit hardly ever fall below it themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from snowmelt.errors import UserError
from snowmelt.evaluation.nearest import (
    Averages,
    Nearest,
    Pictures,
    Rows,
    Training,
    apart,
    averages,
    nearest_features,
    nearest_pixels,
)
from snowmelt.evaluation.shares import NORMAL, Share, wilson
from snowmelt.shapes import Features

SAME = 2.0
"""Grey levels; pictures that differ by less in every region are the same to the eye."""
MARGINS = (0.6, 0.8)
"""What part of the least usual ratio a copy's may have: of few held-out pictures, and of `MANY`."""
MANY = 200
MOST = 0.4
"""A ratio above it is no copy's, whatever held-out pictures have."""
LEAST = 20
"""Held-out pictures needed."""
PAIRS = 16


@dataclass(frozen=True)
class Searched:
    """Pictures to compare (`Rows` of stored ones where there are many), and their features where there are any."""

    pixels: Pictures | Rows
    features: Features | None = None
    mirrored: Features | None = None
    """Features of their mirror images: of samples and held-out pictures, so that mirrored copies are seen in features
    too; used where both have them."""


@dataclass(frozen=True)
class Suspect:
    """A sample and the training picture it is nearest to."""

    sample: int
    training: int
    """The row among the training pictures given."""
    flipped: bool
    ratio: float
    """Of pixels or of features, whichever makes it the more suspicious."""
    distance: float
    """Grey levels by which the region that differs most does."""
    flagged: bool


@dataclass(frozen=True)
class Memorization:
    """What the nearest training pictures say."""

    samples: int
    training: int
    copies: Share
    count: int
    held_out: int
    """Held-out pictures, without duplicates, that said what is usual."""
    false_alarms: float
    """The share of them that is flagged where the other half of them sets the limits."""
    duplicates: int
    """Held-out pictures that were set aside, since they are training pictures to the eye."""
    closer: Share
    """Samples nearer to a training picture than the median held-out picture is: 0.5 where nothing is copied."""
    flagged: tuple[int, ...]
    """The samples that are copies."""
    pairs: tuple[Suspect, ...]
    """The most suspicious, most suspicious first."""


@dataclass(frozen=True)
class Gap:
    """A mean error on training and on held-out pictures."""

    name: str
    train: float
    held_out: float
    difference: float
    """held_out - train: above 0 where training pictures are known by heart."""
    low: float
    high: float


def find_copies(samples: Searched, training: Searched, held_out: Searched) -> Memorization:
    """Search the training pictures for every sample, in pixels and, where all three have them, in features.

    A `UserError` for fewer than 20 held-out pictures, since they say how near is unusually near.
    """
    if len(held_out.pixels) < LEAST:
        raise UserError(
            f"Copies are told from what is usual by {LEAST} or more held-out pictures, and there are "
            f"{len(held_out.pixels)}; prepare more pictures."
        )
    known, mine = averages(training.pixels), averages(samples.pixels)
    tests = [(nearest_pixels(mine, known), nearest_pixels(averages(held_out.pixels), known))]
    if samples.features is not None and training.features is not None and held_out.features is not None:
        tests.append(_by_features(samples, training.features, held_out))
    ours, theirs = tests[0]
    usual = theirs.distance >= SAME
    ratios = [others.ratio[usual] for _, others in tests]
    suspicions = [some.ratio / _limit(others) for (some, _), others in zip(tests, ratios, strict=True)]
    suspicions[0] = torch.minimum(suspicions[0], ours.distance / SAME)
    suspicion = torch.stack(suspicions).amin(0)
    flagged = (suspicion < 1).nonzero()[:, 0].tolist()
    return Memorization(
        samples=len(samples.pixels),
        training=len(training.pixels),
        copies=wilson(len(flagged), len(suspicion)),
        count=len(flagged),
        held_out=len(ratios[0]),
        false_alarms=_false_alarms(ratios),
        duplicates=int((~usual).sum().item()),
        closer=_closer(ours, theirs),
        flagged=tuple(flagged),
        pairs=_suspects(_worst([some for some, _ in tests], suspicions), suspicion, mine, known),
    )


def gaps(train: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> list[Gap]:
    """Means of errors, one for each picture, by name, and their differences with Welch's 95 % intervals.

    A `UserError` where a name is missing on one side or has fewer than two errors.
    """
    if train.keys() != held_out.keys():
        raise UserError("Training and held-out pictures were measured at different levels; measure the same.")
    return [_gap(name, train[name].double(), held_out[name].double()) for name in train]


def _by_features(samples: Searched, training: Features, held_out: Searched) -> tuple[Nearest, Nearest]:
    """The nearest training pictures of samples and of held-out pictures; mirrored for both or for neither."""
    assert samples.features is not None and held_out.features is not None
    if samples.mirrored is None or held_out.mirrored is None:
        return nearest_features(samples.features, training), nearest_features(held_out.features, training)
    return (
        nearest_features(samples.features, training, samples.mirrored),
        nearest_features(held_out.features, training, held_out.mirrored),
    )


def _limit(ratios: Tensor, of: int | None = None) -> float:
    """The ratio below which a picture is a copy, from those of held-out pictures, `of` how many all of them are."""
    if not len(ratios):
        return 1e-9
    least = ratios.sort().values[len(ratios) // MANY].item()
    return max(1e-9, min(MOST, MARGINS[(of or len(ratios)) >= MANY] * least))


def _false_alarms(ratios: list[Tensor]) -> float:
    """The share of held-out pictures that is below a limit set by the other half; every second one is a half."""
    total = len(ratios[0])
    if total < 2:
        return 0.0
    count = 0
    for half in range(2):
        below = [every[half::2] < _limit(every[1 - half :: 2], total) for every in ratios]
        count += int(torch.stack(below).any(0).sum().item())
    return count / total


def _worst(found: list[Nearest], suspicions: list[Tensor]) -> Nearest:
    """What the most suspicious test found, for every sample; the first where they agree."""
    worst, least = found[0], suspicions[0]
    for other, suspicion in zip(found[1:], suspicions[1:], strict=True):
        more = suspicion < least
        worst = Nearest(
            torch.where(more, other.row, worst.row),
            torch.where(more, other.flipped, worst.flipped),
            torch.where(more, other.distance, worst.distance),
            torch.where(more, other.ratio, worst.ratio),
        )
        least = torch.minimum(least, suspicion)
    return worst


def _closer(ours: Nearest, theirs: Nearest) -> Share:
    """How many are nearer than the median held-out picture; the interval knows that the median is an estimate too."""
    share = (ours.distance < theirs.distance.median()).double().mean().item()
    reach = NORMAL * math.sqrt(share * (1 - share) / len(ours.distance) + 0.25 / len(theirs.distance))
    return Share(share, max(0.0, share - reach), min(1.0, share + reach))


def _suspects(
    found: Nearest, suspicion: Float[Tensor, " samples"], mine: Averages, known: Training
) -> tuple[Suspect, ...]:
    first = suspicion.argsort(stable=True)[:PAIRS]
    rows, flipped = found.row[first], found.flipped[first]
    seen = torch.where(flipped[:, None, None, None], mine[first].flip(3), mine[first])
    columns = (first, rows, flipped, found.ratio[first], apart(seen, known[rows]), suspicion[first] < 1)
    return tuple(Suspect(*values) for values in zip(*(column.tolist() for column in columns), strict=True))


def _gap(name: str, train: Tensor, held_out: Tensor) -> Gap:
    if min(len(train), len(held_out)) < 2:
        raise UserError(f"{name} was measured on fewer than two pictures; measure more.")
    means = train.mean().item(), held_out.mean().item()
    parts = train.var().item() / len(train), held_out.var().item() / len(held_out)
    total = sum(parts)
    below = parts[0] ** 2 / (len(train) - 1) + parts[1] ** 2 / (len(held_out) - 1)
    reach = _student(total**2 / below) * math.sqrt(total) if below else 0.0
    difference = means[1] - means[0]
    return Gap(name, means[0], means[1], difference, difference - reach, difference + reach)


def _student(freedom: float) -> float:
    """The 97.5 % point of Student's t by Fisher's expansion; within 0.5 % from 4 degrees of freedom on."""
    z, n = NORMAL, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
