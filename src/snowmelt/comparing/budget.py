"""How the time of a comparison is shared: the same for each model, and enough to measure them.

    | pictures, encoder | vae | gan | diffusion | drawing and measuring | report |

What comes first is as long as it takes. `MEASURED` of the whole is kept for measuring, within bounds; each model gets
an equal part of the rest. Then as many pictures are drawn as there is time for.
"""

from __future__ import annotations

from dataclasses import dataclass

from snowmelt.errors import UserError

AIM = 0.97
"""Share of the time that is given away; the rest is for surprises."""
MEASURED = 0.25
LEAST_MEASURED, MOST_MEASURED = 45.0, 1200.0
SHORTEST = 30.0
"""Seconds of training of each model that are worth it."""
ENCODER_SHARE = 0.12
"""Of the time that training an encoder may take; beyond that the random features must do."""
OTHERS = 0.35
"""Share of what is left for drawing that is kept for bits/dim, for starting processes, and for the report."""
OVER_TIME, STATES = 300, 3
"""Pictures drawn, at most, from each of so many earlier states of every model."""
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


def samples_within(seconds: float, per_picture: list[float], most: int) -> int:
    """How many pictures of every model, the same number for each, can be drawn and measured in `seconds`.

    Args:
        per_picture: seconds that a picture takes, of each model.
        most: asked for; the answer is at least `LEAST_SAMPLES`, where so many are asked for.
    """
    possible = int((1 - OTHERS) * seconds / max(sum(per_picture), 1e-9))
    earlier = STATES * OVER_TIME
    count = possible - earlier if possible >= earlier + OVER_TIME else possible // (STATES + 1)
    return min(most, max(LEAST_SAMPLES, count))
