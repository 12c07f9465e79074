"""`snowmelt tune`: which few levels draw best with this run, found on trajectories of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from snowmelt.errors import UserError, choose
from snowmelt.terminal import console

if TYPE_CHECKING:
    from rich.progress import Progress

    from snowmelt.diffusion.search import Trajectories
    from snowmelt.diffusion.walk import NoiseSource, Step
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.shapes import Images, Labels

FINE = 41
"""Levels of a trajectory, of which few are chosen."""
REFERENCE = "dpmpp_3m"
DISCOUNTS = (0.0, 0.5, 1.0)
"""How much of an error the rest of the way undoes (see `snowmelt.diffusion.search`); each is tried."""
BATCH = 64
"""Pictures drawn at once; also those that every candidate draws."""
CHECKED = 128
"""Pictures that the levels found are checked on."""
SHIFTS = (0.3, -0.3)
"""Shares of the way to a neighbour by which a level is moved, to see whether that is better."""
ROUNDS = 2
FEWEST, MOST = 3, 30
"""Steps that levels are found for."""


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Find the levels at which few steps draw best, from trajectories of the run; `snowmelt sample` then uses them."""

    run: tyro.conf.Positional[Path]
    """A run of a diffusion model."""
    counts: tuple[int, ...] = (4, 5, 6, 7, 8, 10, 12)
    """Numbers of steps to find levels for."""
    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm")
    """The multistep samplers to find them for; of each number of steps the best one becomes the default."""
    pictures: int = 256
    """Trajectories to learn from."""
    seed: int = 1_000_000
    """Of their noise; pictures that are drawn later should have another one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster where the processor has it."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


class Found(NamedTuple):
    """Levels for a sampler."""

    sampler: str
    levels: tuple[float, ...]
    error: float
    """How far their pictures are from those of many steps: root mean square over pixels in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Pictures drawn in many steps, which few steps should draw too."""

    model: DiffusionModel
    noise: NoiseSource
    labels: Labels | None
    wanted: Images

    def found(self, sampler: str, levels: tuple[float, ...]) -> Found:
        """What these levels draw, compared with it."""
        from snowmelt.models.base import Drawing

        drawn = list(self.model.sample(self.noise, self.labels, Drawing(sampler=sampler, levels=levels)))[-1]
        error = (drawn.x0.clamp(-1, 1) - self.wanted).square().mean().sqrt().item()
        return Found(sampler, levels, error)


def tune(options: TuneOptions) -> Path:
    """Search, check on other pictures, keep the levels in the run and return the file that holds them.

    Raises:
        UserError: for every mistake in the options, before anything is computed.
    """
    # Late, so that the command line stays instant.
    from rich.progress import Progress
    from rich.table import Table

    from snowmelt.device import make_precision, pick_device
    from snowmelt.diffusion.search import Trajectories
    from snowmelt.evaluation.drawing import keep_tuned
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

    check(options)
    run = Run.open(Path(options.run))
    model, _ = run.load_model(make_precision(pick_device(options.device), options.precision))
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} holds a {run.config.model} model, which draws in a single step: nothing to tune.")
    with Progress(console=console(), transient=True) as progress:
        drawn = trajectories(model, options, progress)
        bench, walk = next(drawn)
        others = (walk for _, walk in islice(drawn, -(-options.pictures // BATCH) - 1))
        best = search(bench, Trajectories.of(chain([walk], others)), options, progress)
        checked = [bench for bench, _ in drawn]
        table = Table("steps", "sampler", "error", *(f"{name}, as usual" for name in options.samplers))
        for count, by_sampler in best.items():
            first = next(iter(by_sampler.values()))
            mean = _mean_error(checked, first.sampler, first.levels)
            usual = (_mean_error(checked, name, usual_levels(model, name, count)) for name in options.samplers)
            table.add_row(str(count), first.sampler, f"{mean:.4f}", *(f"{error:.4f}" for error in usual))
    file = keep_tuned(run, {count: {n: one.levels for n, one in of.items()} for count, of in best.items()})
    screen = console()
    screen.print(table)
    screen.print(
        f"Difference from the pictures of {FINE} steps, root mean square over pixels from -1 to 1, on "
        f"{CHECKED} pictures that nothing was learned from."
    )
    screen.print(f"Wrote {file}; snowmelt sample {run.path} --steps {options.counts[-1]} uses it.", markup=False)
    return file


def check(options: TuneOptions) -> None:
    """Refuse what cannot be tuned."""
    from snowmelt.diffusion.samplers import SAMPLERS

    for name in options.samplers:
        how = choose(SAMPLERS, name, "sampler").how
        if how is None or how.eta:
            raise UserError(f"{name} is no multistep sampler without fresh noise; tune ddim, dpmpp_2m, ipndm, ...")
    for count in options.counts:
        if not FEWEST <= count <= MOST:
            raise UserError(f"--counts has {count}; give numbers of steps from {FEWEST} to {MOST}.")
    if not options.samplers or not options.counts:
        raise UserError("--samplers and --counts need a value each; leave them away for the usual ones.")
    if options.pictures < BATCH:
        raise UserError(f"--pictures is {options.pictures}; give at least {BATCH}.")


def trajectories(model: DiffusionModel, options: TuneOptions, progress: Progress) -> Iterator[tuple[Bench, list[Step]]]:
    """Walks over `FINE` levels, `BATCH` pictures each: those to learn from, then those to check on."""
    import torch

    from snowmelt.evaluation.drawing import class_by_chance
    from snowmelt.models.base import Drawing
    from snowmelt.seeds import noise_source

    data, device = model.config.data, model.precision.device
    total = -(-options.pictures // BATCH) + CHECKED // BATCH
    work = progress.add_task("Trajectories", total=total * FINE)
    for part in range(total):
        numbers = range(part * BATCH, (part + 1) * BATCH)
        noise = noise_source([options.seed] * BATCH, numbers, (data.channels, data.size, data.size), device)
        classes = [class_by_chance(data, options.seed, number) for number in numbers] if data.classes else []
        labels = torch.tensor(classes, device=device) if classes else None
        walk: list[Step] = []
        for step in model.sample(noise, labels, Drawing(sampler=REFERENCE, steps=FINE)):
            walk.append(step)
            progress.advance(work)
        yield Bench(model, noise, labels, walk[-1].x0.clamp(-1, 1)), walk


def search(bench: Bench, found: Trajectories, options: TuneOptions, progress: Progress) -> dict[int, dict[str, Found]]:
    """For each count the levels of each sampler, the best sampler first."""
    from snowmelt.diffusion.samplers import SAMPLERS
    from snowmelt.diffusion.search import Costs

    work = progress.add_task("Levels", total=len(options.samplers) + len(options.counts))
    best: dict[int, dict[str, Found]] = {count: {} for count in options.counts}
    for name in options.samplers:
        how = SAMPLERS[name].how
        assert how is not None, "they were checked"
        costs = Costs.of(found, how.form, answers=how.order)
        for count in options.counts:
            paths = {usual_levels(bench.model, name, count)}
            for discount in DISCOUNTS:
                places = costs.discounted(bench.model.config.data.std, discount).best(count)
                paths.add(tuple(found.levels[place] for place in places))
            best[count][name] = min((bench.found(name, path) for path in sorted(paths)), key=lambda one: one.error)
        progress.advance(work)
    for count, by_sampler in best.items():
        first = min(by_sampler.values(), key=lambda one: one.error)
        by_sampler[first.sampler] = moved(bench, first)
        best[count] = dict(sorted(by_sampler.items(), key=lambda item: item[1].error))
        progress.advance(work)
    return best


def moved(bench: Bench, found: Found) -> Found:
    """`found` with each level but the first moved, one at a time, where that is better."""
    for _ in range(ROUNDS):
        for place in range(1, len(found.levels)):
            for shift in SHIFTS:
                other = shifted(found.levels, place, shift)
                found = min(found, bench.found(found.sampler, other), key=lambda one: one.error)
    return found


def shifted(levels: tuple[float, ...], place: int, share: float) -> tuple[float, ...]:
    """The levels, one of them moved by a share of the way to its next neighbour (share > 0) or the one before."""
    before, after = levels[place] - levels[place - 1], 0.0
    after = levels[place + 1] - levels[place] if place + 1 < len(levels) else before
    level = levels[place] + share * (after if share > 0 else before)
    return (*levels[:place], level, *levels[place + 1 :])


def usual_levels(model: DiffusionModel, sampler: str, count: int) -> tuple[float, ...]:
    """Where the sampler would go if nothing were tuned."""
    from snowmelt.models.base import Drawing

    return tuple(model.grid(Drawing(sampler=sampler, steps=count)).tolist())


def _mean_error(benches: list[Bench], sampler: str, levels: tuple[float, ...]) -> float:
    squares = [bench.found(sampler, levels).error ** 2 for bench in benches]
    return (sum(squares) / len(squares)) ** 0.5
