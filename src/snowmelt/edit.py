"""`snowmelt edit`: a run changes a picture: fills in, varies, leads to another, inverts, enlarges, restores.

What each kind may be asked is in `edits/options.py`, what it does in `edits/kinds.py`, and the mathematics in
`diffusion/editing.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from snowmelt.edits.options import (
    EditOptions,
    EnlargeOptions,
    InpaintOptions,
    InterpolateOptions,
    InvertOptions,
    RestoreOptions,
    VaryOptions,
)
from snowmelt.errors import UserError
from snowmelt.files import make_folder
from snowmelt.late import import_torch
from snowmelt.terminal import console

if TYPE_CHECKING:
    from snowmelt.run import Run

EDITS: dict[str, type[EditOptions]] = {
    "inpaint": InpaintOptions,
    "vary": VaryOptions,
    "interpolate": InterpolateOptions,
    "invert": InvertOptions,
    "enlarge": EnlargeOptions,
    "restore": RestoreOptions,
}
MOST = 64
"""Pictures in one call: they are drawn together."""
MOST_STEPS = 10_000


def edit(options: EditOptions) -> list[Path]:
    """Draw the pictures and return the files written: each picture's PNG and note, then the sheet.

    Raises:
        UserError: for every mistake in the options, before anything is written.
    """
    kind = next(name for name, one in EDITS.items() if one is type(options))
    _check(options)
    # Late, so that the command line stays instant.
    import_torch()
    import torch

    from snowmelt.device import make_precision, pick_device
    from snowmelt.edits.canvas import Canvas
    from snowmelt.edits.files import write_edit
    from snowmelt.edits.kinds import KINDS
    from snowmelt.evaluation.drawing import make_ready
    from snowmelt.models import check_drawing
    from snowmelt.models.base import Drawing
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run
    from snowmelt.seeds import noise_source

    run = Run.open(Path(options.run))
    label = _label(options, run)
    drawing = Drawing(
        sampler=getattr(options, "sampler", "ddim"),
        steps=options.steps,
        guidance=options.guidance,
        guide=options.guide,
        away_from=options.away_from,
        threshold=options.threshold,
    )
    check_drawing(drawing, classes=bool(run.config.data.classes))
    model, checkpoint = run.load_model(make_precision(pick_device(options.device), "fp32"))
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} is no diffusion model ({run.config.model}); name the run of one.")
    model.requires_grad_(False)
    make_ready(run, checkpoint, model, drawing)
    data, device, count = run.config.data, model.precision.device, getattr(options, "count", 1)
    noise = noise_source([options.seed] * count, range(count), (data.channels, data.size, data.size), device)
    labels = None if label is None else torch.full((count,), label, device=device)
    with make_folder(options.out or run.path / "edits") as out:
        with torch.no_grad():
            result = KINDS[kind](Canvas(run, model, drawing, labels, noise), options)
        files = write_edit(out, kind, options, checkpoint, result)
    console().print(f"Wrote {count} picture{'s' * (count > 1)} to {files[0].parent}", markup=False)
    return files


def _check(options: EditOptions) -> None:
    """What can be told without torch and without the run."""
    for name in ("count", "steps", "rounds"):
        if getattr(options, name, 1) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least 1.")
    if getattr(options, "count", 1) > MOST:
        raise UserError(f"--count is more than {MOST} pictures; draw them in parts, with another --seed for each.")
    if options.steps > MOST_STEPS:
        raise UserError(f"--steps is {options.steps}; give at most {MOST_STEPS:,}, such as 50.")
    for name in ("strength", "noise", "width"):
        value, bound = getattr(options, name, 0.5), " up to 1" if name == "strength" else ""
        if not 0 < value < math.inf or (bound and value > 1):
            raise UserError(f"--{name} is {value}; give a number above 0{bound}.")


def _label(options: EditOptions, run: Run) -> int | None:
    names = run.config.data.classes
    if options.class_name is not None:
        if not names:
            raise UserError(f"{run.path} was trained without classes; leave --class away.")
        return run.config.data.label_of(options.class_name)
    if run.always_told:
        raise UserError(f"{run.path} knows pictures only with their class; say which with --class.")
    if names and options.guidance != 1 and options.away_from == "no_class":
        raise UserError("--guidance holds a picture to its class; say which with --class, or add --away-from early.")
    return None
