"""The pictures of a run's previews: always from the same noise, so that one sees them change."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from snowmelt.diffusion.walk import Step
from snowmelt.evaluation.drawing import SHARP, SMOOTH, detail, in_parts, keep_suited
from snowmelt.models.base import Drawing, Model
from snowmelt.pictures import moments_of
from snowmelt.presets import drawn_at_once
from snowmelt.run import Run
from snowmelt.seeds import noise_source
from snowmelt.shapes import Images, Labels
from snowmelt.terminal import Log, words_of
from snowmelt.training.signals import Stop

DRAWING = Drawing()
"""How previews are drawn, and the last one, which is the final pictures, where that suits the run."""
TRIED = 6
"""Steps that tell how long drawing takes."""
MOMENTS, STRIP = 10, 10
"""Noisy images of each picture of a strip, and its pictures, at most."""


class Drawn(NamedTuple):
    """What a preview drew."""

    pictures: Images
    strip: list[Images]
    """Some of them: `MOMENTS` noisy images, and the pictures."""


FEWER = (1, 2, 3, 6)
"""What the number of pictures is divided by where there is no time for all of them."""


@dataclass
class Previews:
    """Draws them, with whatever weights the model has."""

    run: Run
    model: Model
    device: torch.device
    stop: Stop
    log: Log
    divisor: int = 1
    """Of the number of pictures: one of `FEWER`."""

    @property
    def columns(self) -> int:
        """Of the grid: pictures of a class stand beside each other, at least two."""
        classes = self.run.config.data.classes
        return max(2, min(8, 48 // min(len(classes), 10)) // self.divisor) if classes else 6

    def limit(self, seconds: float, most: float) -> float:
        """Where drawing all pictures takes `seconds`, and that is longer than `most`, draw fewer from now on.

        Returns:
            The share of them that is left.
        """
        before, whole = self._count(), seconds * self.divisor
        self.divisor = next((divisor for divisor in FEWER if whole <= divisor * most), FEWER[-1])
        if (count := self._count()) < before:
            self.log(f"Pictures: {count} at the end instead of {before}, whose drawing would take {words_of(seconds)}.")
        return count / before

    def draw(self, drawing: Drawing | None = None) -> Drawn | None:
        """The pictures, and how some came to be; None when the run was asked to stop meanwhile."""
        parts = list[list[Images]]()
        for part in self._parts():
            moments, pictures = list[Images](), None
            shown = [index - part[0] for index in self._of_strip() if index in part]
            for step in self._steps(part, drawing or DRAWING):
                if self.stop.requested:
                    return None
                # Of every moment only what will be shown: all of it may be more than there is memory for.
                moments.append(step.x[shown].clone())
                pictures = step.x0
            assert pictures is not None, "a walk has a step"
            parts.append([*(moments[index] for index in moments_of(len(moments), MOMENTS)), pictures])
        *strip, pictures = (torch.cat(one) for one in zip(*parts, strict=True))
        return Drawn(pictures, [*strip, pictures[self._of_strip()]])

    def draw_at_last(self) -> Drawn | None:
        """The final pictures, drawn as usual or, where fresh noise costs them their detail, without; from then on that
        is how the run draws."""
        drawn = self.draw()
        if drawn is None or self.model.at_once:
            return drawn
        sharp = self.draw(replace(DRAWING, sampler=SHARP))
        if sharp is None:
            return None
        kept = detail(drawn.pictures) / max(detail(sharp.pictures), 1e-12)
        sampler, drawn = (SHARP, sharp) if kept < SMOOTH else (DRAWING.sampler, drawn)
        self.log(f"Sampler: {sampler} (the fresh noise of {DRAWING.sampler} leaves {kept:.0%} of the detail).")
        keep_suited(self.run, sampler, kept)
        return drawn

    def foreseen(self, most: float) -> tuple[float, Images, float]:
        """Seconds that drawing takes, from a few steps of the pictures that are drawn first: `TRIED`, or fewer where
        they take longer than `most`.

        The first of them does not count, since it may wake the device up, and of the others the median: beside other
        processes a single one may take several times as long as the next.

        Returns:
            The seconds, what has become of those pictures, and how many times as many there are in all.
        """
        part, taken = self._parts()[0], list[float]()
        steps, pictures = self._steps(part, DRAWING), None
        while len(taken) < (1 if self.model.at_once else TRIED) and (len(taken) < 2 or sum(taken) <= most):
            begin = time.monotonic()
            step = next(steps, None)
            if step is None:
                break
            taken.append(time.monotonic() - begin)
            pictures = step.x0
        assert pictures is not None, "a walk has a step"
        each = median(taken[1:]) * DRAWING.count if len(taken) > 1 else taken[0]
        times = self._count() / len(part)
        return each * times, pictures, times

    def _steps(self, part: Sequence[int], drawing: Drawing) -> Iterator[Step]:
        """From noise to some of the pictures."""
        data, labels = self.run.config.data, self._labels()
        shape = (data.channels, data.size, data.size)
        noise = noise_source([self.run.config.training.seed] * len(part), part, shape, self.device)
        some = None if labels is None else labels[list(part)]
        yield from self.model.sample(noise, some, drawing)

    def _parts(self) -> list[Sequence[int]]:
        """The pictures, as many at once as a model draws."""
        return in_parts(range(self._count()), drawn_at_once(self.run.config))

    def _of_strip(self) -> list[int]:
        """The pictures that a strip shows: the first of a row."""
        return [*range(0, self._count(), self.columns)][:STRIP]

    def _count(self) -> int:
        labels = self._labels()
        return 36 // self.divisor if labels is None else len(labels)

    def _labels(self) -> Labels | None:
        """One row for each class, ten rows at most; none where there are no classes."""
        classes = len(self.run.config.data.classes)
        if not classes:
            return None
        return torch.arange(min(classes, 10)).repeat_interleave(self.columns).to(self.device)
