"""One folder for what is expensive and belongs to no run: encoders, features of real pictures, fetched weights.

    CACHE/encoders/<key>.safetensors   CACHE/features/<key>.safetensors   CACHE/weights/<name>

It is the system's folder for such things, or the one that SNOWMELT_CACHE names. Everything in it can be deleted: it is
made again. Files are written whole or not at all and hold a digest of their numbers; a damaged one is made again too.
Two processes that make the same file do no harm, as they make the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from snowmelt.errors import UserError
from snowmelt.files import write_atomic

VARIABLE = "SNOWMELT_CACHE"
_SECONDS = 30.0
_DIGEST = "sha256"

Fetch = Callable[[str, int], bytes]
"""Address, most bytes -> what is there."""


def cache_folder(kind: str) -> Path:
    """The folder for one kind of things, made where it was not.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(os.environ.get(VARIABLE) or user_cache_dir("snowmelt", appauthor=False)) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache {folder} cannot be made ({error.strerror}); name another with {VARIABLE}."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"The cache {folder} cannot be written; name another folder with {VARIABLE}.")
    return folder


def key_of(facts: Mapping[str, object]) -> str:
    """A file name that only the same facts have."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:32]


def rows_key(rows: np.ndarray) -> str:
    """The same for rows of a dataset, in their order."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:32]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, shapes, types and numbers, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`, made and put there when it is absent or damaged."""
    found = _whole(path)
    if found is None:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        _write(path, save(found, metadata={_DIGEST: digest_of(found)}))
    return found


def is_kept(path: Path) -> bool:
    """Whether `kept` would find what it looks for."""
    return _whole(path) is not None


def _whole(path: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get(_DIGEST)
    except (OSError, SafetensorError, ValueError):
        return None
    return found if digest == digest_of(found) else None


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another folder with {VARIABLE}.") from error


@dataclass(frozen=True)
class Published:
    """A file that others keep on the network."""

    name: str
    url: str
    sha256: str
    size: int
    """Bytes."""
    option: str
    """With which a person gives its path instead."""


def published_path(what: Published) -> Path:
    """Where a fetched file lies, whether it does or not."""
    return cache_folder("weights") / what.name


def fetched(what: Published, fetch: Fetch | None = None) -> Path:
    """The file, fetched once and checked.

    Raises:
        UserError: there is no network, or what came is something else.
    """
    path = published_path(what)
    if not path.exists():
        try:
            data = (fetch or _download)(what.url, what.size)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"{what.name} could not be fetched ({reason}); "
                f"get it from {what.url} and give its path with {what.option}."
            ) from error
        if hashlib.sha256(data).hexdigest() != what.sha256:
            raise UserError(
                f"What came from {what.url} is not {what.name} (its SHA-256 differs); "
                f"get the right file and give its path with {what.option}."
            )
        _write(path, data)
    return path


def _download(url: str, size: int) -> bytes:
    if not url.startswith("https://"):
        raise ValueError("the address is not https")
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310, the scheme was looked at
        return answer.read(size + 1)
