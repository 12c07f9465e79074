"""Outline, colour and texture: when each of them appears on the way from noise to picture.

outline   the brightness of the picture, blurred
texture   what the blur takes from the brightness
colour    how far each pixel is from grey (two channels of chroma)

share(part) = 1 - |part of the belief - part of the result|^2 / |part of the result|^2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from snowmelt.shapes import Images

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601, as in the decoder's grey."""
FAINT = 1e-4
"""Mean square below which a part has nothing to do: pictures that are grey have no colour to appear."""
HALF = 0.5


class Parts(NamedTuple):
    """Of pictures; colour is None for grey ones. Outline and texture add up to the brightness."""

    outline: Tensor
    texture: Tensor
    colour: Tensor | None


def blur(images: Images, width: float) -> Images:
    """A Gaussian of standard deviation `width` pixels; the border is mirrored."""
    reach = min(max(1, round(3 * width)), images.shape[-1] - 1)
    places = torch.arange(-reach, reach + 1, dtype=images.dtype)
    kernel = torch.exp(-((places / width) ** 2) / 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1).repeat(images.shape[1], 1, 1, 1)
    groups = images.shape[1]
    across = functional.conv2d(functional.pad(images, (reach, reach, 0, 0), "reflect"), kernel, groups=groups)
    upright = functional.pad(across, (0, 0, reach, reach), "reflect")
    return functional.conv2d(upright, kernel.transpose(2, 3), groups=groups)


def split(images: Images) -> Parts:
    """Pictures in [-1, 1] as their parts; the blur is a sixteenth of a picture wide, 3/4 of a pixel at least."""
    grey = images.shape[1] == 1
    weights = torch.tensor((1.0,) if grey else LUMA).reshape(1, -1, 1, 1)
    luma = (images * weights).sum(1, keepdim=True)
    outline = blur(luma, max(0.75, images.shape[-1] / 16))
    return Parts(outline, luma - outline, None if grey else (images - luma)[:, ::2])


def shown(parts: Parts) -> dict[str, Tensor]:
    """The parts as pictures: texture doubled, so that it can be seen, colour around middle grey."""
    pictures = {"outline": parts.outline, "texture": (2 * parts.texture).clamp(-1, 1)}
    if parts.colour is not None:
        red, blue = parts.colour[:, :1], parts.colour[:, 1:]
        # The three distances from grey weigh up to 0.
        green = -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1]
        pictures["colour"] = torch.cat([red, green, blue], 1).clamp(-1, 1)
    return pictures


class Appearance(NamedTuple):
    """How much of one part is there at every step, and from which step on it is at least half."""

    shares: list[float]
    half: int
    """A place in `shares`."""


def appearances(beliefs: list[Images]) -> dict[str, Appearance]:
    """By name, of the parts in which the first belief differs from the last; over all pictures together."""
    every = [split(belief) for belief in beliefs]
    found: dict[str, Appearance] = {}
    for name in Parts._fields:
        ways: list[Tensor | None] = [getattr(one, name) for one in every]
        parts = [part for part in ways if part is not None]
        if parts and distance(parts[0], parts[-1]) > FAINT:
            shares = [max(0.0, 1 - distance(part, parts[-1]) / distance(parts[0], parts[-1])) for part in parts]
            found[name] = Appearance(shares, stays(shares))
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Mean square of the difference."""
    return (one - other).square().mean().item()


def stays(shares: list[float]) -> int:
    """The first place from which on no share is below one half."""
    below = [index for index, value in enumerate(shares) if value < HALF]
    return below[-1] + 1 if below else 0
