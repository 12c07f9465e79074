"""Charts: each is drawn once as an SVG whose colours are the page's own variables, light or dark, and once as a PNG."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

Paint: TypeAlias = Callable[[str], str]
"""The colour of a role."""
Draw: TypeAlias = Callable[[Any, Paint], None]
"""Draws into axes."""

LIGHT = {
    "ink": "#1d2530",
    "faint": "#8a94a3",
    "rule": "#dfe3e8",
    "signal": "#1f66b0",
    "noise": "#b5490f",
    "third": "#2f7d4f",
    "series0": "#1f66b0",
    "series1": "#6b7a1f",
    "series2": "#b5490f",
    "series3": "#2f7d4f",
    "series4": "#8a5bb5",
    "series5": "#b23a6e",
    "series6": "#157a83",
    "series7": "#8b6b3e",
}
"""Every role and its colour on white; the page's style sheet has the same and those for the dark."""
_STANDIN = {role: f"#0a0b{number:02x}" for number, role in enumerate(LIGHT)}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "snowmelt",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify_threshold": 0.5,
}


class Chart(NamedTuple):
    """One panel: how it is drawn, its title in the PNG, its width and height in inches."""

    draw: Draw
    title: str
    size: tuple[float, float] = (4.2, 2.9)


def svg(chart: Chart, name: str, label: str) -> str:
    """The chart as inline SVG, which asks for nothing outside itself.

    Args:
        name: begins its ids, so that no two charts of a page share one.
        label: for those who cannot see it.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS), _no_remarks():
        figure = Figure(figsize=chart.size, dpi=72)
        axes = figure.subplots(gridspec_kw=_margins(*chart.size))
        _frame(axes, _STANDIN.__getitem__)
        chart.draw(axes, _STANDIN.__getitem__)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
        ends = [axes.transData.transform((x, 0))[0] for x in axes.get_xlim()]
    return _inline(buffer.getvalue(), name, label, ends)


@contextmanager
def _no_remarks() -> Generator[None]:
    """Names may be written in any script: what the font lacks the browser draws, and nobody needs to be told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def _inline(text: str, name: str, label: str, ends: list[float]) -> str:
    """Matplotlib's document as a part of a page: own names, the page's colours, no document of its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for role, colour in _STANDIN.items():
        text = text.replace(colour, f"var(--{role})")
    size = re.search(r'viewBox="([^"]+)"', text)
    assert size is not None
    head = (
        f'<svg viewBox="{size.group(1)}" role="img" aria-label="{html.escape(label)}" '
        f'data-left="{ends[0]:.2f}" data-right="{ends[1]:.2f}">'
    )
    return head + re.sub(r"\s*\n\s*", " ", text[text.index(">") + 1 :]).strip()


def png_of(charts: list[Chart], columns: int) -> bytes:
    """The charts side by side as one picture on white."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(charts))
    rows = math.ceil(len(charts) / columns)
    width, height = charts[0].size
    with mpl.rc_context(_SETTINGS), _no_remarks():
        figure = Figure(figsize=(columns * width, rows * (height + 0.3)), dpi=130)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        edges = _margins(columns * width, rows * (height + 0.3), top=0.35)
        figure.subplots_adjust(**edges, hspace=0.85 / (height - 0.6), wspace=0.6 / (width - 0.6))
        for axes, chart in zip(grid, charts, strict=False):
            _frame(axes, LIGHT.__getitem__)
            chart.draw(axes, LIGHT.__getitem__)
            axes.set_title(chart.title, fontsize=10, color=LIGHT["ink"])
            if axes is grid[0] and axes.lines and not axes.lines[0].get_label().startswith("_"):
                axes.legend(frameon=False, fontsize=7.5)
        for axes in grid[len(charts) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


class Line(NamedTuple):
    """One line of a chart of lines."""

    role: str
    xs: list[float]
    ys: list[float]
    dots: str = ""
    """Matplotlib's mark of every point, where points are few."""
    spans: tuple[tuple[float, float], ...] = ()
    """The interval of every point, where there are any."""


def lines_chart(title: str, xlabel: str, lines: list[Line], size: tuple[float, float] = (4.2, 2.6)) -> Chart:
    """Lines over a common axis, which is logarithmic upwards where all values allow it and span over a factor of 20."""
    values = [value for line in lines for value in line.ys]
    steep = bool(values) and min(values) > 0 and max(values) > 20 * min(values)

    def draw(axes: Any, paint: Paint) -> None:
        for line in lines:
            axes.plot(line.xs, line.ys, color=paint(line.role), marker=line.dots, markersize=5, linewidth=1.8)
            for x, (low, high) in zip(line.xs, line.spans, strict=False):
                axes.plot([x, x], [low, high], color=paint(line.role), linewidth=1.4)
        axes.set(xlabel=xlabel)
        if steep:
            _logarithmic(axes, max(values) / min(values))
        largest = max((max(map(abs, axis.get_view_interval())) for axis in (axes.xaxis, axes.yaxis)), default=0.0)
        if largest >= 1e4:
            shorten(axes)

    return Chart(draw, title, size)


def _logarithmic(axes: Any, span: float) -> None:
    """A logarithmic axis upwards; over less than three powers of ten it also names what lies between them."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    if span < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())


def shorten(axes: Any) -> None:
    """Large numbers on linear axes as 20k and 3M, so that they do not run into each other."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "linear" and max(map(abs, axis.get_view_interval())) >= 1e4:
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(EngFormatter(sep=""))


def _margins(width: float, height: float, top: float = 0.08) -> dict[str, float]:
    """Room for the numbers on the axes, always the same: measuring them would take most of the drawing's time."""
    return {"left": 0.5 / width, "right": 1 - 0.12 / width, "bottom": 0.5 / height, "top": 1 - top / height}


def _frame(axes: Any, paint: Paint) -> None:
    axes.patch.set_visible(False)
    axes.figure.patch.set_alpha(0)
    axes.grid(color=paint("rule"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=paint("ink"), length=0)
    axes.xaxis.label.set_color(paint("ink"))
    axes.yaxis.label.set_color(paint("ink"))
    for spine in axes.spines.values():
        spine.set_color(paint("faint"))
