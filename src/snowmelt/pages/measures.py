"""Figures of an evaluation as a page shows them: in words, with their intervals beside what real pictures get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

from snowmelt.evaluation.metrics import Figure
from snowmelt.pages.markup import number, plain
from snowmelt.pages.reading import finite, table_of, whole

WORDS = {
    "frechet": "how far the drawn pictures as a whole lie from the real ones",
    "kid": "the same by another ruler, which is fair to few pictures",
    "precision": "share of drawn pictures that could pass for real ones",
    "density": "how thickly drawn pictures lie where real ones are",
    "recall": "share of real pictures that the model could have drawn",
    "coverage": "share of real pictures that have a drawn one like them",
    "patches": "how far small pieces of the pictures, such as edges and textures, are from real ones",
}
"""What a metric says, in half a sentence, to one who has never heard of it."""
SPACES = {
    "trained": "Seen by an encoder trained on these pictures",
    "random": "Seen by a random network",
    "inception": "Seen by Inception-v3",
    "dinov2": "Seen by DINOv2",
    "pixels": "Pixel by pixel",
}
BAND = (
    "The grey band is what <em>real</em> pictures get against other real ones. No distance can honestly be below it; "
    "precision and density can be above it, since blurred or all too usual pictures stray less than real ones do."
)
"""How to read it; HTML."""
ALL = "all pictures"
"""The reference of an evaluation where few pictures are held out."""


class Measure(Figure):
    """A figure of figures.json, as far as it could be read."""

    @staticmethod
    def of(fields: dict[str, Any]) -> Measure:
        """From JSON; what is odd is left empty."""
        readers: dict[object, Callable[[Any], Any]] = {str: str, int: whole, float | None: finite}
        kinds = get_type_hints(Figure)
        given = {name: fields.get(name, "" if kind is str else None) for name, kind in kinds.items()}
        read: dict[str, Any] = {name: readers[kind](given[name]) for name, kind in kinds.items()}
        read["title"] = read["title"] or read["metric"] or "a figure"
        return Measure(**read)

    @property
    def span(self) -> tuple[float, float] | None:
        """Its interval; None where there is none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def floors(self) -> tuple[float, float] | None:
        """The range of real against real."""
        return None if self.floor_low is None or self.floor_high is None else (self.floor_low, self.floor_high)


def measures_of(figures: Any) -> list[Measure]:
    """Those of a list from figures.json."""
    return [Measure.of(one) for one in figures if isinstance(one, dict)] if isinstance(figures, list) else []


def interval(low: float | None, high: float | None) -> str:
    """An interval in words."""
    if low is None or high is None:
        return ""
    # The digits of a very small end say nothing beside a large one.
    small = abs(low) < 1e-3 <= abs(high)
    return f"{number(round(low, 3) if small else low)} to {number(high)}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number, and its interval small below it."""
    if value is None:
        return "–"
    between = interval(low, high)
    return f"<b>{number(value)}</b>" + (f'<small class="interval">{between}</small>' if between else "")


def share_with_interval(part: dict[str, Any]) -> str:
    """A share as a percentage, with its interval below it."""
    value, between = share_words(part)
    return f"<b>{value}</b>" + (f'<small class="interval">{between}</small>' if between else "")


def share_words(part: dict[str, Any]) -> tuple[str, str]:
    """A share as a percentage, and its interval; plain text."""
    value, low, high = (finite(part.get(key)) for key in ("share", "low", "high"))
    between = "" if value is None or low is None or high is None else f"{100 * low:.1f} to {percent(high)}"
    return percent(value), between


def share_of(values: Any) -> dict[str, Any]:
    """The share and its interval from a list of three numbers; empty for anything else."""
    return dict(zip(("share", "low", "high"), values, strict=False)) if isinstance(values, list) else {}


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "–" if share is None else f"{100 * share:.1f} %"


def twins_share(memorization: dict[str, Any]) -> float | None:
    """The share of real held-out pictures that are training pictures to the eye; None where it is not known."""
    twins, others = finite(memorization.get("duplicates")), finite(memorization.get("held_out"))
    return None if twins is None or others is None or twins + others <= 0 else twins / (twins + others)


def drawing_words(drawing: Any, precision: Any) -> str:
    """How pictures were drawn; empty where that is not known, plain text."""
    if not isinstance(drawing, dict):
        return ""
    given = {name: value for name, value in drawing.items() if value is not False and value not in (None, "", [])}
    said = ", ".join(_setting(name, value) for name, value in given.items())
    how = f"with {said}" if said else "in a single step"
    return f"{how}, in bf16" if precision == "bf16" else how


def _setting(name: str, value: Any) -> str:
    if name == "levels":
        return f"{len(value)} levels from {value[0]:.1f} to {value[-1]:.1f}"
    return name.replace("_", " ") if value is True else f"{name} {value}"


def learned_from(quality: dict[str, Any]) -> str:
    """A sentence where drawn pictures are compared with such as were learned from; empty elsewhere, plain text."""
    spaces = list(dict.fromkeys(one.space for one in measures_of(quality.get("figures")) if one.value is not None))
    found = [space for space in spaces if reference_of(quality, space) == ALL]
    if not found:
        return ""
    where = "" if len(found) == len(spaces) else f" ({', '.join(SPACES.get(one, one).lower() for one in found)})"
    return (
        f"Few pictures are held out, so drawn ones are compared with all pictures{where}, most of which were learned "
        "from: a model that copies would look good by these numbers. Copies are counted separately, below."
    )


def reference_of(quality: dict[str, Any], space: str) -> str:
    """What drawn pictures are compared with in a space: held-out pictures or all pictures."""
    own = table_of(table_of(quality.get("spaces")).get(space)).get("reference")
    return str(own or quality.get("reference") or "real pictures")


def space_title(space: str) -> str:
    """What a feature space is, as a heading."""
    return SPACES.get(space, f"Seen in the space {plain(space)}")


def time_words(seconds: float) -> str:
    """A short time, in milliseconds where it is less than a tenth of a second."""
    return f"{number(1000 * seconds)} ms" if seconds < 0.1 else f"{number(seconds)} s"


def common_reason(figures: list[Measure]) -> str:
    """Why none of the figures has a number, where that is one reason for all; empty otherwise."""
    reasons = {one.reason for one in figures if one.value is None}
    return reasons.pop() if len(reasons) == 1 and all(one.value is None for one in figures) else ""


def value_cell(one: Measure) -> str:
    """The value of a figure, or the reason why there is none."""
    if one.value is None:
        return f'<span class="none">{plain(one.reason or "not measured")}</span>'
    return with_interval(one.value, one.low, one.high)


def bar(one: Measure) -> str:
    """Value (a dot) and interval (a line) on a small axis from 0, and behind them the band that real pictures get."""
    if one.value is None:
        return ""
    low, high = one.span or (one.value, one.value)
    first, last = one.floors or ((one.floor, one.floor) if one.floor is not None else (0.0, 0.0))
    begin, end = min(0.0, low, first), max(high, last, one.value) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - begin) / ((end - begin) or 1.0), 2)

    def part(kind: str, low: float, high: float) -> str:
        return f'<i class="{kind}" style="left:{place(low)}%;width:{max(0.0, place(high) - place(low)):.2f}%"></i>'

    band = part("floor", first, last) if one.floor is not None else ""
    words = f"{number(one.value)}, {interval(low, high)}; real pictures get {interval(first, last)}"
    return (
        f'<span class="bar" role="img" aria-label="{plain(words)}">{band}{part("span", low, high)}'
        f'<i class="dot" style="left:{place(one.value)}%"></i></span>'
    )


def metric_name(one: Measure) -> str:
    """Its title, and what it says."""
    words = WORDS.get(one.metric, "")
    arrow = {"lower": "lower is better", "higher": "higher is better"}.get(one.better, "")
    about = "; ".join(part for part in (words, arrow) if part)
    return f'{plain(one.title)}<small class="about">{about}</small>'
