"""Picture files as figures: sheets of samples, and drawn pictures beside the training pictures nearest to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snowmelt.pages.markup import figure, img, number, plain
from snowmelt.pages.reading import DAMAGE, embedded, finite, opened, reason_of, whole

PAIR_BYTES = 11_000
"""Of each picture of a pair."""


def sheet_figure(path: Path, alt: str, caption: str, budget: int) -> str:
    """A PNG file as a figure; a sentence where it cannot be shown."""
    try:
        one = embedded(opened(path), budget)
    except DAMAGE as error:
        return f'<p class="odd">{plain(path.name)} could not be read: {plain(reason_of(error))}.</p>'
    note = f" ({one.note}; {plain(path.name)} has every pixel)" if one.note else ""
    ratio = f"--ratio:{one.size[0] / one.size[1]:.3f}"
    shown = img(one.address, one.size, alt)
    return f'<figure class="sheet" style="{ratio}">{shown}<figcaption>{caption}{note}</figcaption></figure>'


def pairs_of(pairs: list[dict[str, Any]], folder: Path, most: int) -> str:
    """Drawn pictures beside the training pictures nearest to them."""
    shown = "".join(_pair(folder, index, one) for index, one in enumerate(pairs[:most]))
    if not shown:
        return ""
    return f'<div class="pairs">{shown}</div>'


def _pair(folder: Path, index: int, one: dict[str, Any]) -> str:
    sample, training = whole(one.get("sample")), whole(one.get("training"))
    flags = ["<b>called a copy</b>"] if one.get("flagged") is True else []
    flags += ["mirrored"] if one.get("flipped") is True else []
    ratio = finite(one.get("ratio"))
    flags += [] if ratio is None else [f"ratio {number(ratio)}"]
    both = "".join(
        _picture(folder / f"{index:02d}-{kind}.png", f"{word} {number_}")
        for kind, word, number_ in (("sample", "Drawn picture", sample), ("training", "Training picture", training))
    )
    return figure(
        f'<div class="two">{both}</div>', f"{sample:,} and {training:,}{': ' if flags else ''}{', '.join(flags)}"
    )


def _picture(path: Path, alt: str) -> str:
    try:
        one = embedded(opened(path), PAIR_BYTES)
    except DAMAGE:
        return f'<p class="odd">{plain(path.name)} could not be read</p>'
    return img(one.address, one.size, alt)
