"""The batch for every step: a pure function of (seed, step), whoever asks and whenever.

Epoch e visits the training pictures in the order of a permutation drawn from (seed, e); step s takes the pictures at
positions s * batch ... (s + 1) * batch of that endless walk. Background threads only gather the same batches sooner,
and a GPU with room for all pictures only gathers the same batches itself.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import Prepared
from snowmelt.seeds import generator
from snowmelt.shapes import Images, Labels, Pixels

Rows: TypeAlias = tuple[np.ndarray, np.ndarray | None]
"""Stored pictures and their labels."""
RowsThere: TypeAlias = tuple[Pixels, Labels | None]
"""The same on the device."""


COPIED = 1 << 30
"""Bytes of training pictures that are copied into memory of the process, at most."""


PIECE = 64 << 20
"""Bytes of pictures that are sent to a device at once, where all are to stay there."""


class Batch(NamedTuple):
    """What a learner is given at every step."""

    images: Images
    labels: Labels | None


def batch_of(data: Prepared, rows: np.ndarray, device: torch.device) -> Batch:
    """Pictures of the dataset as a learner is given them."""
    images = to_images(torch.from_numpy(np.ascontiguousarray(data.images[rows]))).to(device)
    labels = None if data.labels is None else torch.from_numpy(data.labels[rows]).to(device)
    return Batch(images, labels)


class Stream:
    """Batches of training pictures by step.

    Args:
        flip: mirror half of the pictures.
        workers: background threads; 0 gathers each batch when it is asked for, which is best on a CPU: one thread
            more took a third of the speed there (113 against 79 images/s at 28 pixels, 2 cores).
        resident: keep all pictures on the device, as bytes; only the order of an epoch goes over then, once, and
            `workers` have nothing to do.
    """

    def __init__(
        self,
        data: Prepared,
        *,
        batch: int,
        seed: int,
        flip: bool,
        workers: int,
        device: torch.device,
        resident: bool = False,
    ) -> None:
        self.size, self.seed, self.flip, self.device = batch, seed, flip, device
        # In memory once, as bytes: 60,000 small pictures are 50 MB. What is larger is read from its file, of which the
        # system keeps as much in memory as there is room for.
        copied = not resident and len(data.train) * data.images[0].nbytes <= COPIED
        self.pixels = np.ascontiguousarray(data.images[data.train]) if copied else data.images
        self.rows = np.arange(len(data.train)) if copied else data.train
        self.labels = None if data.labels is None else data.labels[data.train]
        self.there = self._resident() if resident else None
        self.pool = ThreadPoolExecutor(workers, "stream") if workers and not resident else None
        self.ahead: deque[tuple[int, Future[Rows]]] = deque()
        self.depth = 2 * workers
        self.order = lru_cache(maxsize=4)(self._order)
        self.order_there = lru_cache(maxsize=4)(self._order_there)

    def _order(self, epoch: int) -> np.ndarray:
        return torch.randperm(len(self.rows), generator=generator(self.seed, "order", epoch)).numpy()

    def _order_there(self, epoch: int) -> Tensor:
        return self._over(torch.from_numpy(self.order(epoch)))

    def _over(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a GPU fetches it when it comes to it, and nobody waits."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _gather(self, step: int) -> Rows:
        """The stored pictures and labels of `step`: numpy's work, since torch in a second thread would start a second
        team of OpenMP threads, which takes the cores from the first."""
        positions = np.arange(step * self.size, (step + 1) * self.size)
        epochs, places = np.divmod(positions, len(self.rows))
        index = np.concatenate([self.order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        return self.pixels[self.rows[index]], None if self.labels is None else self.labels[index]

    def _rows(self, step: int) -> Rows:
        if self.pool is None:
            return self._gather(step)
        while self.ahead and self.ahead[0][0] != step:
            self.ahead.popleft()[1].cancel()
        following = self.ahead[-1][0] + 1 if self.ahead else step
        for number in range(following, step + self.depth + 1):
            self.ahead.append((number, self.pool.submit(self._gather, number)))
        return self.ahead.popleft()[1].result()

    def _all_over(self, pixels: np.ndarray, labels: np.ndarray | None) -> RowsThere:
        return self._over(torch.from_numpy(pixels)), None if labels is None else self._over(torch.from_numpy(labels))

    def _resident(self) -> RowsThere:
        """All training pictures on the device, sent in pieces: at once they would be in memory twice more meanwhile."""
        shape, each = self.pixels.shape[1:], max(1, PIECE // self.pixels[0].nbytes)
        there = torch.empty((len(self.rows), *shape), dtype=torch.uint8, device=self.device)
        for first in range(0, len(self.rows), each):
            some = self.rows[first : first + each]
            there[first : first + len(some)] = torch.from_numpy(self.pixels[some]).to(self.device)
        return there, None if self.labels is None else self._over(torch.from_numpy(self.labels))

    def _index_there(self, step: int) -> Tensor:
        """Which pictures `step` takes, on the device: a few pieces of the orders of its epochs."""
        begin, end, count = step * self.size, (step + 1) * self.size, len(self.rows)
        epochs = range(begin // count, (end - 1) // count + 1)
        return torch.cat([self.order_there(e)[max(begin - e * count, 0) : end - e * count] for e in epochs])

    def _rows_there(self, step: int) -> RowsThere:
        if self.there is None:
            return self._all_over(*self._rows(step))
        index, (pixels, labels) = self._index_there(step), self.there
        return pixels[index], None if labels is None else labels[index]

    def at(self, step: int) -> Batch:
        """The batch of `step` (0 for the first), whatever was asked for before."""
        pixels, labels = self._rows_there(step)
        images = to_images(pixels)
        if self.flip:
            mirrored = torch.rand(self.size, generator=generator(self.seed, "flip", step)) < 0.5
            images = torch.where(self._over(mirrored)[:, None, None, None], images.flip(3), images)
        return Batch(images, labels)

    def close(self) -> None:
        """End the background threads."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
