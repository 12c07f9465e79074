"""Sources: a folder, a zip or a tar, listed once and read in place, never written.

`list_source(path)` names every file; `open_reader(kind, path)` gives a function `read(entry, limit) -> bytes`. What
cannot even be listed as a file (a pipe, a link that leads nowhere, an encrypted member) is skipped with its reason.
Members of archives are only read: their names are names, and nothing is extracted.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snowmelt.errors import UserError
from snowmelt.files import check_name

BUILTIN = "builtin:"
"""Begins the name of a dataset that needs no files."""
ENDINGS = (".gz", ".bz2", ".xz", ".tgz", ".zip", ".tar")
MAX_FILE_BYTES = 256 * 1024 * 1024
LITTER = {".ds_store", "thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "icon\r"}
"""What operating systems leave in folders."""


def is_builtin(source: str) -> bool:
    """Whether a source is a built-in dataset, and no place."""
    return source.startswith(BUILTIN)


def resolved(source: str) -> str:
    """The source as it is named from everywhere."""
    return source if is_builtin(source) else str(Path(source).resolve())


def name_of(source: str) -> str:
    """What a source is called: a folder by its name, an archive by that without its ending.

    >>> [name_of(source) for source in ("builtin:digits", "pictures.of.cats.tar.gz", "cats.ZIP")]
    ['digits', 'pictures.of.cats', 'cats']
    """
    path = Path(source.removeprefix(BUILTIN)).resolve()
    name = path.name
    if not path.is_dir():
        for ending in ENDINGS:
            name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name or "images"


class Unusable(Exception):
    """A file that cannot be used; the message is the reason for the report."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file of a source."""

    name: str
    """Relative to the source, with `/`; bytes that are not UTF-8 are kept as lone surrogates."""
    size: int
    where: int = 0
    """The place in a zip's directory, the offset of a tar member's bytes; unused in a folder."""


Skipped = tuple[str, str]  # name, reason
Read = Callable[[Entry, int], bytes]


@dataclass(frozen=True)
class Listing:
    """A source and its files in the order of their names' bytes."""

    kind: str
    path: Path
    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]


def list_source(path: Path) -> Listing:
    """Every file of the folder, zip or plain tar at `path`; a `UserError` when it is none of these or unreadable."""
    kind = source_kind(path)
    try:
        entries, skipped = LISTERS[kind](path)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a {kind} ({first_line(error)}); copy or download it again."
        ) from error
    ordered = sorted(entries, key=lambda entry: (os.fsencode(entry.name), entry.where))
    return Listing(kind, path, tuple(ordered), tuple(skipped))


def source_kind(path: Path) -> str:
    """`folder`, `zip` or `tar`, by what is there and not by its name."""
    try:
        # A run keeps where it is, from everywhere.
        check_name(path.absolute())
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "folder"
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is no folder, zip or tar; name one of these.")
        with path.open("rb") as file:
            head = file.read(4)
        if head in (b"PK\x03\x04", b"PK\x05\x06"):
            return "zip"
        if packing(path) is not None or tarfile.is_tarfile(path):
            return "tar"
    except FileNotFoundError:
        raise UserError(f"There is no file or folder {path}; check the spelling.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror or error}); check its permissions.") from error
    except (tarfile.TarError, EOFError, ValueError):
        pass
    raise UserError(f"{path} is no folder, zip or tar; name one of these.")


PACKINGS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def packing(path: Path) -> bytes | None:
    """The first bytes that name the compression of a `.tar.gz`, `.tar.bz2` or `.tar.xz`, None for other files."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((magic for magic in PACKINGS if head.startswith(magic)), None)


def unpack(path: Path, target: Path) -> None:
    """Write the plain tar inside a compressed one to `target`, so that its members can be read in any order."""
    magic = packing(path)
    assert magic is not None, "only for compressed tars"
    room = shutil.disk_usage(target.parent).free - (1 << 28)
    try:
        with PACKINGS[magic](path, "rb") as packed, target.open("wb") as plain:
            while block := packed.read(1 << 20):
                plain.write(block)
                room -= len(block)
                if room < 0:
                    raise UserError(f"There is no room to unpack {path}; free some space or unpack it elsewhere.")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be unpacked ({first_line(error)}); copy or download it again.") from error
    if not tarfile.is_tarfile(target):
        raise UserError(f"{path} is compressed but holds no tar; name a folder, zip or tar of images.")


# folders


def _list_folder(root: Path) -> tuple[list[Entry], list[Skipped]]:
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    folders: list[str] = [""]
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        # Links wait until all real folders are known, so that a folder is listed under its own name.
        folder = folders.pop() if folders else _first(links)
        try:
            if folder and _identity((root / folder).stat()) in seen:
                skipped.append((folder, _SEEN))
                continue
            seen.add(_identity((root / folder).stat()))
            with os.scandir(root / folder) as found:
                children = sorted(found, key=lambda child: os.fsencode(child.name), reverse=True)
        except OSError as error:
            if not folder:
                raise
            skipped.append((folder + "/", f"the folder cannot be opened ({error.strerror})"))
            continue
        for child in children:
            name = f"{folder}/{child.name}" if folder else child.name
            try:
                _classify(child, name, (entries, folders, links), seen)
            except Unusable as reason:
                skipped.append((name, str(reason)))
    return entries, skipped


def _classify(
    child: os.DirEntry[str], name: str, found: tuple[list[Entry], list[str], list[str]], seen: set[tuple[int, int]]
) -> None:
    """Put one directory entry where it belongs, or raise `Unusable`."""
    entries, folders, links = found
    if is_litter(child.name):
        raise Unusable("system file")
    try:
        status = child.stat()
    except FileNotFoundError:
        raise Unusable("a link that leads nowhere") from None
    except OSError as error:
        raise Unusable("a link that leads in a circle" if child.is_symlink() else str(error.strerror)) from None
    if stat.S_ISREG(status.st_mode):
        entries.append(Entry(name, status.st_size))
    elif stat.S_ISDIR(status.st_mode):
        if _identity(status) in seen:
            raise Unusable(_SEEN)
        (links if child.is_symlink() else folders).append(name)
    else:
        raise Unusable(f"not a file but a {_special(status.st_mode)}")


_SEEN = "a link to a folder that is already listed"


def _first(links: list[str]) -> str:
    links.sort(key=os.fsencode)
    return links.pop(0)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _special(mode: int) -> str:
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def _read_folder(root: Path) -> Read:
    def read(entry: Entry, limit: int) -> bytes:
        # Not to hang should the file have become a pipe since it was listed.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(root / entry.name, flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise Unusable("no longer a regular file")
                return file.read(limit)
        except FileNotFoundError:
            raise Unusable("vanished during the run") from None
        except OSError as error:
            raise Unusable(f"cannot be read ({(error.strerror or 'input error').lower()})") from None

    return read


# archives


def _list_zip(path: Path) -> tuple[list[Entry], list[Skipped]]:
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    with zipfile.ZipFile(path) as archive:
        for place, member in enumerate(archive.infolist()):
            if member.is_dir():
                continue
            name = tidy_name(_zip_name(member))
            if reason := _zip_obstacle(name, member):
                skipped.append((name, reason))
            else:
                entries.append(Entry(name, member.file_size, place))
    return entries, skipped


def _zip_obstacle(name: str, member: zipfile.ZipInfo) -> str:
    if is_litter(name):
        return "system file"
    if member.flag_bits & 0x1:
        return "encrypted"
    return "a link inside the archive" if stat.S_ISLNK(member.external_attr >> 16) else ""


def _zip_name(member: zipfile.ZipInfo) -> str:
    """The name as UTF-8 where its bytes are UTF-8: many programs write it without setting the flag that says so."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _read_zip(path: Path) -> Read:
    archive = zipfile.ZipFile(path)
    members = archive.infolist()

    def read(entry: Entry, limit: int) -> bytes:
        try:
            with archive.open(members[entry.where]) as file:
                return file.read(limit)
        except zipfile.BadZipFile:
            raise Unusable("damaged inside the archive (its checksum or header is wrong)") from None
        except (OSError, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise Unusable(f"cannot be unpacked ({first_line(error)})") from None

    return read


def _list_tar(path: Path) -> tuple[list[Entry], list[Skipped]]:
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    with tarfile.open(path, "r:") as archive:
        try:
            for member in archive:
                name = tidy_name(member.name)
                if member.isdir():
                    continue
                if reason := _tar_obstacle(name, member):
                    skipped.append((name, reason))
                else:
                    entries.append(Entry(name, member.size, member.offset_data))
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if not entries:
                raise
            skipped.append((path.name, f"the archive is damaged after {entries[-1].name} ({first_line(error)})"))
    return entries, skipped


def _tar_obstacle(name: str, member: tarfile.TarInfo) -> str:
    if is_litter(name):
        return "system file"
    if member.issparse():
        return "a sparse file inside the archive"
    return "" if member.isreg() else "a link or special file inside the archive"


def _read_tar(path: Path) -> Read:
    file = path.open("rb")

    def read(entry: Entry, limit: int) -> bytes:
        file.seek(entry.where)
        return file.read(min(limit, entry.size))

    return read


LISTERS: dict[str, Callable[[Path], tuple[list[Entry], list[Skipped]]]] = {
    "folder": _list_folder,
    "zip": _list_zip,
    "tar": _list_tar,
}
READERS: dict[str, Callable[[Path], Read]] = {"folder": _read_folder, "zip": _read_zip, "tar": _read_tar}


def open_reader(kind: str, path: Path) -> Read:
    """A function that gives the first `limit` bytes of an entry or raises `Unusable`; every process opens its own."""
    return READERS[kind](path)


# names


def is_litter(name: str) -> bool:
    """Whether the file or a folder above it is hidden or made by an operating system."""
    parts = (part for part in name.split("/") if part != "..")
    return any(part.startswith(".") or part.lower() in LITTER for part in parts)


def tidy_name(name: str) -> str:
    """A member's name without empty and `.` parts; it is only a name, so `..` may stay."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sorting key that puts `2` before `10`, and numbers before words."""
    return [_rank(part) for part in re.split(r"([0-9]+)", name) if part]


def _rank(part: str) -> tuple[bool, int, str]:
    if part[0] not in "0123456789":
        return True, 0, part
    digits = part.lstrip("0")  # compared as text: Python refuses to make a number of thousands of digits
    return False, len(digits), digits


def first_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def walk(listing: Listing) -> Iterator[str]:
    """The name of every file of the listing, usable or not."""
    yield from (entry.name for entry in listing.entries)
    yield from (name for name, _ in listing.skipped)
