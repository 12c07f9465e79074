"""The options of `snowmelt compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from snowmelt.config import FAMILIES
from snowmelt.errors import UserError, choose, options_given
from snowmelt.terminal import seconds_of

LEAST_SECONDS = 180.0
"""Of a whole comparison: below this there is no time to train three models and to measure them."""
MODELS = "vae,gan,diffusion"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Train a VAE, a GAN and a diffusion model on the same pictures for the same time, measure them alike, and say what
    can be said; or compare runs that are finished. The same command again continues an interrupted comparison."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """A folder, zip or tar of images, a prepared dataset or builtin:digits; or two or more finished runs."""
    out: Path | None = None
    """The folder of the comparison; compare/NAME when not given."""
    duration: Annotated[str | None, tyro.conf.arg(name="for")] = None
    """How long all of it may take, training, measuring and the report: 30m, 2h. 30m when not given."""
    models: str = MODELS
    """Families to train, with commas between them."""
    size: int | None = None
    """Height and width of the pictures; chosen from the images when not given."""
    color: Literal["auto", "rgb", "grey"] = "auto"
    """Colour or grey; auto looks at the images."""
    background: str = "white"
    """What transparent and padded parts show: a name or #rrggbb."""
    fit: Literal["crop", "pad"] = "crop"
    """How an image that is not square becomes one."""
    classes: Literal["auto", "none"] = "auto"
    """auto takes sub-folders as classes where every image lies in one."""
    flip: bool = False
    """Mirror half of the pictures: for things that have no left and right."""
    samples: int = 2000
    """Pictures drawn from each model to measure it; fewer where the time does not suffice."""
    spaces: tuple[str, ...] = ("trained", "random")
    """What sees the pictures: docs/features.md."""
    inception: Path | None = None
    """Inception-v3's weights of the usual FID, to measure in that space too."""
    dinov2: Path | None = None
    """DINOv2's weights, to measure in that space too."""
    seed: int = 0
    """Decides weights, the order of the pictures, noise and what is held out."""
    processes: int = 0
    """That draw side by side; 0: as many as are worth starting, or one on a GPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What pictures are drawn in; auto is for each model as `snowmelt sample` draws with it."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""

    @property
    def seconds(self) -> float:
        """The time for all of it."""
        return seconds_of(self.duration or "30m")

    @property
    def families(self) -> tuple[str, ...]:
        """The families to train."""
        return tuple(name.strip() for name in self.models.split(","))


TRAINED_ONLY = ("duration", "models", "size", "color", "background", "fit", "classes", "flip")
"""What only matters where models are trained."""


def check(options: CompareOptions) -> None:
    """Refuse what can be refused without looking at any file."""
    if not options.sources:
        raise UserError("Name the pictures to train the models on, or the finished runs to compare.")
    if options.samples < 2:
        raise UserError(f"--samples is {options.samples}; give at least 2, better 2000.")
    if options.processes < 0:
        raise UserError(f"--processes is {options.processes}; give 0 or more.")
    for family in options.families:
        choose(FAMILIES, family, "model")
    if len(set(options.families)) < len(options.families):
        raise UserError(f"--models {options.models} names a model twice; compare runs of one family by their folders.")
    if options.duration is not None and options.seconds < LEAST_SECONDS:
        raise UserError(f"--for {options.duration} is too short to train and measure models; give 3m or more.")


def check_runs(options: CompareOptions) -> None:
    """Refuse a comparison of runs that is none."""
    if given := options_given(options, TRAINED_ONLY):
        raise UserError(f"Finished runs are compared as they are; leave {given} away.")
    if len(options.sources) < 2:
        raise UserError("One run alone is no comparison; name two or more, or see `snowmelt report RUN`.")
    if len({Path(source).resolve() for source in options.sources}) < len(options.sources):
        raise UserError("A run is named twice; name each once.")
