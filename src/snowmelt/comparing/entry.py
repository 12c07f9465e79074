"""One run of a comparison, measured: what compare.json holds of it."""

from __future__ import annotations

import dataclasses
import json
from statistics import median
from typing import Any

from snowmelt import checkpoint
from snowmelt.comparing.budget import OVER_TIME
from snowmelt.errors import UserError
from snowmelt.evaluating.bits import measure_bits
from snowmelt.evaluating.draw import draw
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluating.quality import FOLDER, in_spaces, measure_quality, order_of
from snowmelt.evaluation.features import Space
from snowmelt.files import write_atomic
from snowmelt.run import Run
from snowmelt.terminal import Log

OVER_TIME_METRICS = ("frechet", "kid")
BITS = {"pictures": 64, "terms": 50, "ode_steps": 0}
"""Of a diffusion model: enough for a standard error of a hundredth, in less than a minute."""


def entry_of(run: Run, options: EvaluateOptions, spaces: list[Space], log: Log) -> dict[str, Any]:
    """Measure `run` and return its part of a compare.json."""
    options = dataclasses.replace(options, run=run.path, spaces=tuple(space.name for space in spaces))
    quality = known_quality(run, options) or measure_quality(run, options, spaces, log)
    lines, status, config = run.metrics(), run.status(), run.config
    speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    words = ["snowmelt", "train", "--resume", str(run.path)]
    return {
        "name": run.path.name,
        "model": config.model,
        "path": str(run.path),
        "command": " ".join(words),
        "parameters": status.get("parameters"),
        "seconds": status.get("seconds"),
        "steps": status.get("step"),
        "images": status.get("images"),
        "images_per_second": median(speeds) if speeds else None,
        "memory": max((line["memory"] for line in lines if "memory" in line), default=None),
        "seconds_per_picture": quality["seconds"]["per_picture"],
        "drawing": quality["drawing"],
        "bits_per_dim": bits_of(run, options),
        "quality": quality,
        "over_time": over_time(run, options, spaces),
    }


def known_quality(run: Run, options: EvaluateOptions) -> dict[str, Any] | None:
    """What was measured before of the same weights with the same options."""
    newest = run.state_of(options.state)
    try:
        known = json.loads((run.path / "evaluations" / FOLDER / "figures.json").read_text(encoding="utf-8"))
        same = (
            known["weights"] == checkpoint.read_state(newest)["sha256"]["average"]
            and known["seed"] == options.seed
            and known["samples"] == options.samples
            and known["drawing"] == order_of(run, options).drawing.as_dict()
            and {*options.spaces} <= {*known["spaces"]}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if same else None


def bits_of(run: Run, options: EvaluateOptions) -> dict[str, Any] | None:
    """Bits/dim of held-out pictures by the bound; None where the family has no likelihood."""
    try:
        found = measure_bits(run, dataclasses.replace(options, **BITS))
    except UserError:
        return None
    write_atomic(run.folder("evaluations") / "bits.json", json.dumps(found, indent=1))
    return {**found["bits_per_dim"]["bound"], "what": "variational bound"}


def over_time(run: Run, options: EvaluateOptions, spaces: list[Space]) -> list[dict[str, Any]]:
    """Quality at the states that were kept on the way, and at the end, at equal counts of pictures."""
    data, points = run.open_pictures(), list[dict[str, Any]]()
    count = min(OVER_TIME, options.samples)
    final = checkpoint.read_state(run.state_of("newest"))
    states = [*map(str, checkpoint.steps_saved(run.snapshots)), "newest"]
    for state in states:
        at = dataclasses.replace(options, state=state, samples=count)
        drawn = draw(order_of(run, at), at.processes)
        figures = in_spaces(spaces, data, drawn, seed=at.seed, names=OVER_TIME_METRICS)
        counters = checkpoint.read_state(run.state_of(state))
        points.append(
            {
                "share": counters["step"] / max(1, final["step"]),
                "seconds": counters["elapsed"],
                "images": counters["images"],
                "figures": [dataclasses.asdict(figure) for figure in figures],
            }
        )
    return points
