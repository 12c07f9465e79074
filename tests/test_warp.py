"""Changed pictures: what is told is what was done, and what learns from them draws none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from snowmelt.config import Config, DataConfig, DiffusionConfig, UNetConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.errors import UserError
from snowmelt.models import build_learner, diffusion
from snowmelt.models.warp import TOLD, warped
from snowmelt.networks.unet import UNet
from snowmelt.seeds import generator

SIDE = 33
TINY = UNetConfig(channels=(16, 32), attention=(False, True), head_channels=8)


def ramps(count: int) -> torch.Tensor:
    """Pictures whose two channels are the places themselves, in units small enough never to be cut off."""
    places = (2 * torch.arange(SIDE) + 1) / SIDE - 1
    return 0.05 * torch.stack(torch.meshgrid(places, places, indexing="xy")).expand(count, 2, SIDE, SIDE)


def test_without_changes_half_are_mirrored_and_nothing_else():
    """Bicubic weights at the places themselves are those of one pixel, within float32."""
    images = torch.rand(400, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1
    changed, told = warped(images, 0.0, torch.Generator().manual_seed(0))
    mirrored = told[:, 0].bool()
    torch.testing.assert_close(changed[mirrored], images[mirrored].flip(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(changed[~mirrored], images[~mirrored], rtol=0, atol=1e-5)
    # Four standard errors of a half in 400.
    assert abs(mirrored.float().mean() - 0.5) < 0.1 and (told[:, 1:] == 0).all()


def test_what_is_told_is_what_was_done():
    """The map from changed places to those of the picture, read off ramps around the middle, is the one that the
    numbers say, and the middle of the picture lies where it was moved to. torch's bicubic weights bend ramps by some
    per cent."""
    changed, told = warped(ramps(300), 0.7, torch.Generator().manual_seed(0))
    mirrored, size, cos, sin, stretch, slanted, right, down = told.T
    at, middle, reach = changed / 0.05, SIDE // 2, 5
    across = at[:, :, middle, middle + reach] - at[:, :, middle, middle - reach]
    along = at[:, :, middle + reach, middle] - at[:, :, middle - reach, middle]
    found = torch.stack([across, along], 2) * SIDE / (4 * reach)
    # Powers of 2 along and across some direction are the exponential of a symmetric matrix without a trace.
    stretching = torch.stack([-stretch, slanted, slanted, stretch], 1).reshape(-1, 2, 2) * math.log(2)
    turning = torch.stack([cos + 1, sin, -sin, cos + 1], 1).reshape(-1, 2, 2)
    mirroring = torch.diag_embed(torch.stack([1 - 2 * mirrored, torch.ones_like(mirrored)], 1))
    said = mirroring @ torch.linalg.matrix_exp(stretching) @ turning * (-size).exp2()[:, None, None]
    # Far moves, and small pictures, put the border, where ramps turn back, near the middle.
    near = (right.abs() < 0.1) & (down.abs() < 0.1) & (size > -0.2)
    assert (near & (stretch != 0) & (sin != 0) & (mirrored == 1)).sum() > 20
    torch.testing.assert_close(found[near], said[near], rtol=0, atol=0.05)
    middles = at[:, :, middle, middle, None] + found @ (2 * torch.stack([right, down], 1)[:, :, None])
    assert middles[near].abs().max() < 0.02, "a third of a pixel"


def test_each_change_is_as_probable_as_asked():
    """Four standard errors of a share of 0.3 in 2,000; numbers of a change are all 0 or none of them."""
    _, told = warped(torch.zeros(2000, 1, 4, 4), 0.3, torch.Generator().manual_seed(0))
    for numbers in (told[:, 1:2], told[:, 2:4], told[:, 4:6], told[:, 6:8]):
        done = (numbers != 0).any(1)
        assert abs(done.float().mean() - 0.3) < 0.041
        assert (numbers[done] != 0).all()
    assert told.shape == (2000, TOLD)


def test_a_network_is_told_and_draws_unchanged():
    """At first the numbers say nothing; after a step they do; none at all is the same as all 0."""
    config = Config(DataConfig(8, 1, ("a", "b"), (4, 4)), network=TINY, diffusion=DiffusionConfig(augment=0.5))
    learner = build_learner(config, Precision(torch.device("cpu")))
    net = learner.model.denoiser.backbone
    x, time, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 500.0), torch.tensor([0, 1, 2, 0])
    told = torch.randn(4, TOLD)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    for step in range(3):
        assert learner.update(Batch(images, cond % 2), generator(0, "train", step, 0), 1e-2).finite
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x, time, cond), net(x, time, cond, torch.zeros(4, TOLD)))
        assert not torch.allclose(net(x, time, cond), net(x, time, cond, told), atol=1e-5)
    plain = UNet(TINY, channels=1, classes=2)
    assert {name for name, _ in net.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "told_embedding.weight"
    }


def test_without_it_pictures_stay_and_no_chance_is_taken(monkeypatch):
    """A run without changes is what it was before there were any."""
    monkeypatch.setattr(diffusion, "warped", None)
    learner = build_learner(Config(DataConfig(8, 1), network=TINY), Precision(torch.device("cpu")))
    asked: list[int] = []
    learner.model.denoiser.backbone.register_forward_pre_hook(lambda _module, given: asked.append(len(given)))
    learner.update(Batch(torch.zeros(2, 1, 8, 8), None), generator(0, "train", 0, 0), 1e-3)
    assert asked == [3] and "told_embedding.weight" not in dict(learner.model.denoiser.backbone.named_parameters())


@pytest.mark.parametrize("augment", [-0.1, 1.0, float("nan")])
def test_a_probability_is_one(augment):
    with pytest.raises(UserError, match="augment is"):
        dataclasses.replace(DiffusionConfig(), augment=augment)
