"""Writing so that a reader, or a power cut, sees the old file or the new one and never a part."""

from __future__ import annotations

import os
from collections.abc import Generator
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


def write_atomic(path: Path, data: bytes | str, *, settle: bool = True) -> None:
    """Replace a file in one instant: temporary name, fsync, rename.

    Args:
        settle: make the name durable too; else whoever writes many files does so once, by `sync_directory`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if settle:
        sync_directory(path.parent)
