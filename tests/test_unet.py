"""The U-Net: weight for weight the one of `diffusers`, calm at the start, and every weight of it learns."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch.nn import functional as F

from conftest import stirred
from snowmelt.config import UNetConfig
from snowmelt.errors import UserError
from snowmelt.networks import group_norm, layers
from snowmelt.networks.group_norm import GroupNorm
from snowmelt.networks.layers import Attention, ResnetBlock, attend, sinusoids
from snowmelt.networks.unet import UNet

SMALL = UNetConfig(channels=(8, 16), attention=(False, True), head_channels=8)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_diffusers(config: UNetConfig, channels: int, classes: int, **settings: object) -> UNet2DModel:
    downs = ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention]
    ups = ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention)]
    ours = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.blocks,
        "down_block_types": tuple(downs),
        "up_block_types": tuple(ups),
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "attention_head_dim": config.head_channels,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": classes + 1 if classes else None,
    }
    return UNet2DModel(**ours | settings).eval()


@pytest.mark.parametrize(
    ("config", "channels", "classes", "size"),
    [
        (UNetConfig(), 3, 0, 16),
        (UNetConfig(channels=(64, 128), attention=(False, True)), 1, 10, 8),
        (UNetConfig(channels=(16, 32, 48), attention=(True, False, True), blocks=2, head_channels=16), 3, 4, 16),
        (UNetConfig(channels=(32,), attention=(True,), blocks=3, groups=4, head_channels=8), 2, 0, 4),
    ],
    ids=["default", "digits", "two blocks", "one size"],
)
def test_the_same_weights_give_the_answer_of_diffusers(config, channels, classes, size):
    ours = stirred(UNet(config, channels=channels, classes=classes))
    theirs = of_diffusers(config, channels, classes)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, time = draws(3, channels, size, size), torch.tensor([0.0, 421.0, 999.0])
    labels = torch.tensor([0, classes - 1, classes]) if classes else None
    with torch.inference_mode():
        answer, reference = ours(x, time, labels), theirs(x, time, labels).sample
    # float32 through some thirty layers, each rounding by 6e-8.
    assert (answer - reference).abs().max() < 1e-5 * reference.abs().max()


SMALLER = UNetConfig(channels=(16, 32), attention=(False, True), head_channels=8)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"embedding": "add"}, {"resnet_time_scale_shift": "default"}),
        ({"embedding": "add"}, {"resnet_time_scale_shift": "default", "attn_norm_num_groups": None}),
        ({"embedding": "add", "middle_groups": 4}, {"resnet_time_scale_shift": "default", "attn_norm_num_groups": 4}),
        ({"middle_groups": 0}, {"attn_norm_num_groups": None}),
        ({"middle_groups": 2}, {"attn_norm_num_groups": 2}),
        ({"middle_attention": False}, {"add_attention": False}),
        ({"epsilon": 0.01}, {"norm_eps": 0.01}),
        ({"halving": "corner"}, {"downsample_padding": 0}),
        ({"sines_first": True}, {"flip_sin_to_cos": False}),
        ({"frequency_shift": 1.0}, {"freq_shift": 1}),
        ({"head_channels": 32, "attention": (True, True)}, {"attention_head_dim": None}),
        ({"groups": 1}, {}),
    ],
    ids=lambda value: " ".join(value),
)
def test_every_setting_is_the_one_of_diffusers(change, settings):
    config = dataclasses.replace(SMALLER, **change)
    ours = stirred(UNet(config, channels=3, classes=0))
    theirs = of_diffusers(config, 3, 0, **settings)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, time = draws(3, 3, 8, 8), torch.tensor([0.0, 421.0, 999.0])
    with torch.inference_mode():
        answer, reference = ours(x, time), theirs(x, time).sample
        try:
            plain = UNet(SMALLER, channels=3, classes=0).eval()
            plain.load_state_dict(ours.state_dict())
            without = plain(x, time)
        except RuntimeError:
            without = torch.zeros_like(answer)
    # float32 through some fifteen layers, each rounding by 6e-8.
    assert (answer - reference).abs().max() < 1e-5 * reference.abs().max()
    assert (answer - without).abs().max() > 1e-4 * reference.abs().max(), "the setting matters"


def test_a_fraction_of_a_step_is_told_like_a_whole_one():
    """Sinusoids turn by their frequency for every unit of time: cos^2 + sin^2 = 1 and the addition theorem."""
    width = 16
    cos, sin = sinusoids(torch.tensor([12.0, 0.3, 12.3]), width).chunk(2, dim=1)
    # float32 angles of up to 12 are rounded by 1e-6.
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(3, width // 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(cos[2], cos[0] * cos[1] - sin[0] * sin[1], rtol=0, atol=3e-6)


def test_a_fresh_network_says_the_same_whatever_it_sees():
    """It begins as a constant, so that the first gradients are those of the data's mean and not of chance weights."""
    network = UNet(SMALL, channels=2, classes=3).eval()
    answer = network(draws(4, 2, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.tensor([0, 1, 2, 3]))
    assert torch.equal(answer, answer[:1, :, :1, :1].expand_as(answer))


def test_a_fresh_block_lets_its_input_pass():
    """Up to one constant for each channel, the bias of its last layer, it begins as the identity."""
    x, embedding = draws(2, 8, 4, 4), draws(2, 32)
    resnet = ResnetBlock(8, 8, embedding=32, enters="scale_shift", groups=8, epsilon=1e-5, dropout=0.0)
    blocks = resnet, Attention(8, head_channels=8, groups=8, epsilon=1e-5)
    for added in (blocks[0](x, embedding) - x, blocks[1](x) - x):
        # (x + constant) - x in float32, for x up to 4.
        torch.testing.assert_close(added, added[:1, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)


def test_every_weight_learns():
    """Parts that begin at zero pass no gradient back: after three updates there is one everywhere."""
    network = UNet(SMALL, channels=2, classes=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, time, labels = draws(4, 2, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.tensor([0, 1, 2, 3])
    for _ in range(4):
        optimizer.zero_grad()
        (network(x, time, labels) - draws(4, 2, 8, 8, seed=1)).square().mean().backward()
        optimizer.step()
    still = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    # A bias on all keys adds the same to every score of a query, which softmax ignores: it learns nothing, in theory.
    assert [name for name in still if not name.endswith("to_k.bias")] == []


def test_no_label_is_the_label_for_none():
    network = stirred(UNet(SMALL, channels=1, classes=5))
    x, time = draws(3, 1, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    none = network(x, time, torch.full((3,), 5))
    assert torch.equal(network(x, time, None), none)
    assert not torch.allclose(network(x, time, torch.zeros(3, dtype=torch.long)), none, atol=1e-3)


def test_patches_are_channels():
    """With patch 2 it is the network of patch 1 on an image of half the size and four times the channels."""
    patched = stirred(UNet(UNetConfig((8, 16), (False, True), patch=2, head_channels=8), channels=3, classes=0))
    plain = UNet(SMALL, channels=12, classes=0).eval()
    plain.load_state_dict(patched.state_dict())
    x, time = draws(2, 3, 16, 16), torch.tensor([5.0, 500.0])
    answer = patched(x, time)
    assert answer.shape == x.shape
    assert torch.equal(F.pixel_unshuffle(answer, 2), plain(F.pixel_unshuffle(x, 2), time))


@pytest.mark.parametrize("places", [1, 49, 196, 197])
@pytest.mark.parametrize(("batch", "heads"), [(2, 4), (2, 1), (1, 4)])
# float32 rounds by 6e-8 and bfloat16 by 2^-9, some times on the way; of the whole, as a root of squares.
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.015)])
def test_attention_is_that_of_torch(places, batch, heads, dtype, error):
    """And its gradient, on both sides of the size at which the fused kernel takes over; also where what it is told lies
    in another order, and its slope is one number."""
    told = draws(batch, 3, places, heads, 16).to(dtype).transpose(1, 2).requires_grad_()
    answer = attend(told)
    parts = told.detach().double().requires_grad_()
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert float((answer.double() - exact).detach().norm() / exact.detach().norm()) < error
    for slope in (draws(*answer.shape).to(dtype), torch.ones((), dtype=dtype).expand(answer.shape)):
        (found,) = torch.autograd.grad(answer, told, slope, retain_graph=True)
        (expected,) = torch.autograd.grad(exact, [parts], slope.double(), retain_graph=True)
        assert float((found.double() - expected).norm() / expected.norm()) < error
    with torch.no_grad():
        assert torch.equal(attend(told), answer)


def test_attention_ignores_a_shift_of_all_keys():
    told = draws(1, 9, 3, 2, 8).double()
    moved = told.clone()
    moved[:, :, 1] += draws(8).double()
    torch.testing.assert_close(attend(moved), attend(told), rtol=0, atol=1e-13)


def test_a_network_that_cannot_be_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="one for each size"):
        UNetConfig(channels=(32, 64), attention=(True,))
    with pytest.raises(UserError, match="multiples of network\\.groups 8"):
        UNetConfig(channels=(32, 36), attention=(False, True))
    with pytest.raises(UserError, match="did you mean 'add'"):
        UNetConfig(embedding="adds")
    with pytest.raises(UserError, match="did you mean 'corner'"):
        UNetConfig(halving="corners")
    with pytest.raises(UserError, match="network\\.epsilon is 0"):
        UNetConfig(epsilon=0.0)
    with pytest.raises(UserError, match="an even number of more than twice"):
        UNetConfig(channels=(2,), attention=(False,), groups=1, frequency_shift=1.0)
    with pytest.raises(UserError, match="divisor of 64, the last"):
        UNetConfig(middle_groups=3)


def test_what_a_compiler_is_told_is_the_same(monkeypatch):
    """The network in the words that suit a compiler, and its gradients: sums in another order, so 1e-5 of each."""
    config = UNetConfig(channels=(16, 32), attention=(False, True), groups=4)
    plain = stirred(UNet(config, channels=3, classes=2))
    told = copy.deepcopy(plain)
    given = draws(3, 3, 8, 8), torch.tensor([0.0, 421.0, 999.0]), torch.tensor([0, 1, 2])
    expected = plain(*given)
    expected.square().sum().backward()
    for module in (group_norm, layers):
        monkeypatch.setattr(module, "for_compiler", lambda: True)
    answer = told(*given)
    answer.square().sum().backward()
    assert torch.allclose(answer, expected, atol=1e-5 * expected.abs().max().item())
    for (name, weight), other in zip(plain.named_parameters(), told.parameters(), strict=True):
        # Keys need no bias, whose gradient is but rounding.
        if not name.endswith("to_k.bias"):
            assert (weight.grad - other.grad).norm() < 1e-5 * weight.grad.norm(), name


def test_only_a_compiler_is_told_so():
    """Seen by one that computes as it is told; who exports, or only computes, sees torch's own layers."""
    norm, seen = GroupNorm(2, 4, epsilon=1e-5), []

    def look(module, _given):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    with torch.no_grad():
        x = draws(2, 4, 3, 3)
        assert torch.allclose(torch.compile(norm.forward, backend=look)(x), norm(x), atol=1e-6)
    assert seen and not any("group_norm" in name for name in seen)
    exported = torch.export.export(norm, (x,)).graph.nodes
    assert any("group_norm" in str(node.target) for node in exported)
