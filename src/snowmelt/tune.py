"""`snowmelt tune`: which few levels draw best with this run, found on trajectories of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from snowmelt.errors import UserError, choose
from snowmelt.terminal import console

if TYPE_CHECKING:
    from rich.progress import Progress

    from snowmelt.diffusion.multistep import Form
    from snowmelt.diffusion.search import Costs, Trajectories
    from snowmelt.diffusion.walk import NoiseSource, Step
    from snowmelt.models.base import Drawing
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.shapes import Images, Labels

FINE = 41
"""Levels of a trajectory, of which few are chosen."""
REFERENCE = "dpmpp_3m"
DISCOUNTS = (0.0, 0.5, 1.0)
"""How much of an error the rest of the way undoes (see `snowmelt.diffusion.search`); each is tried."""
TRIED, CHECKED = 64, 128
"""Pictures that every candidate draws, and others that the best are checked on."""
LARGEST_BATCH, LARGE = 64, 64
"""Pictures drawn at once, up to this size; fewer of larger ones, whose trajectories would not fit into memory."""
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
    counts: tuple[int, ...] = (5, 6, 8, 10)
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


class Part(NamedTuple):
    """Pictures that were drawn in many steps."""

    noise: NoiseSource
    labels: Labels | None
    wanted: Images


class Trial(NamedTuple):
    """Levels for a sampler, tried."""

    drawing: Drawing
    error: float
    """How far the pictures are from those of many steps: root mean square over pixels in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where levels are tried: few steps should draw what many have drawn."""

    model: DiffusionModel
    parts: list[Part]
    tried: Callable[[], object]
    """Called after every trial."""

    def trial(self, drawing: Drawing) -> Trial:
        """Draw so, and compare."""
        squares: list[float] = []
        for part in self.parts:
            *_, last = self.model.sample(part.noise, part.labels, drawing)
            squares += [(last.x0.clamp(-1, 1) - part.wanted).square().mean().item()] * len(part.wanted)
        self.tried()
        return Trial(drawing, (sum(squares) / len(squares)) ** 0.5)


def tune(options: TuneOptions) -> Path:
    """Search, check on other pictures, keep the levels in the run and return the file that holds them.

    Raises:
        UserError: for every mistake in the options, before anything is computed.
    """
    # Late, so that the command line stays instant.
    from rich.progress import Progress
    from rich.table import Table

    from snowmelt.device import make_precision, pick_device
    from snowmelt.evaluation.drawing import keep_tuned
    from snowmelt.models.base import Drawing
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

    check(options)
    run = Run.open(Path(options.run))
    model, state = run.load_model(make_precision(pick_device(options.device), options.precision))
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} holds a {run.config.model} model, which draws in a single step: nothing to tune.")
    screen = console()
    screen.print(
        f"Drawing {options.pictures + CHECKED} pictures in {FINE} steps, then {TRIED} of them {_trials(options):,} "
        f"times in {min(options.counts)} to {max(options.counts)} steps."
    )
    with Progress(console=screen, transient=True) as progress:
        drawn = walks(model, options, progress)
        found, parts = learned(drawn, options.pictures)
        trying = progress.add_task("Levels", total=_trials(options))
        bench = Bench(model, parts, lambda: progress.advance(trying))
        costs = costs_of(found, options.samplers)
        best = {count: searched(bench, costs, count) for count in options.counts}
        others = [part for part, _ in drawn]
        checking = progress.add_task("Check", total=len(best) * (1 + len(options.samplers)))
        check_bench = Bench(model, others, lambda: progress.advance(checking))
        table = Table("steps", "best", "error", *(f"{name}, as usual" for name in options.samplers))
        for count, one in best.items():
            usual = (check_bench.trial(Drawing(sampler=name, steps=count)).error for name in options.samplers)
            error = check_bench.trial(one.drawing).error
            table.add_row(str(count), one.drawing.sampler, f"{error:.4f}", *(f"{other:.4f}" for other in usual))
    file = keep_tuned(run, state, {count: one.drawing for count, one in best.items()})
    screen.print(table)
    screen.print(
        f"Errors are differences from pictures of {FINE} steps, root mean square over pixels from -1 to 1, of "
        f"{CHECKED} pictures that had no part in the search."
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
    if options.pictures < TRIED:
        raise UserError(f"--pictures is {options.pictures}; give at least {TRIED}.")


def walks(model: DiffusionModel, options: TuneOptions, progress: Progress) -> Iterator[tuple[Part, list[Step]]]:
    """Batches of pictures with their walks over `FINE` levels: `options.pictures` to learn from, `CHECKED` others."""
    import torch

    from snowmelt.evaluation.drawing import class_by_chance
    from snowmelt.models.base import Drawing
    from snowmelt.seeds import noise_source

    data, device = model.config.data, model.precision.device
    batch = max(1, min(LARGEST_BATCH, LARGEST_BATCH * LARGE**2 // data.size**2))
    starts = [*range(0, options.pictures, batch), *range(options.pictures, options.pictures + CHECKED, batch)]
    work = progress.add_task("Trajectories", total=len(starts) * FINE)
    for start, stop in pairwise([*starts, options.pictures + CHECKED]):
        numbers = range(start, stop)
        shape = (data.channels, data.size, data.size)
        noise = noise_source([options.seed] * len(numbers), numbers, shape, device)
        classes = [class_by_chance(data, options.seed, number) for number in numbers] if data.classes else []
        labels = torch.tensor(classes, device=device) if classes else None
        walk: list[Step] = []
        for step in model.sample(noise, labels, Drawing(sampler=REFERENCE, steps=FINE)):
            walk.append(step)
            progress.advance(work)
        yield Part(noise, labels, walk[-1].x0.clamp(-1, 1)), walk


def learned(drawn: Iterator[tuple[Part, list[Step]]], pictures: int) -> tuple[Trajectories, list[Part]]:
    """What the first `pictures` of the walks teach, and the first `TRIED` of the pictures."""
    from snowmelt.diffusion.search import Trajectories

    parts: list[Part] = []

    def some() -> Iterator[list[Step]]:
        seen = 0
        while seen < pictures:
            part, walk = next(drawn)
            if seen < TRIED:
                parts.append(part)
            seen += len(part.wanted)
            yield walk

    return Trajectories.of(some()), parts


def costs_of(found: Trajectories, samplers: Sequence[str]) -> dict[str, Costs]:
    """What each sampler's steps cost; computed once for those that weigh two answers alike."""
    from snowmelt.diffusion.samplers import SAMPLERS
    from snowmelt.diffusion.search import Costs

    kinds: dict[tuple[Form, int], Costs] = {}
    costs: dict[str, Costs] = {}
    for name in samplers:
        how = SAMPLERS[name].how
        assert how is not None, "they were checked"
        kind = how.form, min(how.order, 2)
        if kind not in kinds:
            kinds[kind] = Costs.of(found, how.form, answers=kind[1])
        costs[name] = kinds[kind]
    return costs


def searched(bench: Bench, costs: dict[str, Costs], count: int) -> Trial:
    """The best levels of `count` steps, of the best sampler."""
    from snowmelt.models.base import Drawing

    tried: list[Trial] = []
    for name, cost in costs.items():
        usual = bench.model.grid(Drawing(sampler=name, steps=count)).tolist()
        tried.append(bench.trial(Drawing(sampler=name, levels=tuple(usual))))
        for discount in DISCOUNTS:
            places = cost.discounted(bench.model.config.data.std, discount).best(count)
            tried.append(bench.trial(Drawing(sampler=name, levels=tuple(cost.levels[place] for place in places))))
    best = min(tried, key=_error)
    for _ in range(ROUNDS):
        for place in range(1, count):
            for share in SHIFTS:
                other = dataclasses.replace(best.drawing, levels=moved(best.drawing.levels, place, share))
                best = min(best, bench.trial(other), key=_error)
    return best


def moved(levels: tuple[float, ...], place: int, share: float) -> tuple[float, ...]:
    """The levels, one of them moved by a share of the way to its next neighbour (share > 0) or the one before."""
    before = levels[place] - levels[place - 1]
    after = levels[place + 1] - levels[place] if place + 1 < len(levels) else before
    return (*levels[:place], levels[place] + share * (after if share > 0 else before), *levels[place + 1 :])


def _error(trial: Trial) -> float:
    return trial.error


def _trials(options: TuneOptions) -> int:
    """How many trials `searched` makes for all counts."""
    of_samplers = len(options.samplers) * (1 + len(DISCOUNTS))
    return sum(of_samplers + ROUNDS * (count - 1) * len(SHIFTS) for count in options.counts)
