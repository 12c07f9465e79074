"""Sheets of pictures: grids, strips, and PNG files written whole."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from snowmelt.data.pixels import to_pixels
from snowmelt.files import write_atomic
from snowmelt.pages.markup import png
from snowmelt.shapes import Images, Pixels

PAPER = 255
"""Grey of the gaps between pictures."""
TINY = 12
"""Pictures up to this many pixels wide are smoothed when they are shown larger."""


def picture(pixels: Tensor) -> Image.Image:
    """One stored picture, uint8 (height, width, channels), as a Pillow image."""
    array = pixels.numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def save_png(path: Path, image: Image.Image) -> Path:
    """Write a PNG in one instant."""
    write_atomic(path, png(image))
    return path


def enlarged(image: Image.Image, size: int) -> Image.Image:
    """A small picture shown about `size` pixels wide.

    Every pixel becomes a square, so that what is seen is what was drawn; only tiny pictures are smoothed, because in
    squares that large the eye sees squares instead of the picture.
    """
    factor = max(1, round(size / max(image.size)))
    how = Image.Resampling.BICUBIC if max(image.size) <= TINY else Image.Resampling.NEAREST
    return image.resize((image.width * factor, image.height * factor), how)


def sheet(images: Images, columns: int, *, smallest: int = 48, gap: int = 2) -> Image.Image:
    """Images in [-1, 1], row by row; each shown about `smallest` pixels wide at least."""
    return sheet_of_pixels(to_pixels(images), columns, smallest=smallest, gap=gap)


def sheet_of_pixels(pixels: Pixels, columns: int, *, smallest: int = 48, gap: int = 2) -> Image.Image:
    """The same, of stored pictures."""
    tiles = [enlarged(picture(one), smallest) for one in pixels]
    width, height = tiles[0].width + gap, tiles[0].height + gap
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    paper = Image.new(
        tiles[0].mode, (columns * width + gap, rows * height + gap), PAPER if tiles[0].mode == "L" else (PAPER,) * 3
    )
    for index, tile in enumerate(tiles):
        paper.paste(tile, (gap + index % columns * width, gap + index // columns * height))
    return paper


def strip(moments: list[Images], *, smallest: int = 48) -> Image.Image:
    """Pictures through time: one row for each picture, one column for each moment."""
    rows = torch.stack(moments, dim=1)
    return sheet(rows.flatten(0, 1), len(moments), smallest=smallest)


def moments_of(count: int, moments: int) -> list[int]:
    """Which of `count` steps to show in `moments` columns: the first, the last, and evenly between."""
    wanted = min(count, moments)
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)})
