"""The data sheet: what the run was trained on, and what became of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snowmelt.data.prepared import Prepared
from snowmelt.data.report import Fate, summary
from snowmelt.errors import UserError
from snowmelt.pages.markup import details, img, items, number, plain, table
from snowmelt.pages.reading import embedded, or_reason, read_json, table_of, tables, texts
from snowmelt.pictures import moments_of
from snowmelt.run import Run

REAL = 24
"""Training pictures shown."""
LARGEST = 96
"""Pixels across at which they are shown at most."""
BUDGET = 12_000
"""Bytes of each."""
CLASSES = 20
"""Classes with a bar of their own."""
FATES = 200
"""Files named one by one."""


def data_sheet(run: Run) -> str:
    """Counts, size, classes, real pictures, and what was skipped."""
    try:
        data = run.open_pictures()
    except UserError as error:
        return f"<p>{plain(error)}</p>{_facts(run, None)}{_classes(run)}"
    return f'<div class="wide">{_real(data)}</div>{_facts(run, data)}{_classes(run)}' + or_reason(
        lambda: _fates(data.path / "report.json"), "What became of every file (report.json)"
    )


def _facts(run: Run, data: Prepared | None) -> str:
    config = run.config.data
    rows: list[tuple[str, str]] = [("Source", plain(run.config.request.get("source", "not known")))]
    if data is not None:
        stored = read_json(data.path / "dataset.json")
        asked = [f"{name} {value}" for name, value in table_of(stored.get("settings")).items()]
        rows[0] = ("Source", plain(stored.get("source", rows[0][1])))
        rows += [
            ("Pictures to learn from", f"{len(data.train):,}"),
            ("Held out, to measure on", f"{len(data.held_out):,}"),
            ("Captions", "yes" if data.captions is not None else "no"),
            ("Prepared with", plain(", ".join(asked))),
        ]
    elif config.counts:
        rows.append(("Pictures to learn from", f"{sum(config.counts):,}"))
    rows += [
        ("Size", f"{config.size} × {config.size} pixels, {'grey' if config.channels == 1 else 'colour'}"),
        ("Classes", f"{len(config.classes):,}" if config.classes else "none"),
        ("Spread of the pixels", f"{number(config.std)} (black is −1, white is 1)"),
        ("Fingerprint", f"<code>{plain(config.fingerprint[:16])}</code>" if config.fingerprint else "none"),
    ]
    return '<dl class="sheet-of-facts">' + "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in rows) + "</dl>"


def _classes(run: Run) -> str:
    """A bar for each of the largest classes."""
    names, counts = run.config.data.classes, run.config.data.counts
    if not names or not counts:
        return ""
    order = sorted(range(len(names)), key=lambda label: -counts[label])
    many = len(names) > CLASSES
    shown = order[:CLASSES] if many else range(len(names))
    most = max(counts) or 1
    rows = [
        [
            plain(names[label]),
            f'<i class="count" style="width:{100 * counts[label] / most:.1f}%"></i>',
            f"{counts[label]:,}",
        ]
        for label in shown
    ]
    rest = order[CLASSES:]
    if rest:
        rows.append([f"{len(rest):,} others", "", f"{sum(counts[label] for label in rest):,}"])
    title = f"The {CLASSES} largest of {len(names):,} classes" if many else "Classes"
    return (
        f'<h3>{title}</h3><div class="classes">{table(["class", "", "pictures"], rows, "Pictures of each class")}</div>'
    )


def _real(data: Prepared) -> str:
    """Some training pictures, of all classes in turn."""
    rows = [int(data.train[index]) for index in _in_turn(data)]
    tiles = "".join(_tile(data, row) for row in rows)
    return f'<div class="tiles">{tiles}</div><p class="small">{len(rows)} of the pictures it learned from.</p>'


def _in_turn(data: Prepared) -> list[int]:
    """Places in `data.train`, evenly from all of it in the order of the classes."""
    order = np.arange(len(data.train))
    if data.labels is not None:
        order = np.argsort(data.labels[data.train], kind="stable")
    return [int(order[index]) for index in moments_of(len(order), REAL)] if len(order) else []


def _tile(data: Prepared, row: int) -> str:
    pixels = np.asarray(data.images[row])
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if image.width > LARGEST:
        image = image.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    one = embedded(image, BUDGET)
    name = "" if data.labels is None else f" of class {data.classes[int(data.labels[row])]}"
    return img(one.address, one.size, f"Training picture{name}")


def _fates(path: Path) -> str:
    """What was used, changed and skipped, and why."""
    if not path.is_file():
        return "<p>There is no record of what was skipped while the pictures were prepared.</p>"
    report = read_json(path)
    fates = [_fate(one) for one in tables(report.get("files"))]
    duplicates = [texts(group) for group in report.get("duplicates", []) if isinstance(group, list)]
    lines = summary(fates, [group for group in duplicates if group])
    notable = [one for one in fates if one.fate in ("skipped", "changed")]
    listed = [f"{plain(one.name)}: {one.fate}, {plain('; '.join(one.reasons))}" for one in notable[:FATES]]
    if len(notable) > FATES:
        listed.append(f"and {len(notable) - FATES:,} more, in {plain(path.name)}")
    folded = details(f"Every file that was skipped or changed ({len(notable):,})", items(listed)) if listed else ""
    return f"<h3>What was skipped</h3>{items([plain(line.strip()) for line in lines])}{folded}"


def _fate(row: dict[str, Any]) -> Fate:
    return Fate(str(row.get("name", "?")), str(row.get("fate", "?")), tuple(texts(row.get("reasons"))))
