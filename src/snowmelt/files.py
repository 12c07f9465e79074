"""Writing so that a reader, or a power cut, sees the old file or the new one and never a part; names as text."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from snowmelt.errors import Locked, UserError


@contextmanager
def make_folder(path: Path, begun: str | None = None) -> Generator[Path]:
    """`path`, made where it was not; made folders that are still empty when the block fails go again.

    Args:
        begun: after a refusal `path`, if it was made, goes with all that is in it, unless there is a file of this name.

    Raises:
        UserError: nothing can be written there, or see `check_name`; before the block begins.
    """
    check_name(path)
    missing, made = [folder for folder in (path, *path.parents) if not folder.exists()], False
    try:
        made = _make_writable(path)
        yield path
    except BaseException as error:
        refused = isinstance(error, UserError) and not isinstance(error, Locked)
        if begun and made and refused and not (path / begun).exists():
            shutil.rmtree(path, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def printable(name: str) -> str:
    """The name as text that any terminal and any JSON can hold: other bytes and control letters as `\\xff`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def check_name(path: Path) -> None:
    """Refuse a path that is no text: it is going to be written down.

    Raises:
        UserError: some of its bytes are no UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"The name {printable(str(path))} is not written in UTF-8; rename the folder or the file."
        ) from None


LEFT = ("data", "log.txt")
"""What a process leaves that was killed before it had decided anything."""


def holds_else(path: Path) -> bool:
    """Whether a folder that is there holds more than `LEFT` and hidden files."""
    return path.is_dir() and any(child.name not in LEFT and child.name[0] != "." for child in path.iterdir())


def _make_writable(path: Path) -> bool:
    """Whether it was made now, by this process and not by another at the same moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = True
        try:
            path.mkdir()
        except FileExistsError:
            made = False
            if not path.is_dir():
                raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written (no permission); choose another --out.")
    return made


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system can open directories and the file system wait for one."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Folders that are shared with a virtual machine, for one, cannot be waited for.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
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
    """Replace files of one folder, by name, each in one instant; the disk is waited for once for all of them."""
    paths = [folder / name for name in files]
    try:
        for path, data in zip(paths, files.values(), strict=True):
            _temporary(path).write_bytes(data)
        _settle(folder, map(_temporary, paths))
        for path in paths:
            _temporary(path).replace(path)
    finally:
        for path in paths:
            _temporary(path).unlink(missing_ok=True)
    sync_directory(folder)
    return paths


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _settle(folder: Path, written: Iterable[Path]) -> None:
    """Wait until the disk has files of a folder: by Linux's syncfs, which takes half of the time of fsync for each."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if sys.platform == "linux" else None
    for path in [folder] if syncfs else written:
        handle = os.open(path, os.O_RDONLY if syncfs else os.O_RDWR)
        try:
            if syncfs is None:
                os.fsync(handle)
            elif syncfs(handle):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        finally:
            os.close(handle)
