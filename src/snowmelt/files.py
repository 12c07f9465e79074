"""Writing so that a reader, or a power cut, sees the old file or the new one and never a part."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from snowmelt.errors import UserError

WRITERS = 8
"""Files that wait for the disk at the same time, where there are many."""


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
    _replace(path, data.encode() if isinstance(data, str) else data)
    sync_directory(path.parent)


def write_together(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Replace files of one folder, by name, each in one instant; they wait for the disk side by side."""
    paths = {folder / name: data for name, data in files.items()}
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(_replace, paths, paths.values()))
    sync_directory(folder)
    return list(paths)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
