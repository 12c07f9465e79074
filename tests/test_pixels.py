"""Pixels: there and back is the identity, and what is outside is cut off."""

from __future__ import annotations

import torch

from snowmelt.data.pixels import to_images, to_pixels

ALL = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)


def test_every_level_comes_back():
    assert torch.equal(to_pixels(to_images(ALL)), ALL)


def test_the_range_is_minus_one_to_one_in_even_steps():
    images = to_images(ALL)
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1
    # float32 values of order 1.
    torch.testing.assert_close(images.flatten(), torch.linspace(-1, 1, 256), rtol=0, atol=2e-7)


def test_the_nearest_level_is_taken():
    """Half a level either way, 1/255, is as far as a value may move; just below that it stays."""
    images = to_images(ALL)
    for shift in (-0.99 / 255, 0.99 / 255):
        assert torch.equal(to_pixels(images + shift), ALL)
    assert torch.equal(to_pixels(images[..., 1:] - 1.01 / 255), ALL[:, :, 1:] - 1)


def test_outside_is_cut_off():
    images = torch.tensor([-7.0, -1.001, 1.001, float("inf")]).reshape(1, 1, 2, 2)
    assert to_pixels(images).flatten().tolist() == [0, 0, 255, 255]


def test_channels_move_from_last_to_second():
    pixels = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).reshape(2, 3, 4, 3)
    images = to_images(pixels)
    assert images.shape == (2, 3, 3, 4) and images.is_contiguous() and to_pixels(images).is_contiguous()
    for channel in range(3):
        assert torch.equal(to_pixels(images[:, channel : channel + 1]), pixels[..., channel : channel + 1])
