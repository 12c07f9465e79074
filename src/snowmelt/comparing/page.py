"""What a comparison looks like: one page that opens offline, the same as Markdown, and its sheets as one PNG."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from snowmelt import __version__
from snowmelt.comparing.plots import ROLES, SIGNS, Shown, interval_charts, mark_of, over_time_charts
from snowmelt.comparing.rows import ASPECTS, Row, figures_of, firsts, memory_of, name_of, rows_of, runs_of, shown_space
from snowmelt.comparing.verdict import RETRAINED
from snowmelt.pages.charts import svg
from snowmelt.pages.markup import code, details, fill, items, plain, table
from snowmelt.pages.measures import (
    BAND,
    SPACES,
    common_reason,
    drawing_words,
    learned_from,
    percent,
    share_with_interval,
    time_words,
    twins_share,
)
from snowmelt.pages.reading import finite, opened, or_reason, table_of, tables, texts, whole
from snowmelt.pages.sheets import pairs_of, sheet_figure
from snowmelt.pages.shell import Page, document, look_of, template
from snowmelt.terminal import words_of

HERE = "snowmelt.comparing"
SHEETS = 2_000_000
"""Bytes of all sheets together."""
PAIRS = 4
"""Most suspicious pairs of each run."""
APART = f"apart from the rest by more than {RETRAINED:g} times what chance in drawing explains"
"""What is called best."""

Comparison = dict[str, Any]


def comparison_page(folder: Path, comparison: Comparison) -> bytes:
    """The whole file; a part that the comparison lacks, or that is damaged, is a sentence.

    Args:
        folder: of the comparison; sheets lie in it.
        comparison: what compare.json holds.
    """
    data, verdict = table_of(comparison.get("data")), table_of(comparison.get("verdict"))
    headline = plain(verdict.get("headline") or "There is no verdict.")
    parts = {
        "sentences": partial(_sentences, verdict),
        "facts": partial(_facts, comparison),
        "sheets": partial(_sheets, folder, comparison),
        "table": partial(_table, comparison),
        "intervals": partial(_intervals, comparison),
        "over_time": partial(_over_time, comparison),
        "copies": partial(_copies, folder, comparison),
        "how": partial(_how, comparison),
        "not_measured": partial(_not_measured, comparison),
    }
    values = {
        "eyebrow": plain(f"A duel on {_source(comparison)}"),
        "headline": headline,
        "version": __version__,
        "seen": _seen(comparison),
        "reference": _reference(comparison),
        "band": BAND,
        "apart": APART,
        **{name: or_reason(build, "This part") for name, build in parts.items()},
    }
    look = look_of(whole(data.get("size")))
    body = fill(template(HERE, "page.html"), values)
    return document(Page("compare", f"Comparison: {headline}", template(HERE, "page.css"), body, look))


# the parts


def _source(comparison: Comparison) -> str:
    """The names of the pictures or runs, without their folders."""
    names = str(comparison.get("source") or "the same pictures").split(", ")
    return ", ".join(Path(name).name or name for name in names)


def _sentences(verdict: dict[str, Any]) -> str:
    """What each is about stands out, so that they can be skimmed."""
    parts = [one.partition(": ") for one in texts(verdict.get("sentences"))]
    entries = "".join(
        f"<li><b>{plain(about)}:</b> {plain(said)}</li>" if said else f"<li>{plain(about)}</li>"
        for about, _, said in parts
    )
    return f'<ul class="verdict">{entries}</ul>' if entries else ""


def _facts(comparison: Comparison) -> str:
    data, seconds = table_of(comparison.get("data")), finite(comparison.get("seconds"))
    parts = [
        f"{len(runs_of(comparison))} models",
        f"{words_of(seconds)} in all" if seconds else "",
        f"{whole(data.get('train')):,} pictures to learn from, {whole(data.get('held_out')):,} held out",
        f"{whole(data.get('size'))} × {whole(data.get('size'))} pixels",
        f"seed {plain(comparison.get('seed', '?'))}",
    ]
    return " · ".join(part for part in parts if part)


def _sheets(folder: Path, comparison: Comparison) -> str:
    """The sheets side by side; on a phone one below the other."""
    runs = runs_of(comparison)
    return "".join(_sheet(folder, run, SHEETS // len(runs), firsts(comparison, name_of(run))) for run in runs)


def _sheet(folder: Path, run: dict[str, Any], budget: int, said: str) -> str:
    name, seconds = plain(name_of(run)), finite(run.get("seconds_per_picture"))
    path = _inside(folder, run.get("sheet"))
    caption = f"<b>{plain(said)}</b>; " if said else ""
    caption += f"{time_words(seconds)} to draw each" if seconds is not None else ""
    missing = '<p class="odd">Its sheet of samples is not there.</p>'
    shown = sheet_figure(path, f"Sample sheet of {name_of(run)}", caption, budget) if path else missing
    return f"<div><h3>{name}</h3>{shown}</div>"


def _inside(folder: Path, name: Any) -> Path | None:
    """A file of the comparison; None where it is none, or lies outside."""
    if not isinstance(name, str) or not name:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def _table(comparison: Comparison) -> str:
    names = [name_of(run) for run in runs_of(comparison)]
    rows = rows_of(comparison)
    head = "".join(f'<th scope="col">{plain(name)}</th>' for name in ["", *names])
    body = ""
    for name, aspect in ASPECTS.items():
        mine = [row for row in rows if row.aspect == name]
        if mine:
            body += f'<tr class="aspect"><th scope="rowgroup" colspan="{len(names) + 1}">{aspect.title}</th></tr>'
            body += "".join(map(_row, mine))
    box = f'<div class="wide figures" style="--columns:{max(1, len(names))}">'
    box += '<div class="table" tabindex="0" role="group" aria-label="The comparison in numbers">'
    return f"{box}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"


def _seen(comparison: Comparison) -> str:
    """By which eye the table sees."""
    space = shown_space(comparison)
    more = ", which notices what they show, and also blur and noise that people overlook" if space == "trained" else ""
    return f"{plain(SPACES.get(space, space))}{more}. " if space else ""


def _reference(comparison: Comparison) -> str:
    """That drawn pictures are compared with such as were learned from, where that is so."""
    said = dict.fromkeys(learned_from(table_of(run.get("quality"))) for run in runs_of(comparison))
    return "".join(f'<p class="small">{plain(one)}</p>' for one in said if one)


def _row(row: Row) -> str:
    tied = sum(cell.best for cell in row.cells) > 1
    star = f'<span class="best">★ best{", tied" if tied else ""}</span>'
    cells = "".join(
        f"<td><b>{plain(cell.value)}</b>"
        + (f'<small class="interval">{plain(cell.interval)}</small>' if cell.interval else "")
        + (star if cell.best else "")
        + "</td>"
        for cell in row.cells
    )
    about = plain("; ".join(part for part in (row.about, row.note) if part))
    return f'<tr><th scope="row">{plain(row.title)}<small class="about">{about}</small></th>{cells}</tr>'


def _intervals(comparison: Comparison) -> str:
    """First the eye of the table, and the pixels; all others folded."""
    shown, first = interval_charts(comparison), (shown_space(comparison), "pixels")
    if not shown:
        return "<p>There are no figures.</p>"
    parts = [_legend(comparison)]
    spaces = sorted({one.space for one in shown}, key=lambda space: (space != first[0], space != first[1], space))
    for place, space in enumerate(spaces):
        title = SPACES.get(space, space)
        charts = _charts([one for one in shown if one.space == space], f"intervals{place}-")
        open_ = f"<h3>{plain(title)}</h3>{charts}"
        parts.append(open_ if space in first else f'<div class="wide">{details(plain(title), charts)}</div>')
    return "".join(parts)


def _over_time(comparison: Comparison) -> str:
    shown = over_time_charts(comparison)
    if not shown:
        return "<p>Quality was measured at the end only.</p>"
    words = (
        "<p>What each had become after a part of its time; the upright lines are 95 % intervals, and the grey line is "
    )
    words += (
        "what real pictures get. A line that still falls (or rises) at its end would have gained from more time.</p>"
    )
    return words + _legend(comparison) + _charts(shown, "over-time")


def _legend(comparison: Comparison) -> str:
    """Colour and mark of every run."""
    entries: list[str] = []
    for index, run in enumerate(runs_of(comparison)):
        role, sign = ROLES[index % len(ROLES)], SIGNS[mark_of(index)]
        entries.append(f'<li><b style="color:var(--{role})">{sign} {plain(name_of(run))}</b></li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _charts(shown: list[Shown], name: str) -> str:
    panels = "".join(
        f'<figure class="chart">{svg(one.chart, f"{name}{index}", one.chart.title)}'
        f"<figcaption><b>{plain(one.title)}</b>: {plain(one.about)}</figcaption></figure>"
        for index, one in enumerate(shown)
    )
    return f'<div class="charts wide">{panels}</div>'


def _copies(folder: Path, comparison: Comparison) -> str:
    """How many copies each drew, and its most suspicious pairs."""
    runs = runs_of(comparison)
    found = [memory_of(run) for run in runs]
    if not any(found):
        return "<p>Copies were not looked for.</p>"
    rows = [
        [
            plain(name_of(run)),
            share_with_interval(table_of(one.get("copies"))),
            percent(twins_share(one)),
            percent(finite(table_of(one.get("copies")).get("false_alarms"))),
            share_with_interval(table_of(one.get("closer"))),
        ]
        for run, one in zip(runs, found, strict=True)
    ]
    head = ["", "copies among drawn pictures", "twins among real held-out ones", "false alarms", "nearer"]
    words = (
        "<p>Every drawn picture was held against all training pictures, and so was every real one that was held out: "
        "some of these are training pictures over again (twins, duplicates), and of the others the test calls a few "
        "copies wrongly (false alarms). A model that copies nothing has about as many copies as there are twins, and "
        "half of its pictures, or fewer where they look odd, are nearer to a training picture than a typical held-out "
        "one is.</p>"
    )
    pairs = "".join(_pairs(folder, run, tables(one.get("pairs"))) for run, one in zip(runs, found, strict=True))
    return f'{words}<div class="wide figures" style="--columns:4">{table(head, rows, "Copies")}</div>{pairs}'


def _pairs(folder: Path, run: dict[str, Any], pairs: list[dict[str, Any]]) -> str:
    """The pairs that lie beside the sheet."""
    sheet = _inside(folder, run.get("sheet"))
    if not pairs or sheet is None or not (place := sheet.parent / "pairs").is_dir():
        return ""
    title = f"<h3>{plain(name_of(run))}: drawn pictures, and the training pictures nearest to them</h3>"
    return f'{title}<div class="wide">{pairs_of(pairs, place, PAIRS)}</div>'


def _how(comparison: Comparison) -> str:
    runs, data = runs_of(comparison), table_of(comparison.get("data"))
    classes = texts(data.get("classes"))
    quality = next((found for run in runs if (found := table_of(run.get("quality")))), {})
    spaces = [
        f"<b>{plain(SPACES.get(name, name))}</b>: {plain(table_of(about).get('about', ''))} "
        f"({whole(table_of(about).get('dimension')):,} numbers a picture)"
        for name, about in table_of(quality.get("spaces")).items()
    ]
    commands = [str(run["command"]) for run in runs if run.get("command")]
    drawn = [
        (name_of(run), drawing_words(run.get("drawing"), table_of(run.get("quality")).get("precision"))) for run in runs
    ]
    drawings = [f"{plain(name)}: {plain(said)}" for name, said in drawn if said]
    words = "<p>All saw the same pictures, with the same ones held out, and were measured by the same "
    words += (
        f"code with the same seeds.</p>{_budget(runs)}<p>{whole(quality.get('samples')):,} drawn pictures of each were "
    )
    words += (
        f"compared with {whole(quality.get('real')):,} {plain(quality.get('reference', 'real pictures'))}. There were "
    )
    words += f"{whole(data.get('train')):,} pictures to learn from, of {len(classes) or 'no'} classes (fingerprint "
    words += f"<code>{plain(str(data.get('fingerprint', ''))[:16])}</code>).</p>"
    return (
        words
        + (f"<p>Pictures are compared as they look to several eyes:</p>{items(spaces)}" if spaces else "")
        + (f"<p>Drawn:</p>{items(drawings)}" if drawings else "")
        + (f"<p>The commands:</p>{code(commands)}" if commands else "")
    )


def _budget(runs: list[dict[str, Any]]) -> str:
    """That each had the same time, and what it made of it."""
    seconds = [finite(run.get("seconds")) or 0.0 for run in runs]
    most = max(seconds, default=0.0) or 1.0
    rows = [
        [
            plain(name_of(run)),
            f'<i style="width:{100 * spent / most:.1f}%"></i>',
            words_of(spent),
            *(f"{whole(run.get(key)):,}" for key in ("steps", "images", "parameters")),
        ]
        for run, spent in zip(runs, seconds, strict=True)
    ]
    head = ["", "", "time", "steps", "images seen", "parameters"]
    apart = (most - min(seconds, default=most)) / most
    said = f"<p class='small'>The times are within {percent(apart)} of each other.</p>" if any(seconds) else ""
    return f'<div class="budget">{table(head, rows, "Time and size of each")}</div>{said}'


def _not_measured(comparison: Comparison) -> str:
    sentences = reasons_of(comparison)
    return items([plain(one) for one in sentences]) or "<p>Everything that was asked for was measured.</p>"


def reasons_of(comparison: Comparison) -> list[str]:
    """What was not measured and why, each sentence once; plain text."""
    of_figures = {one.reason for run in runs_of(comparison) for one in figures_of(run)}
    found = [sentence for sentence in texts(comparison.get("not_measured")) if sentence not in of_figures]
    for run in runs_of(comparison):
        found += texts(table_of(run.get("quality")).get("not_measured"))
        figures = figures_of(run)
        for space in dict.fromkeys(one.space for one in figures):
            mine = [one for one in figures if one.space == space]
            if reason := common_reason(mine):
                found.append(f"{SPACES.get(space, space)}: {reason}")
            else:
                title = SPACES.get(space, space)
                found += [
                    f"{one.title}, {title.lower()}: {one.reason}" for one in mine if one.value is None and one.reason
                ]
    return list(dict.fromkeys(found))


# the same elsewhere


def comparison_markdown(comparison: Comparison) -> str:
    """The verdict, the table and what was not measured, as Markdown."""
    verdict, runs = table_of(comparison.get("verdict")), runs_of(comparison)
    lines = [f"# {_escaped(verdict.get('headline') or 'There is no verdict.')}", ""]
    lines += [f"- {_escaped(one)}" for one in texts(verdict.get("sentences"))]
    lines += ["", _line(["", *map(name_of, runs)]), "|" + "---|" * (len(runs) + 1)]
    for row in rows_of(comparison):
        cells = [
            f"{cell.value}{f' ({cell.interval})' if cell.interval else ''}{' ★' if cell.best else ''}"
            for cell in row.cells
        ]
        lines.append(_line([row.title, *cells]))
    lines += ["", f"In brackets the 95 % interval; ★ marks what is best beyond chance: {APART}.", ""]
    if found := reasons_of(comparison):
        lines += ["Not measured:", "", *(f"- {_escaped(one)}" for one in found), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: object) -> str:
    """Text of whatever origin, which does nothing in Markdown or in the HTML that it becomes."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    for letter in "\\`*_[]|#":
        shown = shown.replace(letter, f"\\{letter}")
    return shown.replace("<", "&lt;")


def comparison_png(folder: Path, comparison: Comparison) -> bytes:
    """The sheets side by side under the verdict, each with the name of its run and its first figures."""
    from snowmelt.comparing.poster import Column, poster

    verdict = table_of(comparison.get("verdict"))
    rows = rows_of(comparison)[:3]
    columns: list[Column] = []
    for index, run in enumerate(runs_of(comparison)):
        path = _inside(folder, run.get("sheet"))
        said = [f"{row.title}: {row.cells[index].value} {'★' if row.cells[index].best else ''}".strip() for row in rows]
        front = firsts(comparison, name_of(run))
        columns.append(Column(name_of(run), [*([front] if front else []), *said], opened(path) if path else None))
    return poster(str(verdict.get("headline", "")), columns)
