"""Diffusion models: a denoiser learns to see pictures in noise; a sampler walks from noise to picture with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from snowmelt.config import Config, DiffusionConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision, is_gpu
from snowmelt.diffusion.denoiser import Denoise, Denoiser, beginning_with, share
from snowmelt.diffusion.grids import GRIDS, check_grid, given_grid
from snowmelt.diffusion.guidance import GUIDANCES, THRESHOLDS, once, rescaled, within
from snowmelt.diffusion.levels import LEVELS, LEVELS_STATE, Drawn
from snowmelt.diffusion.linear import LinearEstimate
from snowmelt.diffusion.loss import WEIGHTS, denoising_losses
from snowmelt.diffusion.noise import add_noise, alpha_sigma, fresh_share, shaped
from snowmelt.diffusion.process import gaussian_kl
from snowmelt.diffusion.samplers import SAMPLERS, ancestral, multistep
from snowmelt.diffusion.schedules import (
    SAMPLED_ON,
    SCHEDULES,
    Schedule,
    ddpm_betas,
    ddpm_time,
    linear,
    shifted,
    table,
    table_time,
)
from snowmelt.diffusion.variance import VARIANCES, Variance, interpolated, posterior
from snowmelt.diffusion.walk import NoiseSource, Sampler, Step
from snowmelt.errors import UserError, choose
from snowmelt.models.base import Drawing, Model, Update, count_parameters
from snowmelt.models.optimizer import Optimizer
from snowmelt.models.warp import TOLD, warped
from snowmelt.networks.layers import sinusoids
from snowmelt.networks.unet import UNet
from snowmelt.shapes import Answers, Features, Grid, Images, Labels, Levels

HELD_OUT_LEVELS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Log-SNRs at which the held-out error is measured, from nearly all noise to nearly clean."""


def schedule_of(config: DiffusionConfig) -> Schedule:
    """The schedule of a configuration.

    Raises:
        UserError: there is no such schedule, or its betas are no schedule.
    """
    schedule = table(config.betas) if config.betas else choose(SCHEDULES, config.schedule, "schedule")
    return schedule if config.shift == 1 else shifted(schedule, config.shift)


class Certain(nn.Module):
    """No uncertainty: every level's loss counts as it is."""

    def forward(self, log_snr: Levels) -> Levels:
        """0 for each."""
        return torch.zeros_like(log_snr)


class Uncertainty(nn.Module):
    """u(l), learned so that the loss at every level is divided by what it usually is there: loss / e^u + u.

    (Karras et al. 2023, arXiv:2312.02696, equation 14.)
    """

    WIDTH = 64

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(self.WIDTH, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, log_snr: Levels) -> Levels:
        """u for each level."""
        return self.linear(sinusoids(ddpm_time(log_snr.float()), self.WIDTH)).flatten()


class Asked:
    """A denoiser with its class bound, that remembers its last answer for `variance`."""

    def __init__(self, model: DiffusionModel, labels: Labels | None) -> None:
        self.denoiser, self.precision, self.labels = model.denoiser, model.precision, labels
        self.last: tuple[Images, Images] | None = None

    def __call__(self, x: Images, log_snr: Tensor) -> Images:
        """x0, in the precision of the run."""
        with self.precision.autocast():
            answer = self.denoiser.answer(x, log_snr, self.labels)
        self.last = x, answer
        return self.denoiser.image(x, log_snr, answer)

    def variance(self, x: Images, log_snr: Tensor, following: Tensor) -> Images:
        """The learned variance of the step: see `Variance`."""
        if self.last is None or self.last[0] is not x:
            self(x, log_snr.to(x.device, x.dtype))
        assert self.last is not None
        return interpolated(share(x, self.last[1]).clamp(0, 1), x, log_snr, following)


class DiffusionModel(Model):
    """A denoiser with the schedule it was trained on."""

    foreseen: ClassVar[bool] = True

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        data, diffusion = config.data, config.diffusion
        self.schedule = schedule_of(diffusion)
        sampled_on = SAMPLED_ON.get(diffusion.schedule, diffusion.schedule)
        self.sampled_on = schedule_of(dataclasses.replace(diffusion, schedule=sampled_on))
        """The schedule that sampling takes its levels from, when no other is asked for."""
        out = data.channels * (2 if diffusion.variance == "learned" else 1)
        told = TOLD if diffusion.augment else 0
        first, shown, classes = None, data.channels, len(data.classes)
        if diffusion.linear:
            first = LinearEstimate(channels=data.channels, size=data.size, classes=classes, directions=diffusion.linear)
            shown = 2 * data.channels
        backbone = UNet(config.network, channels=shown, classes=classes, out=out, told=told)
        betas = diffusion.betas or ddpm_betas()
        time_of = partial(table_time, betas=betas)
        self.denoiser = Denoiser(
            backbone, diffusion.predicts, data.std, first=first, censored=diffusion.censored, time_of=time_of
        )
        self.uncertainty = Uncertainty() if diffusion.weight == "learned" else Certain()
        self.variances: dict[str, Variance] = dict(VARIANCES)
        """What `Drawing.variance` may name, but "learned"; an estimated one can be added."""
        self.weaker: dict[str, Callable[[Labels | None], Denoise]] = {"no_class": lambda _labels: self.bind(None)}
        """What `Drawing.away_from` may name; an early state of the same model can be added."""
        self.means: Images | None = None
        """The mean picture of each class and, last, of all, for `Drawing.mean_first`; whoever wants that gives them."""

    @property
    def compilable(self) -> nn.Module:
        """The backbone."""
        return self.denoiser.backbone

    def study(self, pictures: Iterable[Batch]) -> None:
        """The linear estimate is fitted to them: see `Model`."""
        if self.denoiser.first is not None:
            self.denoiser.first.fit(pictures)

    def bind(self, labels: Labels | None) -> Asked:
        """The denoiser with its class bound, computing in the run's precision; dropout is off."""
        self.eval()
        return Asked(self, labels)

    def guided(self, plain: Denoise, labels: Labels | None, drawing: Drawing) -> Denoise:
        """`plain` with the guidance and the threshold of `drawing`."""
        denoise = plain = once(plain)
        if drawing.guidance != 1:
            without = choose(self.weaker, drawing.away_from, "estimate to go away from")(labels)
            denoise = choose(GUIDANCES, drawing.guide, "guide")(plain, without, drawing.guidance)
            if drawing.guidance_rescale:
                denoise = rescaled(denoise, plain, drawing.guidance_rescale)
            if drawing.guidance_range is not None:
                denoise = within(denoise, plain, *drawing.guidance_range)
        return choose(THRESHOLDS, drawing.threshold, "threshold")(denoise)

    def denoise(self, labels: Labels | None, drawing: Drawing) -> Denoise:
        """The denoiser with its class, guidance and threshold bound."""
        return self.guided(self.bind(labels), labels, drawing)

    def grid(self, drawing: Drawing) -> Grid:
        """The levels that `drawing` asks for.

        Raises:
            UserError: there is no such schedule or grid, or the levels do not rise.
        """
        if drawing.levels:
            return given_grid(drawing.levels)
        schedule = choose(SCHEDULES, drawing.schedule, "schedule") if drawing.schedule else self.sampled_on
        spacing = drawing.spacing or choose(SAMPLERS, drawing.sampler, "sampler").grid
        return check_grid(choose(GRIDS, spacing, "grid")(schedule, drawing.count))

    def sampler(self, drawing: Drawing, plain: Asked) -> Sampler:
        """The sampler that `drawing` asks for; `plain` tells the variance where that is learned."""
        if drawing.variance is None:
            method = choose(SAMPLERS, drawing.sampler, "sampler")
            if drawing.eta is None or method.how is None:
                return method
            return partial(multistep, how=dataclasses.replace(method.how, eta=drawing.eta, late=0.0))
        if drawing.variance == "learned":
            if self.config.diffusion.variance != "learned":
                raise UserError("This run has not learned a variance; choose posterior, forward or analytic.")
            return partial(ancestral, variance=plain.variance)
        return partial(ancestral, variance=choose(self.variances, drawing.variance, "variance"))

    def sample(self, noise: NoiseSource, labels: Labels | None, drawing: Drawing) -> Iterator[Step]:
        """From noise to pictures, a step at a time: see `Model`."""
        plain = self.bind(labels)
        walk = self.sampler(drawing, plain)
        denoise = self.guided(plain, labels, drawing)
        if drawing.mean_first:
            denoise = beginning_with(self.mean_of(labels), denoise)
        yield from quietly(walk(denoise, noise(0), self.grid(drawing), noise))

    def mean_of(self, labels: Labels | None) -> Images:
        """The mean picture of each label, (batch, ...), or that of all, (1, ...)."""
        assert self.means is not None, "made ready for it: evaluation.drawing.make_ready"
        return self.means[-1:] if labels is None else self.means[labels]


def quietly(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps, made without remembering what gradients would need."""
    while True:
        # Entered anew for every step, since a generator would carry it into its caller.
        with torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step


class DiffusionLearner:
    """Trains a `DiffusionModel` by the denoising loss."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.config = model.config
        self.levels = choose(LEVELS, self.config.diffusion.levels, "distribution of levels")(model.schedule)
        self.weight = choose(WEIGHTS, self.config.diffusion.weight, "weight")
        self.learns_variance = self.config.diffusion.variance == "learned"
        self.optimizer = Optimizer(model, self.config.training, dtype=model.precision.dtype)
        self.waits = not is_gpu(model.precision.device)
        """Whether each step is waited for, or only some: a GPU stands still while it is waited for."""

    @property
    def averaged(self) -> nn.Module:
        """The whole model."""
        return self.model

    @property
    def parameters(self) -> int:
        """Of the denoiser, and of what it learns of its losses."""
        return count_parameters(self.model)

    def update(self, batch: Batch, rng: torch.Generator, learning_rate: float) -> Update:
        """One step at random levels, noise and hidden labels: see `Learner`."""
        self.model.train()
        # Dropout draws from torch's global generator; it too must be a function of (seed, step), and not the noise's.
        torch.manual_seed(rng.initial_seed() ^ 1)
        (images, labels), told = batch, None
        if self.config.diffusion.augment:
            images, told = warped(images, self.config.diffusion.augment, rng)
        drawn = self.levels.draw(len(images), rng)
        noise = torch.randn(images.shape, generator=rng, device=images.device)
        if labels is not None:
            hidden = torch.rand(len(labels), generator=rng, device=labels.device) < self.config.diffusion.label_dropout
            labels = labels.masked_fill(hidden, len(self.config.data.classes))
        with self.model.precision.autocast():
            losses, variance = self._losses(images, labels, drawn, noise, told)
        losses, doubt = losses.float(), self.model.uncertainty(drawn.log_snr)
        loss = (drawn.correction * (losses / doubt.exp() + doubt + variance)).mean()
        value = (drawn.correction * losses).mean().detach()
        if self.waits:
            value = value.item()
            if not math.isfinite(value + loss.item()):
                return Update({"loss": value}, finite=False)
        loss.backward()
        finite = self.optimizer.step(learning_rate) if self.waits else self.optimizer.step_unseen(learning_rate, loss)
        # Levels that learn have something to keep; only they need to know at once.
        if self.levels.tensors() and finite:
            self.levels.observe(drawn, (losses / doubt.exp() + variance).detach())
        return Update({"loss": value}, finite)

    def _losses(
        self, x0: Images, labels: Labels | None, drawn: Drawn, noise: Images, told: Features | None
    ) -> tuple[Levels, Levels]:
        """Of each picture: the denoising loss, and that of the variance."""
        denoiser, log_snr = self.model.denoiser, drawn.log_snr
        x = add_noise(x0, noise, log_snr)
        answer = denoiser.answer(x, log_snr, labels, told)
        losses = denoising_losses(denoiser, x0, drawn, x, answer, weight=self.weight)
        variance = (
            variance_losses(denoiser, x0, log_snr, x, answer) if self.learns_variance else torch.zeros_like(losses)
        )
        return losses, variance

    def held_out(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """The denoising error |x0_hat - x0|^2 per pixel at each of `HELD_OUT_LEVELS`, and the loss: see `Learner`."""
        images, labels = batch
        noise = torch.randn(images.shape, generator=rng, device=images.device)
        errors: dict[str, Tensor] = {}
        network_errors: list[Tensor] = []
        denoise = self.model.bind(labels)
        for level in HELD_OUT_LEVELS:
            log_snr = torch.tensor(level, device=images.device)
            with torch.inference_mode():
                x0 = denoise(add_noise(images, noise, log_snr), log_snr)
            error = ((x0 - images) ** 2).flatten(1).mean(1)
            errors[f"error at log-SNR {level:+.0f}"] = error
            c_out = self.model.denoiser.coefficients(log_snr, images).c_out
            network_errors.append(error / c_out.flatten() ** 2)
        errors["held_out_loss"] = torch.stack(network_errors).mean(0)
        return errors

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Momenta and step counts, and what the levels have learned: see `Learner`."""
        return {**self.optimizer.tensors(), **self.levels.tensors()}

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        mine = {name for name in tensors if name.startswith(LEVELS_STATE)}
        if mine == self.levels.tensors().keys():
            self.levels.load({name: tensors[name] for name in mine})
        self.optimizer.load({name: tensor for name, tensor in tensors.items() if name not in mine})


def variance_losses(denoiser: Denoiser, x0: Images, log_snr: Levels, x: Images, answer: Answers) -> Levels:
    """(batch,) the bound's term for the step to the next cleaner level of DDPM's table, in bits per dimension.

    The mean is held fixed, so that this teaches the variance only: the second part of L_hybrid of Nichol & Dhariwal
    2021, equation 16, with its weight of 0.001 for each of the 1000 terms of the bound.
    """
    following = linear((ddpm_time(log_snr) - 1) / (len(ddpm_betas()) - 1))
    alpha_next, _ = alpha_sigma(following, x0)
    reach = alpha_next * shaped(fresh_share(log_snr, following), x0)
    x0_hat = denoiser.image(x, log_snr, answer.detach())
    true = posterior(x, log_snr, following)
    kl = gaussian_kl(reach * x0, true, reach * x0_hat, interpolated(share(x, answer), x, log_snr, following))
    return kl.flatten(1).mean(1) / math.log(2)
