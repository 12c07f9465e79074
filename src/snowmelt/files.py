"""Writing so that a reader, or a power cut, sees the old file or the new one and never a part."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from snowmelt.errors import UserError


@contextmanager
def make_folder(path: Path) -> Generator[Path]:
    """`path`, made where it was not; made folders that are still empty when the block fails go again.

    Raises:
        UserError: nothing can be written there; before the block begins.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        _make_writable(path)
        yield path
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written (no permission); choose another --out.")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (systems that cannot open directories need no such thing)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file in one instant: temporary name, fsync, rename."""
    temporary = _temporary(path)
    try:
        write_synced(temporary, data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_together(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Replace files of one folder, by name, each in one instant; the disk is waited for once for all of them.

    Waiting for every file by itself takes two thirds of the time of writing small ones (docs/recipe.md).
    """
    paths = {folder / name: data for name, data in files.items()}
    try:
        for path, data in paths.items():
            if hasattr(os, "sync"):
                _temporary(path).write_bytes(data)
            else:
                write_synced(_temporary(path), data)
        if hasattr(os, "sync"):
            os.sync()
        for path in paths:
            _temporary(path).replace(path)
    finally:
        for path in paths:
            _temporary(path).unlink(missing_ok=True)
    sync_directory(folder)
    return list(paths)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
