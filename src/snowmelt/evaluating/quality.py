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
from snowmelt.checkpoint import digest_of
from snowmelt.data.prepared import Prepared, spread_rows
from snowmelt.data.publish import publish
from snowmelt.device import make_precision, pick_device
from snowmelt.errors import UserError
from snowmelt.evaluating.draw import Drawn, Order, draw, seconds_per_picture
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluation.classes import recognised
from snowmelt.evaluation.drawing import in_a_single_step, usual
from snowmelt.evaluation.features import Space, expected_seconds, open_spaces, real_features
from snowmelt.evaluation.held_out import errors_of
from snowmelt.evaluation.memorization import Gap, Searched, find_copies, gaps
from snowmelt.evaluation.metrics import METRICS, OF_FEATURES, Figure
from snowmelt.evaluation.nearest import Rows
from snowmelt.evaluation.statistics import measure, measure_patches, seconds_expected, seconds_expected_patches
from snowmelt.models import MODELS, check_drawing
from snowmelt.models.base import Drawing
from snowmelt.pictures import picture, save_png, sheet_of_pixels
from snowmelt.presets import drawn_at_once
from snowmelt.run import Run
from snowmelt.terminal import Log, words_of

ENOUGH = 500
"""Held-out pictures that are a reference of their own; where there are fewer, all pictures are."""
MOST_REAL = 10_000
GAP_PICTURES = 200
"""Held-out and as many training pictures whose errors are compared."""
SHEET = 100
"""Pictures on the sheet, ten in a row."""
FOLDER = "quality"
NO_GAP = "Errors on training and held-out pictures: of this state only the weights that draw were kept."


def drawing_of(options: EvaluateOptions) -> Drawing:
    """How a diffusion model draws for these options."""
    given = {name: getattr(options, name) for name in ("sampler", "steps", "guidance")}
    return Drawing(**{name: value for name, value in given.items() if value is not None})


def order_of(run: Run, options: EvaluateOptions) -> Order:
    """What is drawn for these options."""
    numbers = tuple(range(options.samples))
    precision = run.drawing_precision(options.device, options.precision)
    drawing = usual(run, run.state_of(options.state), drawing_of(options), sampler=options.sampler)
    device = str(precision.device)
    return Order(str(run.path), options.state, drawing, options.seed, numbers, options.batch, device, precision.name)


def reference_of(data: Prepared, space: Space | None = None) -> tuple[np.ndarray, str]:
    """The rows that generated pictures are compared with, and what they are in words.

    Held-out pictures, where there are `ENOUGH` of them and enough for a Frechet distance in `space`; else all.
    """
    least = 0 if space is None else 2 * METRICS["frechet"].needed(space.dimension)
    if len(data.held_out) >= max(ENOUGH, least):
        return spread_rows(data.held_out, MOST_REAL), "held-out pictures"
    return spread_rows(np.arange(len(data.images), dtype=np.int64), MOST_REAL), "all pictures"


def spaces_of(data: Prepared, options: EvaluateOptions, log: Log) -> list[Space]:
    """The feature spaces asked for; an encoder that has to be trained is trained now.

    Raises:
        UserError: weights are missing.
    """
    given = {"inception": options.inception, "dinov2": options.dinov2}
    names = dict.fromkeys((*options.spaces, *(name for name, path in given.items() if path is not None)))
    device = pick_device(options.device)
    return open_spaces(data, tuple(names), inception=options.inception, dinov2=options.dinov2, device=device, log=log)


def measure_quality(
    run: Run, options: EvaluateOptions, spaces: list[Space], log: Log, folder: Path | None = None
) -> dict[str, Any]:
    """Draw, measure in `spaces`, and write a folder as a whole, evaluations/quality where no other is named; what its
    figures.json holds. Of the same pictures it keeps what is not measured now.

    Raises:
        UserError: for what cannot be measured, before anything is drawn.
    """
    data, checkpoint = run.open_pictures(), run.state_of(options.state)
    # One state for all that follows, also where the training goes on meanwhile.
    options, weights = dataclasses.replace(options, state=str(int(checkpoint.name))), digest_of(checkpoint)
    order = order_of(run, options)
    announce(run, order, spaces, options, log)
    drawn = draw(order, options.processes)
    begin = time.monotonic()
    rows, reference = reference_of(data)
    figures = in_spaces(spaces, data, drawn.pixels, seed=options.seed)
    if spaces:
        figures += measure_patches(data.images[rows], drawn.pixels, seed=options.seed)
    classes = _classes(data, rows, drawn, spaces, options)
    missing = [f"Classes: {classes['reason']}."] if classes and classes["reason"] else list[str]()
    copies = None
    if "copies" in options.measure:
        try:
            copies = _copies(run, data, drawn, spaces, options)
        except UserError as reason:
            missing.append(str(reason))
        if copies is not None and not copies["gap"]:
            missing.append(NO_GAP)
    found = {
        "snowmelt": __version__,
        "run": str(run.path),
        "checkpoint": checkpoint.name,
        "weights": weights,
        "samples": len(drawn.pixels),
        "real": len(rows),
        "reference": reference,
        "seed": options.seed,
        "drawing": {} if is_at_once(run) else order.drawing.as_dict(),
        "precision": order.precision,
        "seconds": {
            "drawing": round(drawn.seconds, 3),
            "per_picture": drawn.seconds / len(drawn.pixels),
            "measuring": round(time.monotonic() - begin, 3),
        },
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "classes": classes,
        "memorization": copies,
        "spaces": {
            space.name: {
                "about": space.about,
                "identity": space.identity,
                "dimension": space.dimension,
                "reference": reference_of(data, space)[1],
            }
            for space in spaces
        },
        "not_measured": missing,
    }
    folder = folder or run.folder("evaluations") / FOLDER
    found = _with_kept(found, folder, tuple(options.measure))
    _write(folder, found, drawn, data)
    return found


SAME = ("weights", "samples", "real", "reference", "seed", "drawing", "precision")
"""What says, in a figures.json, which pictures were measured, and beside which."""


def _with_kept(found: dict[str, Any], folder: Path, measured: tuple[str, ...]) -> dict[str, Any]:
    """`found`, with what an earlier measurement of the same pictures says of that which is not `measured` now."""
    try:
        # All were drawn so before they said it.
        before = {"precision": "fp32"} | json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        if any(before[name] != found[name] for name in SAME):
            return found
        names = () if "quality" in measured else ("figures", "classes", "spaces")
        names += () if "copies" in measured else ("memorization",)
        kept = [reason for reason in before["not_measured"] if reason.startswith("Classes: ") == ("classes" in names)]
        reasons = dict.fromkeys([*found["not_measured"], *kept])
        return found | {name: before[name] for name in names} | ({"not_measured": [*reasons]} if names else {})
    except (OSError, ValueError, KeyError, TypeError):
        return found


def check_run(run: Run, options: EvaluateOptions) -> None:
    """Refuse a run that cannot be measured.

    Raises:
        UserError: it is still training, has no such state, or no pictures.
    """
    check_drawing(drawing_of(options), classes=bool(run.config.data.classes))
    given = {"sampler": options.sampler, "steps": options.steps}
    asked = [name for name, value in given.items() if value is not None] + ["guidance"] * (options.guidance != 1)
    if asked and is_at_once(run):
        raise in_a_single_step(run, asked[0])
    run.check_idle("measure")
    run.state_of(options.state)
    run.open_pictures()


def see_real(spaces: list[Space], data: Prepared) -> None:
    """See all the real pictures that figures and copies will need, so that the cache has them."""
    for space in spaces:
        real_features(space, data, reference_of(data, space)[0])
        if space.name == "trained":
            real_features(space, data, data.train)


def is_at_once(run: Run) -> bool:
    """Whether the run's family draws in a single step, so that no option of drawing applies."""
    return MODELS[run.config.model].at_once


def announce(run: Run, order: Order, spaces: list[Space], options: EvaluateOptions, log: Log) -> None:
    """Say what is going to be done and about how long it takes."""
    drawing = words_of(seconds_per_picture(order, options.processes) * len(order.numbers))
    measuring = words_of(seconds_of_measuring(run.open_pictures(), spaces, len(order.numbers), options))
    log(
        f"Drawing {len(order.numbers):,} pictures of {run.path} in {order.precision} takes about {drawing}, measuring "
        f"them about {measuring}."
    )


def seconds_of_measuring(data: Prepared, spaces: list[Space], samples: int, options: EvaluateOptions) -> float:
    """About how long it takes to see and to compare so many drawn pictures, all real ones included."""
    real, seconds = len(reference_of(data)[0]), 0.0
    copies = len(data.train) + len(data.held_out) if "copies" in options.measure else 0
    for space in spaces:
        count = max(len(reference_of(data, space)[0]), copies if space.name == "trained" else 0)
        seconds += expected_seconds(data, (space.name,), count + 2 * samples)
        seconds += seconds_expected(real, samples, space.dimension)
    values = data.size**2 * data.channels
    return seconds + seconds_expected_patches(real, samples, values) * bool(spaces) + 3e-7 * copies * samples


def in_spaces(
    spaces: list[Space], data: Prepared, drawn: np.ndarray, *, seed: int, names: tuple[str, ...] = tuple(OF_FEATURES)
) -> list[Figure]:
    """The figures `names` of drawn pictures, uint8 (pictures, height, width, channels), in every space."""
    found: list[Figure] = []
    for space in spaces:
        real = real_features(space, data, reference_of(data, space)[0])
        found += measure(real, space.features(drawn), space.name, seed=seed, names=names)
    return found


def _pixels(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _copies(run: Run, data: Prepared, drawn: Drawn, spaces: list[Space], options: EvaluateOptions) -> dict[str, Any]:
    """What is learned by heart: near-copies among the drawn pictures, and smaller errors on training pictures.

    Raises:
        UserError: there are too few held-out pictures to tell.
    """
    rows, held_out = data.train, spread_rows(data.held_out, MOST_REAL)
    others = data.images[held_out]
    space = next((space for space in spaces if space.name == "trained"), None)
    if space is None:
        found = find_copies(Searched(drawn.pixels), Searched(Rows(data.images, rows)), Searched(others))
    else:
        found = find_copies(
            Searched(drawn.pixels, space.features(drawn.pixels), space.features(_mirrored(drawn.pixels))),
            Searched(Rows(data.images, rows), real_features(space, data, rows)),
            Searched(others, real_features(space, data, held_out), space.features(_mirrored(others))),
        )
    pairs = [dataclasses.asdict(pair) | {"training": int(rows[pair.training])} for pair in found.pairs]
    about = dataclasses.asdict(found)
    about["copies"] |= {"count": about.pop("count"), "false_alarms": about.pop("false_alarms")}
    return about | {"pairs": pairs, "gap": [dataclasses.asdict(gap) for gap in _gaps(run, data, options)]}


def _mirrored(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _classes(
    data: Prepared, rows: np.ndarray, drawn: Drawn, spaces: list[Space], options: EvaluateOptions
) -> dict[str, Any] | None:
    """Which classes the trained encoder recognises, where it is asked at all."""
    if not any(space.name == "trained" for space in spaces):
        return None
    return recognised(data, rows, drawn.pixels, drawn.labels, device=pick_device(options.device))


def _gaps(run: Run, data: Prepared, options: EvaluateOptions) -> list[Gap]:
    """The errors of the averaged weights on training and on held-out pictures."""
    if not (run.state_of(options.state) / "optimizer.safetensors").exists():
        return []
    learner = run.load_learner(make_precision(pick_device(options.device), "fp32"), options.state)
    device = learner.model.precision.device
    train, held_out = (
        errors_of(
            learner,
            data,
            spread_rows(rows, GAP_PICTURES),
            seed=options.seed,
            device=device,
            batch=drawn_at_once(run.config),
        )
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
