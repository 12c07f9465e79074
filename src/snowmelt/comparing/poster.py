"""Sample sheets side by side as one picture, with a headline and a few words above each."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from snowmelt.pages.markup import png
from snowmelt.pictures import PAPER

WIDE = 640
"""Of a column, in pixels."""
EDGE = 28
INK, SOFT = (29, 37, 48), (86, 96, 110)


class Column(NamedTuple):
    """One run."""

    name: str
    lines: list[str]
    """Under its name."""
    sheet: Image.Image | None
    """None where there is none."""


def poster(headline: str, columns: list[Column]) -> bytes:
    """The PNG, on white."""
    width = EDGE + max(1, len(columns)) * (WIDE + EDGE)
    title = textwrap.wrap(headline, max(20, (width - 2 * EDGE) // 17)) or [""]
    sheets = [_fitted(column.sheet) for column in columns]
    top = EDGE + 42 * len(title) + 16
    begin = top + 42 + 26 * max((len(column.lines) for column in columns), default=0) + 10
    paper = Image.new("RGB", (width, begin + max((one.height for one in sheets), default=0) + EDGE), (PAPER,) * 3)
    draw = ImageDraw.Draw(paper)
    draw.text((EDGE, EDGE), "\n".join(title), fill=INK, font=_font(29, bold=True), spacing=9)
    for index, (column, shown) in enumerate(zip(columns, sheets, strict=True)):
        left = EDGE + index * (WIDE + EDGE)
        draw.text((left, top), column.name[:40], fill=INK, font=_font(26, bold=True))
        draw.text((left, top + 40), "\n".join(line[:52] for line in column.lines), fill=SOFT, font=_font(19), spacing=5)
        paper.paste(shown, (left, begin))
    return png(paper)


def _fitted(sheet: Image.Image | None) -> Image.Image:
    """At the column's width: small sheets in squares, large ones smoothed."""
    if sheet is None:
        return Image.new("RGB", (WIDE, WIDE // 2), (244, 242, 238))
    how = Image.Resampling.LANCZOS if sheet.width > WIDE else Image.Resampling.NEAREST
    return sheet.convert("RGB").resize((WIDE, max(1, round(sheet.height * WIDE / sheet.width))), how)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, so that the picture is the same everywhere."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
