"""What every edit works with, and what comes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from snowmelt.data.decode import recipe_of
from snowmelt.data.photo import images_of, read_photo
from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.editing import Operator, inversion, observed, psnr
from snowmelt.diffusion.guidance import THRESHOLDS, untouched
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.walk import NoiseSource, Step
from snowmelt.errors import UserError
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.run import Run
from snowmelt.shapes import Grid, Images, Labels
from snowmelt.terminal import console


class Result(NamedTuple):
    """What an edit made."""

    images: Images
    before: list[Images]
    """What it was made of, for the sheet, each (1, channels, size, size)."""
    facts: dict[str, Any]
    """Figures for the notes, as JSON."""
    noise: Images | None = None
    """The noise, where that was sought."""


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A model, how it is to draw, and the noise to draw from."""

    run: Run
    model: DiffusionModel
    drawing: Drawing
    labels: Labels | None
    """The class of each picture of the batch."""
    noise: NoiseSource
    """Its number 0 is where the pictures start."""

    def photo(self, path: Path, *, shrunk: int = 1) -> Images:
        """(1, channels, size, size) the photo at `path`, made to fit the run's size divided by `shrunk`."""
        data = self.run.config.data
        recipe = recipe_of(data.size // shrunk, data.background, data.fit)
        return images_of(read_photo(path, recipe), data.channels).to(self.model.precision.device)

    @property
    def grid(self) -> Grid:
        """The levels of a whole walk."""
        return self.model.grid(self.drawing)

    def denoise(self) -> Denoise:
        """With class and guidance, without threshold."""
        return self.model.denoise(self.labels, dataclasses.replace(self.drawing, threshold="none"))

    def walk(
        self, denoise: Denoise, x: Images, log_snrs: Grid, around: Callable[[Denoise], Denoise] = untouched
    ) -> Images:
        """From `x` to pictures; the threshold goes around `denoise`, where no gradient has to pass it.

        Args:
            around: goes around the threshold.
        """
        within = around(THRESHOLDS[self.drawing.threshold](denoise))
        return _last(SAMPLERS[self.drawing.sampler](within, x, log_snrs, self.noise), "Drawing", len(log_snrs)).x0

    def inverted(self, photo: Images, rounds: int) -> Images:
        """The noise that DDIM turns into `photo` on this canvas, all of whose pictures have one class.

        Raises:
            UserError: the drawing's guidance has no inverse.
        """
        if self.drawing.guide == "projected" and self.drawing.guidance not in (0, 1):
            raise UserError(
                "--guide projected goes by what it has drawn before, so it cannot be drawn backwards from a photo; "
                "leave it away."
            )
        labels = None if self.labels is None else self.labels[: len(photo)]
        denoise = self.model.denoise(labels, self.drawing)
        return _last(inversion(denoise, photo, self.grid, rounds=rounds), "Inverting", self.drawing.count).x

    def restored(self, operator: Operator, seen: Images, noise: float) -> Result:
        """Pictures that `operator` turns into what was seen, and how nearly it does."""
        denoise = observed(self.denoise(), operator, seen, noise, spread=self.run.config.data.std)
        images = self.walk(denoise, self.noise(0), self.grid)
        again = operator(images)
        return Result(
            images, [], {"agreement PSNR in dB": [decibels(one) for one in psnr(again, seen.expand_as(again))]}
        )


def decibels(value: Any) -> float | None:
    """For JSON, which has no infinity: None for a picture that is the same."""
    return round(float(value), 2) if math.isfinite(value) else None


def _last(steps: Iterator[Step], title: str, total: int) -> Step:
    """The last of `steps`, with progress over them."""
    last: Step | None = None
    for step in track(steps, title, total, console=console(), transient=True):
        last = step
    assert last is not None, "a walk has a step at least"
    return last
