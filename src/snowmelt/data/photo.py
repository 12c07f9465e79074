"""One photo of a person, or a mask for one, made to fit a model's pictures as its own pictures were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snowmelt.errors import UserError

if TYPE_CHECKING:
    from snowmelt.data.decode import Picture, Recipe
    from snowmelt.shapes import Images

_ON_THEIR_SIDE = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


def read_photo(path: Path, recipe: Recipe, what: str = "photo") -> Picture:
    """The picture in a file.

    Raises:
        UserError: there is no such file, or no picture in it.
    """
    from snowmelt.data.decode import decode
    from snowmelt.data.source import Unusable
    from snowmelt.files import printable

    try:
        return decode(_bytes_of(path, what), printable(path.name), recipe)
    except Unusable as error:
        raise UserError(f"{path} is no {what} that can be used: {error}; name another one.") from error


def size_of_photo(path: Path, what: str = "photo") -> tuple[int, int]:
    """Width and height in pixels, as it is looked at.

    Raises:
        UserError: as `read_photo`.
    """
    from snowmelt.data.decode import open_image
    from snowmelt.data.source import Unusable

    try:
        image, _ = open_image(_bytes_of(path, what))
    except Unusable as error:
        raise UserError(f"{path} is no {what} that can be used: {error}; name another one.") from error
    try:
        turned = image.getexif().get(0x0112) in _ON_THEIR_SIDE
    except Exception:  # a broken EXIF block is no reason to lose the picture
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def _bytes_of(path: Path, what: str) -> bytes:
    from snowmelt.data.formats import HEAD_BYTES, recognise

    if not path.exists():
        raise UserError(f"There is no file {path}; name a {what}, such as a JPEG or PNG file.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one {what} in it.")
    try:
        with path.open("rb") as file:
            # Before the rest is read: what is no picture may be very long.
            head = file.read(HEAD_BYTES)
            recognise(head)
            return head + file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that or name another {what}.") from error


def images_of(picture: Picture, channels: int) -> Images:
    """(1, channels, size, size) in [-1, 1], in grey (1) or colour (3)."""
    import torch

    from snowmelt.data.decode import to_grey
    from snowmelt.data.pixels import to_images

    pixels = picture.pixels
    if channels == 1 and pixels.shape[2] == 3:
        pixels = to_grey(pixels)
    if channels == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return to_images(torch.from_numpy(np.array(pixels))[None])
