"""The prepared dataset: one folder with every picture at one size, decoded once and never again.

    images.npy      uint8 (count, height, width, channels), memory-mapped when opened
    labels.npy      int64 (count,), only with classes           captions.json   only with captions
    held_out.npy    int64, the rows kept out of training        dataset.json    everything else that matters
    report.json     what became of every file                   report.txt      the same for people

The fingerprint is the SHA-256 of the pixels' digest, labels, captions, split and settings. Nothing in the folder
depends on the clock, on absolute paths or on how many processes made it: the same pictures give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from snowmelt.errors import UserError

KIND = "snowmelt prepared dataset"
FORMAT = 1
FILES = (
    "images.npy",
    "labels.npy",
    "held_out.npy",
    "captions.json",
    "dataset.json",
    "report.json",
    "report.txt",
)
HEADER_BYTES = 128  # of images.npy: numpy pads its headers to 64 bytes, and ours always needs two blocks
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Prepared:
    """An opened prepared dataset."""

    path: Path
    images: np.ndarray
    """uint8 (count, height, width, channels), memory-mapped and read-only; channels is 1 or 3."""
    labels: np.ndarray | None
    """int64 (count,), None without classes."""
    classes: tuple[str, ...]
    captions: tuple[str, ...] | None
    train: np.ndarray
    """int64 rows of the training images, increasing."""
    held_out: np.ndarray
    """int64 rows of the held-out images, increasing."""
    mean: float
    """Of the training pixels over all channels, in [-1, 1] units."""
    std: float
    """Likewise; the data's sigma in the edm parameterization."""
    fingerprint: str
    background: str = "#ffffff"
    fit: str = "crop"
    """How they were made, as `snowmelt prepare` was told."""

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return int(self.images.shape[1])

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.images.shape[3])


@dataclass(frozen=True)
class Contents:
    """What is written beside the pixels."""

    labels: np.ndarray | None
    classes: tuple[str, ...]
    captions: tuple[str, ...] | None
    held_out: np.ndarray
    settings: dict[str, int | str]
    source: str


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder made by `snowmelt prepare`, whatever its state."""
    try:
        return _read_json(path / "dataset.json").get("kind") == KIND
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def open_prepared(path: Path) -> Prepared:
    """The prepared dataset at `path`; a `UserError` when it is none, is damaged or comes from a later version."""
    if not is_prepared(path):
        what = "is no prepared dataset" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; make one with `snowmelt prepare SOURCE --out {path}`.")
    facts = _read_json(path / "dataset.json")
    version = facts.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{path} was prepared by a later Snowmelt (format {version}); update Snowmelt or prepare again."
        )
    try:
        return _open(path, facts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({detail}); prepare it again with --out {path}.") from error


def _open(path: Path, facts: dict[str, Any]) -> Prepared:
    shape = tuple(int(extent) for extent in facts["shape"])
    images = np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)
    if images.shape != shape or images.dtype != np.uint8 or shape[3] not in (1, 3):
        raise ValueError(f"images.npy holds {images.dtype} {images.shape}, not uint8 {shape}")
    if (path / "images.npy").stat().st_size != HEADER_BYTES + images.nbytes:
        raise ValueError("images.npy has the wrong length")
    classes = tuple(str(name) for name in facts["classes"])
    labels = np.load(path / "labels.npy", allow_pickle=False) if classes else None
    captions = tuple(_read_json(path / "captions.json")) if facts["captions"] else None
    held_out = np.load(path / "held_out.npy", allow_pickle=False)
    contents = Contents(labels, classes, captions, held_out, facts["settings"], facts["source"])
    if _fingerprint(shape, facts["pixels"], contents) != facts["fingerprint"]:
        raise ValueError("its parts do not belong together: the fingerprint differs")
    return Prepared(
        path=path,
        images=images,
        labels=labels,
        classes=classes,
        captions=captions,
        train=np.setdiff1d(np.arange(shape[0], dtype=np.int64), held_out),
        held_out=held_out,
        mean=float(facts["mean"]),
        std=float(facts["std"]),
        fingerprint=str(facts["fingerprint"]),
        background=str(contents.settings["background"]),
        fit=str(contents.settings["fit"]),
    )


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The first `HEADER_BYTES` of an uint8 npy file of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    header = buffer.getvalue()
    assert len(header) == HEADER_BYTES, "numpy has changed the length of its header"
    return header


def row_chunks(images: np.ndarray) -> Iterator[slice]:
    """Consecutive slices of the rows, each about 16 MB."""
    rows = max(1, _CHUNK_BYTES // max(1, int(images[0].nbytes)))
    return (slice(start, start + rows) for start in range(0, len(images), rows))


def spread_rows(rows: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` of the rows, at even places among all of them: rows lie in the order of their classes."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]


FLAT_PLACES = 32
"""Places side by side, of which neighbours are compared: the finer pictures are, the more alike are their pixels."""
LOOKED_AT, LOOKED_BYTES = 1000, 64 << 20
"""Training pictures that say how flat all are, and bytes of them, at most (16 of any size)."""


def flat_share(data: Prepared) -> float:
    """The share of places in training pictures that are exactly like the one beside them, a 32nd of the width away.

    Of photographs it is a few per cent, of drawings and digits, which stand on one colour, a third and more;
    photographs that were padded stand on one colour, too.
    """
    most = max(16, min(LOOKED_AT, LOOKED_BYTES // data.images[0].nbytes))
    step = max(1, data.size // FLAT_PLACES)
    some = (data.images[row, ::step, ::step] for row in spread_rows(data.train, most))
    alike = [(one[:, 1:] == one[:, :-1]).all(-1).mean() for one in some]
    return float(np.mean(alike)) if alike else 0.0


def mean_pictures(data: Prepared) -> np.ndarray:
    """uint8 (classes + 1, height, width, channels): the mean training picture of each class and, last, of all."""
    sums = np.zeros((len(data.classes) + 1, *data.images.shape[1:]), np.int64)
    counts = np.zeros(len(sums), np.int64)
    for rows in _some_rows(data.images, data.train):
        pictures, labels = data.images[rows], None if data.labels is None else data.labels[rows]
        for label in range(len(sums)):
            some = pictures if label == len(data.classes) else pictures[labels == label]
            sums[label] += some.sum(0, dtype=np.int64)
            counts[label] += len(some)
    # A class without a training picture is as likely to be like all the others.
    empty = counts == 0
    sums[empty], counts[empty] = sums[-1], counts[-1]
    return (sums / counts[:, None, None, None]).round().astype(np.uint8)


def row_digests(images: np.ndarray) -> list[bytes]:
    """The SHA-256 of every image's pixels."""
    return [hashlib.sha256(row.tobytes()).digest() for chunk in row_chunks(images) for row in np.asarray(images[chunk])]


def write_dataset(folder: Path, digests: list[bytes], contents: Contents) -> None:
    """Write everything but the reports beside `folder/images.npy`, which is complete."""
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    train = np.setdiff1d(np.arange(len(images), dtype=np.int64), contents.held_out)
    mean, std = _moments(images, train)
    pixels = hashlib.sha256(b"".join(digests)).hexdigest()
    if contents.labels is not None:
        np.save(folder / "labels.npy", contents.labels.astype("<i8"))
    if contents.captions is not None:
        write_json(folder / "captions.json", list(contents.captions))
    np.save(folder / "held_out.npy", contents.held_out.astype("<i8"))
    facts = {
        "kind": KIND,
        "format": FORMAT,
        "source": contents.source,
        "shape": list(images.shape),
        "train": len(train),
        "held_out": len(contents.held_out),
        "mean": mean,
        "std": std,
        "classes": list(contents.classes),
        "captions": contents.captions is not None,
        "settings": contents.settings,
        "pixels": pixels,
        "fingerprint": _fingerprint(images.shape, pixels, contents),
    }
    write_json(folder / "dataset.json", facts)


def write_json(path: Path, value: object) -> None:
    """UTF-8, one line per item, the same bytes for the same value."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _some_rows(images: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in pieces, of about 16 MB of pictures each."""
    step = max(1, _CHUNK_BYTES // int(images[0].nbytes))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _moments(images: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation in [-1, 1] units, in whole numbers until the end: the order cannot matter."""
    first = second = 0
    total = len(rows) * int(images[0].size)
    for some in _some_rows(images, rows):
        values = images[some]
        first += int(values.sum(dtype=np.int64))
        second += int(np.square(values, dtype=np.uint16).sum(dtype=np.int64))
    variance = (second * total - first * first) / (total * total)
    return 2 * first / (255 * total) - 1, 2 * variance**0.5 / 255


def _fingerprint(shape: tuple[int, ...], pixels: str, contents: Contents) -> str:
    def rows(array: np.ndarray | None) -> list[int]:
        return [] if array is None else cast(list[int], array.tolist())

    parts = {
        "format": FORMAT,
        "shape": list(shape),
        "pixels": pixels,
        "labels": rows(contents.labels),
        "classes": list(contents.classes),
        "captions": None if contents.captions is None else list(contents.captions),
        "held_out": rows(contents.held_out),
        "settings": contents.settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
