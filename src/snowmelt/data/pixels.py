"""Between stored pixels and what models see: the only place that knows 127.5."""

from __future__ import annotations

import torch

from snowmelt.shapes import Images, Pixels


def to_images(pixels: Pixels) -> Images:
    """uint8 (batch, height, width, channels) to float32 (batch, channels, height, width) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().contiguous().div_(127.5).sub_(1)


def to_pixels(images: Images) -> Pixels:
    """The inverse, rounded to the nearest level; values outside [-1, 1] are cut off there. Always on the CPU."""
    levels = images.float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
