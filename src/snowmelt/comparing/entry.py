"""One run of a comparison, measured: what compare.json holds of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from snowmelt import __version__, checkpoint
from snowmelt.comparing.budget import samples_over_time
from snowmelt.data.prepared import Prepared
from snowmelt.errors import UserError, option_of
from snowmelt.evaluating.bits import NoLikelihood, measure_bits
from snowmelt.evaluating.draw import draw
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluating.quality import in_spaces, measure_quality, order_of, reference_of
from snowmelt.evaluation.features import Space
from snowmelt.evaluation.statistics import seconds_expected
from snowmelt.files import write_atomic
from snowmelt.run import Run
from snowmelt.terminal import Log

OVER_TIME_METRICS = ("frechet", "kid")
BITS = {"pictures": 64, "terms": 50, "ode_steps": 0}
"""Of a diffusion model: enough for a standard error of a hundredth, in less than a minute."""


def entry_of(run: Run, options: EvaluateOptions, spaces: list[Space], log: Log, kept: Path) -> dict[str, Any]:
    """Measure `run` and return its part of a compare.json; what was measured before in the same way is in `kept`, and
    beside it, in a folder of that name, figures, sheet and pairs: the run keeps its own evaluation."""
    options = dataclasses.replace(options, run=run.path, spaces=tuple(space.name for space in spaces))
    key = _key(run, options, spaces)
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["key"] == key and (sheets_of(kept) / "samples.png").is_file():
            return known["entry"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    kept.parent.mkdir(exist_ok=True)
    entry = _measured(run, options, spaces, log, sheets_of(kept))
    write_atomic(kept, json.dumps({"key": key, "entry": entry}))
    return entry


def sheets_of(kept: Path) -> Path:
    """The folder of what was drawn and measured for the entry in `kept`."""
    return kept.with_suffix("")


def folder_names(paths: list[Path]) -> list[str]:
    """Names of folders that are not the same: their own or, where two are alike, with the folders above.

    >>> folder_names([Path("/a/vae"), Path("/a/gan")]), folder_names([Path("/a/vae"), Path("/b/vae")])
    (['vae', 'gan'], ['a/vae', 'b/vae'])
    """
    names = list[str]()
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _key(run: Run, options: EvaluateOptions, spaces: list[Space]) -> dict[str, Any]:
    """All that an entry depends on, as JSON has it."""
    order = order_of(run, options)
    return {
        "samples": options.samples,
        "seed": options.seed,
        "drawing": order.drawing.as_dict(),
        # How long a picture takes depends on these.
        "device": order.device,
        "precision": order.precision,
        "processes": options.processes,
        "version": __version__,
        "weights": checkpoint.digest_of(run.state_of("newest")),
        "spaces": {space.name: space.identity for space in spaces},
    }


def _measured(run: Run, options: EvaluateOptions, spaces: list[Space], log: Log, folder: Path) -> dict[str, Any]:
    missing: list[str] = []
    quality = measure_quality(run, options, spaces, log, folder)
    lines, status = run.metrics(), run.status()
    return {
        "model": run.config.model,
        "path": str(run.path.resolve()),
        "command": _command(run),
        "parameters": status.get("parameters"),
        "seconds": status.get("seconds"),
        "steps": status.get("step"),
        "images": status.get("images"),
        "images_per_second": run.speed(),
        "memory": max((line["memory"] for line in lines if "memory" in line), default=None),
        "seconds_per_picture": quality["seconds"]["per_picture"],
        "drawing": quality["drawing"],
        "bits_per_dim": bits_of(run, options, missing),
        "quality": quality,
        "over_time": over_time(run, options, spaces),
        "not_measured": missing,
    }


def _command(run: Run) -> str:
    """The line that trains such a run again, or that imported it; settings of a --config are in its config.toml."""
    request = run.config.request
    source = str(request.get("source", "PICTURES"))
    if "folder" in request:
        return shlex.join(["snowmelt", "import", str(request["folder"]), "--pictures", source])
    words = ["snowmelt", "train", source, *(["--config", "SETTINGS.toml"] if "config" in request else [])]
    for name, value in request.items():
        if name not in ("source", "config") and value is not False and value != "auto":
            words += [option_of(name)] if value is True else [option_of(name), str(value)]
    return shlex.join(words)


def bits_of(run: Run, options: EvaluateOptions, missing: list[str]) -> dict[str, Any] | None:
    """Bits/dim of held-out pictures by the bound; None where the family has no likelihood, or with a reason."""
    try:
        found = measure_bits(run, dataclasses.replace(options, **BITS))
    except NoLikelihood:
        return None
    except UserError as reason:
        missing.append(f"Bits/dim of {run.path.name}: {reason}")
        return None
    return {**found["bits_per_dim"]["bound"], "what": "variational bound"}


def seconds_over_time(data: Prepared, spaces: list[Space], samples: int) -> float:
    """About how long it takes to compare so many pictures of a state with real ones."""
    return sum(
        seconds_expected(len(reference_of(data, space)[0]), samples, space.dimension, OVER_TIME_METRICS)
        for space in spaces
    )


def over_time(run: Run, options: EvaluateOptions, spaces: list[Space]) -> list[dict[str, Any]]:
    """Quality at the states that were kept on the way, and at the end, at equal counts of pictures."""
    data, points = run.open_pictures(), list[dict[str, Any]]()
    count = samples_over_time(options.samples)
    final = checkpoint.read_state(run.state_of("newest"))
    states = [*map(str, checkpoint.steps_saved(run.snapshots)), "newest"]
    # All states are drawn from alike; by themselves earlier ones would not use levels that were tuned for the last.
    drawing = order_of(run, options).drawing
    for state in states:
        at = dataclasses.replace(options, state=state, samples=count)
        drawn = draw(dataclasses.replace(order_of(run, at), drawing=drawing), at.processes)
        figures = in_spaces(spaces, data, drawn.pixels, seed=at.seed, names=OVER_TIME_METRICS)
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
