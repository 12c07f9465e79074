"""`snowmelt sample`: a run and seeds become pictures, each with a note that draws it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from snowmelt import __version__
from snowmelt.errors import UserError, option_of
from snowmelt.files import make_folder, write_together
from snowmelt.late import import_torch
from snowmelt.terminal import console

if TYPE_CHECKING:
    from snowmelt.models.base import Drawing, Model
    from snowmelt.run import Run
    from snowmelt.shapes import Images

MOMENTS = 12
"""Columns of a strip."""
ROWS = 16
"""Of a strip, at most."""
MOST = 100_000
"""Pictures in one call."""


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Draw new pictures from a run: PNG files, each with a JSON beside it that says how to draw it again."""

    run: tyro.conf.Positional[Path]
    """The run directory that `snowmelt train` made."""
    out: Path | None = None
    """Where the pictures go; RUN/samples when not given."""
    count: int = 16
    """Pictures for each seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; picture 17 of seed 5 is the same picture whatever else is drawn beside it."""
    first: int = 0
    """Number of the first picture of each seed."""
    classes: tuple[str, ...] = ()
    """Classes by name, used in turn; all of them in turn when not given."""
    unconditional: bool = False
    """Let chance choose the class of each picture, as often as the training pictures have it."""
    state: str = "newest"
    """newest, before (it knew its training pictures by heart), or the number of a step that the run has kept."""
    sampler: str | None = None
    """ddim (no fresh noise), ddpm (fresh noise at every step), dpmpp_2m, unipc, heun, ...: docs/samplers.md. When not
    given, dpmpp_2m_late or dpmpp_2m, whichever suits the run, or what `snowmelt tune` found best for so few steps."""
    eta: float | None = None
    """How much fresh noise all steps of ddim, dpmpp_2m, dpmpp_2m_late, ... draw: 0 none, 1 as much as ddpm."""
    steps: int | None = None
    """Noise levels at which the network is asked, by most samplers once; 15 when not given."""
    schedule: str | None = None
    """Noise schedule that the levels are taken from; the one of the training when not given."""
    spacing: str | None = None
    """time, log_snr or karras: how they are spaced; as suits the sampler when not given."""
    levels: tuple[float, ...] = ()
    """The levels themselves, as rising log-SNRs such as -8 -4 0 4 8, instead of --steps."""
    mean_first: bool = False
    """Begin with the mean of the training pictures, or of the class, which is all that can be said of pure noise: one
    level more, at which the network is not asked."""
    variance: str | None = None
    """Of ddpm's fresh noise: posterior, forward, analytic (measured on the training pictures) or learned."""
    guidance: float = 1.0
    """How strongly to hold to the class: 1 is plain, 2 to 4 exaggerates it, 0 forgets it."""
    guide: str = "classifier_free"
    """How: classifier_free, or projected, which keeps colours calm at high --guidance."""
    away_from: str = "no_class"
    """no_class, or early: away from what the network drew when it was young; that needs no classes."""
    guidance_range: tuple[float, float] | None = None
    """Guide only between these two log-SNRs, such as -4 4."""
    guidance_rescale: float = 0.0
    """Share, up to 1, by which the contrast that guidance adds is taken back."""
    threshold: str = "clamp"
    """clamp, dynamic or none: what keeps every guess within what a picture can show."""
    grid: bool = False
    """Also write all pictures as one sheet, grid.png."""
    strip: bool = False
    """Also write strip.png: how the pictures come out of the noise."""
    batch: int | None = None
    """Pictures drawn at once; 64 (in bf16 128), or fewer of large ones, when not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32 draws the same picture everywhere, but for rounding; auto is bf16 where the run was trained in it and the
    processor multiplies it, which is mostly faster and hardly to be seen, and else fp32."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


class Wanted(NamedTuple):
    """One picture to draw; `label` is None without classes."""

    seed: int
    number: int
    label: int | None

    @property
    def stem(self) -> str:
        """Of its files' names."""
        return f"seed{self.seed}-{self.number:05d}"


def sample(options: SampleOptions) -> list[Path]:
    """Draw the pictures and return the files written: each picture's PNG and note, then the sheets.

    Raises:
        UserError: for every mistake in the options, before anything is written.
    """
    # Late, so that the command line stays instant.
    import_torch()
    import torch

    from snowmelt.evaluation.drawing import make_ready, usual
    from snowmelt.models import check_drawing
    from snowmelt.models.base import Drawing
    from snowmelt.pictures import save_png, sheet, strip
    from snowmelt.presets import drawn_at_once
    from snowmelt.run import Run

    run = Run.open(Path(options.run))
    wanted = wanted_pictures(options, run)

    drawing = usual(run, run.state_of(options.state), Drawing.of(options), sampler=options.sampler)
    check_drawing(drawing, classes=bool(run.config.data.classes))
    precision = run.drawing_precision(options.device, options.precision)
    model, checkpoint = run.load_model(precision, options.state)
    make_ready(run, checkpoint, model, drawing)
    facts = _facts(run, checkpoint, options, precision.name, {} if model.at_once else drawing.as_dict())
    batch = options.batch or drawn_at_once(run.config, precision.name)
    files: list[Path] = []
    # Of the strip no more than it shows, of the grid the pictures alone: of thousands, all moments are gigabytes.
    rows: list[list[Images]] = []
    finals: list[Images] = []
    with make_folder(Path(options.out or run.path / "samples")) as out:
        for group, moments in _drawn(run, model, wanted, drawing, batch, strip=options.strip):
            files += _write(out, group, moments[-1], facts)
            if options.grid:
                finals.append(moments[-1].cpu())
            if moments[:-1]:
                rows.append([moment.cpu() for moment in moments])
        if options.grid:
            files.append(save_png(out / "grid.png", sheet(torch.cat(finals), _columns(wanted), smallest=64)))
        if options.strip:
            columns = [torch.cat(parts)[:ROWS] for parts in zip(*rows, strict=True)]
            files.append(save_png(out / "strip.png", strip(columns, smallest=64)))
    how = ", drawn in bf16 as the run was trained" if options.precision == "auto" and precision.name == "bf16" else ""
    console().print(f"Wrote {len(wanted)} pictures to {out}{how}", markup=False)
    return files


def wanted_pictures(options: SampleOptions, run: Run) -> list[Wanted]:
    """Every picture asked for, in order."""
    from snowmelt.evaluation.drawing import class_by_chance

    if options.levels and options.steps is not None:
        raise UserError("--levels and --steps exclude each other; give one.")
    if not options.seeds:
        raise UserError("--seeds names no seed; give one or more, such as --seeds 0 1.")
    for name in ("count", "batch"):
        given: int | None = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name} is {given}; give at least 1.")
    if options.count * len(options.seeds) > MOST:
        whole = options.count * len(options.seeds)
        raise UserError(f"{whole:,} pictures are more than {MOST:,}; draw them in parts, with --count and --first.")
    if options.first < 0:
        raise UserError(f"--first is {options.first}; pictures are numbered from 0.")
    names = run.config.data.classes
    if options.classes and not names:
        raise UserError(f"{options.run} was trained without classes; leave --classes away.")
    if options.classes and options.unconditional:
        raise UserError("--classes and --unconditional exclude each other; give one.")
    turn = [run.config.data.label_of(name) for name in options.classes] or list(range(len(names)))
    by_chance = partial(class_by_chance, run.config.data)
    pick = by_chance if options.unconditional and names else _in_turn(turn)
    numbers = range(options.first, options.first + options.count)
    return [Wanted(seed, number, pick(seed, number)) for seed in options.seeds for number in numbers]


def _in_turn(turn: list[int]) -> Callable[[int, int], int | None]:
    return lambda _seed, number: turn[number % len(turn)] if turn else None


def _drawn(
    run: Run, model: Model, wanted: list[Wanted], drawing: Drawing, batch: int, *, strip: bool
) -> Iterator[tuple[Sequence[Wanted], list[Images]]]:
    """Batch by batch the pictures, and before them, for a strip, as long as it has fewer than `ROWS` rows, the noisy
    images of its rows at `MOMENTS` moments."""
    import torch
    from rich.progress import track

    from snowmelt.evaluation.drawing import in_parts
    from snowmelt.pictures import moments_of
    from snowmelt.seeds import noise_source

    data, device = run.config.data, model.precision.device
    shape = (data.channels, data.size, data.size)
    groups, rows = in_parts(wanted, batch), ROWS if strip else 0
    for number, group in enumerate(groups, 1):
        noise = noise_source([one.seed for one in group], [one.number for one in group], shape, device)
        labels = [one.label for one in group if one.label is not None]
        way = model.sample(noise, torch.tensor(labels, device=device) if labels else None, drawing)
        title = f"Drawing {len(wanted)} pictures, batch {number}/{len(groups)}"
        moments: list[Images] = []
        pictures = noise(0)
        for step in track(way, title, drawing.count, console=console(), transient=True):
            pictures = step.x0
            if rows > 0:
                # A part of a batch would keep all of it.
                moments.append(step.x[:rows].clone())
        rows -= len(group)
        yield group, [*(moments[index] for index in moments_of(len(moments), MOMENTS - 1)), pictures]


def _write(out: Path, group: Sequence[Wanted], images: Images, facts: dict[str, Any]) -> list[Path]:
    """One PNG and one JSON for each picture."""
    from snowmelt.data.pixels import to_pixels
    from snowmelt.pages.markup import png
    from snowmelt.pictures import picture

    files: dict[str, bytes] = {}
    for one, pixels in zip(group, to_pixels(images), strict=True):
        name = None if one.label is None else facts["classes"][one.label]
        note = {key: value for key, value in facts.items() if key not in ("classes", "drawing")} | facts["drawing"]
        note |= {"seed": one.seed, "number": one.number, "class": name, "command": _command(facts, one, name)}
        files[f"{one.stem}.png"] = png(picture(pixels))
        files[f"{one.stem}.json"] = json.dumps(note, indent=1, ensure_ascii=False).encode()
    return write_together(out, files)


def _facts(
    run: Run, checkpoint: Path, options: SampleOptions, precision: str, drawing: dict[str, Any]
) -> dict[str, Any]:
    """What determines a picture, beside its seed, number and class."""
    from snowmelt.checkpoint import digest_of

    return {
        "snowmelt": __version__,
        "run": str(run.path),
        "checkpoint": checkpoint.name,
        "weights": digest_of(checkpoint),
        # The newest is another one, once the training has gone on.
        "state": str(int(checkpoint.name)) if options.state == "newest" else options.state,
        "drawing": drawing,
        "precision": precision,
        "classes": run.config.data.classes,
    }


def _command(facts: dict[str, Any], one: Wanted, name: str | None) -> str:
    """The line that draws this picture again."""
    words: list[Any] = ["snowmelt", "sample", facts["run"], "--seeds", one.seed, "--first", one.number, "--count", 1]
    for field, value in {**facts["drawing"], "state": facts["state"], "precision": facts["precision"]}.items():
        given = [] if value is True else value if isinstance(value, list) else [value]
        words += [option_of(field), *given]
    words += [] if name is None else ["--classes", name]
    return shlex.join(map(str, words))


def _columns(wanted: list[Wanted]) -> int:
    """Of the grid: as many as there are classes, so that each column is one; else a square."""
    classes = len({one.label for one in wanted})
    return classes if 1 < classes <= 20 else max(1, round(len(wanted) ** 0.5))
