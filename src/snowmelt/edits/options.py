"""What each kind of edit may be asked; the first positional argument is the run, the others are pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions:
    """What all kinds of edits share."""

    run: tyro.conf.Positional[Path]
    """The run directory that `snowmelt train` made."""
    out: Path | None = None
    """Where the pictures go; RUN/edits when not given."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class that the network is told; none when not given."""
    steps: int = 50
    """Noise levels that are visited."""
    guidance: float = 1.0
    """How strongly to hold to the class: 1 is plain, 2 to 4 exaggerates it."""
    guide: str = "classifier_free"
    """How: classifier_free, or projected, which keeps colours calm at high --guidance."""
    away_from: str = "no_class"
    """no_class, or early: away from what the network drew when it was young; that needs no classes."""
    threshold: str = "clamp"
    """clamp, dynamic or none: what keeps every guess within what a picture can show."""
    seed: int = 0
    """Decides the noise."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintOptions(EditOptions):
    """Fill in the part of a photo that is white in a mask."""

    photo: tyro.conf.Positional[Path]
    """The photo; it is made to fit as the run's own pictures were."""
    mask: Path
    """A picture as large as the photo, or as the run's: white is filled in, black is kept."""
    fill: str = "repaint"
    """repaint (goes back again and again, so that old and new fit), replace (goes once) or posterior (by gradients)."""
    count: int = 4
    """Fillings to draw."""
    sampler: str = "ddpm"
    """Any of `snowmelt sample`; fresh noise helps here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaryOptions(EditOptions):
    """Draw pictures like a photo: noise is added, and taken away again."""

    photo: tyro.conf.Positional[Path]
    """The photo; it is made to fit as the run's own pictures were."""
    strength: float = 0.5
    """How much: near 0 the photo stays, 1 forgets it."""
    count: int = 4
    """Variations to draw."""
    sampler: str = "ddim"
    """Any of `snowmelt sample`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolateOptions(EditOptions):
    """Draw what lies between two pictures."""

    first: tyro.conf.Positional[str]
    """A photo, or a number: picture 0 of that seed, as ddim draws it with --precision fp32."""
    second: tyro.conf.Positional[str]
    """Likewise."""
    count: int = 9
    """Pictures, the two ends among them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertOptions(EditOptions):
    """Find the noise that DDIM turns into a photo, and say how well it does."""

    photo: tyro.conf.Positional[Path]
    """The photo; it is made to fit as the run's own pictures were."""
    steps: int = 100
    """Noise levels that are visited."""
    rounds: int = 8
    """Evaluations at each level, at most: 1 is plain DDIM inversion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnlargeOptions(EditOptions):
    """Draw what a small picture may show when it is larger."""

    photo: tyro.conf.Positional[Path]
    """The small picture; it is made to fit the run's size divided by --factor."""
    factor: int = 2
    """How many times larger; divides the run's size."""
    noise: float = 0.02
    """How far the small picture may be off, of the range from -1 to 1."""
    count: int = 4
    """Pictures to draw."""
    sampler: str = "ddpm"
    """Any of `snowmelt sample`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions(EditOptions):
    """Draw what a damaged photo may have been."""

    photo: tyro.conf.Positional[Path]
    """The damaged photo; it is made to fit as the run's own pictures were."""
    damage: str = "blur"
    """blur, or grey: a colour picture seen without its colours."""
    width: float = 1.0
    """Of the blur: its standard deviation in pixels of the run's size."""
    noise: float = 0.02
    """How far the damaged photo may be off, of the range from -1 to 1."""
    count: int = 4
    """Pictures to draw."""
    sampler: str = "ddpm"
    """Any of `snowmelt sample`."""


def pictures_named(options: EditOptions) -> list[Any]:
    """The positional arguments without the run."""
    fields = [field for field in dataclasses.fields(options) if is_positional(field) and field.name != "run"]
    return [getattr(options, field.name) for field in fields]


def is_positional(field: dataclasses.Field[Any]) -> bool:
    """Whether a field is given without its name."""
    return "Positional" in str(field.type)
