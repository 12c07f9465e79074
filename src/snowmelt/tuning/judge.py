"""The last word: how near to real pictures a candidate draws, and where moving it brings it nearer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from snowmelt.data.pixels import to_pixels
from snowmelt.data.prepared import spread_rows
from snowmelt.diffusion.grids import given_grid
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.errors import UserError
from snowmelt.evaluation.drawing import in_parts, noise_of
from snowmelt.evaluation.features import Space, open_spaces, real_features
from snowmelt.evaluation.metrics import frechet_of
from snowmelt.evaluation.neighbours import Pair
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.presets import drawn_at_once
from snowmelt.run import Run
from snowmelt.shapes import Features

JUDGED, REAL = 256, 2000
"""Pictures drawn with each candidate, and training pictures, between which the distance is measured."""
FINALISTS, FINAL = 4, 1024
"""How many candidates, each of a kind of its own, draw so many others, which decide (and so does what fewer steps
found): fresh noise makes a failure now and then, and among dozens that drew few pictures the one that made none by
chance would win (docs/tune.md)."""
MOVED = 12
"""Moves of each start, at most."""
STARTS = 3
"""Drawings that moves begin at, at most: see `moved_on`."""


class Judged(NamedTuple):
    """A way to draw, judged."""

    distance: float
    drawing: Drawing

    def words(self) -> str:
        """How it draws, for the table, which has no room for long names."""
        levels = self.drawing.levels
        noise = "" if self.drawing.eta is None else f"eta {self.drawing.eta:g}, "
        mean = "mean first, " if self.drawing.mean_first else ""
        return f"{short(self.drawing.sampler)}, {noise}{mean}{levels[0]:.1f} to {levels[-1]:.1f}"


def short(sampler: str) -> str:
    """A sampler's name as the table has it.

    >>> short("dpmpp_2m_late"), short("unipc")
    ('2m_late', 'unipc')
    """
    return sampler.removeprefix("dpmpp_")


@dataclasses.dataclass(frozen=True)
class Judge:
    """Says how near pictures are to the training pictures, in a space that nobody trained."""

    model: DiffusionModel
    space: Space
    real: Features
    seed: int
    drew: Callable[[int], object]
    """Told after every candidate how many pictures it drew."""

    @staticmethod
    def of(run: Run, model: DiffusionModel, seed: int, drew: Callable[[int], object]) -> Judge:
        """With pictures of `run`.

        Raises:
            UserError: they are gone.
        """
        data = run.open_pictures()
        (space,) = open_spaces(data, ("random",), device=model.precision.device, log=lambda _: None)
        return Judge(model, space, real_features(space, data, spread_rows(data.train, REAL)), seed, drew)

    def distance(self, drawing: Drawing) -> float:
        """The Frechet distance of `JUDGED` pictures, made of the same noise for every drawing."""
        return self._of(drawing, range(JUDGED))

    def final(self, drawing: Drawing) -> float:
        """That of `FINAL` others."""
        return self._of(drawing, range(JUDGED, JUDGED + FINAL))

    def _of(self, drawing: Drawing, pictures: range) -> float:
        features: list[torch.Tensor] = []
        # Of other noise than the trajectories.
        config, precision = self.model.config, self.model.precision
        for numbers in in_parts(pictures, drawn_at_once(config, precision.name)):
            noise, labels = noise_of(config.data, self.seed + 1, numbers, precision.device)
            *_, last = self.model.sample(noise, labels, drawing)
            features.append(self.space.features(to_pixels(last.x0).numpy()))
        self.drew(len(pictures))
        return frechet_of(Pair(self.real, torch.cat(features)))


def moved_on(
    distance: Callable[[Drawing], float], judged: list[Judged], even: int, heir: Drawing | None = None
) -> list[Judged]:
    """`judged`, and all that moves were tried from and led to.

    They begin at the best of the first `even` candidates and at the best of the searched ones, since with few steps the
    second can be far behind at first and far ahead in the end (docs/benchmarks.md); and at `heir`, what fewer steps had
    found, `respaced`, since moves that begin with more steps can stop at a bump on the way there.
    """
    known = {one.drawing: one for one in judged}

    def judge(drawing: Drawing) -> Judged:
        if drawing not in known:
            known[drawing] = Judged(distance(drawing), drawing)
        return known[drawing]

    starts = [min(some, key=_distance) for some in (judged[:even], judged[even:]) if some]
    if heir is not None:
        starts.append(judge(heir))
    for start in starts:
        improved(judge, start)
    return list(known.values())


def best_of(final: Callable[[Drawing], float], judged: list[Judged], heir: Drawing | None = None) -> Judged:
    """The one whose `final` distance is least: of the nearest of each kind, a sampler with or without fresh noise, the
    `FINALISTS` nearest; and of `heir`, which many pictures have found already, with fewer steps."""
    of_each = dict[tuple[str, bool], Judged]()
    for one in sorted(judged, key=_distance):
        of_each.setdefault((one.drawing.sampler, draws(one.drawing)), one)
    nearest = [*of_each.values()][:FINALISTS]
    asked = dict.fromkeys((*nearest, *(one for one in judged if one.drawing == heir)))
    return min(asked, key=lambda one: final(one.drawing))


def draws(drawing: Drawing) -> bool:
    """Whether its steps draw fresh noise.

    >>> draws(Drawing(sampler="dpmpp_2m_sde")), draws(Drawing(sampler="dpmpp_2m_sde", eta=0.0))
    (True, False)
    """
    how = SAMPLERS[drawing.sampler].how
    return drawing.eta > 0 if drawing.eta is not None else how is not None and how.draws


def improved(judge: Callable[[Drawing], Judged], start: Judged) -> Judged:
    """`start`, moved along one of `MOVES` after the other for as long as its pictures come nearer to real ones."""
    best, left = start, MOVED
    for move in MOVES:
        for way in (1, -1):
            begun = best
            while left and (other := move(best.drawing, way)) is not None:
                left -= 1
                found = judge(other)
                if found.distance >= best.distance:
                    break
                best = found
            if best is not begun:
                break
    return best


def fresher(drawing: Drawing, way: int) -> Drawing | None:
    """With a quarter more or less fresh noise; None where there is no more, or no less, or none to choose.

    A sampler that draws it late has no eta to begin at.
    """
    how = SAMPLERS[drawing.sampler].how
    if how is None or not how.may_draw or (how.late and drawing.eta is None):
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


def respaced(drawing: Drawing, answers: int) -> Drawing:
    """At as many levels that the network is asked `answers` times, spread over the same range in the same way.

    >>> respaced(Drawing(levels=(-9.0, -5.0, 5.0)), 5).levels
    (-9.0, -7.0, -5.0, 0.0, 5.0)
    """
    places = np.linspace(0, len(drawing.levels) - 1, answers + drawing.mean_first)
    levels = np.interp(places, range(len(drawing.levels)), drawing.levels)
    return dataclasses.replace(drawing, levels=tuple(levels.tolist()))


def with_levels(drawing: Drawing, levels: Iterable[float]) -> Drawing | None:
    """The same with other levels; None where they are none."""
    try:
        return dataclasses.replace(drawing, levels=tuple(given_grid(list(levels)).tolist()))
    except UserError:
        return None


def _distance(judged: Judged) -> float:
    return judged.distance
