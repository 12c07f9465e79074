"""The batch for every step: a pure function of (seed, step), whoever asks and whenever.

Epoch e visits the training pictures in the order of a permutation drawn from (seed, e); step s takes the pictures at
positions s * batch ... (s + 1) * batch of that endless walk. Background threads only gather the same batches sooner.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import Prepared
from snowmelt.seeds import generator
from snowmelt.shapes import Images, Labels

Rows: TypeAlias = tuple[np.ndarray, np.ndarray | None]
"""Stored pictures and their labels."""


class Batch(NamedTuple):
    """What a learner is given at every step."""

    images: Images
    labels: Labels | None


class Stream:
    """Batches of training pictures by step.

    Args:
        flip: mirror half of the pictures.
        workers: background threads; 0 gathers each batch when it is asked for, which is best on a CPU: one thread
            more took a third of the speed there (113 against 79 images/s at 28 pixels, 2 cores).
    """

    def __init__(
        self, data: Prepared, *, batch: int, seed: int, flip: bool, workers: int, device: torch.device
    ) -> None:
        self.size, self.seed, self.flip, self.device = batch, seed, flip, device
        # In memory once, as bytes: 60,000 small pictures are 50 MB.
        self.pixels = np.ascontiguousarray(data.images[data.train])
        self.labels = None if data.labels is None else data.labels[data.train]
        self.pool = ThreadPoolExecutor(workers, "stream") if workers else None
        self.ahead: deque[tuple[int, Future[Rows]]] = deque()
        self.depth = 2 * workers
        self.order = lru_cache(maxsize=4)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return torch.randperm(len(self.pixels), generator=generator(self.seed, "order", epoch)).numpy()

    def _gather(self, step: int) -> Rows:
        """The stored pictures and labels of `step`: numpy's work, since torch in a second thread would start a second
        team of OpenMP threads, which takes the cores from the first."""
        positions = np.arange(step * self.size, (step + 1) * self.size)
        epochs, places = np.divmod(positions, len(self.pixels))
        index = np.concatenate([self.order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        return self.pixels[index], None if self.labels is None else self.labels[index]

    def _rows(self, step: int) -> Rows:
        if self.pool is None:
            return self._gather(step)
        while self.ahead and self.ahead[0][0] != step:
            self.ahead.popleft()[1].cancel()
        following = self.ahead[-1][0] + 1 if self.ahead else step
        for number in range(following, step + self.depth + 1):
            self.ahead.append((number, self.pool.submit(self._gather, number)))
        return self.ahead.popleft()[1].result()

    def at(self, step: int) -> Batch:
        """The batch of `step` (0 for the first), whatever was asked for before."""
        pixels, labels = self._rows(step)
        images = to_images(torch.from_numpy(pixels).to(self.device))
        if self.flip:
            mirrored = torch.rand(self.size, generator=generator(self.seed, "flip", step)) < 0.5
            images = torch.where(mirrored.to(self.device)[:, None, None, None], images.flip(3), images)
        return Batch(images, None if labels is None else torch.from_numpy(labels).to(self.device))

    def close(self) -> None:
        """End the background threads."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
