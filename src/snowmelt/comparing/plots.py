"""The charts of a comparison: a dot and a whisker for each run, and quality over time."""

from __future__ import annotations

from typing import Any, NamedTuple

from snowmelt.comparing.rows import figure_of, name_of, pairs_measured, runs_of
from snowmelt.files import printable
from snowmelt.pages.charts import Chart, Line, Paint, lines_chart
from snowmelt.pages.measures import SPACES, WORDS, Measure, measures_of
from snowmelt.pages.reading import finite, tables

ROLES = ("signal", "noise", "third", "series4", "series5", "series6", "series7", "series1")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIGNS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
"""Of the runs in turn, so that none is told by its colour alone."""
MOST_OVER_TIME = 6
LONGEST = 40
"""Letters of a name in a chart."""


def mark_of(index: int) -> int:
    """Which mark a run has: another one when the colours begin again."""
    return (index + index // len(ROLES)) % len(MARKS)


class Shown(NamedTuple):
    """A chart and what it shows, in words; plain text."""

    chart: Chart
    title: str
    about: str
    space: str


def interval_charts(comparison: dict[str, Any]) -> list[Shown]:
    """A chart for every figure that some run has a number for."""
    return [_intervals(comparison, metric, space) for metric, space in pairs_measured(comparison)]


def _intervals(comparison: dict[str, Any], metric: str, space: str) -> Shown:
    runs = runs_of(comparison)
    found = [figure_of(run, metric, space) for run in runs]
    first = next(one for one in found if one is not None)
    names = [name_of(run) for run in runs]
    arrow = {"lower": "← better", "higher": "better →"}.get(first.better, "")

    def draw(axes: Any, paint: Paint) -> None:
        floors = [one.floors for one in found if one is not None and one.floors]
        if floors:
            low, high = min(low for low, _ in floors), max(high for _, high in floors)
            axes.axvspan(low, high, color=paint("faint"), alpha=0.3, linewidth=0)
        for index, (name, one) in enumerate(zip(names, found, strict=True)):
            _whisker(axes, paint, index, name, one)
        axes.set(ylim=(len(names) - 0.55, -0.75), yticks=[], xlabel=arrow)
        axes.margins(x=0.08)
        axes.spines["left"].set_visible(False)

    title = f"{first.title}, {SPACES.get(space, space).lower()}"
    return Shown(Chart(draw, title, (3.9, 0.75 + 0.5 * len(names))), first.title, WORDS.get(metric, ""), space)


def _whisker(axes: Any, paint: Paint, index: int, name: str, one: Measure | None) -> None:
    """A run on a line of its own, its name above."""
    colour = paint(ROLES[index % len(ROLES)])
    value = None if one is None else one.value
    name = printable(name)[:LONGEST]
    said = name if value is not None else f"{name}: no number"
    axes.text(
        0.0, index - 0.28, said, transform=axes.get_yaxis_transform(), color=paint("ink"), fontsize=9, parse_math=False
    )
    if one is None or value is None:
        return
    low, high = one.span or (value, value)
    axes.plot([low, high], [index, index], color=colour, linewidth=2.4, solid_capstyle="butt")
    axes.plot(
        [low, low, None, high, high], [index - 0.12, index + 0.12, None, index - 0.12, index + 0.12], color=colour
    )
    axes.plot(value, index, MARKS[mark_of(index)], color=colour, markersize=8)


def over_time_charts(comparison: dict[str, Any]) -> list[Shown]:
    """Every figure that was measured along the way: a line for each run, with whiskers."""
    runs = runs_of(comparison)
    tracks = [_track(run) for run in runs]
    keys = list(dict.fromkeys(key for track in tracks for key in track))
    return [_over_time(tracks, key) for key in keys[:MOST_OVER_TIME]]


Track = dict[tuple[str, str], list[tuple[float, Measure]]]
"""By metric and space: minutes of training, and the figure."""


def _track(run: dict[str, Any]) -> Track:
    found: Track = {}
    for moment in tables(run.get("over_time")):
        seconds = finite(moment.get("seconds"))
        for one in measures_of(moment.get("figures")):
            if seconds is not None and one.value is not None:
                found.setdefault((one.metric, one.space), []).append((seconds / 60, one))
    return found


def _over_time(tracks: list[Track], key: tuple[str, str]) -> Shown:
    lines: list[Line] = []
    every = [point for track in tracks for point in track.get(key, [])]
    floors = [one.floor for _, one in every if one.floor is not None]
    # A kernel distance of real pictures may be just below 0, which no logarithmic axis can show.
    if floors and (sum(floors) > 0 or any((one.value or 0.0) <= 0 for _, one in every)):
        ends = [0.0, max(minutes for minutes, _ in every)]
        lines.append(Line("faint", ends, [sum(floors) / len(floors)] * 2))
    for index, track in enumerate(tracks):
        points = sorted(track.get(key, []), key=lambda point: point[0])
        values = [one.value or 0.0 for _, one in points]
        spans = tuple(one.span or (one.value or 0.0, one.value or 0.0) for _, one in points)
        role, mark = ROLES[index % len(ROLES)], MARKS[mark_of(index)]
        lines.append(Line(role, [minutes for minutes, _ in points], values, mark, spans))
    first = every[0][1]
    better = {"lower": "lower is better", "higher": "higher is better"}.get(first.better, "")
    title = f"{first.title} over time"
    about = f"{SPACES.get(first.space, first.space)}; {better}"
    return Shown(lines_chart(title, "minutes of training", lines, (4.6, 2.9)), first.title, about, first.space)
