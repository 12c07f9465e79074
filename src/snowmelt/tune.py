"""`snowmelt tune`: which few levels draw best with this run.

Candidates come from trajectories of the run itself (`diffusion/search.py`): levels at which few steps draw what many
draw. Many steps need not draw best, since a network that has not learned everything is followed into all its errors,
and fresh noise forgets a part of them. So the last word has the distance to real pictures, and the best candidates are
then moved for as long as that brings them nearer to these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    from snowmelt.evaluation.features import Space
    from snowmelt.models.base import Drawing
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run
    from snowmelt.shapes import Features, Images, Labels

FINE = 41
"""Levels of a trajectory, of which few are chosen."""
REFERENCE = "dpmpp_3m"
DISCOUNTS = (0.0, 0.5, 1.0)
"""How much of an error the rest of the way undoes (see `snowmelt.diffusion.search`); each is tried."""
HALF = 0.5
"""The one taken for the sampler with fresh noise, which is not tried by how near it comes to many steps."""
TRIED = 32
"""Pictures that are drawn at searched levels, to be compared with those of many steps."""
JUDGED, REAL = 256, 2000
"""Pictures drawn with each candidate, and training pictures, between which the distance is measured."""
USUAL = ("dpmpp_2m", "unipc")
"""Samplers whose usual levels are candidates, beside those of the sampler that draws when nothing is asked for."""
LARGEST_BATCH, LARGE = 32, 64
"""Pictures drawn at once, up to this size; fewer of larger ones, whose trajectories would not fit into memory."""
SHIFTS = (0.3, -0.3)
"""Shares of the way to a neighbour by which a level is moved, to see whether that is better."""
ROUNDS = 1
MOVED = 12
"""Moves of each of the two best candidates, at most, that real pictures judge."""
FEWEST, MOST = 3, 30
"""Steps that levels are found for."""


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Find the levels at which few steps draw best with a run; `snowmelt sample` then uses them."""

    run: tyro.conf.Positional[Path]
    """A run of a diffusion model."""
    counts: tuple[int, ...] = (5, 6, 8, 10)
    """Numbers of steps to find levels for."""
    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm")
    """The multistep samplers to search them for; of each number of steps the best one becomes the default."""
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


class Judged(NamedTuple):
    """A way to draw, judged."""

    distance: float
    drawing: Drawing

    def words(self) -> str:
        """How it draws, for the table."""
        levels = self.drawing.levels
        noise = "" if self.drawing.eta is None else f"eta {self.drawing.eta:g}, "
        return f"{self.drawing.sampler}, {noise}{levels[0]:.1f} to {levels[-1]:.1f}"


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


@dataclasses.dataclass(frozen=True)
class Judge:
    """Says how near pictures are to the training pictures, in a space that nobody trained."""

    model: DiffusionModel
    space: Space
    real: Features
    seed: int
    judged: Callable[[], object]
    """Called after every candidate."""

    @staticmethod
    def of(run: Run, model: DiffusionModel, options: TuneOptions, judged: Callable[[], object]) -> Judge:
        """With pictures of `run`.

        Raises:
            UserError: they are gone.
        """
        from snowmelt.data.prepared import spread_rows
        from snowmelt.evaluation.features import open_spaces, real_features

        data = run.open_pictures()
        (space,) = open_spaces(data, ("random",), device=model.precision.device, log=lambda _: None)
        return Judge(model, space, real_features(space, data, spread_rows(data.train, REAL)), options.seed, judged)

    def distance(self, drawing: Drawing) -> float:
        """The Frechet distance of `JUDGED` pictures, made of the same noise for every drawing."""
        import numpy as np

        from snowmelt.data.pixels import to_pixels
        from snowmelt.evaluation.metrics import frechet_of
        from snowmelt.evaluation.neighbours import Pair

        pixels: list[np.ndarray] = []
        # Of other noise than the trajectories.
        for noise, labels in noises(self.model, self.seed + 1, JUDGED):
            *_, last = self.model.sample(noise, labels, drawing)
            pixels.append(to_pixels(last.x0).cpu().numpy())
        self.judged()
        return frechet_of(Pair(self.real, self.space.features(np.concatenate(pixels))))


def tune(options: TuneOptions) -> Path:
    """Search, judge by real pictures, keep the levels in the run and return the file that holds them.

    Raises:
        UserError: for every mistake in the options, or training pictures that are gone, before anything is computed.
    """
    # Late, so that the command line stays instant.
    from rich.progress import Progress
    from rich.table import Table

    from snowmelt.device import make_precision, pick_device
    from snowmelt.evaluation.drawing import keep_tuned
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

    check(options)
    run = Run.open(Path(options.run))
    model, state = run.load_model(make_precision(pick_device(options.device), options.precision))
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} holds a {run.config.model} model, which draws in a single step: nothing to tune.")
    screen = console()
    with Progress(console=screen, transient=True) as progress:
        judging = progress.add_task("Candidates", start=False)
        judge = Judge.of(run, model, options, lambda: progress.advance(judging))
        progress.console.print(
            f"Drawing {options.pictures} pictures in {FINE} steps, {TRIED} of them {_trials(options):,} times in "
            f"{min(options.counts)} to {max(options.counts)} steps, and {JUDGED} others with every candidate."
        )
        found, parts = learned(walks(model, options, progress), options.pictures)
        trying = progress.add_task("Levels", total=_trials(options))
        bench = Bench(model, parts, lambda: progress.advance(trying))
        costs = costs_of(found, options.samplers)
        candidates = {count: candidates_of(bench, costs, count) for count in options.counts}
        progress.update(judging, total=sum(len(these) + 2 * MOVED for these in candidates.values()))
        progress.start_task(judging)
        judged = {count: [Judged(judge.distance(one), one) for one in these] for count, these in candidates.items()}
        usual = list(usual_names())
        kept = {count: moved_on(judge.distance, these, len(usual)) for count, these in judged.items()}
    file = keep_tuned(run, state, {count: one.drawing for count, (one, _) in kept.items()})
    table = Table("steps", "best", "distance", "unmoved", *usual)
    for count, these in judged.items():
        best, start = kept[count]
        shown = (best, start, *these[: len(usual)])
        table.add_row(str(count), best.words(), *(f"{one.distance:.4g}" for one in shown))
    screen.print(table)
    screen.print(
        f"Distances are Frechet distances of {JUDGED} drawn from {len(judge.real):,} training pictures, in the space "
        "of random convolutions: of the best, of what it was moved from, and of samplers at their usual levels. It "
        "was chosen by these distances, so its own flatters it a little."
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


def noises(model: DiffusionModel, seed: int, count: int) -> Iterator[tuple[NoiseSource, Labels | None]]:
    """Batches of the noise of `count` pictures and, where there are classes, of what they show."""
    import torch

    from snowmelt.evaluation.drawing import class_by_chance
    from snowmelt.seeds import noise_source

    data, device = model.config.data, model.precision.device
    batch = max(1, min(LARGEST_BATCH, LARGEST_BATCH * LARGE**2 // data.size**2))
    for start, stop in pairwise([*range(0, count, batch), count]):
        numbers, shape = range(start, stop), (data.channels, data.size, data.size)
        classes = [class_by_chance(data, seed, number) for number in numbers] if data.classes else []
        noise = noise_source([seed] * len(numbers), numbers, shape, device)
        yield noise, torch.tensor(classes, device=device) if classes else None


def walks(model: DiffusionModel, options: TuneOptions, progress: Progress) -> Iterator[tuple[Part, list[Step]]]:
    """Batches of `options.pictures` pictures with their walks over `FINE` levels."""
    from snowmelt.models.base import Drawing

    batches = list(noises(model, options.seed, options.pictures))
    work = progress.add_task("Trajectories", total=len(batches) * FINE)
    for noise, labels in batches:
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


def usual_names() -> Iterator[str]:
    """The samplers whose usual levels are candidates."""
    from snowmelt.models.base import Drawing

    yield from dict.fromkeys((*USUAL, Drawing().sampler))


def candidates_of(bench: Bench, costs: dict[str, Costs], count: int) -> list[Drawing]:
    """Ways to draw in `count` steps, among which real pictures decide.

    First usual levels, of the samplers and in the order of `usual_names`; then the one nearest to many steps, and the
    sampler with fresh noise at the levels that suit its like without, unless they are among those.
    """
    from snowmelt.models.base import Drawing

    plain = Drawing().sampler
    grids = {name: bench.model.grid(Drawing(sampler=name, steps=count)).tolist() for name in usual_names()}
    usual = [Drawing(sampler=name, levels=tuple(grid)) for name, grid in grids.items()]
    cost = costs.get(plain.removesuffix("_sde"), next(iter(costs.values())))
    noisy = Drawing(sampler=plain, levels=levels_of(bench, cost, HALF, count))
    return list(dict.fromkeys([*usual, searched(bench, costs, count).drawing, noisy]))


def levels_of(bench: Bench, cost: Costs, discount: float, count: int) -> tuple[float, ...]:
    """The best path of `count` levels."""
    places = cost.discounted(bench.model.config.data.std, discount).best(count)
    return tuple(cost.levels[place] for place in places)


def searched(bench: Bench, costs: dict[str, Costs], count: int) -> Trial:
    """The levels of `count` steps, of the sampler, with which pictures are nearest to those of many steps."""
    from snowmelt.models.base import Drawing

    tried: list[Trial] = []
    for name, cost in costs.items():
        usual = bench.model.grid(Drawing(sampler=name, steps=count)).tolist()
        tried.append(bench.trial(Drawing(sampler=name, levels=tuple(usual))))
        for discount in DISCOUNTS:
            tried.append(bench.trial(Drawing(sampler=name, levels=levels_of(bench, cost, discount, count))))
    best = min(tried, key=_error)
    for _ in range(ROUNDS):
        for place in range(1, count):
            for share in SHIFTS:
                other = dataclasses.replace(best.drawing, levels=moved(best.drawing.levels, place, share))
                best = min(best, bench.trial(other), key=_error)
    return best


def moved_on(distance: Callable[[Drawing], float], judged: list[Judged], usual: int) -> tuple[Judged, Judged]:
    """The nearest to real pictures that moves lead to, and where they began.

    They begin at the best of the first `usual` candidates and at the best of the searched ones: with few steps the
    second can be far behind at first and far ahead in the end (docs/benchmarks.md).
    """
    starts = [min(some, key=_distance) for some in (judged[:usual], judged[usual:]) if some]
    return min(((improved(distance, start), start) for start in starts), key=lambda way: way[0].distance)


def improved(distance: Callable[[Drawing], float], start: Judged) -> Judged:
    """`start`, moved along one of `MOVES` after the other for as long as its pictures come nearer to real ones."""
    best, left = start, MOVED
    for move in MOVES:
        for way in (1, -1):
            begun = best
            while left and (other := move(best.drawing, way)) is not None:
                left -= 1
                found = Judged(distance(other), other)
                if found.distance >= best.distance:
                    break
                best = found
            if best is not begun:
                break
    return best


def fresher(drawing: Drawing, way: int) -> Drawing | None:
    """With a quarter more or less fresh noise; None where there is no more, or no less, or none to choose."""
    from snowmelt.diffusion.samplers import SAMPLERS

    how = SAMPLERS[drawing.sampler].how
    if how is None or not how.may_draw:
        return None
    eta = (how.eta if drawing.eta is None else drawing.eta) + way / 4
    return dataclasses.replace(drawing, eta=eta) if 0 <= eta <= 1 else None


def bent(drawing: Drawing, way: int) -> Drawing | None:
    """With levels denser where there is much noise, or where there is little."""
    first, *_, last = drawing.levels
    power, reach = 1.2**way, last - first
    return with_levels(drawing, (first + reach * ((level - first) / reach) ** power for level in drawing.levels))


def started(drawing: Drawing, way: int) -> Drawing | None:
    """Starting at less noise, or at more."""
    first, *_, last = drawing.levels
    share = 1 - way / (last - first)
    return with_levels(drawing, (last - share * (last - level) for level in drawing.levels))


def ended(drawing: Drawing, way: int) -> Drawing | None:
    """Ending at more noise, or at less."""
    first, *_, last = drawing.levels
    share = 1 - way / (last - first)
    return with_levels(drawing, (first + share * (level - first) for level in drawing.levels))


MOVES: tuple[Callable[[Drawing, int], Drawing | None], ...] = (fresher, ended, bent, started)
"""(drawing, 1 or -1) -> a drawing near to it, or None where there is none; in the order that they are tried."""


def with_levels(drawing: Drawing, levels: Iterable[float]) -> Drawing | None:
    """The same with other levels; None where they are none."""
    from snowmelt.diffusion.grids import given_grid

    try:
        return dataclasses.replace(drawing, levels=tuple(given_grid(list(levels)).tolist()))
    except UserError:
        return None


def moved(levels: tuple[float, ...], place: int, share: float) -> tuple[float, ...]:
    """The levels, one of them moved by a share of the way to its next neighbour (share > 0) or the one before."""
    before = levels[place] - levels[place - 1]
    after = levels[place + 1] - levels[place] if place + 1 < len(levels) else before
    return (*levels[:place], levels[place] + share * (after if share > 0 else before), *levels[place + 1 :])


def _error(trial: Trial) -> float:
    return trial.error


def _distance(judged: Judged) -> float:
    return judged.distance


def _trials(options: TuneOptions) -> int:
    """How many trials `searched` makes for all counts."""
    of_samplers = len(options.samplers) * (1 + len(DISCOUNTS))
    return sum(of_samplers + ROUNDS * (count - 1) * len(SHIFTS) for count in options.counts)
