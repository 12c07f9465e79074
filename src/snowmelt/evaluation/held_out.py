"""The errors of a model on pictures of the dataset, by name: whether it learns, and where (for diffusion by level)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from snowmelt.data.prepared import Prepared
from snowmelt.data.stream import batch_of
from snowmelt.models.base import Learner
from snowmelt.seeds import generator

Errors: TypeAlias = dict[str, Tensor]
"""One error for each picture, by name."""


def errors_in_parts(
    learner: Learner, data: Prepared, rows: np.ndarray, *, seed: int, device: torch.device, batch: int = 64
) -> Iterator[Errors]:
    """The learner's errors on the pictures `rows`, `batch` after `batch`.

    The same noise every time, so that two moments of a run differ only by the model.
    """
    for start in range(0, len(rows), batch):
        some = batch_of(data, rows[start : start + batch], device)
        yield learner.held_out(some, generator(seed, "held out", start, device=device))


def joined(parts: Sequence[Errors]) -> Errors:
    """The errors of all of them, each (pictures,), in float32 on the processor."""
    return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}


def errors_of(
    learner: Learner, data: Prepared, rows: np.ndarray, *, seed: int, device: torch.device, batch: int = 64
) -> Errors:
    """The parts of `errors_in_parts`, joined."""
    return joined([*errors_in_parts(learner, data, rows, seed=seed, device=device, batch=batch)])
