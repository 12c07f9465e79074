"""What was measured of a run: the figures of its pictures, classes, copies, bits/dim."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from snowmelt.evaluation.curves import ERROR
from snowmelt.pages.charts import Line, lines_chart, svg
from snowmelt.pages.markup import details, items, number, plain, table
from snowmelt.pages.measures import (
    BAND,
    Measure,
    bar,
    common_reason,
    drawing_words,
    learned_from,
    measures_of,
    metric_name,
    percent,
    share_of,
    share_with_interval,
    space_title,
    time_words,
    twins_share,
    value_cell,
    with_interval,
)
from snowmelt.pages.reading import finite, or_reason, read_json, table_of, tables, texts, whole
from snowmelt.pages.sheets import pairs_of, sheet_figure
from snowmelt.run import Run
from snowmelt.terminal import words_of

PAIRS, SHEET = 16, 400_000
"""Pairs shown; bytes of the sheet of samples."""
WORSE = {
    "held_out_loss": "loss",
    "reconstruction bits": "bits of the reconstruction",
    "squared error": "squared error",
}
"""Errors beside those by level that are larger where a picture is not known by heart."""


def measured(run: Run) -> str:
    """Every evaluation that there is, or how to make one."""
    quality, bits = run.path / "evaluations" / "quality", run.path / "evaluations" / "bits.json"
    parts: list[str] = []
    if quality.is_dir():
        parts.append(or_reason(lambda: _quality(quality), "The evaluation (quality/figures.json)"))
    else:
        parts.append("<p>Its pictures were not measured yet; <code>snowmelt evaluate</code> does it.</p>")
    if bits.is_file():
        parts.append(or_reason(lambda: _bits(bits), "Bits per dimension (bits.json)"))
    return "".join(parts)


def _quality(folder: Path) -> str:
    found = read_json(folder / "figures.json")
    parts = (
        (partial(_figures, found), "The figures"),
        (partial(_classes, table_of(found.get("classes"))), "The classes"),
        (partial(_memory, table_of(found.get("memorization")), folder), "What was learned by heart"),
        (partial(_not_measured, found), "What was not measured"),
    )
    sheet = folder / "samples.png"
    shown = sheet_figure(sheet, "Drawn pictures that were measured", "Some of the pictures that were measured.", SHEET)
    return (
        or_reason(lambda: _how(found), "How it was measured")
        + "".join(or_reason(build, what) for build, what in parts)
        + (f'<div class="wide">{shown}</div>' if sheet.is_file() else "")
    )


def _how(found: dict[str, Any]) -> str:
    """Against what, with how many pictures, and what it cost."""
    seconds = {
        name: value for name, one in table_of(found.get("seconds")).items() if (value := finite(one)) is not None
    }
    drawing = drawing_words(found.get("drawing"), found.get("precision"))
    total = sum(value for name, value in seconds.items() if name != "per_picture")
    sentences = [
        f"<b>{whole(found.get('samples')):,} drawn pictures</b> were compared with "
        f"<b>{whole(found.get('real')):,} {plain(found.get('reference', 'real pictures'))}</b>.",
        f"Drawing took {time_words(seconds['per_picture'])} for each picture." if "per_picture" in seconds else "",
        f"All of it took {words_of(total)}." if total else "",
    ]
    facts = [
        f"checkpoint {plain(found.get('checkpoint', '?'))}",
        f"seed {plain(found.get('seed', '?'))}",
        f"drawn {plain(drawing)}" if drawing else "",
    ]
    small = "".join(
        f"<p class='small'>{line}</p>" for line in (" · ".join(filter(None, facts)), learned_from(found)) if line
    )
    return f"<p>{' '.join(sentences)}</p>{small}"


def _figures(found: dict[str, Any]) -> str:
    """One table for each feature space, the number in words, with its interval beside what real pictures get."""
    figures = measures_of(found.get("figures"))
    if not figures:
        return "<p>No figures were written down.</p>"
    spaces = table_of(found.get("spaces"))
    parts: list[str] = [f"<p>A number alone says little. Below each stands its 95 % interval. {BAND}</p>"]
    for space in dict.fromkeys(one.space for one in figures):
        about = plain(table_of(spaces.get(space)).get("about", ""))
        parts.append(f"<h3>{space_title(space)}</h3>{f'<p class=small>{about}</p>' if about else ''}")
        parts.append(_space([one for one in figures if one.space == space]))
    return "".join(parts)


def _space(figures: list[Measure]) -> str:
    """The figures in one space; one sentence where they lack numbers for one reason."""
    if reason := common_reason(figures):
        return f'<p class="odd">{plain(reason)}</p>'
    rows = [
        [metric_name(one), value_cell(one), bar(one), _floor(one.floor), _counts(one.samples, one.real)]
        for one in figures
    ]
    head = ["", "value", "value and real pictures", "real", "pictures"]
    return f'<div class="wide figures">{table(head, rows, "Figures")}</div>'


def _floor(value: float | None) -> str:
    return "–" if value is None else number(value)


def _counts(samples: int, real: int) -> str:
    return f"{samples:,} / {real:,}" if samples or real else "–"


def _classes(found: dict[str, Any]) -> str:
    if not found:
        return ""
    if reason := str(found.get("reason") or ""):
        return f'<h3>Classes</h3><p class="odd">{plain(reason[:1].upper() + reason[1:].rstrip("."))}.</p>'
    balance, real = table_of(found.get("balance")), table_of(found.get("balance_real"))
    rows = [
        [
            "Pictures in which a class is recognised",
            _triple(found.get("recognised")),
            _triple(found.get("recognised_real")),
        ],
        ["Recognised as the class that was asked for", _triple(found.get("as_asked")), ""],
    ]
    distance = finite(found.get("distance"))
    shares = [[plain(name), percent(finite(share)), percent(finite(real.get(name)))] for name, share in balance.items()]
    words = "" if distance is None else f"<p>{percent(distance)} of the pictures would have to be of another class for "
    words += "" if distance is None else "the balance of real ones (total variation).</p>"
    each = table(["class", "drawn", "real"], shares, "Share of each class") if shares else ""
    return f"<h3>Classes</h3>{table(['', 'drawn', 'real'], rows, 'Classes')}{words}" + (
        details(f"The share of each of {len(shares):,} classes", each) if each else ""
    )


def _triple(found: Any) -> str:
    """A share with its interval."""
    return share_with_interval(share_of(found))


def _memory(found: dict[str, Any], folder: Path) -> str:
    if not found:
        return ""
    copies, closer = table_of(found.get("copies")), table_of(found.get("closer"))
    alarms, twins = finite(copies.get("false_alarms")), twins_share(found)
    rows = [
        ["Copies of training pictures among the drawn ones", share_with_interval(copies)],
        ["Twins: real held-out pictures that are training pictures too", percent(twins)],
        ["Other held-out pictures that the same test would call copies", percent(alarms)],
        ["Nearer to a training picture than a typical held-out one is", share_with_interval(closer)],
    ]
    counts = f"{whole(found.get('samples')):,} drawn against {whole(found.get('training')):,} training pictures"
    return (
        "<h3>Does it copy?</h3><p>Every drawn picture was held against all training pictures, mirrored ones too "
        f"({counts}). A model that copies nothing has about as many copies as there are twins among real pictures, and "
        f"half of its pictures are nearer than a typical held-out one.</p>{table(['', 'share'], rows, 'Copies')}"
        + or_reason(lambda: _gap(tables(found.get("gap"))), "The gap of the errors")
        + or_reason(lambda: _pairs(tables(found.get("pairs")), folder / "pairs"), "The most suspicious pairs")
    )


def _gap(gaps: list[dict[str, Any]]) -> str:
    """Held-out less training error, by level where there are levels."""
    keys = ("train", "held_out", "difference", "low", "high")
    found = [(str(one.get("name", "")), [finite(one.get(key)) for key in keys]) for one in gaps]
    found = [(name, values) for name, values in found if name in WORSE or name.startswith(ERROR)]
    if not found:
        return ""
    rows = [
        [
            plain(WORSE.get(name, name)),
            *("–" if one is None else number(one) for one in values[:2]),
            with_interval(*values[2:]),
        ]
        for name, values in found
    ]
    listed = details("The errors in numbers", table(["", "training", "held out", "difference"], rows, "Errors"))
    points = sorted(
        (level, values) for name, values in found if (level := _level(name)) is not None and None not in values
    )
    words = "<p>A network that knows its training pictures by heart has larger errors on pictures it never saw.</p>"
    if len(points) < 2:
        return words + listed.replace("<details>", "<details open>")
    spans = tuple((values[3] or 0.0, values[4] or 0.0) for _, values in points)
    line = Line("noise", [level for level, _ in points], [values[2] or 0.0 for _, values in points], "o", spans)
    zero = Line("faint", [points[0][0], points[-1][0]], [0.0, 0.0])
    title = "Held-out error less training error, by noise level"
    drawn = svg(lines_chart(title, "log-SNR, from noise to picture", [zero, line], (5.0, 2.4)), "gap", title)
    caption = f"<b>{title}</b>; the upright lines are 95 % intervals. Above 0 beyond doubt: learned by heart."
    return f'{words}<figure class="chart">{drawn}<figcaption>{caption}</figcaption></figure>{listed}'


def _level(name: str) -> float | None:
    try:
        return float(name.removeprefix(ERROR)) if name.startswith(ERROR) else None
    except ValueError:
        return None


def _pairs(pairs: list[dict[str, Any]], folder: Path) -> str:
    shown = min(len(pairs), PAIRS)
    words = (
        "<p>On the left a drawn picture, on the right the training picture nearest to it. The ratio is its distance "
    )
    words += "over that of the 50 next nearest: close to 1 is usual, close to 0 is a copy.</p>"
    title = f"<h3>The {shown} most suspicious pairs</h3>{words}"
    return f'{title}<div class="wide">{pairs_of(pairs, folder, PAIRS)}</div>' if shown else ""


def _not_measured(found: dict[str, Any]) -> str:
    sentences = texts(found.get("not_measured"))
    return f"<h3>What was not measured, and why</h3>{items([plain(one) for one in sentences])}" if sentences else ""


def _bits(path: Path) -> str:
    found = table_of(read_json(path).get("bits_per_dim"))
    names = {"bound": "by the bound", "ode": "by the probability-flow ODE", "difference": "their difference"}
    rows = [
        [plain(names.get(name, f"of which {name}")), number(mean), f"± {number(error)}" if error is not None else ""]
        for name, one in sorted(found.items(), key=lambda pair: list(names).index(pair[0]) if pair[0] in names else 9)
        if (mean := finite(table_of(one).get("mean"))) is not None
        for error in [finite(table_of(one).get("standard_error"))]
    ]
    words = (
        "<p>How many bits the model needs for each value of a held-out picture; 8 would be no compression at all.</p>"
    )
    return f"<h3>Bits per dimension</h3>{words}{table(['', 'bits', 'standard error'], rows, 'Bits per dimension')}"
