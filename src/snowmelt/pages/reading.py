"""Reading what may be damaged, odd or hostile: JSON as plain values, PNG files as pictures, a sentence for the rest."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from snowmelt.errors import UserError
from snowmelt.pages.markup import data_uri, plain, png

DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    UserError,
    Image.DecompressionBombError,
)
"""What reading a file that holds something else can raise."""
MOST_PIXELS = 60_000_000
"""Of a picture file that is opened."""
MOST_BYTES = 200_000_000
"""Of a JSON file that is read."""
QUALITY = 88
"""Of the JPEG that a picture becomes where it would be too large as PNG."""


def or_reason(build: Callable[[], str], what: str) -> str:
    """A part of a page, or the sentence that says why it is not there."""
    try:
        return build()
    except DAMAGE as error:
        return f'<p class="odd">{plain(what)} could not be read: {plain(reason_of(error))}.</p>'


def reason_of(error: BaseException) -> str:
    """The first line of what is wrong, without a full stop."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError, ValueError: it is not there, not JSON, no object or too large.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES // 10**6} MB")
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def finite(value: Any) -> float | None:
    """A number as a float; None for everything else, infinities and truths among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole(value: Any) -> int:
    """A count as an int; 0 for everything else."""
    number = finite(value)
    return 0 if number is None else int(number)


def texts(value: Any) -> list[str]:
    """The texts in a list."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def tables(value: Any) -> list[dict[str, Any]]:
    """The objects in a list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def table_of(value: Any) -> dict[str, Any]:
    """An object; an empty one for everything else."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Embedded:
    """A picture that stands inside a page."""

    address: str
    size: tuple[int, int]
    """Width and height in pixels."""
    bytes: int
    note: str = ""
    """What was done to it so that the page stays small, if anything."""


def opened(path: Path) -> Image.Image:
    """A PNG file as grey or colour.

    Raises:
        OSError, ValueError, Image.DecompressionBombError: it is not there, damaged, no PNG or too large.
    """
    with Image.open(path, formats=["PNG"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{path.name} has more than {MOST_PIXELS // 10**6} million pixels")
        image.load()
        return image.convert("L" if image.mode in ("L", "1") else "RGB")


def embedded(image: Image.Image, budget: int) -> Embedded:
    """The picture in at most about `budget` bytes: as PNG where it fits, else as JPEG, else smaller, too."""
    data, kind, note = png(image), "png", ""
    shown = image
    while len(data) > budget and min(shown.size) > 32:
        if kind == "jpeg":
            share = max(0.5, 0.95 * math.sqrt(budget / len(data)))
            shown = image.resize((int(shown.width * share), int(shown.height * share)), Image.Resampling.LANCZOS)
        data, kind = _jpeg(shown), "jpeg"
        size = "" if shown is image else f" of {shown.width} × {shown.height} pixels"
        note = f"shown as JPEG{size}, to keep this page small"
    return Embedded(data_uri(data, kind), shown.size, len(data), note)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
