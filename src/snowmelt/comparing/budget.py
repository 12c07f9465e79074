"""How the time of a comparison is shared: the same for each model, and enough to measure them.

    | pictures, encoder | vae | gan | diffusion | drawing and measuring | report |

What comes first is as long as it takes. `MEASURED` of the whole is kept for measuring, within bounds; each model gets
an equal part of the rest. Then as many pictures are drawn as there is time for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from snowmelt.errors import UserError
from snowmelt.presets import SHORTEST

AIM = 0.97
"""Share of the time that is given away; the rest is for surprises."""
MEASURED = 0.25
LEAST_MEASURED, MOST_MEASURED = 45.0, 1200.0
ENCODER_SHARE = 0.12
"""Of the time that training an encoder may take; beyond that the random features must do."""
OTHERS = 0.25
"""Share of what is left for measuring that is kept for bits/dim, for starting processes, and for the report."""
OVER_TIME, LEAST_OVER_TIME, STATES = 300, 256, 4
"""Pictures drawn, at most and, where there are so many, at least, from each of the states that show quality over time,
the last of them once more. With fewer there is no Frechet distance in the 128 dimensions of random features."""
LEAST_SAMPLES = 100
"""Below which nothing could be said."""


@dataclass(frozen=True)
class Shares:
    """Seconds."""

    each: float
    """Of training, for each model."""
    measuring: float
    """For all the rest that is still to come."""


def shares(seconds: float, spent: float, models: int) -> Shares:
    """The shares of a comparison that may take `seconds` and has taken `spent` of them before any training.

    Raises:
        UserError: too little is left.
    """
    measuring = min(max(MEASURED * seconds, LEAST_MEASURED), MOST_MEASURED)
    each = (AIM * seconds - spent - measuring) / models
    if each < SHORTEST:
        raise UserError(
            f"After {spent:.0f} s for the pictures and their encoder, too little of {seconds:.0f} s is left to train "
            f"{models} models; give more time with --for."
        )
    return Shares(each, measuring)


def samples_over_time(samples: int) -> int:
    """How many pictures show the quality of each state, where `samples` are drawn in all: together no more than those,
    unless too few would be left to say anything."""
    return min(OVER_TIME, samples, max(LEAST_OVER_TIME, samples // STATES))


def samples_within(seconds: float, cost: Callable[[int], float], most: int) -> int:
    """How many pictures of every model, the same number for each, can be drawn and measured in `seconds`.

    Args:
        cost: seconds that so many pictures take; grows with their number.
        most: asked for; the answer is at least `LEAST_SAMPLES`, where so many are asked for.
    """
    fewest = min(LEAST_SAMPLES, most)
    return fewest + max(0, bisect_right(range(fewest, most + 1), (1 - OTHERS) * seconds, key=cost) - 1)
