"""The sliced Wasserstein distance of small patches at several scales (Karras et al. 2018, arXiv:1710.10196, section 5).

Every picture becomes a Laplacian pyramid: what each halving of the size loses, and the small picture that is left. Of
every level random patches of 7 x 7 are taken, projected on random directions, and the one-dimensional distributions of
real and generated projections compared: the mean distance of values of equal rank. Unlike features, this sees texture,
noise, contrast and colour as such. Both sets are divided by the spread of the REAL patches, by level and channel: were
each divided by its own, as in the paper, lost contrast would not be seen.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from snowmelt.errors import UserError
from snowmelt.seeds import generator
from snowmelt.shapes import Images

SIDE = 7
"""Height and width of a patch."""
SMALLEST = 14
"""Height and width below which a level is not halved again into another: a patch would be most of the picture."""
PATCHES = 32
"""Patches of each picture and level."""
DIRECTIONS = 64
"""Random projections of each level."""
_CHUNK = 256
"""Pictures whose pyramids are in memory at once; fewer of pictures larger than 64 pixels."""

Projections = Float[Tensor, "pictures slices patches"]
"""What is compared: a slice is one direction at one level."""


def projections(
    real: UInt8[np.ndarray, "some height width channels"],
    fake: UInt8[np.ndarray, "others rows columns colours"],
    seed: int,
) -> tuple[Projections, Float[Tensor, "others slices patches"]]:
    """The projected patches of both sets; a `UserError` where sizes or channels differ or are below 7."""
    if real.shape[1:] != fake.shape[1:]:
        raise UserError(f"Pictures of {_shape(real)} and {_shape(fake)} cannot be compared; take the same for both.")
    if min(real.shape[1:3]) < SIDE:
        raise UserError(f"Pictures of {_shape(real)} are smaller than a patch of {SIDE} x {SIDE}; measure larger ones.")
    patches = _patches(real, seed, "real"), _patches(fake, seed, "generated")
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for level, ours in enumerate(patches[0]):
        # One grey level at least: what spreads less is rounding.
        mean, spread = ours.mean((0, 1, 2), keepdim=True), ours.std((0, 1, 2), keepdim=True).clamp(min=1)
        directions = torch.randn(ours[0, 0].numel(), DIRECTIONS, generator=generator(seed, "directions", level))
        directions = directions / directions.norm(dim=0)
        for side, some in zip(sides, patches, strict=True):
            side.append((((some[level] - mean) / spread).flatten(2) @ directions).transpose(1, 2))
    return torch.cat(sides[0], 1).contiguous(), torch.cat(sides[1], 1).contiguous()


def sliced_distance(real: Projections, fake: Projections) -> float:
    """The mean over slices of the Wasserstein-1 distance, in spreads of real patches; both sides equally many."""
    assert real.shape == fake.shape, "ranks pair up only in equal numbers"
    # numpy sorts float32 five times as fast as torch.
    return float(np.abs(_ranked(real) - _ranked(fake)).mean(dtype=np.float64))


def _ranked(values: Projections) -> np.ndarray:
    # A copy: where a transposition changes nothing, `flatten` would lend the caller's own memory to be sorted.
    return np.sort(values.transpose(0, 1).flatten(1).numpy(), axis=1)


def pyramid(images: Images) -> list[Tensor]:
    """The Laplacian pyramid, finest level first; the last level is the smallest picture itself."""
    levels: list[Tensor] = []
    while min(images.shape[2:]) >= 2 * SMALLEST:
        small = _blur(images)[:, :, ::2, ::2]
        levels.append(images - _enlarged(small, images))
        images = small
    return [*levels, images]


def _blur(images: Images) -> Images:
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = images.shape[1]
    for kernel in (taps[None, :], taps[:, None]):
        edge = (kernel.shape[1] // 2,) * 2 + (kernel.shape[0] // 2,) * 2
        weight = kernel.expand(channels, 1, *kernel.shape).to(images)
        images = functional.conv2d(functional.pad(images, edge, mode="reflect"), weight, groups=channels)
    return images


def _enlarged(small: Float[Tensor, "batch channels rows columns"], like: Images) -> Images:
    spaced = torch.zeros_like(like)
    spaced[:, :, ::2, ::2] = 4 * small
    return _blur(spaced)


def _patches(pixels: np.ndarray, seed: int, purpose: str) -> list[Float[Tensor, "pictures patches square channels"]]:
    """Random patches of every level, each with its own places."""
    chunk = max(1, min(_CHUNK, _CHUNK * 64**2 // math.prod(pixels.shape[1:3])))
    chunks = [
        _of_chunk(pixels[start : start + chunk], seed, (purpose, start)) for start in range(0, len(pixels), chunk)
    ]
    return [torch.cat(level) for level in zip(*chunks, strict=True)]


def _of_chunk(pixels: np.ndarray, seed: int, which: tuple[str, int]) -> list[Tensor]:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    rng = generator(seed, f"patches, {which[0]}", which[1])
    return [_cut(level, rng) for level in pyramid(images)]


def _cut(images: Images, rng: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    steps = torch.arange(SIDE)
    tops = torch.randint(height - SIDE + 1, (count, PATCHES), generator=rng)[:, :, None, None] + steps[:, None]
    lefts = torch.randint(width - SIDE + 1, (count, PATCHES), generator=rng)[:, :, None, None] + steps
    rows = torch.arange(count)[:, None, None, None]
    return images.permute(0, 2, 3, 1)[rows, tops, lefts].flatten(2, 3)


def _shape(pixels: np.ndarray) -> str:
    return " x ".join(map(str, pixels.shape[1:]))
