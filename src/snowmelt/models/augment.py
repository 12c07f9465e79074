"""Changes to pictures that a generator does not learn, though the critic sees only changed pictures.

A critic that sees few pictures learns them by heart. So real and generated pictures are changed before it sees them,
each in each of these ways with probability p. The changes do not leak into what is generated, because from the
distribution of changed pictures that of the pictures can be told: as a map between distributions each way is
(1 - p) identity + p change, and no eigenvalue of it is zero for any p < 1.

- shift: around the borders, by the difference of two even draws; its Fourier transform is a square, never negative;
- brightness, contrast, saturation: adding, or multiplying by the exponential of, a Gaussian number, whose
  characteristic function is positive;
- cutout: a square set to mid-grey, which loses what it hides; but a share of at least 1 - p hides nothing.

Mirroring and turning are not among them: where half of all pictures are mirrored, nobody can tell which half (in the
above, mirroring has an eigenvalue of -1, so that of the map is 1 - 2 p: zero at p = 1/2).
(Karras et al. 2020, arXiv:2006.06676, section 2.2 and appendix C.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from snowmelt.shapes import Images, Levels

Change: TypeAlias = Callable[[Images], Images]
"""Changes as many pictures as it was drawn for; differentiable twice."""

SHIFT = 1 / 8
"""Of the side: the furthest shift."""
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0
"""Standard deviations: of what is added, and of the exponents of two of what is multiplied."""
CUTOUT = 1 / 2
"""Of the side: the side of the square that is hidden."""


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def shift(active: Levels, size: int, rng: torch.Generator) -> Change:
    """Whole pixels down and right; what leaves on one side comes in on the other."""
    furthest = max(1, round(SHIFT * size))
    draws = torch.randint(furthest + 1, (2, 2, len(active)), generator=rng, device=active.device)
    offsets = (draws[0] - draws[1]) * active.long()
    places = torch.arange(size, device=active.device)
    # As products with permutation matrices: exact, and with gradients that are the same on every device.
    down, right = F.one_hot((places - offsets[..., None]) % size, size).to(active.dtype).unsqueeze(2)
    return lambda x: down @ x @ right.transpose(2, 3)


def brightness(active: Levels, size: int, rng: torch.Generator) -> Change:
    """The same number added everywhere."""
    del size
    added = _column(BRIGHTNESS * active * _normal(active, rng))
    return lambda x: x + added


def contrast(active: Levels, size: int, rng: torch.Generator) -> Change:
    """All distances from mid-grey multiplied by the same number."""
    del size
    factor = _column((CONTRAST * active * _normal(active, rng)).exp2())
    return lambda x: x * factor


def saturation(active: Levels, size: int, rng: torch.Generator) -> Change:
    """All distances from the pixel's grey multiplied by the same number; grey pictures stay as they are."""
    del size
    factor = _column((SATURATION * active * _normal(active, rng)).exp2())

    def change(x: Images) -> Images:
        grey = x.mean(1, keepdim=True)
        return grey + (x - grey) * factor

    return change


def cutout(active: Levels, size: int, rng: torch.Generator) -> Change:
    """A square, which may reach over the border, set to mid-grey."""
    centre = torch.rand((2, len(active), 1), generator=rng, device=active.device) * size
    places = torch.arange(size, device=active.device) + 0.5
    rows, columns = (places - centre).abs() < CUTOUT * size / 2
    kept = 1 - _column(active) * (rows[:, None, :, None] & columns[:, None, None, :])
    return lambda x: x * kept


AUGMENTATIONS: dict[str, Callable[[Levels, int, torch.Generator], Change]] = {
    "shift": shift,
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "cutout": cutout,
}
"""By name: what draws a change for each picture that is active (1) and none where it is not (0), given their side."""


def _normal(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, device=like.device)


def draw_change(count: int, size: int, probability: float, rng: torch.Generator) -> Change:
    """A change of `count` pictures of side `size`: each of `AUGMENTATIONS` with `probability`, in their order.

    The change takes pictures in [-1, 1] and may leave that range; it is the same whenever it is applied.
    """
    if not probability:
        return lambda x: x
    changes: list[Change] = []
    for draw in AUGMENTATIONS.values():
        active = torch.rand(count, generator=rng, device=rng.device) < probability
        changes.append(draw(active.float(), size, rng))

    def change(x: Images) -> Images:
        for each in changes:
            x = each(x)
        return x

    return change
