"""The pictures of a run: the final grid at the head, strips and other sheets, and what `snowmelt sample` drew."""

from __future__ import annotations

from pathlib import Path

from snowmelt.pages.markup import img, plain
from snowmelt.pages.reading import DAMAGE, embedded, opened
from snowmelt.pages.sheets import sheet_figure
from snowmelt.pictures import moments_of
from snowmelt.run import Run

HERO, SHEETS, TILES, SHEET = 800_000, 700_000, 450_000, 400_000
"""Bytes of the head's picture, of all other sheets of the run together, of all samples, of each sheet of samples."""
MOST_TILES = 36
MOST_SHEETS = 6
CAPTIONS = {
    "strip": "How pictures melted out of noise: each row is one picture, from pure noise on the left to the result.",
    "reconstructions": "Held-out pictures, and what the model makes of its own description of them.",
    "interpolation": "From one picture to another, in even steps of the numbers that describe them.",
}
"""By the name of a PNG at the top of a run."""


def hero(run: Run) -> str:
    """The final pictures, or the newest there are, large."""
    previews = sorted((run.path / "previews").glob("[0-9]*.png"))
    places = [(run.path / "grid.png", "The final pictures of the run")]
    places += [(path, f"Pictures of the run at step {path.stem.lstrip('0') or '0'}") for path in previews[-1:]]
    places += [(run.path / "samples" / "grid.png", "Pictures drawn from the run")]
    for path, alt in places:
        if path.is_file():
            return sheet_figure(path, alt, f"{alt}.", HERO)
    return '<p class="odd">The run has no pictures yet.</p>'


def samples(run: Run) -> str:
    """The run's own sheets, and pictures of RUN/samples."""
    own = sorted(path for path in run.path.glob("*.png") if path.name not in ("grid.png", "curves.png"))
    budget = SHEETS // max(1, len(own[:MOST_SHEETS]))
    parts = [
        f'<div class="wide">{sheet_figure(path, f"Sheet {path.stem}", _caption(path), budget)}</div>'
        for path in own[:MOST_SHEETS]
    ]
    if len(own) > MOST_SHEETS:
        parts.append(f"<p>{len(own) - MOST_SHEETS} more sheets lie in the folder of the run.</p>")
    return "".join(parts) + _drawn(run.path / "samples")


def _caption(path: Path) -> str:
    return CAPTIONS.get(path.stem, plain(path.name))


def _drawn(folder: Path) -> str:
    files = sorted(path for path in folder.glob("*.png"))
    singles = [path for path in files if path.stem not in ("grid", "strip")]
    if not files:
        return "<p>Nothing was drawn with <code>snowmelt sample</code> yet.</p>"
    chosen = [singles[index] for index in moments_of(len(singles), MOST_TILES)] if singles else []
    tiles = "".join(_tile(path, TILES // len(chosen)) for path in chosen)
    count = f"{len(chosen)} of the {len(singles):,}" if len(singles) > len(chosen) else f"The {len(singles)}"
    words = f"<h3>Drawn with <code>snowmelt sample</code></h3><p>{count} pictures in {plain(folder.name)}/.</p>"
    sheets = "".join(
        f'<div class="wide">{sheet_figure(path, f"Samples, {path.stem}", _caption(path), SHEET)}</div>'
        for path in files
        if path not in singles
    )
    return words + (f'<div class="tiles wide">{tiles}</div>' if tiles else "") + sheets


def _tile(path: Path, budget: int) -> str:
    try:
        one = embedded(opened(path), budget)
    except DAMAGE:
        return f'<p class="odd">{plain(path.name)} is damaged</p>'
    return img(one.address, one.size, f"Sample {path.stem}")
