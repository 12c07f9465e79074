"""What a run warns of while it trains: pictures learned by heart, and pictures that are all alike.

A network that knows its training pictures by heart has smaller errors on them than on pictures it has never seen. One
that has collapsed draws the same picture from every noise. Both are looked for at every preview, and said once.
"""

from __future__ import annotations

import numpy as np

from snowmelt.data.prepared import Prepared
from snowmelt.evaluation.features import random_space
from snowmelt.evaluation.memorization import Gap
from snowmelt.evaluation.metrics import spread
from snowmelt.shapes import Pixels

SURE = 2.0
"""A gap counts when it is so many times as wide as its interval reaches: about four standard errors, since a run looks
for it a dozen times and should not cry wolf once in its life."""
ALIKE = 0.5
"""Spread of drawn pictures, as a share of that of real ones, below which they have collapsed: GANs of MNIST that had
were seen at 0.29 to 0.45, healthy ones at 0.74 to 0.85 (one seed each)."""
EARLIEST = 0.2
"""Share of the training before which pictures may be alike: nothing has been learned yet."""


def learned_by_heart(gap: Gap) -> bool:
    """Whether the errors on held-out pictures are larger than on training pictures beyond doubt."""
    return gap.difference > SURE * (gap.difference - gap.low)


def spread_ratio(drawn: Pixels, data: Prepared, *, columns: int, classes: int) -> float | None:
    """How different drawn pictures are from each other, as a share of how different real ones are; None where these are
    all the same.

    Args:
        drawn: rows of `columns` pictures, each row of one class where there are classes.
        classes: rows that are classes, 0 for none.
    """
    space = random_space(data.channels)
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)] if classes else [drawn]
    mine = [spread(space.features(row.numpy())) for row in rows]
    true = [
        spread(space.features(_alike(data, label if classes else None, len(row)))) for label, row in enumerate(rows)
    ]
    real = sum(true) / len(true)
    return sum(mine) / len(mine) / real if real else None


def _alike(data: Prepared, label: int | None, count: int) -> np.ndarray:
    """So many training pictures, of one class where one is given (of all where it has only one)."""
    rows = data.train if label is None or data.labels is None else data.train[data.labels[data.train] == label]
    rows = rows if len(rows) > 1 else data.train
    return data.images[np.sort(np.random.default_rng(0).permutation(rows)[: max(2, count)])]
