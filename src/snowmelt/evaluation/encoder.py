"""An encoder trained on the folder itself, so that distances between pictures need no download.

Three tasks at once, on crops of training pictures, teach it what a measure of quality must notice:

    view      tell a crop from those of other pictures, given another crop of the same one (InfoNCE, van den Oord et
              al. 2018, arXiv:1807.03748): what is shown
    classes   name the class, where there are any: what is shown, in the person's own words
    damage    estimate the blur and the noise that were added to the second crop: whether it is sharp and clean

All of it is a function of the prepared dataset: the same one gives the same weights. Held-out pictures are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import Prepared, spread_rows
from snowmelt.evaluation.cache import cache_folder, digest_of, is_kept, kept, key_of
from snowmelt.evaluation.nearest import Rows, parts_of
from snowmelt.networks.encoder import Encoder, Said
from snowmelt.seeds import generator, seeded
from snowmelt.shapes import Features, Images
from snowmelt.terminal import console, words_of

SEED = 0
LARGEST = 64
"""Pictures beyond this many pixels are shrunk to it first."""
STANDARD_PICTURES = 4000
"""Training pictures whose features are made to have mean 0 and standard deviation 1."""
_HALVED = 40
"""Pictures beyond this many pixels are halved by the first convolution."""


@dataclass(frozen=True)
class Lessons:
    """How an encoder is trained; a part of its name in the cache."""

    version: int = 1
    """Raised when the code changes what it learns."""
    batch: int = 64
    """Pictures at a time; each is seen twice."""
    fewest: int = 500
    most: int = 1200
    """Steps: one for every `per_step` pictures, between these."""
    per_step: int = 45
    rate: float = 3e-3
    temperature: float = 0.1
    smoothing: float = 0.05
    blur: float = 1.5
    """Largest standard deviation in pixels."""
    noise: float = 0.4
    """Largest standard deviation, pictures being in [-1, 1]."""
    view_weight: float = 0.5
    class_weight: float = 1.0
    damage_weight: float = 1.0


LESSONS = Lessons()


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation of each feature over training pictures."""

    mean: Tensor
    std: Tensor

    def __call__(self, features: Features) -> Features:
        """Features with mean 0 and standard deviation 1 over the training pictures."""
        return (features - self.mean) / self.std


@dataclass(frozen=True)
class Trained:
    """An encoder that has learned from a prepared dataset."""

    encoder: Encoder
    standard: Standard
    identity: str
    """Of the weights themselves: a machine that rounds differently learns others."""


def standard_of(features: Features) -> Standard:
    """The standard of these features; one that never changes is divided by 1."""
    std = features.std(dim=0)
    return Standard(features.mean(dim=0), torch.where(std > 1e-6, std, 1.0))


def shrunk(images: Images) -> Tensor:
    """The pictures, no larger than `LARGEST` pixels on each side; antialiased."""
    if images.shape[3] <= LARGEST:
        return images
    return F.interpolate(images, size=(LARGEST, LARGEST), mode="bilinear", align_corners=False, antialias=True)


def steps_for(count: int, lessons: Lessons) -> int:
    """Training steps for `count` training pictures: a number, not a time, so that any machine learns the same."""
    return min(lessons.most, max(lessons.fewest, count // lessons.per_step))


def training_seconds(data: Prepared, cores: int) -> float:
    """About how long `train_encoder` takes on these processor cores."""
    side = min(data.size, LARGEST) / _stride(data.size)
    return steps_for(len(data.train), LESSONS) * (0.02 + 0.15 * (side / 32) ** 2) / min(cores, 2) ** 0.7


def new_encoder(data: Prepared) -> Encoder:
    """An untrained encoder for these pictures, of weights that depend on nothing else."""
    with seeded(SEED, "encoder"):
        return Encoder(data.channels, len(data.classes), stride=_stride(data.size))


def _stride(size: int) -> int:
    return 2 if min(size, LARGEST) > _HALVED else 1


def train_encoder(
    data: Prepared,
    lessons: Lessons,
    *,
    device: torch.device,
    told: Callable[[int, int], object] = lambda done, steps: None,
) -> Encoder:
    """An encoder that has learned from the training pictures of `data`, on `device`, ready to measure.

    Args:
        told: is called with the steps done and all steps, after each.
    """
    encoder = new_encoder(data).to(device).train()
    steps = steps_for(len(data.train), lessons)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lessons.rate, weight_decay=0.05, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lessons.rate * _rate(step / steps)
        optimizer.zero_grad()
        _loss(encoder, data, step, lessons).backward()
        optimizer.step()
        told(step + 1, steps)
    return encoder.eval().requires_grad_(False)


def _rate(progress: float) -> float:
    """Up in a twentieth of the time, then down to nothing along a cosine."""
    return min(progress / 0.05 + 0.02, 0.5 + 0.5 * math.cos(math.pi * progress))


def _loss(encoder: Encoder, data: Prepared, step: int, lessons: Lessons) -> Tensor:
    device = next(encoder.parameters()).device
    rng = generator(SEED, "lesson", step)
    rows = data.train[torch.randint(len(data.train), (lessons.batch,), generator=rng).numpy()]
    images = shrunk(to_images(torch.from_numpy(data.images[rows])).to(device))
    whole = images.shape[3]
    side = int(torch.randint(math.ceil(0.6 * whole), math.ceil(0.9 * whole) + 1, (), generator=rng))
    spoiled, damage = damaged(_crops(images, side, rng), lessons, rng)
    said: Said = encoder(torch.cat([_crops(images, side, rng), spoiled]))
    first, second = said.view.chunk(2)
    loss = lessons.view_weight * alike(first, second, lessons.temperature)
    loss = loss + lessons.damage_weight * F.mse_loss(said.damage.chunk(2)[1], damage.to(device))
    if data.labels is not None:
        wanted = torch.from_numpy(data.labels[rows]).to(device).repeat(2)
        loss = loss + lessons.class_weight * F.cross_entropy(said.classes, wanted, label_smoothing=lessons.smoothing)
    return loss


def _crops(images: Images, side: int, rng: torch.Generator) -> Tensor:
    """A square from each picture, (batch, channels, side, side), from a place by chance."""
    count, _, height, width = images.shape
    top, left = (torch.randint(extent - side + 1, (count, 1), generator=rng) for extent in (height, width))
    down, across = ((start + torch.arange(side)).to(images.device) for start in (top, left))
    which = torch.arange(count, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[which, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def damaged(images: Images, lessons: Lessons, rng: torch.Generator) -> tuple[Images, Tensor]:
    """The pictures with blur and noise of strengths by chance, often none, and the strengths as shares of the most."""
    strength = torch.rand(len(images), 2, generator=rng)
    strength = strength * (torch.rand(len(images), 2, generator=rng) < 0.6)
    noise = torch.randn(images.shape, generator=rng)
    blur, level = strength.to(images.device).unbind(1)
    spoiled = blurred(images, blur * lessons.blur)
    return spoiled + (level * lessons.noise)[:, None, None, None] * noise.to(images.device), strength


def blurred(images: Images, sigma: Tensor) -> Images:
    """Each picture blurred by a Gaussian of its own standard deviation in pixels, its edges continued outside."""
    count, channels = images.shape[:2]
    reach = 4
    places = torch.arange(-reach, reach + 1, device=images.device)
    # Below a tenth of a pixel the kernel is a single one, which the division must not turn into nothing.
    kernel = torch.exp(-0.5 * (places / sigma.clamp_min(0.1)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None, None, :]
    x = F.pad(images, (reach,) * 4, mode="replicate").reshape(
        1, count * channels, *(e + 2 * reach for e in images.shape[2:])
    )
    x = F.conv2d(F.conv2d(x, kernel, groups=count * channels), kernel.transpose(2, 3), groups=count * channels)
    return x.reshape(images.shape)


def alike(first: Features, second: Features, temperature: float) -> Tensor:
    """InfoNCE: how badly row i of `first` picks out row i of `second` among all, and the other way round; in nats."""
    scores = first @ second.T / temperature
    right = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


@torch.no_grad()
def said_of(encoder: Encoder, pixels: np.ndarray | Rows, *, batch: int = 250) -> tuple[Features, Tensor]:
    """Features (n, dimension) and log-probabilities of the classes (n, classes) of uint8 (n, h, w, c), on the CPU."""
    device = next(encoder.parameters()).device
    features, classes = list[Tensor](), list[Tensor]()
    for part in parts_of(pixels, batch):
        said: Said = encoder(shrunk(to_images(torch.from_numpy(np.array(part)).to(device))))
        features.append(said.features.cpu())
        classes.append(F.log_softmax(said.classes, dim=1).cpu())
    return torch.cat(features), torch.cat(classes)


def trained(data: Prepared, *, device: torch.device, log: Callable[[str], object], cores: int = 2) -> Trained:
    """The encoder of `data`, from the cache, or trained now and kept there."""
    path = encoder_path(data)
    if not is_kept(path):
        log(f"An encoder learns from the training pictures, once: about {words_of(training_seconds(data, cores))}.")
    tensors = kept(path, lambda: _learned(data, device))
    encoder = new_encoder(data).requires_grad_(False)
    encoder.load_state_dict({name: tensors[name] for name in encoder.state_dict()})
    standard = Standard(tensors["standard.mean"], tensors["standard.std"])
    return Trained(encoder.to(device).eval(), standard, digest_of(tensors))


def encoder_path(data: Prepared) -> Path:
    """Where the encoder of `data` is kept."""
    facts = {"fingerprint": data.fingerprint, "seed": SEED, "largest": LARGEST, **asdict(LESSONS)}
    return cache_folder("encoders") / f"{key_of(facts)}.safetensors"


def _learned(data: Prepared, device: torch.device) -> dict[str, Tensor]:
    with Progress(console=console(), transient=True) as progress:
        task = progress.add_task("Training an encoder", total=None)
        encoder = train_encoder(
            data, LESSONS, device=device, told=lambda done, steps: progress.update(task, completed=done, total=steps)
        )
    standard = standard_of(said_of(encoder, Rows(data.images, spread_rows(data.train, STANDARD_PICTURES)))[0])
    return {**encoder.state_dict(), "standard.mean": standard.mean, "standard.std": standard.std}
