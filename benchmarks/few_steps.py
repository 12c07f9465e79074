"""How near to real pictures does a run draw, by sampler and number of steps?

    python benchmarks/few_steps.py runs/mine --ways heun:50 unipc:15 dpmpp_2m:8 tuned:8 unipc:8@1.5

A way is SAMPLER:STEPS, with @GUIDANCE where there is some; `tuned` stands for what `snowmelt tune` has found for so
many steps. Every way draws the same pictures (by seed and number, each of the same class) and is measured as `snowmelt
evaluate` measures. The ratio is to the first way, by the Frechet distance in the first
space; evaluations are those of the network for one picture, counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from snowmelt.errors import UserError
from snowmelt.evaluating.draw import Order, draw
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluating.quality import in_spaces, order_of, spaces_of
from snowmelt.evaluation.drawing import make_ready
from snowmelt.evaluation.metrics import Figure
from snowmelt.models import check_drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.run import Run
from snowmelt.seeds import noise_source
from snowmelt.terminal import Log, console

NAMES = ("frechet", "kid")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    run: tyro.conf.Positional[Path]
    """A run of a diffusion model."""
    ways: tuple[str, ...] = ("heun:50", "unipc:15", "unipc:10", "unipc:8", "unipc:6", "unipc:5")
    samples: int = 1000
    """Pictures of each way."""
    spaces: tuple[str, ...] = ("trained", "random")
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the network computes in; auto is as `snowmelt sample` draws."""
    write: Path | None = None
    """A JSON file for all figures."""


def order_for(run: Run, options: Options, way: str) -> Order:
    """What is drawn.

    Raises:
        UserError: `way` is no way, or names levels that `tune` has not found.
    """
    name, _, rest = way.partition(":")
    steps, _, guidance = rest.partition("@")
    if not steps.isdecimal():
        raise UserError(f"{way} is no way; give SAMPLER:STEPS or SAMPLER:STEPS@GUIDANCE.")
    asked = EvaluateOptions(
        options.run,
        samples=options.samples,
        spaces=options.spaces,
        sampler=None if name == "tuned" else name,
        steps=int(steps),
        guidance=float(guidance or 1),
        seed=options.seed,
        precision=options.precision,
    )
    order = order_of(run, asked)
    if name == "tuned" and not order.drawing.levels:
        raise UserError(f"{run.path} has no tuned levels for {steps} steps; run snowmelt tune first.")
    check_drawing(order.drawing, classes=bool(run.config.data.classes))
    return order


def evaluations(model: DiffusionModel, order: Order) -> int:
    """Of the network, for one picture."""
    asked = 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    data = model.config.data
    hook = model.denoiser.backbone.register_forward_hook(count)
    labels = torch.zeros(1, dtype=torch.long) if data.classes else None
    noise = noise_source([0], [0], (data.channels, data.size, data.size))
    try:
        for _ in model.sample(noise, labels, order.drawing):
            pass
    finally:
        hook.remove()
    return asked


def shown(figure: Figure) -> str:
    """A value with its interval."""
    if figure.value is None or figure.low is None or figure.high is None:
        return figure.reason or "-"
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"


def main(options: Options) -> None:
    """Draw each way, measure it and print the table."""
    run, log = Run.open(options.run), Log(console(), options.run / "log.txt")
    data = run.open_pictures()
    spaces = spaces_of(data, EvaluateOptions(options.run, spaces=options.spaces), log)
    precision = run.drawing_precision("cpu", options.precision)
    model, state = run.load_model(precision)
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} holds a {run.config.model} model, which draws in a single step.")
    orders = {way: order_for(run, options, way) for way in options.ways}
    table = Table(
        "way", "evaluations", "s/picture", "to the first",
        *(f"{name} ({space.name})" for space in spaces for name in NAMES),
        title=f"{run.path}: {options.samples:,} pictures, {', '.join({one.precision for one in orders.values()})}",
    )  # fmt: skip
    found: dict[str, dict[str, object]] = {}
    first = 0.0
    for way, order in orders.items():
        make_ready(run, state, model, order.drawing)
        drawn = draw(order, 0)
        figures: Sequence[Figure] = in_spaces(spaces, data, drawn.pixels, seed=options.seed, names=NAMES)
        distance = figures[0].value or float("nan")
        first = first or distance
        row = {
            "evaluations": evaluations(model, order),
            "precision": order.precision,
            "seconds": drawn.seconds / len(drawn.pixels),
            "figures": [dataclasses.asdict(figure) for figure in figures],
        }
        found[way] = row
        cells = (shown(figure) for figure in figures)
        table.add_row(way, f"{row['evaluations']}", f"{row['seconds']:.4f}", f"{distance / first:.2f}", *cells)
        log(f"{way}: {distance:.4g} in {drawn.seconds:.0f} s")
    Console(width=160).print(table)
    if options.write is not None:
        options.write.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
