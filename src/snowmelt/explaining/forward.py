"""The story of the photo: the values of forward.html, and forward.png, histogram.png, curves.png."""

from __future__ import annotations

import html
import math
from typing import Any

import torch
from torch import Tensor

from snowmelt.diffusion.process import Moment, posterior
from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.explaining import charts
from snowmelt.explaining.markup import data_uri, figure, img
from snowmelt.explaining.page import Part, Subject
from snowmelt.explaining.process import (
    REACH,
    Forward,
    Measured,
    Process,
    bell,
    betas_of,
    histogram,
    walk_back,
    walked,
)
from snowmelt.pages.charts import Chart, png_of, svg
from snowmelt.pages.markup import number, png, table
from snowmelt.pages.shell import script_data
from snowmelt.pictures import moments_of, sheet
from snowmelt.shapes import Images

TEN = 10
"""Moments shown side by side."""
BUDGET = 2_400_000
"""Bytes of pixels behind the slider, about; a large photo has fewer moments."""


def forward_part(process: Process, subject: Subject) -> Part:
    """Everything of the page that needs no network."""
    ten = moments_of(process.steps + 1, TEN)
    shown = sorted({*ten, *moments_of(process.steps + 1, _frames(process))})
    one = ten[2]
    forward = walked(process, sorted({*ten[1:], one}), subject.seed)
    back = _walked_back(process, subject.seed, ten)
    curves = charts.schedule_charts(process, subject.schedule)
    ridges = charts.ridges(process, ten)
    values = {
        **_introduction(process, subject, ten),
        **_one_step(process, forward, one),
        **_slider(process, shown, ten),
        **_agreement(process, forward, ten),
        **_schedules(process, subject, curves),
        "ridges": svg(ridges, "ridges", "Histograms of ten moments, flowing into the bell curve"),
        **_end(process),
        **_posterior(process, back, ten),
    }
    files = {
        "forward.png": png(sheet(torch.cat([process.at(t) for t in ten]), 5, smallest=128)),
        "histogram.png": png_of([ridges], 1),
        "curves.png": png_of(curves, 3),
    }
    return Part(values, files)


def _walked_back(process: Process, seed: int, ten: list[int]) -> dict[int, Images]:
    found: dict[int, Images] = {}
    for stride in walk_back(process, seed):
        if stride.t + 1 == process.steps:
            found[process.steps] = stride.before
        if stride.t in ten:
            found[stride.t] = stride.x
    return found


def _frames(process: Process) -> int:
    """Moments of the slider: four between any two of the ten where the budget allows it."""
    each = process.x0.numel()
    return next((9 * more + 1 for more in (5, 4, 3) if (9 * more + 1) * each <= BUDGET), 19)


def _introduction(process: Process, subject: Subject, ten: list[int]) -> dict[str, str]:
    _, channels, size, _ = process.x0.shape
    facts = [
        html.escape(", ".join([subject.photo, f"{size} × {size} pixels", *subject.changes])),
        f"schedule {html.escape(subject.schedule)}",
        f"T = {process.steps} steps",
        f"seed {subject.seed}",
    ]
    hero = [(0, "x_0", "the photo"), (ten[3], f"x_{{{ten[3]}}}", "on its way"), (ten[-1], "x_T", "snow")]
    bars = [process.alpha_bar(t) for t in ten]
    gone = next((t for t, bar in zip(ten, bars, strict=True) if bar < 0.05), ten[-1])
    remark = (
        f"At step {gone} less than a twentieth is left, and to the eye the rest of the way is snow. It is not wasted: "
        "on the way back, these are the steps in which it is decided what the picture will be."
        if gone != ten[-1]
        else "With this schedule something of the photo is left until almost the end."
    )
    return {
        "photo": html.escape(subject.photo),
        "size": str(size),
        "steps": str(process.steps),
        "count": f"{process.x0.numel():,}",
        "values_each": "one number (how bright)" if channels == 1 else "three numbers (red, green and blue)",
        "facts": " · ".join(facts),
        "hero": "".join(figure(img(process.at(t), words), f"\\( {symbol} \\) {words}") for t, symbol, words in hero),
        "photo_and_noise": figure(img(process.x0, "The photo"), "the photo \\( x_0 \\)")
        + figure(img(process.noise, "Pure noise"), "noise \\( \\epsilon \\)"),
        "ten": "".join(
            figure(img(process.at(t), f"The photo at step {t}", name=f"moment-{t}"), _caption(t, bar))
            for t, bar in zip(ten, bars, strict=True)
        ),
        "ten_remark": remark,
        "middle_t": str(ten[4]),
    }


def _caption(t: int, bar: float) -> str:
    return f"<b>t = {t}</b>, \\( \\bar\\alpha_t \\) = {number(bar)}"


def _one_step(process: Process, forward: Forward, t: int) -> dict[str, str]:
    stride, beta = forward.strides[t], process.beta(t)
    faded, added = math.sqrt(1 - beta), math.sqrt(beta)
    terms = [
        (
            faded * stride.before,
            f"\\( \\signal{{\\sqrt{{1 - \\beta_t}}\\, x_{{{t - 1}}}}} \\), times {number(faded, 4)}",
        ),
        (added * stride.noise, f"\\( \\noise{{\\sqrt{{\\beta_t}}\\, \\epsilon_t}} \\), times {number(added)}"),
        (stride.x, f"\\( x_{{{t}}} \\)"),
    ]
    pictures = [figure(img(picture, f"A term of step {t}"), words) for picture, words in terms]
    return {
        "one_t": str(t),
        "one_beta": number(beta),
        "one_step": f"{pictures[0]}<span>+</span>{pictures[1]}<span>=</span>{pictures[2]}",
    }


# the slider


def _slider(process: Process, shown: list[int], ten: list[int]) -> dict[str, str]:
    """The frames; a moment that stands on the page already is pointed to."""
    histograms = [histogram(process, t) for t in shown]
    later = [one.counted.max().item() for t, one in zip(shown, histograms, strict=True) if t >= ten[1]]
    top = min(1.8, max(0.6, *later))
    frames = [
        _frame(process, t, f"#moment-{t}" if t in ten else data_uri(process.at(t)))
        | {"paths": {"counted": _bars(one.counted, top), "expected": _line(one.places, one.expected, top)}}
        for t, one in zip(shown, histograms, strict=True)
    ]
    chart = charts.mixture(process)
    return {
        "frames": script_data(frames),
        "last_frame": str(len(frames) - 1),
        "start_image": data_uri(process.x0),
        "start_bars": _bars(histograms[0].counted, top),
        "bell": _line(histograms[0].places, bell(histograms[0].places), top),
        "mixture": svg(chart, "mixture", "The weights of signal and noise over the steps"),
    }


def _frame(process: Process, t: int, address: str) -> dict[str, Any]:
    bar = process.alpha_bar(t)
    signal, noise = math.sqrt(bar), math.sqrt(1 - bar)
    return {
        "t": t,
        "images": {"x": address},
        "texts": {
            "t": f"{t} of {process.steps}",
            "signal": number(signal),
            "noise": number(noise),
            "beta": number(process.beta(t)) if t else "–",
            "alpha_bar": number(bar),
            "log_snr": number(process.log_snr(t)) if t else "∞",
        },
        "shares": {"signal": signal, "noise": noise},
        "place": t / process.steps,
        "label": f"Step {t} of {process.steps}: {number(100 * bar)} percent of the photo's variance is left",
    }


_BASE, _TALL, _UNIT = 88, 84, 40


def _x(value: float) -> str:
    return f"{_UNIT * (value + REACH):.1f}".removesuffix(".0")


def _y(density: float, top: float) -> str:
    return f"{_BASE - _TALL * min(1.0, density / top):.1f}".removesuffix(".0")


def _bars(counted: Tensor, top: float) -> str:
    """Steps, filled down to the base line; bars higher than `top` are cut off."""
    width = 2 * REACH / len(counted)
    heights = [_y(density, top) for density in counted.tolist()]
    steps = "".join(f"V{height}H{_x(-REACH + (index + 1) * width)}" for index, height in enumerate(heights))
    return f"M0 {_BASE}{steps}V{_BASE}Z"


def _line(places: Tensor, densities: Tensor, top: float) -> str:
    """Nothing where the density is nothing everywhere."""
    if not densities.any():
        return ""
    points = [f"{_x(x)} {_y(y, top)}" for x, y in zip(places.tolist(), densities.tolist(), strict=True)]
    return "M" + "L".join(points)


# the checks


def _agreement(process: Process, forward: Forward, ten: list[int]) -> dict[str, str]:
    t = ten[2]
    rows = [
        [str(one.t), *map(_pair, (one.equation, one.walked, one.jumped))]
        for one in forward.agreement
        if one.t in (ten[1], ten[2], ten[4], ten[6], ten[-1])
    ]
    error = 1 / math.sqrt(forward.copies * process.x0.double().square().sum().item())
    copies = f" (of {forward.copies:,} walks, since one has only {process.x0.numel():,})" if forward.copies > 1 else ""
    return {
        "walk_and_jump": figure(
            img(forward.strides[t].x, f"Walked to step {t}"), f"walked: {t} steps, {t} draws of noise"
        )
        + figure(img(process.at(t), f"Jumped to step {t}"), "jumped: one draw of noise"),
        "agreement": table(["step", "the equation", "walked", "jumped"], rows, "Walk and jump"),
        "agreement_values": f"{forward.values:,}",
        "agreement_copies": copies,
        "agreement_error": number(error, 1),
    }


def _pair(one: Measured) -> str:
    return f'<span class="signal">{number(one.signal)}</span> <span class="noise">{number(one.noise)}</span>'


def _schedules(process: Process, subject: Subject, curves: list[Chart]) -> dict[str, str]:
    def entry(name: str) -> str:
        return f'<li><i style="background:var(--{charts.series(name)})"></i>{name}</li>'

    chosen = f'<li><i style="background:var(--ink);height:5px"></i><b>{html.escape(subject.schedule)}</b></li>'
    others = [name for name in SCHEDULES if name != subject.schedule]
    captions = [
        "\\( \\alpha_t = 1 - \\beta_t \\): what one step keeps (cut off at 0.95)",
        "\\( \\beta_t \\): the noise of one step",
        "\\( \\bar\\alpha_t \\): what is left of the photo's variance",
        "\\( \\signal{\\sqrt{\\bar\\alpha_t}} \\): the weight of the photo",
        "\\( \\noise{\\sqrt{1 - \\bar\\alpha_t}} \\): the weight of the noise",
        "log-SNR: both in one number",
    ]
    panels = [
        figure(svg(chart, f"curves{index}", chart.title.replace("$", "").replace("\\", "")), words)
        for index, (chart, words) in enumerate(zip(curves, captions, strict=True))
    ]
    other = "cosine" if subject.schedule != "cosine" else "linear"
    half = halfway(1 - process.betas)
    remark = (
        f"With {html.escape(subject.schedule)}, half of the photo's variance is gone after {half} steps; with {other}, "
        f"after {halfway(1 - betas_of(SCHEDULES[other], process.steps))}."
    )
    return {
        "schedule": html.escape(subject.schedule),
        "legend": chosen + "".join(map(entry, others)),
        "schedule_charts": "".join(panels).replace("<figure>", '<figure class="chart">'),
        "schedule_remark": remark,
    }


def halfway(alphas: Tensor) -> int:
    """The first step after which at most half of the variance is left; the last where that never happens."""
    below = (alphas.cumprod(0) <= 0.5).nonzero()
    return int(below[0]) + 1 if len(below) else len(alphas)


def _end(process: Process) -> dict[str, str]:
    bits = process.prior_bits()
    total = bits * process.x0.numel()
    remark = (
        "That is practically nothing. So the end of the road is the same for every photo in the world, and we know how "
        "to draw from it without any photo: that is where new pictures will start."
        if bits < 1e-3
        else "That is not nothing: this schedule stops while a trace of the photo is left. New pictures start from "
        "pure noise all the same, and the trace is what they start without."
    )
    return {"prior_bits": number(bits), "prior_whole": number(total), "prior_remark": remark}


def _posterior(process: Process, back: dict[int, Images], ten: list[int]) -> dict[str, str]:
    t = ten[4]
    photo, present, spread = posterior_weights(process.moment(t))
    difference = (back[0] - process.x0).abs().max().item()
    return {
        "posterior_t": str(t),
        "posterior_photo": number(photo),
        "posterior_x": number(present, 4),
        "posterior_std": number(spread),
        "walk_back": "".join(
            figure(img(back[t], f"Walking back, at step {t}"), f"<b>t = {t}</b>") for t in reversed(ten)
        ),
        "walk_back_remark": "It arrives at your photo; the largest difference of a number is "
        f"{number(difference) if difference > 1e-6 else '0'}.",
    }


def posterior_weights(at: Moment) -> tuple[float, float, float]:
    """Of the photo and of x_t in the mean of the true posterior, and its spread."""
    one, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    table = {"beta": at.beta, "alpha_bar": at.alpha_bar, "alpha_bar_previous": at.alpha_bar_previous}
    photo, variance = posterior(one, none, **table)
    present, _ = posterior(none, one, **table)
    return photo.item(), present.item(), variance.sqrt().item()
