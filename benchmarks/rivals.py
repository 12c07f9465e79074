"""The systems that Snowmelt is compared with, trained as their own scripts train: one step at a time.

`diffusers` is a part of the tests' environment; the other is installed by

    pip install -c constraints.txt -r benchmarks/requirements.txt
    pip install --no-deps denoising-diffusion-pytorch==2.3.4

without what it asks for beside: a `torchvision` that fits the build of torch is not to be had everywhere, and only its
`Trainer`, of which `denoising_diffusion_pytorch` below does the step, looks at it.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snowmelt.config import TrainingConfig
from snowmelt.ema import Average
from snowmelt.models.optimizer import Optimizer
from snowmelt.training.plan import Plan

RATE, CLIP = 1e-4, 1.0
"""Learning rate and largest norm of the gradient of both scripts."""


NETWORKS: dict[str, dict[str, Any]] = {
    # 3.8 and 35.7 million parameters; the large one is that of the DDPM paper for CIFAR-10.
    "small": {"block_out_channels": [64, 96, 128], "layers_per_block": 1, "attention": [False, False, True]},
    "large": {
        "block_out_channels": [128, 256, 256, 256],
        "layers_per_block": 2,
        "attention": [False, True, False, False],
    },
}


def settings(network: str, size: int, channels: int) -> dict[str, Any]:
    """Those of a `UNet2DModel` of `NETWORKS`."""
    chosen = dict(NETWORKS[network])
    attention = chosen.pop("attention")
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["AttnDownBlock2D" if on else "DownBlock2D" for on in attention],
        "up_block_types": ["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)],
        **chosen,
    }


@dataclass(frozen=True)
class Rival:
    """A system under training."""

    step: Callable[[], object]
    """One batch: forward, backward, update, average."""
    module: nn.Module
    """Its network."""
    finished: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    """The denoiser of its averaged weights: (x, log-SNR) -> the picture, in [-1, 1]."""
    precision: str = "fp32"


def batches(pictures: Tensor, batch: int) -> Iterator[Tensor]:
    """For ever, shuffled anew each time round, as a DataLoader gives them."""
    if len(pictures) < batch:
        raise SystemExit(f"A step of {batch} pictures cannot be made of {len(pictures)}; name a larger folder.")
    while True:
        yield from torch.utils.data.DataLoader(pictures, batch_size=batch, shuffle=True, drop_last=True)


def diffusers(
    pictures: Tensor,
    settings: dict[str, Any],
    batch: int,
    *,
    updates: int = 100_000,
    bf16: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Rival:
    """A step of examples/unconditional_image_generation/train_unconditional.py, with its defaults.

    Args:
        pictures: (count, channels, size, size) in [-1, 1].
        settings: of its `UNet2DModel`.
        updates: that its cosine learning rate is laid out for.
        bf16: under bf16 autocast, as somebody who knows would add.
    """
    from diffusers import UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.nn import functional

    torch.manual_seed(seed)
    model = UNet2DModel(**settings).to(device)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noising = _ddpm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=updates)
    order = batches(pictures, batch)

    def step() -> None:
        images = next(order).to(device)
        noise = torch.randn_like(images)
        times = torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            answer = model(noising.add_noise(images, noise, times), times).sample
            loss = functional.mse_loss(answer.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    def finished() -> Callable[[Tensor, Tensor], Tensor]:
        averaged = copy.deepcopy(model).eval()
        ema.copy_to(averaged.parameters())
        return _by_noise(averaged, noising)

    return Rival(step, model, finished, "bf16" if bf16 else "fp32")


def diffusers_tuned(
    pictures: Tensor, settings: dict[str, Any], batch: int, *, updates: int = 100_000, seed: int = 0
) -> Rival:
    """`diffusers`' network, loss, noise and batch, with the optimizer, learning rate and averaging of Snowmelt."""
    from diffusers import UNet2DModel
    from torch.nn import functional

    torch.manual_seed(seed)
    model, noising, order = UNet2DModel(**settings), _ddpm(), batches(pictures, batch)

    def loss() -> Tensor:
        images = next(order)
        noise = torch.randn_like(images)
        times = torch.randint(0, 1000, (batch,))
        return functional.mse_loss(model(noising.add_noise(images, noise, times), times).sample, noise)

    step, average = _tuned(model, loss, batch, updates)

    def finished() -> Callable[[Tensor, Tensor], Tensor]:
        averaged = copy.deepcopy(model).eval()
        averaged.load_state_dict(average.state())
        return _by_noise(averaged, noising)

    return Rival(step, model, finished)


def _tuned(
    model: nn.Module, loss: Callable[[], Tensor], batch: int, updates: int
) -> tuple[Callable[[], None], Average]:
    """A step of `model` with the optimizer and learning rate of Snowmelt, laid out for `updates`, and its averaging."""
    training = TrainingConfig(steps=updates, batch=batch, learning_rate=3e-3)
    plan, optimizer, average = Plan.open(Path(), training), Optimizer(model, training), Average(model, training.average)
    count = itertools.count(1)

    def step() -> None:
        done = next(count)
        loss().backward()
        # At least 0, should there be time for more updates than were foreseen.
        optimizer.step(max(0.0, plan.learning_rate(done)))
        average.update(done)

    return step, average


def _ddpm() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000)


def _by_noise(model: Any, noising: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser of a network that finds the noise."""

    def picture(x: Tensor, time: int, alpha: float, sigma: float) -> Tensor:
        return (x - sigma * model(x, time).sample) / alpha

    return at_table(noising.alphas_cumprod, picture)


def _without(package: str, *names: str) -> None:
    """Let a package that is not installed, and not used, be imported."""
    if package not in sys.modules and find_spec(package) is None:
        empty = types.ModuleType(package)
        for name in names:
            setattr(empty, name, None)
        sys.modules[package] = empty


def denoising_diffusion_pytorch(pictures: Tensor, batch: int, *, seed: int = 0) -> Rival:
    """A step of its `Trainer`, with its defaults, on a small `Unet`."""
    model, process = _gaussian_diffusion(pictures, seed)
    from ema_pytorch import EMA

    ema = EMA(process, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(process.parameters(), lr=RATE, betas=(0.9, 0.99))
    order = batches(pictures / 2 + 0.5, batch)

    def step() -> None:
        loss = process(next(order))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(process.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return Rival(step, model, lambda: _by_predictions(ema.ema_model.eval()))


def denoising_diffusion_pytorch_tuned(pictures: Tensor, batch: int, *, updates: int = 100_000, seed: int = 0) -> Rival:
    """Its network, loss, noise and batch, with the optimizer, learning rate and averaging of Snowmelt."""
    model, process = _gaussian_diffusion(pictures, seed)
    order = batches(pictures / 2 + 0.5, batch)
    step, average = _tuned(model, lambda: process(next(order)), batch, updates)

    def finished() -> Callable[[Tensor, Tensor], Tensor]:
        averaged = copy.deepcopy(process).eval()
        averaged.model.load_state_dict(average.state())
        return _by_predictions(averaged)

    return Rival(step, model, finished)


def _gaussian_diffusion(pictures: Tensor, seed: int, width: int = 32) -> tuple[nn.Module, Any]:
    """A small `Unet` of denoising-diffusion-pytorch, and its process."""
    _without("torchvision", "transforms", "utils")
    _without("accelerate", "Accelerator")
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    torch.manual_seed(seed)
    model = Unet(dim=width, dim_mults=(1, 2, 4), channels=pictures.shape[1])
    return model, GaussianDiffusion(model, image_size=pictures.shape[-1])


def _by_predictions(process: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Its denoiser."""

    def picture(x: Tensor, time: int, _alpha: float, _sigma: float) -> Tensor:
        return process.model_predictions(x, torch.full((len(x),), time, dtype=torch.long)).pred_x_start

    return at_table(process.alphas_cumprod, picture)


def at_table(
    kept: Tensor, picture: Callable[[Tensor, int, float, float], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser by log-SNR of one by steps of a table: at each level the nearest step answers.

    Args:
        kept: alpha^2 of each step.
    """
    levels = (kept / (1 - kept)).log()

    def denoise(x: Tensor, log_snr: Tensor) -> Tensor:
        time = int((levels - log_snr.item()).abs().argmin())
        alpha, sigma = float(kept[time]) ** 0.5, float(1 - kept[time]) ** 0.5
        with torch.no_grad():
            return picture(x, time, alpha, sigma).clamp(-1, 1)

    return denoise
