"""The story of the network: the values of network.html, and the PNGs of everything that it shows."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from snowmelt.explaining import charts
from snowmelt.explaining.forward import TEN
from snowmelt.explaining.markup import data_uri, img
from snowmelt.explaining.network import (
    COMPANIONS,
    EVALUATIONS,
    SIDEWAYS,
    Network,
    StepBack,
    Trail,
    companions,
    compare,
    falling,
    held_out_errors,
    steps_to_compare,
    total_bits,
    trail,
)
from snowmelt.explaining.page import Part, Subject
from snowmelt.explaining.parts import Appearance, appearances, shown, split
from snowmelt.explaining.process import Process
from snowmelt.pages.charts import png_of, svg
from snowmelt.pages.markup import number, png, table
from snowmelt.pages.shell import script_data
from snowmelt.pictures import moments_of, strip
from snowmelt.run import Run
from snowmelt.shapes import Images

BUDGET = 900_000
"""Bytes of pixels behind the slider of the way back, about."""


COARSE = 16
"""In pictures of fewer pixels across there is nothing finer than the outline."""


def reverse_part(process: Process, network: Network, run: Run, subject: Subject) -> Part:
    """Everything of the page that a network is asked for."""
    ten = moments_of(process.steps + 1, TEN)
    ts = falling(process.steps, EVALUATIONS)
    together = trail(network, process, "ddim", companions(process, subject.seed), ts, subject.seed)
    ddim = Trail(ts, [x[:1] for x in together.xs], [belief[:1] for belief in together.beliefs])
    ddpm = trail(network, process, "ddpm", process.at(process.steps), ts, subject.seed)
    steps = [compare(network, process, t) for t in sorted({*steps_to_compare(process.steps), *ten[1:]})]
    beliefs = [network.believe(process.at(t), process.log_snr(t)) for t in ten[1:]]
    back = [trail(network, process, "ddim", process.at(t), falling(t, SIDEWAYS), subject.seed).result for t in ten[1:]]
    found = appearances(together.beliefs)
    drawn = {
        "steps.png": [charts.gap_chart(steps), charts.kl_chart(steps)],
        "parts.png": [charts.parts_chart(ts, found)],
        "errors.png": [charts.error_chart(steps, held_out_errors(run))],
    }
    values = {
        **_about(process, network, run),
        **_beliefs(process, ten, beliefs, back),
        **_way_back(process, ddim, ddpm, len(ts)),
        **_steps(process, steps, ten),
        **_parts(ddim, found),
        **_errors(steps, held_out_errors(run)),
        "gap_chart": svg(drawn["steps.png"][0], "gap", "Distance of the means and spreads of the steps back"),
        "kl_chart": svg(drawn["steps.png"][1], "kl", "Divergence of every step back"),
        "parts_chart": svg(drawn["parts.png"][0], "parts", "How much of each part is there at every step"),
        "error_chart": svg(drawn["errors.png"][0], "errors", "Error of the guess by noise level"),
    }
    places = _places(ts, TEN)
    files = {
        "reverse.png": _strip([[one[place] for place in places] for trail in (ddim, ddpm) for one in trail[1:]]),
        "beliefs.png": _strip([[process.at(t) for t in ten[1:]], beliefs, back]),
        **{name: png_of(some, len(some)) for name, some in drawn.items()},
    }
    return Part(values, files)


def _strip(rows: list[list[Images]]) -> bytes:
    columns = [torch.cat(list(column)) for column in zip(*rows, strict=True)]
    return png(strip(columns, smallest=96))


def _places(ts: list[int], count: int) -> list[int]:
    """Which of the steps of a trail to show: evenly from the first to the last."""
    return moments_of(len(ts), count)


def cast(heads: list[str], rows: Sequence[tuple[str, Sequence[Tensor]]], alt: str) -> str:
    """Rows of pictures under one row of headings."""
    columns = f"grid-template-columns: 5.2rem repeat({len(heads)}, minmax(0, 1fr))"
    titles = "".join(f"<figcaption>{head}</figcaption>" for head in ["", *heads])
    body = "".join(
        f'<div class="name">{name}</div>' + "".join(img(one, f"{alt}: {html.escape(_plain(name))}") for one in pictures)
        for name, pictures in rows
    )
    return f'<div style="{columns}">{titles}{body}</div>'


def _plain(name: str) -> str:
    return name.replace("<b>", "").replace("</b>", "")


def _about(process: Process, network: Network, run: Run) -> dict[str, str]:
    data = run.config.data
    pictures = f"{sum(data.counts):,} pictures" if data.counts else "pictures"
    remark = (
        "" if network.label is None else f" (it is told the class <em>{html.escape(data.classes[network.label])}</em>)"
    )
    return {
        "run": html.escape(run.path.resolve().name),
        "trained_on": f"{pictures} of {data.size} × {data.size} pixels",
        "class_remark": remark,
        "of_class": " of that class" if remark else "",
        "size": str(data.size),
        "steps": str(process.steps),
        "prior_bits": number(process.prior_bits()),
    }


def _beliefs(process: Process, ten: list[int], beliefs: list[Images], back: list[Images]) -> dict[str, str]:
    heads = [f"t = {t}" for t in ten[1:]]
    moments = [process.at(t) for t in ten[1:]]
    kept = [_closeness(process.x0, one) for one in back]
    lost = next((t for t, close in zip(ten[1:], kept, strict=True) if close < 0.5), None)
    unlike = "it is unlike the pictures this network has seen, and it turns what it sees into what it knows"
    if lost is None:
        remark = (
            "Even the last of them is more than half your photo, counted in variance: this network draws such pictures."
        )
    elif lost == ten[1]:
        remark = f"Even from step {lost} less than half of your photo, counted in variance, comes back: {unlike}."
    else:
        kept_to = ten[ten.index(lost) - 1]
        remark = (
            f"Up to step {kept_to} more than half of your photo, counted in variance, comes back; from step {lost} "
        )
        remark += "on it is less, and in the end it is another picture."
    return {
        "beliefs": cast(heads, [("photo <b>x<sub>t</sub></b>", moments), ("its guess", beliefs)], "At ten moments"),
        "ways_back": cast(heads, [("from <b>x<sub>t</sub></b>", moments), ("arrives at", back)], "Ways back"),
        "ways_remark": remark,
    }


def _closeness(x0: Images, other: Images) -> float:
    """The share of the photo's variance that `other` accounts for."""
    return 1 - ((other - x0).square().sum() / (x0 - x0.mean()).square().sum().clamp_min(1e-9)).item()


def _way_back(process: Process, ddim: Trail, ddpm: Trail, evaluations: int) -> dict[str, str]:
    frames = max(9, min(45, BUDGET // (4 * process.x0.numel())))
    places = _places(ddim.ts, frames)
    tracks = {"ddim_x": ddim.xs, "ddim_belief": ddim.beliefs, "ddpm_x": ddpm.xs, "ddpm_belief": ddpm.beliefs}
    pictures = [{name: data_uri(track[place]) for name, track in tracks.items()} for place in places]
    data = [
        {
            "t": ddim.ts[place],
            "images": some,
            "texts": {"t": f"{ddim.ts[place]} of {process.steps}"},
            "shares": {},
            "paths": {},
            "place": 0,
            "label": f"On the way back, step {ddim.ts[place]} of {process.steps}",
        }
        for place, some in zip(places, pictures, strict=True)
    ]
    few = _places(ddim.ts, TEN)
    names = ("DDIM <b>x<sub>t</sub></b>", "its guess", "DDPM <b>x<sub>t</sub></b>", "its guess")
    rows = [(name, [track[place] for place in few]) for name, track in zip(names, tracks.values(), strict=True)]
    return {
        "evaluations": str(evaluations),
        "back_frames": script_data(data),
        "back_last": str(len(data) - 1),
        "back_start": pictures[0]["ddim_x"],
        "back_start_belief": pictures[0]["ddim_belief"],
        "rows": cast([f"t = {ddim.ts[place]}" for place in few], rows, "The way back"),
    }


def _steps(process: Process, steps: list[StepBack], ten: list[int]) -> dict[str, str]:
    rows = [
        [str(one.t), *map(number, (one.mean_gap, one.true_std, one.wide_std, one.kl_true, one.kl_wide))]
        for one in steps
        if one.t in (2, *ten[1:])
    ]
    head = ["step", "means apart", "true spread", "wide spread", "KL, true", "KL, wide"]
    total = total_bits(steps) + process.prior_bits()
    later = [one for one in steps if one.t > 1]
    ratios = [one.mean_gap / one.true_std for one in later]
    near = [ratio for ratio in ratios if ratio < 1]
    where = "At every step" if len(near) == len(ratios) else f"At {len(near)} of the {len(ratios)} steps compared,"
    remark = f"{where} the two means lie closer together than the step is wide."
    return {
        "steps_table": table(head, rows, "True and learned steps"),
        "gap_remark": remark,
        "total_bits": number(total),
        "bits_remark": "8 would be no compression at all"
        if total < 8
        else "more than the 8 in which it is stored: to this network it is a surprise",
    }


def _parts(ddim: Trail, found: dict[str, Appearance]) -> dict[str, str]:
    order = sorted(found, key=lambda name: found[name].half)
    when = [f"the {name} at step {ddim.ts[found[name].half]}" for name in order]
    first = bool(order) and order[0] == "outline"
    words = f"On the way back, half of each is there for good from here on: {_listed(when)}." if when else ""
    if not found:
        words = "The pictures that came out are of one colour, so there are no parts to tell apart."
    elif ddim.result.shape[-1] < COARSE:
        words += f" In {ddim.result.shape[-1]} × {ddim.result.shape[-1]} pixels the two are hardly different things."
    elif not first:
        words += " With most pictures the outline comes first; this network may not have learned its own well yet."
    pictures = [(place, shown(split(ddim.beliefs[place]))) for place in _places(ddim.ts, TEN)]
    colours = len(pictures[0][1]) > 2
    rows = [
        (name, [some[name] for _, some in pictures])
        for name in ("outline", "colour", "texture")
        if name in pictures[0][1]
    ]
    return {
        "companions": str(COMPANIONS),
        "colour_words": '; the <strong class="noise">colour</strong> is how far each pixel is from grey'
        if colours
        else "",
        "parts_title": "First the outline, then the rest" if first else "What appears when",
        "parts_found": words,
        "parts_rows": cast([f"t = {ddim.ts[place]}" for place, _ in pictures], rows, "Part of the guess"),
    }


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _errors(steps: list[StepBack], held_out: dict[float, float]) -> dict[str, str]:
    words = (
        ', and <span class="noise">on pictures held out of training</span>, as the run measured it last'
        if held_out
        else "; the run has not measured its held-out pictures yet"
    )
    shared = [level for level in held_out if steps[-1].log_snr <= level <= steps[0].log_snr]
    ratio = [min(steps, key=lambda one: abs(one.log_snr - level)).belief_error / held_out[level] for level in shared]
    typical = math.exp(sum(map(math.log, ratio)) / len(ratio)) if ratio and min(ratio) > 0 else None
    remark = (
        "Noise is easy to take away where there is little of it, on the right; where there is only noise, on the left, "
    )
    remark += "the error is that of guessing the average."
    if typical is not None:
        harder = f"{number(typical, 2)} times as hard" if typical > 1.5 else "about as hard"
        compared = f"{number(1 / typical, 2)} times as easy" if typical < 1 / 1.5 else harder
        remark += f" Your photo is {compared} for this network as the held-out pictures are."
    return {"held_out_words": words, "error_remark": remark}
