"""The facts of a comparison, row by row: what is told of every run, and who is ahead beyond chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from snowmelt.pages.markup import number
from snowmelt.pages.measures import (
    WORDS,
    Measure,
    interval,
    measures_of,
    percent,
    share_of,
    share_words,
    time_words,
    twins_share,
)
from snowmelt.pages.reading import finite, table_of, tables, texts, whole


class Aspect(NamedTuple):
    """A part of the table."""

    title: str
    metrics: tuple[str, ...] = ()
    """The figures in it."""


ASPECTS = {
    "quality": Aspect("Quality: do the pictures look real?", ("frechet", "kid", "precision", "density", "patches")),
    "diversity": Aspect("Diversity: is everything there that is in the real ones?", ("recall", "coverage")),
    "classes": Aspect("Classes: is it what was asked for?"),
    "copies": Aspect("Copies: are they new?"),
    "cost": Aspect("Cost"),
    "likelihood": Aspect("Likelihood"),
}
"""In their order."""
PREFERRED = ("trained", "dinov2", "inception", "random")
"""The space that the table shows: the first of these with a number."""


@dataclass(frozen=True)
class Cell:
    """What is told of one run; plain text."""

    value: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One fact of all runs; plain text."""

    aspect: str
    """One of `ASPECTS`."""
    title: str
    about: str
    cells: tuple[Cell, ...]
    note: str = ""
    """What the intervals say of it."""


def runs_of(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs in their order."""
    return tables(comparison.get("runs"))


def name_of(run: dict[str, Any]) -> str:
    """What the person calls a run."""
    return str(run.get("name") or run.get("model") or "a run")


def figures_of(run: dict[str, Any]) -> list[Measure]:
    """What was measured of its pictures."""
    return measures_of(table_of(run.get("quality")).get("figures"))


def shown_space(comparison: dict[str, Any]) -> str:
    """The feature space of the table."""
    found = [one.space for run in runs_of(comparison) for one in figures_of(run) if one.value is not None]
    spaces = [space for space in (*PREFERRED, *found) if space in found and space != "pixels"]
    return spaces[0] if spaces else ""


def pairs_measured(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """(metric, space) of every figure that some run has a number for."""
    found = [(one.metric, one.space) for run in runs_of(comparison) for one in figures_of(run) if one.value is not None]
    return list(dict.fromkeys(found))


def figure_of(run: dict[str, Any], metric: str, space: str) -> Measure | None:
    """One figure of a run; None where it was not even tried."""
    return next((one for one in figures_of(run) if (one.metric, one.space) == (metric, space)), None)


def rows_of(comparison: dict[str, Any]) -> list[Row]:
    """The table: quality, diversity, copies, costs and bits/dim."""
    space, measured = shown_space(comparison), pairs_measured(comparison)
    rows: list[Row] = []
    for name, aspect in ASPECTS.items():
        for metric in aspect.metrics:
            places = [place for one, place in measured if one == metric]
            if places:
                rows.append(figure_row(comparison, name, metric, space if space in places else places[0]))
    rows += _classes(runs_of(comparison))
    return [*rows, *_copies(comparison), *_costs(runs_of(comparison)), *_bits(runs_of(comparison))]


def firsts(comparison: dict[str, Any], name: str) -> str:
    """In how many of the numbers that tell runs apart a run is best or tied with the best, in words."""
    found = [
        groups for row in tables(table_of(comparison.get("verdict")).get("table")) if len(groups := _groups(row)) > 1
    ]
    return f"At the front in {sum(name in groups[0] for groups in found)} of {len(found)} numbers" if found else ""


def _groups(row: dict[str, Any]) -> list[list[str]]:
    """The names of a row of the verdict's table, from best to worst."""
    order = row.get("order")
    return [group for one in order if (group := texts(one))] if isinstance(order, list) else []


def figure_row(comparison: dict[str, Any], aspect: str, metric: str, space: str) -> Row:
    """One figure of all runs."""
    runs = runs_of(comparison)
    best, note = _verdict(comparison, metric, space)
    found = [figure_of(run, metric, space) for run in runs]
    if any(one is None or one.value is None for one in found):
        best, note = [], "not every one has a number, so none is called best"
    cells = tuple(
        Cell("–" if one is None or one.value is None else number(one.value))
        if one is None or one.value is None
        else Cell(number(one.value), interval(one.low, one.high), name_of(run) in best)
        for run, one in zip(runs, found, strict=True)
    )
    first = next(one for one in found if one is not None)
    better = {"lower": "lower is better", "higher": "higher is better"}.get(first.better, "")
    about = "; ".join(part for part in (WORDS.get(metric, ""), better, _floor(found)) if part)
    return Row(aspect, first.title, about, cells, note)


def _floor(found: list[Measure | None]) -> str:
    """What real pictures get, in words."""
    floors = [one.floor for one in found if one is not None and one.floor is not None]
    return f"real pictures get {number(sum(floors) / len(floors))}" if floors else ""


def _verdict(comparison: dict[str, Any], metric: str, space: str) -> tuple[list[str], str]:
    """The names that are best, where any is beyond chance, and a sentence."""
    for entry in tables(table_of(comparison.get("verdict")).get("table")):
        if entry.get("metric") == metric and entry.get("space") == space:
            groups = _groups(entry)
            if len(groups) > 1:
                return groups[0], ""
            return [], "nobody is ahead beyond chance" if groups else ""
    return [], ""


def _classes(runs: list[dict[str, Any]]) -> list[Row]:
    found = [table_of(table_of(run.get("quality")).get("classes")) for run in runs]
    if not any(one.get("as_asked") for one in found):
        return []
    cells = tuple(Cell(*share_words(share_of(one.get("as_asked")))) for one in found)
    real = next((share for one in found if (share := share_of(one.get("held_out_right")).get("share"))), None)
    about = "share of drawn pictures that are recognised as the class they were drawn as; higher is better"
    about += f"; of real pictures {percent(finite(real))} are recognised" if real else ""
    balance = tuple(Cell(percent(finite(one.get("distance")))) for one in found)
    apart = (
        "share of drawn pictures that would have to be of another class for the balance of real ones; lower is better"
    )
    return [Row("classes", "Recognised", about, cells), Row("classes", "Balance", apart, balance)]


def memory_of(run: dict[str, Any]) -> dict[str, Any]:
    """What was found of copies."""
    return table_of(table_of(run.get("quality")).get("memorization"))


def _copies(comparison: dict[str, Any]) -> list[Row]:
    memories = [memory_of(run) for run in runs_of(comparison)]
    found = [table_of(one.get("copies")) for one in memories]
    if not any(found):
        return []
    twins = [share for one in memories if (share := twins_share(one)) is not None]
    about = "share of drawn pictures that are a training picture over again; lower is better"
    about += f"; so are {percent(max(twins))} of real held-out pictures" if twins else ""
    return [Row("copies", "Copies", about, tuple(Cell(*share_words(one)) for one in found))]


def _costs(runs: list[dict[str, Any]]) -> list[Row]:
    def cells(key: str, scale: float, unit: str) -> tuple[Cell, ...]:
        found = [finite(run.get(key)) for run in runs]
        return tuple(Cell("–" if one is None else f"{number(one * scale)} {unit}") for one in found)

    return [
        Row("cost", "Time per picture", "how long drawing one takes on this machine", _times(runs)),
        Row("cost", "Training speed", "images learned from in a second", cells("images_per_second", 1.0, "/ s")),
        Row("cost", "Memory", "of the process while training", cells("memory", 1 / 2**30, "GB")),
        Row("cost", "Parameters", "numbers that the model has learned", _parameters(runs)),
    ]


def _times(runs: list[dict[str, Any]]) -> tuple[Cell, ...]:
    found = [finite(run.get("seconds_per_picture")) for run in runs]
    return tuple(Cell("–" if one is None else time_words(one)) for one in found)


def _parameters(runs: list[dict[str, Any]]) -> tuple[Cell, ...]:
    return tuple(Cell(f"{whole(run.get('parameters')):,}" if run.get("parameters") else "–") for run in runs)


def _bits(runs: list[dict[str, Any]]) -> list[Row]:
    found = [table_of(run.get("bits_per_dim")) for run in runs]
    if not any(found):
        return []
    cells = tuple(_bits_cell(one) for one in found)
    whats = list(dict.fromkeys(str(one["what"]) for one in found if one.get("what")))
    about = "bits needed for each value of a held-out picture, fewer are better"
    about += f" ({'; '.join(whats)})" if whats else ""
    note = "a model without probabilities, such as a GAN, has none" if not all(found) else ""
    return [Row("likelihood", "Bits per dimension", about, cells, note)]


def _bits_cell(found: dict[str, Any]) -> Cell:
    mean, error = finite(found.get("mean")), finite(found.get("standard_error"))
    if mean is None:
        return Cell("not defined")
    return Cell(
        number(mean), "" if error is None else f"{number(mean - 1.96 * error)} to {number(mean + 1.96 * error)}"
    )
