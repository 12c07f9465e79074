"""The stream: every picture once in an epoch, and a batch that depends on its step and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from snowmelt.data import stream as streams
from snowmelt.data.pixels import to_pixels
from snowmelt.data.prepared import Prepared
from snowmelt.data.stream import Batch, Stream
from snowmelt.device import has_room

COUNT, HELD_OUT = 23, (3, 11, 12)
TRAIN = [row for row in range(COUNT) if row not in HELD_OUT]


@pytest.fixture(scope="module")
def data() -> Prepared:
    """Pictures that bear their number on the left and are black elsewhere; the label follows from the number."""
    images = np.zeros((COUNT, 4, 4, 1), dtype=np.uint8)
    images[:, :, 0, 0] = np.arange(COUNT)[:, None] + 100
    return Prepared(
        path=Path("nowhere"),
        images=images,
        labels=np.arange(COUNT, dtype=np.int64) % 5,
        classes=tuple("abcde"),
        captions=None,
        train=np.array(TRAIN, dtype=np.int64),
        held_out=np.array(HELD_OUT, dtype=np.int64),
        mean=0.0,
        std=0.5,
        fingerprint="",
    )


def stream(
    data: Prepared, *, batch: int = 6, seed: int = 0, flip: bool = False, workers: int = 0, resident: bool = False
) -> Stream:
    cpu = torch.device("cpu")
    return Stream(data, batch=batch, seed=seed, flip=flip, workers=workers, device=cpu, resident=resident)


def numbers(batch: Batch) -> list[int]:
    """Which pictures are in a batch, mirrored or not."""
    return (to_pixels(batch.images).int().amax(dim=(1, 2, 3)) - 100).tolist()


def same(one: Batch, other: Batch) -> bool:
    assert isinstance(one.labels, Tensor) and isinstance(other.labels, Tensor)
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("batch", [1, 6, 20, 47])
def test_every_epoch_visits_each_training_picture_once(data, batch):
    walk = [number for step in range(200 // batch + 1) for number in numbers(stream(data, batch=batch).at(step))]
    epochs = [walk[start : start + len(TRAIN)] for start in range(0, len(walk) - len(TRAIN) + 1, len(TRAIN))]
    assert len(epochs) >= 10 and all(sorted(epoch) == TRAIN for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "20! orders: none comes twice"


def test_labels_go_with_their_pictures(data):
    batch = stream(data).at(7)
    assert batch.labels is not None and batch.labels.tolist() == [number % 5 for number in numbers(batch)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_batch_is_a_function_of_its_step(data, workers):
    """In order, after jumps forwards and back, from threads and without: always the same, bit for bit."""
    wanted = [0, 1, 2, 3, 9, 10, 4, 5, 6, 0, 100, 101, 99]
    expected = {step: stream(data, flip=True).at(step) for step in wanted}
    asked = stream(data, flip=True, workers=workers)
    try:
        assert all(same(asked.at(step), expected[step]) for step in wanted)
    finally:
        asked.close()


@pytest.mark.parametrize("batch", [1, 6, 20, 47])
def test_where_the_pictures_are_kept_changes_no_batch(data, batch):
    """Also one that spans three epochs, and without classes."""
    for some in (data, replace(data, labels=None, classes=())):
        plain, there = stream(some, batch=batch, flip=True), stream(some, batch=batch, flip=True, resident=True)
        for step in [0, 1, 2, 3, 9, 2, 100, 41]:
            one, other = plain.at(step), there.at(step)
            assert torch.equal(one.images, other.images) and one.images.is_contiguous() == other.images.is_contiguous()
            assert some.labels is None or same(one, other)


def test_a_gpu_keeps_pictures_that_leave_room_for_the_rest(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (4000, 9000))
    assert [has_room(torch.device("cuda"), needed) for needed in (1000, 1001)] == [True, False]
    assert not has_room(torch.device("cpu"), 1)


def test_the_seed_decides_the_order(data):
    assert numbers(stream(data, seed=1).at(0)) == numbers(stream(data, seed=1).at(0))
    assert numbers(stream(data, seed=1, batch=20).at(0)) != numbers(stream(data, seed=2, batch=20).at(0))


def test_the_size_of_a_batch_only_cuts_the_walk(data):
    small = [number for step in range(10) for number in numbers(stream(data, batch=6).at(step))]
    large = [number for step in range(3) for number in numbers(stream(data, batch=20).at(step))]
    assert small == large


def test_half_of_the_pictures_are_mirrored(data):
    """A mirrored picture bears its number on the right."""
    plain, flipped = stream(data, batch=1000), stream(data, batch=1000, flip=True)
    sides = []
    for step in range(2):
        images = flipped.at(step).images
        mirrored = images[:, 0, 0, 3] > -1
        assert torch.equal(torch.where(mirrored[:, None, None, None], images.flip(3), images), plain.at(step).images)
        # Four standard deviations of 1000 tosses of a coin.
        assert abs(int(mirrored.sum()) - 500) < 4 * 0.5 * 1000**0.5
        sides.append(mirrored)
    # Every step tosses anew: half of the tosses differ.
    assert abs(int((sides[0] ^ sides[1]).sum()) - 500) < 4 * 0.5 * 1000**0.5


def test_pictures_without_classes_have_no_labels(data):
    assert stream(replace(data, labels=None, classes=())).at(0).labels is None


def test_many_pictures_are_read_from_their_file(data, monkeypatch):
    """The same batches, and no copy of all of them in memory."""
    expected = [stream(data, flip=True).at(step) for step in range(9)]
    monkeypatch.setattr(streams, "COPIED", 0)
    other = stream(data, flip=True, workers=1)
    assert other.pixels is data.images
    assert all(same(other.at(step), batch) for step, batch in enumerate(expected))
    other.close()
