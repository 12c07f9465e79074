"""What a drawing may need beside the weights: the sampler that suits the run, what `tune` found, the early state of the
run, a measured variance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save

from snowmelt import checkpoint
from snowmelt.config import DataConfig
from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import mean_pictures
from snowmelt.data.stream import batch_of
from snowmelt.device import Precision
from snowmelt.diffusion.grids import given_grid, log_snr_grid
from snowmelt.diffusion.variance import Variance, analytic, noise_power
from snowmelt.diffusion.walk import NoiseSource
from snowmelt.errors import UserError, option_of
from snowmelt.files import write_atomic
from snowmelt.models import build_model, check_drawing
from snowmelt.models.base import Drawing, Model, classes_of
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.presets import drawn_at_once
from snowmelt.run import Run
from snowmelt.seeds import generator, noise_source
from snowmelt.shapes import Grid, Images, Labels

One = TypeVar("One")

MEASURED_LEVELS, MEASURED_PICTURES = 40, 128
"""At how many levels, and on how many pictures, the variance of `--variance analytic` is measured: a smooth curve of
means over all pixels."""


def make_ready(run: Run, state: Path, model: Model, drawing: Drawing) -> None:
    """Give `model`, which has the weights of a `state` of `run`, what `drawing` asks for, and refuse what it cannot
    draw.

    Raises:
        UserError: the run has no early state, or no pictures to measure on; or the drawing asks a model that draws at
            once for steps; or see `DiffusionModel.sampler` and `grid`.
    """
    if model.at_once and drawing != Drawing():
        plain = Drawing()
        name = next(
            field.name for field in fields(Drawing) if getattr(drawing, field.name) != getattr(plain, field.name)
        )
        raise in_a_single_step(run, name)
    if isinstance(model, DiffusionModel):
        if run.always_told and drawing.guidance != 1 and drawing.away_from == "no_class":
            raise UserError(
                f"{run.path} knows pictures only with their class, so that --guidance has nothing to go away from; "
                "leave it away, or add --away-from early."
            )
        model.grid(drawing)
        if drawing.away_from == "early" and drawing.guidance != 1:
            early = early_model(run, model)
            model.weaker["early"] = early.bind
        if drawing.variance == "analytic":
            model.variances["analytic"] = measured_variance(run, state, model)
        if drawing.mean_first:
            model.means = mean_images(run).to(model.precision.device)
        model.sampler(drawing, model.bind(None))


def in_a_single_step(run: Run, name: str) -> UserError:
    """That a setting of drawing does not apply to the family of `run`."""
    return UserError(
        f"{run.path} holds a {run.config.model} model, which draws in a single step; leave {option_of(name)} away."
    )


def class_by_chance(data: DataConfig, seed: int, number: int) -> int:
    """The class of a picture that is asked for without one, by its seed and number: see `classes_of`."""
    return int(classes_of(data, torch.randn(1, generator=generator(seed, "class", number))))


def in_parts(pictures: Sequence[One], batch: int) -> list[Sequence[One]]:
    """The pictures, or their numbers, `batch` and `batch`."""
    return [pictures[start : start + batch] for start in range(0, len(pictures), batch)]


def noise_of(
    data: DataConfig, seed: int, numbers: Sequence[int], device: torch.device
) -> tuple[NoiseSource, Labels | None]:
    """The noise of pictures that are asked for by seed and number alone, and their classes, where there are any."""
    classes = [class_by_chance(data, seed, number) for number in numbers] if data.classes else []
    noise = noise_source([seed] * len(numbers), numbers, (data.channels, data.size, data.size), device)
    return noise, torch.tensor(classes, device=device) if classes else None


def early_model(run: Run, model: DiffusionModel) -> DiffusionModel:
    """The model as it was after a tenth of the training.

    Raises:
        UserError: the run kept no early state.
    """
    saved = checkpoint.steps_saved(run.snapshots)
    if not saved:
        raise UserError(f"{run.path} has kept no early state to go away from; leave --away-from away.")
    early = build_model(run.config, model.precision)
    path = checkpoint.path_of(run.snapshots, saved[0])
    checkpoint.load_into(early, checkpoint.load(path, "average"), path)
    assert isinstance(early, DiffusionModel)
    return early


MEANS = "means.safetensors"


def mean_images(run: Run) -> Images:
    """What the training pictures of each class are like on average and, last, all of them; kept in the run.

    Raises:
        UserError: they were not kept, and the prepared pictures are gone.
    """
    facts, path = run.config.data, run.path / "evaluations" / MEANS
    name = f"{facts.fingerprint}{' mirrored' if run.config.training.flip else ''}"
    shape = (len(facts.classes) + 1, facts.channels, facts.size, facts.size)
    try:
        kept = load(path.read_bytes())[name]
        if kept.shape == shape and kept.isfinite().all():
            return kept
    except (OSError, KeyError, SafetensorError):
        pass
    means = to_images(torch.from_numpy(mean_pictures(run.open_pictures())))
    if run.config.training.flip:
        means = (means + means.flip(3)) / 2
    # A network with classes may be trained on pictures without.
    means = means if len(means) == shape[0] else means[-1:].repeat(shape[0], 1, 1, 1)
    write_atomic(run.folder("evaluations") / MEANS, save({name: means}))
    return means


def measured_variance(run: Run, state: Path, model: DiffusionModel) -> Variance:
    """Analytic-DPM's variance for the weights of a state, which `model` has, from `MEASURED_PICTURES` training
    pictures; kept in the run for the state that was measured last.

    Raises:
        UserError: the prepared pictures are gone.
    """
    path, weights = run.folder("evaluations") / "variance.json", checkpoint.digest_of(state)
    levels, powers = _kept(path, weights) or ([], [])
    if not levels:
        grid = log_snr_grid(model.schedule, MEASURED_LEVELS)
        levels, powers = grid.tolist(), _powers(run, model, grid)
        write_atomic(path, json.dumps({"weights": weights, "log_snr": levels, "noise_power": powers}, indent=1))
    return analytic(torch.tensor(levels, dtype=torch.float64), powers)


def _kept(path: Path, weights: str) -> tuple[list[float], list[float]] | None:
    """Levels and powers measured before with these weights; None where there are none that can be used."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        levels, powers = ([float(value) for value in known[name]] for name in ("log_snr", "noise_power"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rising = all(low < high for low, high in pairwise(levels))
    return (levels, powers) if known.get("weights") == weights and len(levels) == len(powers) > 1 and rising else None


def _powers(run: Run, model: DiffusionModel, grid: Grid) -> list[float]:
    data, device, batch = run.open_pictures(), model.precision.device, drawn_at_once(run.config)
    rows = np.sort(np.random.default_rng(0).permutation(data.train)[:MEASURED_PICTURES])
    total = torch.zeros(len(grid), dtype=torch.float64)
    for start in range(0, len(rows), batch):
        images, labels = batch_of(data, rows[start : start + batch], device)
        noise = noise_source([0] * len(images), range(start, start + len(images)), images.shape[1:], device)
        asked = model.bind(labels)
        # It is kept, so it must not depend on what was drawn in when it was first asked for.
        asked.precision = Precision(device)
        with torch.no_grad():
            powers = noise_power(asked, images, grid, noise)
        total += len(images) * torch.tensor(powers, dtype=torch.float64)
    return (total / len(rows)).tolist()


SUITED = "sampler.json"
SHARP = "dpmpp_2m"
"""The usual sampler without its fresh noise."""
SMOOTH = 0.85
"""Detail that fresh noise leaves of what there is without, below which it costs more than it mends (docs/recipe.md)."""


def detail(images: Images) -> float:
    """Mean square, over pictures and pixels, of what is finer than squares of 2 x 2 pixels: waves shorter than four."""
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0)
    return (images - coarse).square().mean().item()


def keep_suited(run: Run, sampler: str, kept: float) -> None:
    """Keep in the run which sampler suits it, and the share of `detail` by which that was seen."""
    told = {"sampler": sampler, "detail": round(kept, 4)}
    write_atomic(run.folder("evaluations") / SUITED, json.dumps(told, indent=1))


def suited(run: Run) -> str | None:
    """The sampler that training found to suit the run; None where it did not look, or what it kept is damaged."""
    try:
        sampler = json.loads((run.path / "evaluations" / SUITED).read_text(encoding="utf-8"))["sampler"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return sampler if sampler in (SHARP, Drawing().sampler) else None


TUNED = "levels.json"


def keep_tuned(run: Run, weights: str, found: dict[int, Drawing]) -> Path:
    """Keep in the run how so few steps draw best with the weights of this digest, in the place of what was kept."""
    path = run.folder("evaluations") / TUNED
    steps = {str(count): one.as_dict() for count, one in found.items()}
    write_atomic(path, json.dumps({"weights": weights, "steps": steps}, indent=1))
    return path


def usual(run: Run, state: Path, drawing: Drawing, *, sampler: str | None) -> Drawing:
    """How is drawn what is asked for where nobody names a sampler: as `tune` found that so few steps draw best with the
    weights of `state`, or else with the sampler that suits the run.

    Args:
        drawing: what is asked for; where that is more than a number of steps, what `tune` found does not apply.
        sampler: the one asked for by its name.
    """
    if sampler is not None:
        return drawing
    found = _tuned(run, state, drawing.steps) if drawing == Drawing(steps=drawing.steps) else None
    return found or replace(drawing, sampler=suited(run) or drawing.sampler)


def _tuned(run: Run, state: Path, steps: int) -> Drawing | None:
    try:
        known = json.loads((run.path / "evaluations" / TUNED).read_text(encoding="utf-8"))
        chosen = known["steps"][str(steps)]
        levels = tuple(given_grid([float(level) for level in chosen["levels"]]).tolist())
        mean_first = chosen.get("mean_first", False) is True
        found = Drawing(sampler=chosen["sampler"], eta=chosen.get("eta"), levels=levels, mean_first=mean_first)
        check_drawing(found, classes=False)
        if known["weights"] != checkpoint.digest_of(state) or found.answers != steps:
            return None
        if mean_first:
            mean_images(run)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, UserError):
        return None
    return found
