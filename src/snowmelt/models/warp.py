"""Changes to training pictures that a diffusion model is told of, so that it learns from them and does not draw them.

A network that sees few pictures a thousand times learns them by heart. Changed ones are new to it; and because it is
told by numbers how each was changed, it keeps them apart: with all numbers 0, as when it draws, it knows the pictures
as they are. So pictures may be mirrored and turned here, which is not so where nobody is told (`augment.py`).
(Karras et al. 2022, arXiv:2206.00364, appendix F.2.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from snowmelt.shapes import Features, Images, Levels

SIZE, STRETCH, MOVE = 0.2, 0.2, 1 / 8
"""Standard deviations: of the powers of 2 by which pictures are larger and longer, and of moves over the side."""
TOLD = 8
"""Numbers that say how a picture was changed."""


def warped(images: Images, probability: float, rng: torch.Generator) -> tuple[Images, Features]:
    """Each picture mirrored with probability 1/2, and made larger, turned, stretched and moved each with `probability`.

    Beyond its borders a picture goes on as its mirror image.

    Returns:
        The pictures, and (batch, `TOLD`) what was done to each: all 0 where that is nothing.
    """
    count, device = len(images), images.device

    def even() -> Tensor:
        return torch.rand(count, generator=rng, device=device)

    def normal() -> Tensor:
        return torch.randn(count, generator=rng, device=device)

    def some(share: float) -> Tensor:
        return (even() < share).float()

    mirrored = some(0.5)
    size = SIZE * normal() * some(probability)
    turn = (2 * even() - 1) * math.pi * some(probability)
    along, stretch = even() * math.pi, STRETCH * normal() * some(probability)
    moves = MOVE * torch.stack([normal(), normal()]) * some(probability)
    # From the places of the changed picture back to those of the picture, in [-1, 1].
    matrix = rotation(-along) @ diagonal(-stretch, stretch) @ rotation(along) @ rotation(-turn) @ diagonal(-size, -size)
    matrix = torch.stack([1 - 2 * mirrored, torch.ones_like(mirrored)], 1)[:, :, None] * matrix
    back = torch.cat([matrix, -(matrix @ (2 * moves.T[:, :, None]))], 2)
    grid = F.affine_grid(back, list(images.shape), align_corners=False)
    # A Mac's GPU has no bicubic sampling.
    where = torch.device("cpu") if device.type == "mps" else device
    changed = F.grid_sample(
        images.to(where), grid.to(where), mode="bicubic", padding_mode="reflection", align_corners=False
    ).to(device)
    turned = torch.stack([turn.cos() - 1, turn.sin()])
    stretched = stretch * torch.stack([(2 * along).cos(), (2 * along).sin()])
    return changed.clamp(-1, 1), torch.cat([mirrored[None], size[None], turned, stretched, moves]).T


def rotation(angle: Levels) -> Tensor:
    """(batch, 2, 2) by these angles."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)


def diagonal(across: Levels, down: Levels) -> Tensor:
    """(batch, 2, 2) by these powers of 2."""
    return torch.diag_embed(torch.stack([across, down], 1).exp2())
