"""The nearest training picture of every picture, in pixels (mirror images included) and in features.

Two pictures are as far apart as the region that differs most: the largest difference of averages over a grid of 8 x 8
regions (16 x 16 above 48 pixels). Noise and compression vanish in averages, while variants of one drawing, which other
distances call near, differ somewhere; Carlini et al. 2023 (arXiv:2301.13188) compare tiles for the same reason. Their
ratio, the distance of the nearest over the mean distance of the 50 that follow, says whether near is unusually near.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from snowmelt.shapes import Features

AMONG = 50
"""How many further neighbours say what distance is usual."""
_CANDIDATES = 64
"""The nearest by root mean square difference of the averages, among which the distance is taken."""
_MOST_AT_ONCE = 128
"""Pictures that are searched for at a time, or fewer where there are so many training pictures that their..."""
_MATRIX_BYTES = 1 << 28
"""...distances would take more than this."""
_READ_BYTES = 1 << 24
"""Of stored pictures that are read at a time; four times as much as floats."""

Pictures: TypeAlias = UInt8[np.ndarray, "pictures height width channels"]
Averages: TypeAlias = Float[Tensor, "pictures channels rows columns"]
Training: TypeAlias = Float[Tensor, "training channels rows columns"]
Values: TypeAlias = Float[Tensor, " pictures"]


@dataclass(frozen=True)
class Rows:
    """Some rows of stored pictures, which are read when they are looked at: all of them may not fit in the memory."""

    images: Pictures
    rows: Int[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Pictures:
        return self.images[self.rows[part]]


def parts_of(pictures: Pictures | Rows, most: int | None = None) -> Iterator[Pictures]:
    """All the pictures, about 16 MB at a time (64 MB as floats), and no more than `most`."""
    images = pictures.images if isinstance(pictures, Rows) else pictures
    count = max(1, _READ_BYTES // max(1, int(np.prod(images.shape[1:]))))
    count = count if most is None else min(most, count)
    return (pictures[start : start + count] for start in range(0, len(pictures), count))


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of every picture."""

    row: Int[Tensor, " pictures"]
    """Its row among the training pictures."""
    flipped: Bool[Tensor, " pictures"]
    """Whether it is its mirror image that is near."""
    distance: Values
    """Of pixels: grey levels by which the region that differs most differs. Of features: the Euclidean distance."""
    ratio: Values
    """`distance` over the mean distance of the next `AMONG` training pictures: near 0 for a copy, at most 1."""


def averages(pictures: Pictures | Rows) -> Averages:
    """What pictures are compared by: averages of regions, in grey levels."""
    images = pictures.images if isinstance(pictures, Rows) else pictures
    height, width, channels = images.shape[1:]
    grid = 16 if min(height, width) > 48 else 8
    regions = min(grid, height), min(grid, width)
    found = torch.empty(len(pictures), channels, *regions)
    done = 0
    for part in parts_of(pictures):
        floats = torch.tensor(np.ascontiguousarray(part)).permute(0, 3, 1, 2).float()
        found[done : done + len(part)] = functional.adaptive_avg_pool2d(floats, regions)
        done += len(part)
    return found


def apart(pictures: Averages, others: Averages) -> Values:
    """How far apart pictures are, each from its own other: grey levels by which the region that differs most does."""
    return (pictures - others).abs().flatten(1).amax(1)


def nearest_pixels(pictures: Averages, training: Training) -> Nearest:
    """The nearest training pictures, as they are or mirrored, by the `averages` of both."""
    known = training.flatten(1)
    lengths = _lengths(known)
    found: list[Nearest] = []
    for some in pictures.split(_at_once(len(known))):
        sides = some.flatten(1), some.flip(3).flatten(1)
        squares = _squares(sides[0], known, lengths)
        torch.minimum(squares, _squares(sides[1], known, lengths), out=squares)
        rows = _lowest(squares, _CANDIDATES)
        theirs = known[rows]
        straight, mirrored = ((side[:, None] - theirs).abs().amax(2) for side in sides)
        found.append(_nearest(rows, straight, mirrored))
    return _joined(found)


def nearest_features(
    features: Features, training: Float[Tensor, "training values"], mirrored: Features | None = None
) -> Nearest:
    """The nearest training pictures by their features.

    Args:
        mirrored: features of the mirror images of the same pictures; each is searched for with the nearer of both.
    """
    middle = training.mean(0)
    known = training - middle
    lengths = _lengths(known)
    found: list[Nearest] = []
    for some in torch.arange(len(features)).split(_at_once(len(known))):
        sides = [side[some] - middle for side in (features, mirrored) if side is not None]
        squares = _squares(sides[0], known, lengths)
        for side in sides[1:]:
            torch.minimum(squares, _squares(side, known, lengths), out=squares)
        rows = _lowest(squares, AMONG + 1)
        distances = [(side[:, None] - known[rows]).norm(dim=2) for side in sides]
        found.append(_nearest(rows, distances[0], distances[-1]))
    return _joined(found)


def _at_once(training: int) -> int:
    """Pictures searched for at a time: three matrices of them and all training pictures are needed."""
    return max(1, min(_MOST_AT_ONCE, _MATRIX_BYTES // (3 * 4 * max(1, training))))


def _lengths(known: Float[Tensor, "training values"]) -> Float[Tensor, " training"]:
    return torch.linalg.vector_norm(known, dim=1).square()


def _squares(
    some: Float[Tensor, "some values"], known: Float[Tensor, "training values"], lengths: Float[Tensor, " training"]
) -> Float[Tensor, "some training"]:
    """Squared distances, less exact than differences would be: they only choose the candidates."""
    return torch.addmm(lengths, some, known.T, alpha=-2).add_(some.square().sum(1, keepdim=True))


def _lowest(values: Tensor, most: int) -> Tensor:
    return values.topk(min(most, values.shape[1]), largest=False).indices


def _nearest(rows: Tensor, straight: Tensor, mirrored: Tensor) -> Nearest:
    """Of candidates (pictures, candidates) and their distances."""
    distances, order = torch.minimum(straight, mirrored).sort(dim=1, stable=True)
    first = order[:, :1]
    flipped = (mirrored < straight).gather(1, first)[:, 0]
    return Nearest(rows.gather(1, first)[:, 0], flipped, distances[:, 0], _ratio(distances))


def _ratio(ordered: Float[Tensor, "pictures neighbours"]) -> Values:
    usual = ordered[:, 1 : AMONG + 1]
    usual = usual.mean(1) if usual.shape[1] else torch.ones(len(ordered))
    return torch.where(ordered[:, 0] > 0, ordered[:, 0] / usual.clamp(min=1e-6), 0.0)


def _joined(parts: list[Nearest]) -> Nearest:
    return Nearest(
        torch.cat([part.row for part in parts]),
        torch.cat([part.flipped for part in parts]),
        torch.cat([part.distance for part in parts]),
        torch.cat([part.ratio for part in parts]),
    )
