"""Randomness as a function: of (seed, step) in training, of (seed, image, step) in sampling.

Every use of chance asks for a generator by the numbers that name the use. Nothing random is ever kept in a
checkpoint, so a resumed run draws what the uninterrupted one would have, and picture 17 of seed 5 starts from the same
noise in whatever batch, order or process it is drawn. (The idea is that of Karras et al. 2023, arXiv:2312.02696.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch

from snowmelt.shapes import Images


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends only on `seed`, what it is for, and the counters (a step, an image number, ...)."""
    name = ":".join(map(str, (seed, purpose, *counters)))
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return torch.Generator(device).manual_seed(number)


@contextmanager
def seeded(seed: int, purpose: str) -> Generator[None]:
    """Within it torch's own generator, from which layers take their first weights, depends only on these two;
    afterwards it goes on as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose).initial_seed())
        yield


def noise_source(
    seeds: Sequence[int],
    images: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    purpose: str = "sample",
) -> Callable[[int], Images]:
    """Noise for pictures, by step: step 0 is the noise a picture starts from, later steps what a sampler adds.

    Args:
        seeds, images: one seed and one image number for each picture of the batch.
        shape: (channels, height, width) of one picture.
        purpose: what it is for, when that is not drawing.

    The noise is made on the CPU, so that every device draws the same picture.
    """

    def noise(step: int) -> Images:
        rows = [
            torch.randn(shape, generator=generator(seed, purpose, image, step))
            for seed, image in zip(seeds, images, strict=True)
        ]
        return torch.stack(rows).to(device)

    return noise
