"""Diffusion models: a denoiser learns to see pictures in noise; a sampler walks from noise to picture with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from snowmelt.config import Config
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import Denoise, Denoiser
from snowmelt.diffusion.guidance import clamped, classifier_free
from snowmelt.diffusion.loss import WEIGHTS, denoising_loss
from snowmelt.diffusion.noise import add_noise
from snowmelt.diffusion.samplers import SAMPLERS, NoiseSource, Step
from snowmelt.diffusion.schedules import SCHEDULES, time_grid
from snowmelt.errors import choose
from snowmelt.models.base import Drawing, Model, Update
from snowmelt.models.optimizer import Optimizer
from snowmelt.networks.unet import UNet
from snowmelt.shapes import Labels, Levels

HELD_OUT_LEVELS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Log-SNRs at which the held-out error is measured, from nearly all noise to nearly clean."""


class DiffusionModel(Model):
    """A denoiser with the schedule it was trained on."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        data = config.data
        backbone = UNet(config.network, channels=data.channels, classes=len(data.classes))
        self.denoiser = Denoiser(backbone, config.diffusion.predicts, data.std)

    def bind(self, labels: Labels | None) -> Denoise:
        """The denoiser with its class bound, computing in the run's precision; dropout is off."""
        self.eval()

        def denoise(x: Tensor, log_snr: Tensor) -> Tensor:
            with self.precision.autocast():
                return self.denoiser(x, log_snr, labels)

        return denoise

    def sample(self, noise: NoiseSource, labels: Labels | None, drawing: Drawing) -> Iterator[Step]:
        """From noise to pictures, a step at a time: see `Model`."""
        schedule = choose(SCHEDULES, drawing.schedule or self.config.diffusion.schedule, "schedule")
        sampler = choose(SAMPLERS, drawing.sampler, "sampler")
        denoise = self.bind(labels)
        if labels is not None:
            denoise = classifier_free(denoise, self.bind(None), drawing.guidance)
        steps = sampler(clamped(denoise), noise(0), time_grid(schedule, drawing.steps), noise)
        while True:
            # Entered anew for every step, since a generator would carry it into its caller.
            with torch.inference_mode():
                step = next(steps, None)
            if step is None:
                return
            yield step


class DiffusionLearner:
    """Trains a `DiffusionModel` by the denoising loss."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.config = model.config
        self.schedule = choose(SCHEDULES, self.config.diffusion.schedule, "schedule")
        self.loss = partial(denoising_loss, weight=choose(WEIGHTS, self.config.diffusion.weight, "weight"))
        self.optimizer = Optimizer(model, self.config.training)

    @property
    def averaged(self) -> nn.Module:
        """The whole model."""
        return self.model

    def update(self, batch: Batch, rng: torch.Generator, learning_rate: float) -> Update:
        """One step at random levels, noise and hidden labels: see `Learner`."""
        self.model.train()
        # Dropout draws from torch's global generator; it too must be a function of (seed, step).
        torch.manual_seed(rng.initial_seed())
        images, labels = batch
        log_snr = self._levels(len(images), rng)
        noise = torch.randn(images.shape, generator=rng, device=images.device)
        if labels is not None:
            hidden = torch.rand(len(labels), generator=rng, device=labels.device) < self.config.diffusion.label_dropout
            labels = labels.masked_fill(hidden, len(self.config.data.classes))
        with self.model.precision.autocast():
            loss = self.loss(self.model.denoiser, images, log_snr, noise, cond=labels)
        value = loss.item()
        if not math.isfinite(value):
            return Update({"loss": value}, finite=False)
        loss.backward()
        return Update({"loss": value}, self.optimizer.step(learning_rate))

    def _levels(self, count: int, rng: torch.Generator) -> Levels:
        """Random levels, one from each of `count` equal slices of time, in random order.

        Every batch then sees all levels alike, which leaves less chance in the loss than free draws.
        """
        slices = torch.randperm(count, generator=rng, device=rng.device)
        return self.schedule((slices + torch.rand(count, generator=rng, device=rng.device)) / count)

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
        """Momenta and step counts: see `Learner`."""
        return self.optimizer.tensors()

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        self.optimizer.load(tensors)
