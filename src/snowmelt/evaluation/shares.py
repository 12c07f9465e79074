"""Shares of pictures, with their chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

NORMAL = 1.959964
"""Standard deviations on both sides of the mean between which 95 % of a normal distribution are."""


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] and its 95 % interval."""

    share: float
    low: float
    high: float


def wilson(count: int, total: int) -> Share:
    """`count` of `total` with Wilson's interval (1927, doi:10.1080/01621459.1927.10502953), right near 0 and 1 too."""
    if not total:
        return Share(0.0, 0.0, 1.0)
    share, square = count / total, NORMAL**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    reach = NORMAL / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return Share(share, max(0.0, middle - reach) if count else 0.0, min(1.0, middle + reach) if count < total else 1.0)
