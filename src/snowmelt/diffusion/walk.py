"""The walk from noise to picture: the one loop of all samplers.

A sampler says how one step is made and leaves the rest to `walk`. Where its path of levels falls instead of rising,
noise is added; so churn, Restart and RePaint are paths (see `grids`) and no samplers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import NamedTuple, TypeAlias

import torch

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.noise import renoise
from snowmelt.shapes import Images, Level, Path

NoiseSource: TypeAlias = Callable[[int], Images]
"""number -> standard normal noise for the whole batch."""


class Step(NamedTuple):
    """One moment of sampling: the noisy image, its level, and what the clean image is believed to be.

    The `x0` of the last step is the result.
    """

    x: Images
    log_snr: Level
    x0: Images


Sampler: TypeAlias = Callable[[Denoise, Images, Path, NoiseSource], Iterator[Step]]
Fresh: TypeAlias = Callable[[], Images]
"""Standard normal noise for the whole batch, new at every call."""
Advance: TypeAlias = Callable[[Step, Level, Fresh], Images]
"""(step, following, fresh) -> the image at the cleaner level `following`."""


def evaluate(denoise: Denoise, x: Images, log_snr: Level) -> Step:
    """Ask `denoise` once."""
    # At least float32: neighbouring levels are alike in fewer digits.
    return Step(x, log_snr, denoise(x, log_snr.to(x.device, torch.promote_types(x.dtype, torch.float32))))


def walk(denoise: Denoise, x: Images, log_snrs: Path, noise_source: NoiseSource, advance: Advance) -> Iterator[Step]:
    """Yield a step at every level of `log_snrs`, but for those from which the path falls.

    Args:
        x: the noisy images at the first level.
        log_snrs: one level at least; no two neighbours alike, the last one the cleanest.
        noise_source: asked for the numbers 1, 2, 3, ... as noise is needed.
    """
    # Levels stay on the CPU in double precision: differences of neighbours are small, and not every device has doubles.
    levels = log_snrs.to("cpu", torch.float64)
    numbers = count(1)

    def fresh() -> Images:
        return noise_source(next(numbers))

    for level, following in pairwise(levels):
        if following < level:
            x = renoise(x, level, following, fresh())
        else:
            step = evaluate(denoise, x, level)
            yield step
            x = advance(step, following, fresh)
    yield evaluate(denoise, x, levels[-1])
