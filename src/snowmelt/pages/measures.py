"""Figures of an evaluation as a page shows them: in words, with their intervals beside what real pictures get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snowmelt.pages.markup import number, plain
from snowmelt.pages.reading import finite, whole

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
ASPECTS = {"quality": ("frechet", "kid", "precision", "density", "patches"), "diversity": ("recall", "coverage")}
"""What the metrics look at."""


@dataclass(frozen=True)
class Measure:
    """A figure of figures.json as far as it could be read; see `snowmelt.evaluation.metrics.Figure`."""

    metric: str
    title: str
    space: str
    better: str
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    floor_low: float | None
    floor_high: float | None
    samples: int
    real: int
    reason: str

    @staticmethod
    def of(fields: dict[str, Any]) -> Measure:
        """From JSON; what is odd is left empty."""

        def text(name: str) -> str:
            return str(fields.get(name, ""))

        def value(name: str) -> float | None:
            return finite(fields.get(name))

        return Measure(
            metric=text("metric"),
            title=text("title") or text("metric") or "a figure",
            space=text("space"),
            better=text("better"),
            value=value("value"),
            low=value("low"),
            high=value("high"),
            floor=value("floor"),
            floor_low=value("floor_low"),
            floor_high=value("floor_high"),
            samples=whole(fields.get("samples")),
            real=whole(fields.get("real")),
            reason=text("reason"),
        )

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
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number, and its interval small below it."""
    if value is None:
        return "–"
    between = interval(low, high)
    return f"<b>{number(value)}</b>" + (f'<small class="interval">{between}</small>' if between else "")


def share_with_interval(part: dict[str, Any]) -> str:
    """A share as a percentage, with its interval below it."""
    value, low, high = (finite(part.get(key)) for key in ("share", "low", "high"))
    if value is None:
        return "–"
    between = "" if low is None or high is None else f"{100 * low:.1f} to {percent(high)}"
    return f"<b>{percent(value)}</b>" + (f'<small class="interval">{between}</small>' if between else "")


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "–" if share is None else f"{100 * share:.1f} %"


def space_title(space: str) -> str:
    """What a feature space is, as a heading."""
    return SPACES.get(space, f"Seen in the space {plain(space)}")


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
