"""Randomness as a function: picture 17 of seed 5 is the same picture in whatever company it is drawn."""

from __future__ import annotations

import math

import torch

from conftest import stirred
from snowmelt.config import Config, DataConfig, UNetConfig
from snowmelt.data.pixels import to_pixels
from snowmelt.device import Precision
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.seeds import generator, noise_source

SHAPE = (3, 8, 8)


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    """Bit for bit: alone, in any order, among pictures of other seeds, at every step."""
    together = noise_source([5, 5, 5, 9], [0, 17, 3, 17], SHAPE)
    shuffled = noise_source([9, 5, 5], [17, 3, 17], SHAPE)
    alone = noise_source([5], [17], SHAPE)
    for step in (3, 0, 1):
        assert torch.equal(alone(step)[0], together(step)[1])
        assert torch.equal(shuffled(step), together(step)[[3, 2, 1]])


def test_every_picture_and_step_has_noise_of_its_own():
    source = noise_source([5, 5, 6], [0, 1, 0], SHAPE)
    rows = torch.cat([source(0), source(1)]).flatten(1)
    # Independent rows of 192 normal values: squared distances of 384 +- 39, so 150 is six deviations off.
    assert torch.pdist(rows).min() ** 2 > 150


def test_noise_is_standard_normal():
    values = noise_source([1] * 500, range(500), SHAPE)(0).flatten()
    count = len(values)
    # Four standard errors of mean, variance and fourth moment (whose variance is 105 - 9).
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)


def test_a_generator_is_named_by_all_its_numbers():
    names = [(0, "train"), (1, "train"), (0, "order"), (0, "train", 0), (0, "train", 1), (0, "train", 0, 0)]
    names += [(0, "train", 1, 11), (0, "train", 11, 1), (-1, "train"), (2**40, "train")]
    seeds = [generator(*name).initial_seed() for name in names]
    assert len(set(seeds)) == len(names)
    assert seeds == [generator(*name).initial_seed() for name in names]


def test_asking_leaves_other_chance_alone():
    before = torch.get_rng_state()
    noise_source([0], [0], SHAPE)(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_picture_does_not_depend_on_its_batch():
    """Through a whole network and sampler: arithmetic may be ordered otherwise, so within one of 255 grey levels."""
    config = Config(
        DataConfig(size=8, channels=3, classes=("a", "b")),
        network=UNetConfig(channels=(16, 32), attention=(False, True), head_channels=16, dropout=0.5),
    )
    model = stirred(DiffusionModel(config, Precision(torch.device("cpu"))))

    def drawn(images: list[int], sampler: str) -> torch.Tensor:
        labels = torch.tensor(images) % 2
        model.train()  # as in the middle of a training run; drawing must turn dropout off
        drawing = Drawing(sampler=sampler, steps=10, guidance=2.0)
        *_, last = model.sample(noise_source([5] * len(images), images, SHAPE), labels, drawing)
        return to_pixels(last.x0).int()

    for sampler in ("ddim", "ddpm"):
        together = drawn([0, 1, 2, 3, 4, 5, 6], sampler)
        assert together.float().std() > 10, "pictures with something in them"
        for images in ([4], [6, 2], [5, 3, 1]):
            assert (drawn(images, sampler) - together[images]).abs().max() <= 1
