"""The nearest training picture of every picture, in pixels (mirror images included) and in features.

Two pictures are as far apart as the region that differs most: the largest difference of averages over a grid of 8 x 8
regions (16 x 16 above 48 pixels). Noise and compression vanish in averages, while variants of one drawing, which other
distances call near, differ somewhere; Carlini et al. 2023 (arXiv:2301.13188) compare tiles for the same reason. Their
ratio, the distance of the nearest over the mean distance of the 50 that follow, says whether near is unusually near.
"""

from __future__ import annotations

from dataclasses import dataclass

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
_CHUNK = 128
_READING = 4096

Pictures = UInt8[np.ndarray, "pictures height width channels"]
Averages = Float[Tensor, "pictures channels rows columns"]
Values = Float[Tensor, " pictures"]


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


def averages(pixels: Pictures) -> Averages:
    """What pixels are compared by: averages of regions, in grey levels."""
    parts = [_averages(pixels[start : start + _READING]) for start in range(0, len(pixels), _READING)]
    return torch.cat(parts)


def nearest_pixels(pictures: Averages, training: Float[Tensor, "training channels rows columns"]) -> Nearest:
    """The nearest training pictures, as they are or mirrored, by the `averages` of both."""
    middle = training.mean(0)
    known = (training - middle).flatten(1)
    half_lengths = known.square().sum(1) / 2
    parts: list[Nearest] = []
    for some in pictures.split(_CHUNK):
        both = torch.stack([some, some.flip(3)], 1)
        products = [(half_lengths - (side - middle).flatten(1) @ known.T) for side in both.unbind(1)]
        rows = _lowest(torch.minimum(*products), _CANDIDATES)
        theirs = training.flatten(1)[rows]
        straight, mirrored = ((side.flatten(1)[:, None] - theirs).abs().amax(2) for side in both.unbind(1))
        distances, order = torch.minimum(straight, mirrored).sort(dim=1)
        first = order[:, :1]
        found = rows.gather(1, first)[:, 0], (mirrored < straight).gather(1, first)[:, 0]
        parts.append(Nearest(*found, distances[:, 0], _ratio(distances)))
    return _joined(parts)


def nearest_features(features: Features, training: Float[Tensor, "training values"]) -> Nearest:
    """The nearest training pictures by their features; what a mirror image is near to is up to the encoder."""
    middle = training.mean(0)
    known = training - middle
    half_lengths = known.square().sum(1) / 2
    parts: list[Nearest] = []
    for some in (features - middle).split(_CHUNK):
        rows = _lowest(half_lengths - some @ known.T, AMONG + 1)
        distances, order = (some[:, None] - known[rows]).norm(dim=2).sort(dim=1)
        flipped = torch.zeros(len(some), dtype=torch.bool)
        parts.append(Nearest(rows.gather(1, order[:, :1])[:, 0], flipped, distances[:, 0], _ratio(distances)))
    return _joined(parts)


def _averages(pixels: Pictures) -> Averages:
    images = torch.tensor(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    height, width = images.shape[2:]
    grid = 16 if min(height, width) > 48 else 8
    return functional.adaptive_avg_pool2d(images, (min(grid, height), min(grid, width)))


def _lowest(values: Tensor, most: int) -> Tensor:
    return values.topk(min(most, values.shape[1]), largest=False).indices


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
