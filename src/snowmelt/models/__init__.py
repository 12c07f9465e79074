"""The families of models, by name: the one registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from snowmelt.config import Config
from snowmelt.device import LAYOUTS, Precision
from snowmelt.diffusion.denoiser import PREDICTS
from snowmelt.diffusion.grids import GRIDS, MOST_STEPS, given_grid
from snowmelt.diffusion.guidance import GUIDANCES, THRESHOLDS
from snowmelt.diffusion.levels import LEVELS
from snowmelt.diffusion.loss import WEIGHTS
from snowmelt.diffusion.noise import BOUND
from snowmelt.diffusion.samplers import SAMPLERS, ancestral
from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.diffusion.variance import VARIANCES
from snowmelt.errors import UserError, choose, option_of
from snowmelt.models.base import Drawing, Learner, Model
from snowmelt.models.diffusion import DiffusionLearner, DiffusionModel, schedule_of
from snowmelt.models.gan import GANLearner, GANModel
from snowmelt.models.optimizer import OPTIMIZERS
from snowmelt.models.vae import VAELearner, VAEModel
from snowmelt.networks.group_norm import FLAGS
from snowmelt.networks.kernels import begin
from snowmelt.seeds import seeded


@dataclass(frozen=True)
class Family:
    """How to build the model of a configuration, and the learner of that model."""

    model: type[DiffusionModel] | type[VAEModel] | type[GANModel]
    learner: Callable[[Any], Learner]
    kernels: bool = True
    """Whether its networks have layers that kernels of ours compute (`networks.convolution`, `networks.group_norm`)."""

    @property
    def at_once(self) -> bool:
        """Whether its models draw in a single step."""
        return self.model.at_once


MODELS: dict[str, Family] = {
    "diffusion": Family(DiffusionModel, DiffusionLearner),
    "vae": Family(VAEModel, VAELearner),
    "gan": Family(GANModel, GANLearner, kernels=False),
}


def build_model(config: Config, precision: Precision, *, learns: bool = False) -> Model:
    """The model of a configuration, its first weights drawn from the run's seed, on the device of `precision`.

    Args:
        learns: whether gradients are going to be needed.
    """
    family = choose(MODELS, config.model, "model")
    with seeded(config.training.seed, "weights"):
        model = family.model(config, precision)
    model = model.to(precision.device)
    if family.kernels and precision.device.type == "cpu" and precision.layout == "channels_last":
        # All that it will need at once, and not each when it is first needed.
        begin(FLAGS[precision.dtype], gradients=learns)
    return model.to(memory_format=LAYOUTS[precision.layout])  # pyright: ignore  (torch leaves it out of its types)


def build_learner(config: Config, precision: Precision) -> Learner:
    """A learner with a fresh model."""
    return choose(MODELS, config.model, "model").learner(build_model(config, precision, learns=True))


def check_names(config: Config) -> None:
    """Refuse a configuration whose names are not all known, or whose schedule is none."""
    choose(MODELS, config.model, "model")
    diffusion = config.diffusion
    schedule_of(diffusion)
    choose(PREDICTS, diffusion.predicts, "prediction")
    choose(LEVELS, diffusion.levels, "distribution of levels")
    choose(WEIGHTS, diffusion.weight, "weight")
    choose(OPTIMIZERS, config.training.optimizer, "optimizer")
    without_picture = diffusion.betas[-1:] == (1,) or schedule_of(diffusion)(torch.ones(1)).item() < -2 * BOUND + 1
    if diffusion.predicts == "noise" and without_picture:
        raise UserError("Where nothing of the picture is left the noise says nothing of it; use --predicts v.")


def check_drawing(drawing: Drawing, *, classes: bool) -> None:
    """Refuse what can be refused without the run: unknown names, options without effect, numbers out of range."""
    method = choose(SAMPLERS, drawing.sampler, "sampler")
    choose(THRESHOLDS, drawing.threshold, "threshold")
    choose(GUIDANCES, drawing.guide, "guide")
    choose(dict.fromkeys(("no_class", "early")), drawing.away_from, "estimate to go away from")
    if drawing.schedule is not None:
        choose(SCHEDULES, drawing.schedule, "schedule")
    if drawing.spacing is not None:
        choose(GRIDS, drawing.spacing, "spacing")
    if drawing.variance is not None:
        choose(dict.fromkeys((*VARIANCES, "analytic", "learned")), drawing.variance, "variance")
        if method.sampler is not ancestral:
            raise UserError(f"{drawing.sampler} has no variance to choose; leave --variance away, or take ddpm.")
    if drawing.eta is not None:
        if method.how is None or not method.how.may_draw:
            able = ", ".join(name for name, one in SAMPLERS.items() if one.how is not None and one.how.may_draw)
            raise UserError(f"{drawing.sampler} has no fresh noise to choose; leave --eta away, or take one of {able}.")
        if not 0 <= drawing.eta <= 1:
            raise UserError(f"--eta is {drawing.eta}; give a number from 0 (no fresh noise) to 1 (as much as ddpm).")
    _check_levels(drawing)
    _check_guidance(drawing, classes=classes)


def _check_levels(drawing: Drawing) -> None:
    if not 1 <= drawing.steps <= MOST_STEPS:
        raise UserError(f"--steps is {drawing.steps}; give 1 to {MOST_STEPS:,}, such as 15.")
    if not drawing.answers:
        raise UserError("--mean-first leaves nothing to ask the network with one of --levels; give another level.")
    if drawing.mean_first and (drawing.guidance != 1 or drawing.variance == "learned"):
        raise UserError("--mean-first goes with neither --guidance nor a learned --variance; leave it away.")
    if drawing.levels:
        given_grid(drawing.levels)
        for name in ("schedule", "spacing"):
            if getattr(drawing, name) is not None:
                raise UserError(f"--levels says all of the levels; leave --{name} away.")


def _check_guidance(drawing: Drawing, *, classes: bool) -> None:
    plain = Drawing()
    for name in ("guide", "away_from", "guidance_range", "guidance_rescale"):
        if drawing.guidance == 1 and getattr(drawing, name) != getattr(plain, name):
            raise UserError(f"{option_of(name)} does nothing without guidance; add --guidance 2, say.")
    if not math.isfinite(drawing.guidance):
        raise UserError(f"--guidance is {drawing.guidance}; give a number such as 1 or 2.")
    if not 0 <= drawing.guidance_rescale <= 1:
        raise UserError(f"--guidance-rescale is {drawing.guidance_rescale}; give a share from 0 to 1.")
    if drawing.guidance != 1 and drawing.away_from == "no_class" and not classes:
        raise UserError(
            "--guidance holds a picture to its class, and there is none here; leave it away, or add --away-from early."
        )
    low, high = drawing.guidance_range or (0.0, 1.0)
    if not low < high:
        raise UserError(f"--guidance-range {low:g} {high:g} is empty; give a lower and a higher log-SNR, such as -4 4.")
