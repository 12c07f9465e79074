"""Where candidates come from: levels with which few steps draw what many steps of the same run draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.progress import Progress

from snowmelt.diffusion.multistep import Form
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.search import Costs, Trajectories
from snowmelt.diffusion.walk import NoiseSource, Step
from snowmelt.evaluation.drawing import in_parts, noise_of
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.shapes import Images, Labels

FINE = 41
"""Levels of a trajectory, of which few are chosen."""
REFERENCE = "dpmpp_3m"
DISCOUNTS = (0.0, 0.5, 1.0)
"""How much of an error the rest of the way undoes (see `snowmelt.diffusion.search`); each is tried."""
PLAIN, FRESH = "dpmpp_2m", ("dpmpp_2m_sde", "dpmpp_2m_late")
"""A sampler, and its like with fresh noise."""
HALF = 0.5
"""The discount of those with fresh noise, which are not tried by how near they come to many steps."""
TRIED = 32
"""Pictures that are drawn at searched levels, to be compared with those of many steps."""
USUAL = (PLAIN, "unipc", *FRESH)
"""Samplers whose usual levels are candidates."""
LARGEST_BATCH, LARGE = 32, 64
"""Pictures whose trajectories are drawn, and kept, at once, up to this size; fewer of larger ones."""
SHIFTS = (0.3, -0.3)
"""Shares of the way to a neighbour by which a level is moved, to see whether that is better."""
ROUNDS = 1
"""How often every level is tried so: a round takes two trials for each."""


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


def walks(model: DiffusionModel, *, pictures: int, seed: int, progress: Progress) -> Iterator[tuple[Part, list[Step]]]:
    """Batches of `pictures` pictures with their walks over `FINE` levels."""
    most = max(1, min(LARGEST_BATCH, LARGEST_BATCH * LARGE**2 // model.config.data.size**2))
    data, device = model.config.data, model.precision.device
    batches = [noise_of(data, seed, numbers, device) for numbers in in_parts(range(pictures), most)]
    work = progress.add_task("Trajectories", total=len(batches) * FINE)
    for noise, labels in batches:
        walk: list[Step] = []
        for step in model.sample(noise, labels, Drawing(sampler=REFERENCE, steps=FINE)):
            walk.append(step)
            progress.advance(work)
        yield Part(noise, labels, walk[-1].x0.clamp(-1, 1)), walk


def learned(drawn: Iterator[tuple[Part, list[Step]]]) -> tuple[Trajectories, list[Part]]:
    """What walks teach, and the first `TRIED` of their pictures."""
    parts: list[Part] = []

    def some() -> Iterator[list[Step]]:
        seen = 0
        for part, walk in drawn:
            if seen < TRIED:
                parts.append(part)
            seen += len(part.wanted)
            yield walk

    return Trajectories.of(some()), parts


def costs_of(found: Trajectories, samplers: Sequence[str]) -> dict[str, Costs]:
    """What each sampler's steps cost; computed once for those that weigh two answers alike."""
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


def at_usual_levels(bench: Bench, sampler: str, count: int, *, mean_first: bool) -> Drawing:
    """With a sampler's usual levels, so that the network is asked `count` times."""
    grid = bench.model.grid(Drawing(sampler=sampler, steps=count, mean_first=mean_first))
    return Drawing(sampler=sampler, levels=tuple(grid.tolist()), mean_first=mean_first)


def even(bench: Bench, count: int) -> list[Drawing]:
    """The samplers of `USUAL`, in their order, at their usual levels; then the same with the mean first."""
    ways = [(name, mean_first) for mean_first in (False, True) for name in USUAL]
    return [at_usual_levels(bench, name, count, mean_first=mean_first) for name, mean_first in ways]


def searched(bench: Bench, costs: dict[str, Costs], count: int) -> list[Drawing]:
    """Levels that trajectories suggest, at which the network is asked `count` times after the mean.

    First those with which a sampler comes nearest to many steps; then samplers with fresh noise, at the levels that
    suit their like without.
    """
    cost = costs.get(PLAIN, next(iter(costs.values())))
    fresh = [at_best_levels(bench, name, cost, HALF, count) for name in FRESH]
    return [nearest(bench, costs, count).drawing, *fresh]


def at_best_levels(bench: Bench, sampler: str, cost: Costs, discount: float, count: int) -> Drawing:
    """With the levels of the best path, so that the network is asked `count` times after the mean."""
    places = cost.discounted(bench.model.config.data.std, discount).best(count + 1)
    return Drawing(sampler=sampler, levels=tuple(cost.levels[place] for place in places), mean_first=True)


def nearest(bench: Bench, costs: dict[str, Costs], count: int) -> Trial:
    """The levels, and the sampler, with which pictures are nearest to those of many steps."""
    tried: list[Trial] = []
    for name, cost in costs.items():
        tried.append(bench.trial(at_usual_levels(bench, name, count, mean_first=True)))
        tried += [bench.trial(at_best_levels(bench, name, cost, discount, count)) for discount in DISCOUNTS]
    best = min(tried, key=_error)
    for _ in range(ROUNDS):
        for place in range(1, count + 1):
            for share in SHIFTS:
                other = dataclasses.replace(best.drawing, levels=moved(best.drawing.levels, place, share))
                best = min(best, bench.trial(other), key=_error)
    return best


def moved(levels: tuple[float, ...], place: int, share: float) -> tuple[float, ...]:
    """The levels, one of them moved by a share of the way to its next neighbour (share > 0) or the one before."""
    before = levels[place] - levels[place - 1]
    after = levels[place + 1] - levels[place] if place + 1 < len(levels) else before
    return (*levels[:place], levels[place] + share * (after if share > 0 else before), *levels[place + 1 :])


def trials(samplers: Sequence[str], counts: Iterable[int]) -> int:
    """How many trials `searched` makes for all counts."""
    of_samplers = len(samplers) * (1 + len(DISCOUNTS))
    return sum(of_samplers + ROUNDS * count * len(SHIFTS) for count in counts)


def _error(trial: Trial) -> float:
    return trial.error
