"""Bytes -> pixels: one file becomes an upright, opaque, 8-bit picture of the asked size, or `Unusable` with a reason.

The content decides what a file is, not its name. The order of steps: recognise, check the declared size, decode
(JPEG at the nearest larger eighth), turn upright, convert colours, lay over the background, crop or pad, resize once.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

from snowmelt.data.formats import HEAD_BYTES, misnamed, recognise
from snowmelt.data.source import Unusable
from snowmelt.errors import UserError, choose

MAX_MEGAPIXELS = 100
MAX_ASPECT = 20
MIN_SIDE = 4
GREY_TOLERANCE = 8  # channels of a grey picture after a lossy codec differ by a few levels

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Recipe:
    """How every picture is made."""

    size: int
    background: Color
    fit: str


def color_of(text: str) -> Color:
    """The colour of that name, or #rrggbb.

    Raises:
        UserError: there is none.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise UserError(f"{text!r} is no colour; give a name such as white, black or grey, or #rrggbb.") from None
    return red, green, blue


@dataclass(frozen=True)
class Picture:
    """A decoded picture: pixels uint8 (size, size, 1 or 3), and what was done to it that its owner may want to know."""

    pixels: np.ndarray
    changes: tuple[str, ...]
    coloured: bool


# opening and measuring


def open_image(data: bytes) -> tuple[Image.Image, str]:
    """The picture, its pixels not yet decoded, and its format; `Unusable` where its header forbids to go on."""
    format_name = recognise(data[:HEAD_BYTES])
    plugins = ("JPEG", "MPO") if format_name == "JPEG" else (format_name,)
    try:
        image = Image.open(io.BytesIO(data), formats=plugins)
    except Image.DecompressionBombError:
        raise Unusable(f"declares far more than {MAX_MEGAPIXELS} megapixels") from None
    except Exception as error:
        memory = isinstance(error, MemoryError)
        raise Unusable(_damage(error) if memory else f"damaged: its {format_name} header cannot be read") from None
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise Unusable(f"declares {width} x {height} pixels, more than {MAX_MEGAPIXELS} megapixels")
    if min(width, height) < MIN_SIDE:
        raise Unusable(f"only {width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Unusable(f"too long and thin ({width} x {height} pixels)")
    return image, format_name


def shorter_side(data: bytes) -> int:
    """In pixels, from the header alone."""
    return min(open_image(data)[0].size)


def decode(data: bytes, name: str, recipe: Recipe) -> Picture:
    """The picture in a file's bytes; `Unusable` with the reason where there is none. No other exception leaves."""
    try:
        image, format_name = open_image(data)
        decoded = _decode_pixels(image, data, format_name, recipe)
        image, converted = _plain(_upright(image), recipe.background)
        image, fitted = fit_picture(image, recipe)
    except Unusable:
        raise
    except Exception as error:  # decoders of hostile files raise anything
        raise Unusable(_damage(error)) from None
    changes = (misnamed(name, format_name), *decoded, *converted, *fitted)
    return picture(image, tuple(change for change in changes if change))


def picture(image: Image.Image, changes: tuple[str, ...]) -> Picture:
    """An L or RGB picture of the final size as pixels."""
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return Picture(pixels, changes, is_coloured(pixels))


def _damage(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "needs too much memory to decode"
    if isinstance(error, Image.DecompressionBombError):
        return f"declares far more than {MAX_MEGAPIXELS} megapixels"
    text = str(error)
    if isinstance(error, EOFError) or re.search("truncat|unexpected end|not enough", text, re.IGNORECASE):
        return "damaged: the file ends too early"
    # Addresses of objects differ from run to run, and the report must not.
    text = re.sub(r"\s*<[^>]*>|\s+at 0x[0-9a-f]+", "", text).strip()
    return f"damaged: cannot be decoded ({(text or type(error).__name__)[:80]})"


# decoding


def _decode_pixels(image: Image.Image, data: bytes, format_name: str, recipe: Recipe) -> list[str]:
    """Decode in place; the changes to report."""
    rotated = _orientation(image) != 1
    deep = _is_deep(image, data, format_name)
    frames = "" if format_name == "JPEG" else _frames(image, format_name)  # a phone's extra pictures are of no interest
    if format_name == "JPEG":
        scale = 2 * recipe.size / min(image.size)  # twice the target leaves the final resize its quality
        if scale < 1:
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    if format_name == "PNG":
        _check_png(data)
    image.load()
    return ["turned upright as its EXIF says" if rotated else "", "converted from 16 bits" if deep else "", frames]


def _check_png(data: bytes) -> None:
    """`Unusable` where pixels are not those that were written: Pillow does not look at their checksums."""
    place, view = 8, memoryview(data)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if kind == b"IDAT" and end + 4 <= len(data):
            (checksum,) = struct.unpack_from(">I", data, end)
            if zlib.crc32(view[place + 4 : end]) != checksum:
                raise Unusable("damaged: a checksum is wrong")
        place = end + 4


def _frames(image: Image.Image, format_name: str) -> str:
    try:
        several = bool(getattr(image, "is_animated", False))
    except Exception:
        return ""
    unit = "page" if format_name == "TIFF" else "frame"
    return f"first {unit} of several" if several else ""


def _is_deep(image: Image.Image, data: bytes, format_name: str) -> bool:
    """Pillow reads 16-bit colour as 8-bit without a word, so the file's own header is asked."""
    if format_name == "PNG":
        return data[24:25] == b"\x10"
    if format_name == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        return tags.get(258, (8,))[0] == 16
    return image.mode.startswith("I;16")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1
    return value if value in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    # Asked again after decoding: TIFF pictures have been turned by then. ImageOps.exif_transpose is not used because it
    # rewrites the EXIF block and fails on broken ones.
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    info = image.info
    image = image.transpose(turn)
    image.info = info
    return image


# colours


def _plain(image: Image.Image, background: Color) -> tuple[Image.Image, list[str]]:
    """The picture as opaque L or RGB, and the changes to report."""
    mode, changes = image.mode, [_CONVERSIONS.get(image.mode, "")]
    if mode in ("I", "F") or mode.startswith("I;"):
        return Image.fromarray(_to_bytes(np.asarray(image))), changes
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")
        image = _converted(image, transform)
    transparent = mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if mode in ("1", "L", "LA", "La"):
        image = image.convert("LA" if transparent else "L")
    else:
        image = image.convert("RGBA" if transparent else "RGB")
    if image.mode in ("RGB", "RGBA") and mode in ("RGB", "RGBA", "P"):
        image, change = _to_srgb(image)
        changes.append(change)
    if transparent:
        image, change = _over(image, background)
        changes.append(change)
    return image, changes


_CONVERSIONS = {
    "1": "converted from 1 bit",
    "P": "converted from a palette",
    "PA": "converted from a palette",
    "CMYK": "converted from CMYK",
    "LAB": "converted from LAB",
    "HSV": "converted from HSV",
    "YCbCr": "converted from YCbCr",
    "I": "converted from 32 bits",
    "F": "converted from floating point",
}


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Deep grey values as uint8: by the range of their type, or by their own range where the type has none.

    16 bits: v / 257. Whole numbers in 32 bits: as 8 or 16 bits where they fit. Floats: [0, 1] or [0, 255] as they are.
    Anything else is stretched from its least to its greatest value.
    """
    numbers = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    if values.dtype == np.uint16 or values.dtype == np.dtype(">u2"):
        numbers = numbers / 257
    elif low < 0 or high > 65535 or (values.dtype.kind == "f" and high > 255):
        numbers = (numbers - low) * (255 / max(high - low, 1e-30))
    elif values.dtype.kind == "f" and high <= 1:
        numbers = numbers * 255
    elif high > 255:
        numbers = numbers / 257
    return np.floor(numbers + 0.5).clip(0, 255).astype(np.uint8)


def _over(image: Image.Image, background: Color) -> tuple[Image.Image, str]:
    """Lay the picture over the background before it is resized, so that hidden colours cannot bleed."""
    alpha = image.getchannel("A")
    opaque = image.convert(image.mode[:-1])
    if alpha.getextrema()[0] == 255:
        return opaque, ""
    if opaque.mode == "L" and len(set(background)) > 1:
        opaque = opaque.convert("RGB")
    sheet = Image.new(opaque.mode, opaque.size, background if opaque.mode == "RGB" else background[0])
    sheet.paste(opaque, mask=alpha)
    return sheet, "transparent, laid over the background"


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return image, ""
    try:
        transform = _profile_transform(profile, image.mode)
        return (image, "") if transform is None else (_converted(image, transform), "colour profile converted to sRGB")
    except Exception:  # a broken profile is no reason to lose the picture
        return image, ""


@lru_cache(maxsize=16)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None when it is sRGB or not of RGB pictures."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    facts: Any = source.profile
    if facts.xcolor_space.strip() != "RGB" or "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(source, _srgb(), mode, mode)


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None, "only in-place transforms return nothing"
    return result


def is_coloured(pixels: np.ndarray) -> bool:
    """Whether any pixel's channels differ by more than a lossy codec makes them."""
    if pixels.shape[2] == 1:
        return False
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]  # reducing a short axis is slow
    high = np.maximum(np.maximum(red, green), blue)
    return bool((high - np.minimum(np.minimum(red, green), blue)).max() > GREY_TOLERANCE)


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> (..., 1): luma after ITU-R 601, in the whole-number form Pillow uses."""
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[..., None]


# size


def fit_picture(image: Image.Image, recipe: Recipe) -> tuple[Image.Image, list[str]]:
    """The L or RGB picture at `recipe.size` squared, and the changes to report."""
    return FITS[recipe.fit](image, recipe)


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """One resize of the part `box`; untouched where it has the size already."""
    part = (box[2] - box[0], box[3] - box[1])
    if part == size:
        return image.crop(box)
    method = Image.Resampling.BICUBIC if max(size) > max(part) else Image.Resampling.LANCZOS
    return image.resize(size, method, box=box, reducing_gap=3.0)


def _crop(image: Image.Image, recipe: Recipe) -> tuple[Image.Image, list[str]]:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    result = _resized(image, (recipe.size, recipe.size), (left, top, left + side, top + side))
    return result, ["" if width == height else "cropped to its middle square", _enlarged(image, side, recipe)]


def _pad(image: Image.Image, recipe: Recipe) -> tuple[Image.Image, list[str]]:
    width, height = image.size
    side = max(width, height)
    scale = recipe.size / side
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    part = _resized(image, size, (0, 0, width, height))
    if width == height:
        return part, [_enlarged(image, side, recipe)]
    if part.mode == "L" and len(set(recipe.background)) > 1:
        part = part.convert("RGB")
    color = recipe.background if part.mode == "RGB" else recipe.background[0]
    sheet = Image.new(part.mode, (recipe.size, recipe.size), color)
    sheet.paste(part, ((recipe.size - size[0]) // 2, (recipe.size - size[1]) // 2))
    return sheet, ["padded to a square", _enlarged(image, side, recipe)]


def _enlarged(image: Image.Image, side: int, recipe: Recipe) -> str:
    return f"enlarged from {image.width} x {image.height} pixels" if side < recipe.size else ""


FITS: dict[str, Callable[[Image.Image, Recipe], tuple[Image.Image, list[str]]]] = {"crop": _crop, "pad": _pad}


def recipe_of(size: int, background: str, fit: str) -> Recipe:
    """How pictures are made at `size`, of the words in which a dataset or a run keeps it.

    Raises:
        UserError: there is no such colour or fit.
    """
    choose(FITS, fit, "fit")
    return Recipe(size, color_of(background), fit)
