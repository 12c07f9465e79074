"""What the numbers of a comparison support, in sentences: no more than that.

Two runs are told apart in a number when it differs by more than `RETRAINED` times what the intervals of both explain,

    |a - b| > RETRAINED * sqrt(half_a^2 + half_b^2)

because the intervals know only the chance in drawing, and training again moves the numbers too: a Frechet distance by
about three times as much ("The FID Lottery", arXiv:2606.20536). For the other numbers the factor is a margin chosen.
"""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

from snowmelt.pages.measures import time_words

RETRAINED = 3.0
DISTANCES = ("frechet", "kid", "patches")
"""Metrics of how near the pictures are to real ones, as a whole."""
VARIETY = ("recall", "coverage")
NAMES = {"diffusion": "diffusion", "vae": "the VAE", "gan": "the GAN"}

Run = dict[str, Any]
"""One of the "runs" of a compare.json."""


def verdict(runs: list[Run]) -> dict[str, Any]:
    """The "verdict" of a compare.json: headline, sentences, and for each number the groups that are told apart."""
    table = [row for metric, space in _measured(runs) if (row := _row(runs, metric, space))]
    return {"headline": _headline(runs, table), "sentences": _sentences(runs, table), "table": table}


def groups(values: dict[str, tuple[float, float]], *, better: str) -> list[list[str]]:
    """Names from best to worst; those that are not told apart from the best of their group stand together.

    Args:
        values: by name, the value and its error (half the width of an interval).
        better: "lower" or "higher".
    """
    left = sorted(values, key=lambda name: values[name][0], reverse=better == "higher")
    found: list[list[str]] = []
    while left:
        best = left[0]
        same = [name for name in left if not told_apart(values[best], values[name])]
        found.append(same)
        left = [name for name in left if name not in same]
    return found


def told_apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two values differ by more than chance in drawing and in training explains."""
    return abs(one[0] - other[0]) > RETRAINED * math.hypot(one[1], other[1])


def _figures(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    return {(figure["metric"], figure["space"]): figure for figure in run["quality"]["figures"]}


def _measured(runs: list[Run]) -> list[tuple[str, str]]:
    """What every run has a number for."""
    all_figures = [_figures(run) for run in runs]
    keys = [key for key in all_figures[0] if all(key in figures for figures in all_figures)]
    return [key for key in keys if all(figures[key]["value"] is not None for figures in all_figures)]


def _row(runs: list[Run], metric: str, space: str) -> dict[str, Any]:
    figures = {run["name"]: _figures(run)[metric, space] for run in runs}
    first = figures[runs[0]["name"]]
    values = {name: (one["value"], one["error"]) for name, one in figures.items()}
    better, order = first["better"], groups(values, better=first["better"])
    wins = [
        [one, other]
        for one, other in permutations(values, 2)
        if told_apart(values[one], values[other]) and (values[one][0] < values[other][0]) == (better == "lower")
    ]
    return {"metric": metric, "space": space, "title": first["title"], "order": order, "wins": wins}


def _headline(runs: list[Run], table: list[dict[str, Any]]) -> str:
    """Who is nearest to the real pictures, where that can be said."""
    rows = [row for row in table if row["metric"] in DISTANCES]
    if not rows:
        return "There were too few pictures to say which model is better."
    tops = [row["order"][0] for row in rows]
    best = [name for name in (run["name"] for run in runs) if all(name in top for top in tops)]
    alone = [name for name in best if sum(top == [name] for top in tops) > len(rows) / 2]
    if alone:
        return f"{_upper(_called(runs, alone[0]))} draws the pictures nearest to yours."
    if len(best) == len(runs):
        return "No model is better than the others beyond chance."
    if len(best) == 1:
        return f"{_upper(_called(runs, best[0]))} is at the front by every distance, though not alone in most of them."
    if best:
        return f"{_upper(_listed(runs, best))} are at the front by every distance."
    firsts = sorted({name for top in tops for name in top})
    return (
        f"There is no single winner: by one distance or another {_listed(runs, firsts)} are nearest to your pictures."
    )


def _sentences(runs: list[Run], table: list[dict[str, Any]]) -> list[str]:
    said = [
        _about(runs, table, DISTANCES, "Nearness to real pictures"),
        _left(runs, table),
        _about(runs, table, ("precision", "density"), "Single pictures that look real"),
        _about(runs, table, VARIETY, "Variety of the real pictures that is covered"),
        _classes(runs, table),
        _copies(runs),
        _speed(runs),
        _bits(runs),
        f"Called better is only what lies more than {RETRAINED:g} times further apart than chance in drawing explains; "
        "that margin is our choice.",
    ]
    return [sentence for sentence in said if sentence]


def _about(runs: list[Run], table: list[dict[str, Any]], metrics: tuple[str, ...], what: str) -> str:
    """How often each of two runs is told to be better, over the numbers of a kind."""
    rows = [row for row in table if row["metric"] in metrics]
    if not rows:
        return ""
    parts: list[str] = []
    for one, other in combinations([run["name"] for run in runs], 2):
        mine, theirs = (sum(pair in row["wins"] for row in rows) for pair in ([one, other], [other, one]))
        for name, loser, count, against in ((one, other, mine, theirs), (other, one, theirs, mine)):
            if count and not against:
                many = "every number" if count == len(rows) > 1 else f"{count} of {len(rows)} numbers"
                parts.append(f"{_called(runs, name)} beats {_called(runs, loser)} in {many}")
        if mine and theirs:
            parts.append(f"{_called(runs, one)} and {_called(runs, other)} each win some")
    return f"{what}: {'; '.join(parts) or 'nobody is ahead beyond chance'}."


def _left(runs: list[Run], table: list[dict[str, Any]]) -> str:
    """How far the best is from what real pictures get, by the first of the distances."""
    row = next((row for row in table if row["metric"] in DISTANCES), None)
    if row is None:
        return ""
    best = row["order"][0][0]
    figure = next(_figures(run)[row["metric"], row["space"]] for run in runs if run["name"] == best)
    if figure.get("floor_high") is None:
        return ""
    seen = "" if figure["low"] > figure["floor_high"] else "none that could be seen: "
    return (
        f"Distance that is left: {seen}{figure['title']} {figure['value']:.3g} with {_called(runs, best)}, "
        f"the nearest, where real pictures get {figure['floor']:.2g}."
    )


def _classes(runs: list[Run], table: list[dict[str, Any]]) -> str:
    shares = [(run, run["quality"].get("classes") or {}) for run in runs]
    known = [(run, found["as_asked"]) for run, found in shares if found.get("as_asked")]
    parts = [f"{share[0]:.0%} for {_called(runs, run['name'])}" for run, share in known]
    right = next((found["held_out_right"][0] for _, found in shares if found.get("held_out_right")), None)
    real = f" (real pictures: {right:.0%})" if right is not None else ""
    if not parts:
        return ""
    said = f"Pictures that are recognised as the class they were drawn as: {', '.join(parts)}{real}."
    easy: dict[str, float] = {run["name"]: share[0] for run, share in known}
    first = max(easy, key=easy.__getitem__)
    behind = [row for row in table if row["metric"] in DISTANCES and first not in row["order"][0]]
    if len(behind) > 1:
        said += (
            f" Those of {_called(runs, first)} are the easiest to recognise and not the nearest: distances also see "
            "what people overlook, such as faint blur and noise, and what is missing."
        )
    return said


def _copies(runs: list[Run]) -> str:
    found = {run["name"]: (run["quality"].get("memorization") or {}).get("copies") for run in runs}
    known = {name: one for name, one in found.items() if one}
    if not known:
        return ""
    guilty = [name for name, one in known.items() if one["low"] > _usual(runs, name)]
    if not guilty:
        most = max(one["high"] for one in known.values())
        return f"Copies of training pictures: not shown for any model (at most {most:.1%} of the pictures of each)."
    shares = [f"{_called(runs, name)} ({known[name]['share']:.1%} of its pictures)" for name in guilty]
    return f"Copies of training pictures: {', '.join(shares)}."


def _usual(runs: list[Run], name: str) -> float:
    """The share of real pictures that the search for copies would find: twins of training pictures, false alarms."""
    found = next(run for run in runs if run["name"] == name)["quality"]["memorization"]
    twins, others = found.get("duplicates", 0), found.get("held_out", 0)
    return (twins + found["copies"]["false_alarms"] * others) / max(1, twins + others)


def _speed(runs: list[Run]) -> str:
    times = {run["name"]: run["seconds_per_picture"] for run in runs if run.get("seconds_per_picture")}
    if len(times) < 2:
        return ""
    fast, slow = min(times, key=lambda name: times[name]), max(times, key=lambda name: times[name])
    ratio = times[slow] / times[fast]
    if ratio < 1.5:
        return "Time to draw a picture: about the same with each."
    parts = [f"{time_words(seconds)} with {_called(runs, name)}" for name, seconds in times.items()]
    return f"Time to draw a picture: {', '.join(parts)}; up to {ratio:,.0f} times as long."


def _bits(runs: list[Run]) -> str:
    known = {run["name"]: run["bits_per_dim"] for run in runs if run.get("bits_per_dim")}
    if not known:
        return ""
    parts = [
        f"{_called(runs, name)} {bits['mean']:.2f} ± {1.96 * bits['standard_error']:.2f}"
        for name, bits in known.items()
    ]
    return f"Bits/dim of held-out pictures, an upper bound and less is better: {', '.join(parts)}."


def _called(runs: list[Run], name: str) -> str:
    """How a run is called in a sentence: by its family where that is unambiguous."""
    run = next(run for run in runs if run["name"] == name)
    alone = [other["model"] for other in runs].count(run["model"]) == 1
    return NAMES.get(str(run["model"]), str(run["model"])) if alone else name


def _listed(runs: list[Run], names: list[str]) -> str:
    words = [_called(runs, name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
