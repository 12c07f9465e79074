"""The held-out error of a model, by noise level: whether it learns, and where."""

from __future__ import annotations

import numpy as np
import torch

from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import Prepared
from snowmelt.data.stream import Batch
from snowmelt.models.base import Learner
from snowmelt.seeds import generator


def held_out_errors(
    learner: Learner, data: Prepared, *, most: int, seed: int, device: torch.device, batch: int = 64
) -> dict[str, float]:
    """The learner's errors on up to `most` held-out pictures, averaged, by name.

    The same pictures and the same noise every time, so that two moments of a run differ only by the model.
    """
    totals: dict[str, float] = {}
    chosen = data.held_out[:: max(1, len(data.held_out) // most)][:most]
    for start in range(0, len(chosen), batch):
        index = chosen[start : start + batch]
        images = to_images(torch.from_numpy(np.ascontiguousarray(data.images[index]))).to(device)
        labels = None if data.labels is None else torch.from_numpy(data.labels[index]).to(device)
        errors = learner.held_out(Batch(images, labels), generator(seed, "held out", start, device=device))
        for name, values in errors.items():
            totals[name] = totals.get(name, 0.0) + values.sum().item()
    return {name: total / len(chosen) for name, total in totals.items()}
