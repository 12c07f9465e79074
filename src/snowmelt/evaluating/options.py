"""The options of `snowmelt evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from snowmelt.errors import UserError, choose, option_of

MOST = {"samples": 100_000, "processes": 256, "bound_steps": 1_000_000, "ode_steps": 10_000}
LEAST = {
    "samples": 2,
    "processes": 0,
    "steps": 1,
    "batch": 1,
    "pictures": 2,
    "bound_steps": 2,
    "terms": 1,
    "ode_steps": 0,
    "probes": 1,
}
MEASURES = ("quality", "copies", "bits")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run: draw pictures and compare them with real ones; the figures go to RUN/evaluations.

    Every figure comes with its 95 % interval and with the floor: what real pictures get against other real ones.
    """

    run: tyro.conf.Positional[Path]
    """The run directory that `snowmelt train` made."""
    measure: tuple[str, ...] = ("quality", "copies")
    """quality: distances to real pictures; copies: whether training pictures are learned by heart; bits: bits/dim of
    held-out pictures (a bound and, for diffusion models, the probability-flow ODE)."""
    samples: int = 2000
    """Pictures to draw."""
    spaces: tuple[str, ...] = ("trained", "random")
    """What sees the pictures: trained (an encoder trained on the same folder), random (random convolutions), inception,
    dinov2; docs/features.md."""
    inception: Path | None = None
    """Inception-v3's weights of the usual FID (pt_inception-2015-12-05); adds the space."""
    dinov2: Path | None = None
    """DINOv2's weights (dinov2_vits14_pretrain.pth or a larger one's); adds the space."""
    state: str = "newest"
    """newest, before (it knew its training pictures by heart), or the number of a step that the run has kept."""
    sampler: str | None = None
    """How a diffusion model draws: as `snowmelt sample` does when not given."""
    steps: int | None = None
    """Levels it visits; 15 when not given."""
    guidance: float = 1.0
    """How strongly it holds to the class."""
    pictures: int = 64
    """Held-out pictures whose bits/dim are measured; all of them where there are fewer."""
    bound_steps: int = 1000
    """Levels of the bound, evenly spaced in log-SNR."""
    terms: int = 100
    """Steps of the bound to compute for each picture, drawn by chance from all of it; as many as --bound-steps computes
    every one."""
    variance: str = "posterior"
    """Variance of the bound's reverse steps: posterior, forward, analytic (measured on the training pictures), or
    learned where the network was taught it. With many steps all give the same."""
    cleanest: float | None = None
    """Log-SNR of the cleanest level, where the decoder takes over; the end of the run's schedule when not given. Where
    the last levels are not well learned a lower one, such as 5, needs fewer bits."""
    ode_steps: int = 40
    """Steps of the ODE; each takes four evaluations of the network; 0 leaves it out."""
    probes: int = 2
    """Random signs for each derivative of the ODE: more of them, less chance."""
    unconditional: bool = False
    """Do not tell the network the classes of the pictures whose bits/dim are measured."""
    seed: int = 0
    """Decides the noise; what happens to a picture does not depend on what is measured beside it."""
    processes: int = 0
    """That draw side by side, sharing the cores; 0: as many as are worth starting, or one on a GPU."""
    batch: int = 32
    """Pictures at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What pictures are drawn in; auto is as `snowmelt sample` draws them. All else is computed in fp32."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""


def check(options: EvaluateOptions) -> None:
    """Refuse what can be refused without the run."""
    for name in options.measure:
        choose(dict.fromkeys(MEASURES), name, "measure")
    if not options.measure:
        raise UserError(f"There is nothing to measure; give --measure one or more of: {', '.join(MEASURES)}.")
    for name, bound in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"{option_of(name)} is {value}; give at least {bound}.")
    for name, bound in MOST.items():
        if getattr(options, name) > bound:
            raise UserError(f"{option_of(name)} is {getattr(options, name)}; give at most {bound:,}.")
