"""`snowmelt evaluate`: a run and the pictures held out of its training become figures in RUN/evaluations."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from snowmelt import __version__
from snowmelt.errors import UserError, choose
from snowmelt.files import write_atomic
from snowmelt.terminal import console

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from snowmelt.diffusion.denoiser import Denoise
    from snowmelt.models.base import Model
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run
    from snowmelt.shapes import Images, Labels


MOST = {"bound_steps": 1_000_000, "ode_steps": 10_000}


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run on the pictures that were held out of its training; the figures go to RUN/evaluations."""

    run: tyro.conf.Positional[Path]
    """The run directory that `snowmelt train` made."""
    bits: bool = False
    """Bits that the model needs for each value of a picture (bits/dim), by the variational bound and by the
    probability-flow ODE, with standard errors: bits.json. For diffusion models."""
    count: int = 64
    """Held-out pictures to measure on; all of them where there are fewer."""
    bound_steps: int = 1000
    """Levels of the bound, evenly spaced in log-SNR."""
    terms: int = 100
    """Steps of the bound to compute for each picture, drawn by chance from all of it; as many as --bound-steps computes
    every one."""
    variance: str = "posterior"
    """Variance of the bound's reverse steps: posterior, forward, analytic (measured on the training pictures), or
    learned where the network was taught it. With many steps all give the same."""
    cleanest: float | None = None
    """Log-SNR of the cleanest level, where the decoder takes over; the end of the run's schedule when not given. Where
    the last levels are not well learned a lower one, such as 5, needs fewer bits."""
    ode_steps: int = 40
    """Steps of the ODE; each takes four evaluations of the network."""
    probes: int = 2
    """Random signs for each derivative of the ODE: more of them, less chance."""
    unconditional: bool = False
    """Do not tell the network the classes of the pictures."""
    seed: int = 0
    """Decides the noise; the noise of a picture does not depend on what is measured beside it."""
    batch: int = 64
    """Pictures at once."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""


class Figure(NamedTuple):
    """A mean over pictures, bits/dim."""

    mean: float
    standard_error: float


class Held(NamedTuple):
    """Held-out pictures."""

    rows: np.ndarray
    """Their places in the prepared dataset."""
    images: Images
    labels: Labels | None


def evaluate(options: EvaluateOptions) -> list[Path]:
    """Measure what is asked for and return the files written.

    Raises:
        UserError: for every mistake in the options, before anything is computed; nothing is half-written.
    """
    # Late, so that the command line stays instant.
    from snowmelt.device import make_precision, pick_device
    from snowmelt.diffusion.variance import VARIANCES
    from snowmelt.evaluation.drawing import make_ready
    from snowmelt.models.base import Drawing
    from snowmelt.run import Run

    _check(options)
    choose(dict.fromkeys((*VARIANCES, "analytic", "learned")), options.variance, "variance")
    run = Run.open(Path(options.run))
    if options.variance == "learned" and run.config.diffusion.variance != "learned":
        raise UserError(f"{run.path} was not taught a variance; use --variance posterior or forward.")
    device = pick_device(options.device)
    if device.type == "mps":
        raise UserError("Likelihoods need double precision, which this device lacks; use --device cpu.")
    model, checkpoint = run.load_model(make_precision(device, "fp32"))
    diffusion = _diffusion(model, run)
    ends = _ends(diffusion, options)
    held = _held_out(run, options, device)
    make_ready(run, diffusion, Drawing(sampler="ddpm", variance=options.variance))
    found = _measured(diffusion, held, ends, options)
    figures = {name: _figure(values) for name, values in found.items()}
    if not all(math.isfinite(number) for figure in figures.values() for number in figure):
        raise UserError("Some bits/dim are not finite: the network fails at some noise levels; train it for longer.")
    path = run.folder("evaluations") / "bits.json"
    facts = {
        **_facts(run, checkpoint, options),
        "rows": [int(row) for row in held.rows],
        "bits_per_dim": {name: figure._asdict() for name, figure in figures.items()},
        "per_picture": {name: values.tolist() for name, values in found.items()},
    }
    write_atomic(path, json.dumps(facts, indent=1))
    _show(figures, len(held.rows))
    console().print(f"Wrote {path}", markup=False)
    return [path]


def _check(options: EvaluateOptions) -> None:
    if not options.bits:
        raise UserError("There is nothing to measure; choose a metric: --bits.")
    least = {"count": 2, "bound_steps": 2, "terms": 1, "ode_steps": 1, "probes": 1, "batch": 1}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            word = name.replace("_", "-")
            raise UserError(f"--{word} is {getattr(options, name)}; give at least {bound}.")
    for name, bound in MOST.items():
        if getattr(options, name) > bound:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at most {bound:,}.")


def _diffusion(model: Model, run: Run) -> DiffusionModel:
    from snowmelt.models.diffusion import DiffusionModel

    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} holds a {run.config.model} model; --bits measures diffusion models only.")
    return model


def _ends(model: DiffusionModel, options: EvaluateOptions) -> tuple[float, float]:
    """The noisiest and the cleanest level."""
    import torch

    noisiest, cleanest = model.schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    chosen = cleanest if options.cleanest is None else options.cleanest
    if not noisiest + 1e-6 < chosen <= cleanest + 1e-6:
        raise UserError(f"--cleanest is {chosen:g}; give a log-SNR above {noisiest:.3g} and up to {cleanest:.3g}.")
    return noisiest, chosen


def _held_out(run: Run, options: EvaluateOptions, device: torch.device) -> Held:
    """Up to `count` of the pictures held out of the training of `run`, evenly from all of them."""
    import numpy as np
    import torch

    from snowmelt.data.pixels import to_images

    data = run.open_pictures()
    rows = data.held_out[:: max(1, len(data.held_out) // options.count)][: options.count]
    if len(rows) < 2:
        raise UserError(f"{run.data} holds {len(rows)} pictures out of training; a standard error takes 2 at least.")
    labels = None if data.labels is None or options.unconditional else torch.from_numpy(data.labels[rows]).to(device)
    return Held(rows, to_images(torch.from_numpy(np.ascontiguousarray(data.images[rows])).to(device)), labels)


def _measured(
    model: DiffusionModel, held: Held, ends: tuple[float, float], options: EvaluateOptions
) -> dict[str, Tensor]:
    """The terms and sums of both likelihoods between two levels, bits/dim of each picture, by name."""
    import torch
    from rich.progress import Progress

    from snowmelt.diffusion.likelihood import bound, hutchinson, ode_bits

    grid = torch.linspace(*ends, options.bound_steps, dtype=torch.float64)
    coarse = torch.linspace(*ends, options.ode_steps + 1, dtype=torch.float64)
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
            noise, signs = _normals(options.seed, "bits", rows, images), _normals(options.seed, "probes", rows, images)
            one = bound(denoise, images, grid, noise, variance=variance, terms=terms)
            ode = ode_bits(denoise, images, coarse, noise, trace=hutchinson(signs, options.probes))
            parts.append({**one._asdict(), "bound": one.total, "ode": ode, "difference": one.total - ode})
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _counting(denoise: Denoise, count: Callable[[], None]) -> Denoise:
    """`denoise`, telling of every call."""

    def counting(x: Images, log_snr: Tensor) -> Images:
        count()
        return denoise(x, log_snr)

    return counting


def _normals(seed: int, purpose: str, rows: np.ndarray, like: Images) -> Callable[[int], Images]:
    """Standard normal noise by number, for each picture a function of its row; made on the CPU."""
    import torch

    from snowmelt.seeds import generator

    def noise(number: int) -> Images:
        each = [torch.randn(like.shape[1:], generator=generator(seed, purpose, int(row), number)) for row in rows]
        return torch.stack(each).to(like.device)

    return noise


def _figure(values: Tensor) -> Figure:
    return Figure(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def _facts(run: Run, checkpoint: Path, options: EvaluateOptions) -> dict[str, Any]:
    """What determines the figures."""
    from snowmelt.checkpoint import read_state

    settings = dataclasses.asdict(options)
    return {
        "snowmelt": __version__,
        "run": str(run.path),
        "checkpoint": checkpoint.name,
        "weights": read_state(checkpoint)["sha256"]["average"],
        "options": {name: value for name, value in settings.items() if name not in ("run", "bits", "batch", "device")},
    }


def _show(figures: dict[str, Figure], count: int) -> None:
    """The table, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Bits/dim of {count} held-out pictures")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± standard error", justify="right")
    names = {"prior": "  prior", "steps": "  steps", "data": "  data", "bound": "bound", "ode": "ODE"}
    for key in ("bound", "prior", "steps", "data", "ode", "difference"):
        figure = figures[key]
        table.add_row(names.get(key, "bound - ODE"), f"{figure.mean:.4f}", f"{figure.standard_error:.4f}")
    Console(highlight=False).print(table)
