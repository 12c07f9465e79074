"""The errors of a model on pictures of the dataset, by name: whether it learns, and where (for diffusion by level)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import Prepared
from snowmelt.data.stream import Batch
from snowmelt.models.base import Learner
from snowmelt.seeds import generator


def batch_of(data: Prepared, rows: np.ndarray, device: torch.device) -> Batch:
    """Pictures of the dataset as a learner is given them."""
    images = to_images(torch.from_numpy(np.ascontiguousarray(data.images[rows]))).to(device)
    labels = None if data.labels is None else torch.from_numpy(data.labels[rows]).to(device)
    return Batch(images, labels)


def errors_of(
    learner: Learner, data: Prepared, rows: np.ndarray, *, seed: int, device: torch.device, batch: int = 64
) -> dict[str, Tensor]:
    """The learner's errors on the pictures `rows`, each (rows,), by name.

    The same noise every time, so that two moments of a run differ only by the model.
    """
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(rows), batch):
        some = batch_of(data, rows[start : start + batch], device)
        parts.append(learner.held_out(some, generator(seed, "held out", start, device=device)))
    return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}
