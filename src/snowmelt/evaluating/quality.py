"""From a run to figures.json: pictures are drawn, measured beside real ones, and looked through for copies.

evaluations/quality/   figures.json   samples.png   pairs/00-sample.png   pairs/00-training.png   ...
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snowmelt import __version__
from snowmelt.checkpoint import read_state
from snowmelt.data.prepared import Prepared
from snowmelt.data.publish import publish
from snowmelt.device import make_precision, pick_device
from snowmelt.errors import UserError
from snowmelt.evaluating.draw import Drawn, Order, draw, seconds_per_picture
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluation.classes import recognised
from snowmelt.evaluation.features import Space, open_spaces, real_features
from snowmelt.evaluation.levels import errors_of, some_of
from snowmelt.evaluation.memorization import Gap, Searched, find_copies, gaps
from snowmelt.evaluation.metrics import OF_FEATURES, Figure
from snowmelt.evaluation.statistics import measure, measure_patches
from snowmelt.models.base import Drawing
from snowmelt.pictures import picture, save_png, sheet_of_pixels
from snowmelt.run import Run, is_locked
from snowmelt.terminal import Log, words_of

SAMPLER, STEPS = "unipc", 15
"""How a diffusion model is drawn from to be measured, when nothing else is asked for: docs/metrics.md says why."""
ENOUGH = 500
"""Held-out pictures that are a reference of their own; where there are fewer, all pictures are."""
MOST_REAL = 5000
GAP_PICTURES = 200
"""Held-out and as many training pictures whose errors are compared."""
SHEET = 100
"""Pictures on the sheet, ten in a row."""
FOLDER = "quality"


def drawing_of(options: EvaluateOptions) -> Drawing:
    """How a diffusion model draws for these options."""
    return Drawing(sampler=options.sampler or SAMPLER, steps=options.steps or STEPS, guidance=options.guidance)


def order_of(run: Run, options: EvaluateOptions) -> Order:
    """What is drawn for these options."""
    numbers = tuple(range(options.samples))
    device = str(pick_device(options.device))
    return Order(str(run.path), options.state, drawing_of(options), options.seed, numbers, options.batch, device)


def reference_of(data: Prepared) -> tuple[np.ndarray, str]:
    """The rows that generated pictures are compared with, and what they are in words."""
    if len(data.held_out) >= ENOUGH:
        return some_of(data.held_out, MOST_REAL), "held-out pictures"
    return some_of(np.arange(len(data.images), dtype=np.int64), MOST_REAL), "all pictures"


def spaces_of(data: Prepared, options: EvaluateOptions, log: Log) -> list[Space]:
    """The feature spaces asked for; an encoder that has to be trained is trained now.

    Raises:
        UserError: weights are missing.
    """
    given = {"inception": options.inception, "dinov2": options.dinov2}
    names = dict.fromkeys((*options.spaces, *(name for name, path in given.items() if path is not None)))
    device = pick_device(options.device)
    return open_spaces(data, tuple(names), inception=options.inception, dinov2=options.dinov2, device=device, log=log)


def measure_quality(run: Run, options: EvaluateOptions, spaces: list[Space], log: Log) -> dict[str, Any]:
    """Draw, measure in `spaces`, and write evaluations/quality as a whole; what its figures.json holds.

    Raises:
        UserError: for what cannot be measured, before anything is drawn.
    """
    data = run.open_pictures()
    order = order_of(run, options)
    checkpoint = run.state_of(options.state)
    announce(run, order, options, log)
    drawn = draw(order, options.processes)
    begin = time.monotonic()
    rows, reference = reference_of(data)
    figures = in_spaces(spaces, data, drawn, seed=options.seed)
    if spaces:
        figures += measure_patches(data.images[rows], drawn.pixels, seed=options.seed)
    classes = _classes(data, rows, drawn, spaces, options)
    missing = list[str]()
    copies = None
    if "copies" in options.measure:
        try:
            copies = _copies(run, data, drawn, spaces, options)
        except UserError as reason:
            missing.append(str(reason))
    found = {
        "snowmelt": __version__,
        "run": str(run.path),
        "checkpoint": checkpoint.name,
        "weights": read_state(checkpoint)["sha256"]["average"],
        "samples": len(drawn.pixels),
        "real": len(rows),
        "reference": reference,
        "seed": options.seed,
        "drawing": order.drawing.as_dict(),
        "seconds": {
            "drawing": round(drawn.seconds, 3),
            "per_picture": drawn.seconds / len(drawn.pixels),
            "measuring": round(time.monotonic() - begin, 3),
        },
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "classes": classes,
        "memorization": copies,
        "spaces": {
            space.name: {"about": space.about, "identity": space.identity, "dimension": space.dimension}
            for space in spaces
        },
        "not_measured": missing,
    }
    _write(run.folder("evaluations") / FOLDER, found, drawn, data)
    return found


def check_run(run: Run, options: EvaluateOptions) -> None:
    """Refuse a run that cannot be measured.

    Raises:
        UserError: it is still training, has no such state, or no pictures.
    """
    if run.status().get("state") == "training" and is_locked(run.path):
        raise UserError(f"{run.path} is still training; wait for it, or stop it with Ctrl-C and measure what it has.")
    run.state_of(options.state)
    run.open_pictures()


def announce(run: Run, order: Order, options: EvaluateOptions, log: Log) -> None:
    """Say what is going to be done and about how long it takes."""
    each = seconds_per_picture(order, options.processes)
    log(f"Drawing {len(order.numbers):,} pictures of {run.path} takes about {words_of(each * len(order.numbers))}.")


def in_spaces(
    spaces: list[Space], data: Prepared, drawn: Drawn, *, seed: int, names: tuple[str, ...] = tuple(OF_FEATURES)
) -> list[Figure]:
    """The figures `names` of drawn pictures in every space."""
    rows, _ = reference_of(data)
    return [
        figure
        for space in spaces
        for figure in measure(
            real_features(space, data, rows), space.features(drawn.pixels), space.name, seed=seed, names=names
        )
    ]


def _pixels(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _copies(run: Run, data: Prepared, drawn: Drawn, spaces: list[Space], options: EvaluateOptions) -> dict[str, Any]:
    """What is learned by heart: near-copies among the drawn pictures, and smaller errors on training pictures.

    Raises:
        UserError: there are too few held-out pictures to tell.
    """
    rows, held_out = data.train, some_of(data.held_out, MOST_REAL)
    space = next((space for space in spaces if space.name == "trained"), None)

    def features_of(some: np.ndarray) -> torch.Tensor | None:
        return None if space is None else real_features(space, data, some)

    mine = None if space is None else space.features(drawn.pixels)
    found = find_copies(
        Searched(drawn.pixels, mine),
        Searched(data.images[rows], features_of(rows)),
        Searched(data.images[held_out], features_of(held_out)),
    )
    pairs = [dataclasses.asdict(pair) | {"training": int(rows[pair.training])} for pair in found.pairs]
    about = dataclasses.asdict(found)
    about["copies"] |= {"count": about.pop("count"), "false_alarms": about.pop("false_alarms")}
    return about | {"pairs": pairs, "gap": [dataclasses.asdict(gap) for gap in _gaps(run, data, options)]}


def _classes(
    data: Prepared, rows: np.ndarray, drawn: Drawn, spaces: list[Space], options: EvaluateOptions
) -> dict[str, Any] | None:
    """Which classes the trained encoder recognises, where it is asked at all."""
    if not any(space.name == "trained" for space in spaces):
        return None
    return recognised(data, rows, drawn.pixels, drawn.labels, device=pick_device(options.device))


def _gaps(run: Run, data: Prepared, options: EvaluateOptions) -> list[Gap]:
    """The errors of the averaged weights on training and on held-out pictures."""
    learner = run.load_learner(make_precision(pick_device(options.device), "fp32"), options.state)
    device = learner.model.precision.device
    train, held_out = (
        errors_of(learner, data, some_of(rows, GAP_PICTURES), seed=options.seed, device=device)
        for rows in (data.train, data.held_out)
    )
    return gaps(train, held_out)


def _write(folder: Path, found: dict[str, Any], drawn: Drawn, data: Prepared) -> None:
    """The folder of a measurement, whole or not at all."""
    with publish(folder, _is_ours) as temporary:
        (temporary / "figures.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        save_png(temporary / "samples.png", sheet_of_pixels(_pixels(drawn.pixels[:SHEET]), 10))
        pairs = (found["memorization"] or {}).get("pairs", [])
        if pairs:
            (temporary / "pairs").mkdir()
        for number, pair in enumerate(pairs):
            own, training = drawn.pixels[pair["sample"]], data.images[pair["training"]]
            shown = training[:, ::-1] if pair["flipped"] else training
            save_png(temporary / "pairs" / f"{number:02d}-sample.png", picture(_pixels(own)))
            save_png(temporary / "pairs" / f"{number:02d}-training.png", picture(_pixels(shown)))


def _is_ours(folder: Path) -> bool:
    return (folder / "figures.json").is_file()
