"""Names for the shapes that pass through Snowmelt; the tests check them, production does not pay for them."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float, Int, UInt8
from torch import Tensor

Images: TypeAlias = Float[Tensor, "batch channels height width"]
"""Images, noise and noisy images: float, clean ones in [-1, 1]."""
Answers: TypeAlias = Float[Tensor, "batch answers height width"]
"""What a backbone says about images: as many channels as they have, or twice as many."""
Levels: TypeAlias = Float[Tensor, " batch"]
"""One log-SNR (or one time, or one coefficient) for each image."""
Level: TypeAlias = Float[Tensor, ""]
"""One log-SNR for a whole batch: a sampler's present level."""
Grid: TypeAlias = Float[Tensor, " levels"]
"""The increasing log-SNRs that a sampler visits."""
Path: TypeAlias = Float[Tensor, " visits"]
"""A grid, or one that goes back: where it falls, noise is added."""
Labels: TypeAlias = Int[Tensor, " batch"]
"""Class numbers; the number of classes itself stands for "no class"."""
Features: TypeAlias = Float[Tensor, "batch values"]
"""One vector for each picture: what an encoder sees in it, or what a generator makes it from."""
Pixels: TypeAlias = UInt8[Tensor, "batch height width channels"]
"""Stored pictures, 0..255, channels last as in every image file."""
