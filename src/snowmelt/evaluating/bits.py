"""Bits/dim of held-out pictures: by the bound and by the ODE for diffusion models, by their own bound for others."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from snowmelt import __version__
from snowmelt.checkpoint import digest_of
from snowmelt.data.prepared import spread_rows
from snowmelt.data.stream import Batch, batch_of
from snowmelt.device import make_precision, pick_device
from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.likelihood import bound, hutchinson, ode_bits
from snowmelt.diffusion.variance import VARIANCES
from snowmelt.errors import UserError, choose
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluation.drawing import make_ready
from snowmelt.evaluation.held_out import Errors, joined
from snowmelt.models import MODELS
from snowmelt.models.base import Drawing, Model
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.run import Run
from snowmelt.seeds import generator, noise_source
from snowmelt.shapes import Images, Labels
from snowmelt.terminal import console


class Mean(NamedTuple):
    """A mean over pictures, bits/dim."""

    mean: float
    standard_error: float


class Held(NamedTuple):
    """Held-out pictures."""

    rows: np.ndarray
    """Their places in the prepared dataset."""
    images: Images
    labels: Labels | None


class NoLikelihood(UserError):
    """The family has none: a GAN tells no probabilities."""


def measure_bits(run: Run, options: EvaluateOptions) -> dict[str, Any]:
    """Bits/dim of held-out pictures, with standard errors and what determines them.

    Raises:
        UserError: see `check_bits`.
    """
    check_bits(run, options)
    model, checkpoint = run.load_model(make_precision(pick_device(options.device), "fp32"), options.state)
    # Slopes by pictures are all that is needed here.
    model.requires_grad_(False)
    held = _held_out(run, options)
    if isinstance(model, DiffusionModel):
        ends = _ends(model, options)
        make_ready(run, checkpoint, model, Drawing(sampler="ddpm", variance=options.variance))
        found = _measured(model, held, ends, options)
    else:
        found = _of(model, held, options)
    means = {name: _mean_of(values) for name, values in found.items()}
    if not all(math.isfinite(number) for mean in means.values() for number in mean):
        raise UserError("Some bits/dim are not finite: the network fails at some noise levels; train it for longer.")
    return {
        **_facts(run, checkpoint, options),
        "rows": [int(row) for row in held.rows],
        "bits_per_dim": {name: mean._asdict() for name, mean in means.items()},
        "per_picture": {name: values.tolist() for name, values in found.items()},
    }


def check_bits(run: Run, options: EvaluateOptions) -> None:
    """Refuse what has no bits/dim.

    Raises:
        UserError: the family has no likelihood, or an option does not fit the run.
    """
    choose(dict.fromkeys((*VARIANCES, "analytic", "learned")), options.variance, "variance")
    if options.variance == "learned" and run.config.diffusion.variance != "learned":
        raise UserError(f"{run.path} was not taught a variance; use --variance posterior or forward.")
    family = MODELS[run.config.model].model
    if not issubclass(family, DiffusionModel) and family.bits is Model.bits:
        raise NoLikelihood(
            f"A model such as {run.path} ({run.config.model}) has no likelihood; leave bits out of --measure."
        )
    told = run.always_told or not issubclass(family, DiffusionModel)
    if options.unconditional and run.config.data.classes and told:
        raise UserError(f"{run.path} knows pictures only with their class; leave --unconditional away.")
    if pick_device(options.device).type == "mps":
        raise UserError("Likelihoods need double precision, which this device lacks; use --device cpu.")
    _held_out(run, options)


def _of(model: Model, held: Held, options: EvaluateOptions) -> dict[str, Tensor]:
    """What a family says of its own bits, some pictures at a time."""
    rng, parts = generator(options.seed, "bits", device=held.images.device), list[Errors]()
    for start in range(0, len(held.images), options.batch):
        some = slice(start, start + options.batch)
        parts.append(model.bits(Batch(held.images[some], None if held.labels is None else held.labels[some]), rng))
    return joined(parts)


def _ends(model: DiffusionModel, options: EvaluateOptions) -> tuple[float, float]:
    """The noisiest and the cleanest level."""
    noisiest, cleanest = model.schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    chosen = cleanest if options.cleanest is None else options.cleanest
    if not noisiest + 1e-6 < chosen <= cleanest + 1e-6:
        raise UserError(f"--cleanest is {chosen:g}; give a log-SNR above {noisiest:.3g} and up to {cleanest:.3g}.")
    return noisiest, chosen


def _held_out(run: Run, options: EvaluateOptions) -> Held:
    """Up to `pictures` of the pictures held out of the training of `run`, evenly from all of them."""
    data = run.open_pictures()
    rows = spread_rows(data.held_out, options.pictures)
    if len(rows) < 2:
        raise UserError(f"{run.data} holds {len(rows)} pictures out of training; a standard error takes 2 at least.")
    images, labels = batch_of(data, rows, pick_device(options.device))
    return Held(rows, images, None if options.unconditional else labels)


def _measured(
    model: DiffusionModel, held: Held, ends: tuple[float, float], options: EvaluateOptions
) -> dict[str, Tensor]:
    """The terms and sums of both likelihoods between two levels, bits/dim of each picture, by name."""
    grid = torch.linspace(*ends, options.bound_steps, dtype=torch.float64)
    coarse = torch.linspace(*ends, options.ode_steps + 1, dtype=torch.float64) if options.ode_steps else None
    count = len(held.rows)
    terms, slopes = min(options.terms, options.bound_steps - 1), 4 * options.ode_steps
    console().print(
        f"{count} pictures; evaluations of the network for each: {terms + 1} for the bound, {slopes + 1} for the ODE, "
        f"{slopes} of them with {options.probes} derivatives."
    )
    parts: list[dict[str, Tensor]] = []
    with Progress(console=console(), transient=True) as progress:
        task = progress.add_task("Measuring", total=-(-count // options.batch) * (terms + slopes + 2))
        for start in range(0, count, options.batch):
            some = slice(start, start + options.batch)
            images, rows = held.images[some], held.rows[some]
            plain = model.bind(None if held.labels is None else held.labels[some])
            variance = plain.variance if options.variance == "learned" else model.variances[options.variance]
            denoise = _counting(plain, partial(progress.advance, task))
            seeds, shape = [options.seed] * len(rows), images.shape[1:]
            noise = noise_source(seeds, rows.tolist(), shape, images.device, "bits")
            one = bound(denoise, images, grid, noise, variance=variance, terms=terms)
            parts.append({**one._asdict(), "bound": one.total})
            if coarse is not None:
                signs = noise_source(seeds, rows.tolist(), shape, images.device, "probes")
                ode = ode_bits(denoise, images, coarse, noise, trace=hutchinson(signs, options.probes))
                parts[-1] |= {"ode": ode, "difference": one.total - ode}
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _counting(denoise: Denoise, count: Callable[[], None]) -> Denoise:
    """`denoise`, telling of every call."""

    def counting(x: Images, log_snr: Tensor) -> Images:
        count()
        return denoise(x, log_snr)

    return counting


def _mean_of(values: Tensor) -> Mean:
    return Mean(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def _facts(run: Run, checkpoint: Path, options: EvaluateOptions) -> dict[str, Any]:
    """What determines the figures."""
    names = (
        "state",
        "pictures",
        "bound_steps",
        "terms",
        "variance",
        "cleanest",
        "ode_steps",
        "probes",
        "unconditional",
    )
    return {
        "snowmelt": __version__,
        "run": str(run.path),
        "checkpoint": checkpoint.name,
        "weights": digest_of(checkpoint),
        "options": {name: getattr(options, name) for name in (*names, "seed")},
    }


def bits_table(found: dict[str, Any]) -> Table:
    """The figures, for a person."""
    table = Table(title=f"Bits/dim of {len(found['rows'])} held-out pictures")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± standard error", justify="right")
    names = {"difference": "bound - ODE", "ode": "ODE"}
    for key, figure in found["bits_per_dim"].items():
        table.add_row(names.get(key, key), f"{figure['mean']:.4f}", f"{figure['standard_error']:.4f}")
    return table
