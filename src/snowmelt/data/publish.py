"""Publishing a folder whole or not at all: written beside its final place, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from snowmelt.data.source import LITTER
from snowmelt.errors import UserError
from snowmelt.files import check_name, make_folder, sync_directory

try:
    import fcntl
except ImportError:  # Windows: a leftover is then taken for abandoned without asking
    fcntl = None


@contextmanager
def publish(out: Path, is_ours: Callable[[Path], bool]) -> Generator[Path]:
    """A fresh folder beside `out` that takes its place when the block ends well and vanishes when it does not.

    An existing `out` is replaced only if it is empty or `is_ours(out)`; anything else is a `UserError`. Leftovers of
    attempts that were killed are removed first.
    """
    check_name(out)
    _refuse_foreign(out, is_ours)
    # Where a link leads, and not the link, is replaced.
    out = out.resolve()
    with make_folder(out.parent):
        _clear_leftovers(out)
        folder = out.with_name(f".{out.name}.preparing-{os.getpid()}")
        shutil.rmtree(folder, ignore_errors=True)
        lock = None
        try:
            folder.mkdir()
            lock = _lock(folder)
            yield folder
            _flush(folder)
            _replace(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def _refuse_foreign(out: Path, is_ours: Callable[[Path], bool]) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link that leads nowhere; remove it or choose another place with --out.")
    if not out.exists():
        return
    if out.resolve() == Path.cwd():
        raise UserError(f"{out} is the folder you are in, which cannot be replaced; choose another place with --out.")
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another place with --out.")
    if contents(out) and not is_ours(out):
        raise UserError(f"{out} holds files that are not a prepared dataset's; choose another place with --out.")


def contents(folder: Path) -> list[str]:
    """The names in a folder but for what operating systems leave there."""
    return [path.name for path in folder.iterdir() if path.name.lower() not in LITTER]


def _clear_leftovers(out: Path) -> None:
    """Remove abandoned attempts, and bring back an older dataset whose replacement was cut between two renames."""
    for old in sorted(out.parent.glob(f".{_literal(out.name)}.replaced-*")):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    for folder in out.parent.glob(f".{_literal(out.name)}.preparing-*"):
        lock = _lock(folder)
        if lock is None and fcntl is not None:
            continue  # another process is writing it at this moment
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed (or its process dies), None when it is taken."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        if path.is_dir():
            sync_directory(path)
            continue
        # Windows waits only for what may be written.
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(folder: Path, out: Path) -> None:
    old = None
    if out.is_dir() and any(out.iterdir()):
        old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
        out.rename(old)
    elif out.is_dir() and os.name == "nt":
        # Nothing is renamed there to a name that is taken.
        out.rmdir()
    folder.rename(out)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
