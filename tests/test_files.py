"""Files are there whole or not at all, whoever waits for the disk."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from snowmelt import files
from snowmelt.cli import run as cli
from snowmelt.errors import UserError
from snowmelt.files import make_folder, write_atomic, write_together

OLD = {str(number): b"old" for number in range(20)}


def found(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("begun", [False, True], ids=["refused", "refused when it had begun"])
def test_what_a_refusal_leaves(tmp_path, begun):
    """Nothing of its own, all that another process made beside it meanwhile, and what is worth going on with."""
    ours, others = tmp_path / "runs" / "ours", tmp_path / "runs" / "others"
    with pytest.raises(UserError), make_folder(ours, begun="config.toml"):
        (ours / "data").mkdir()
        (ours / ("config.toml" if begun else "log.txt")).write_text("some")
        others.mkdir()
        raise UserError("No.")
    assert others.exists() and ours.exists() == begun


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="no such names there")
@pytest.mark.parametrize(
    "words", [["train", "PICTURES"], ["prepare", "PICTURES"], ["train", "builtin:digits", "--out", "RUN"]]
)
def test_a_name_that_is_no_text_is_refused_at_once(tmp_path, monkeypatch, capsys, words):
    """A run could not write it down, and its log neither."""
    monkeypatch.chdir(tmp_path)
    strange = os.fsdecode(b"caf\xe9")
    (tmp_path / strange).mkdir()
    names = {"PICTURES": strange, "RUN": f"{strange}/run"}
    assert cli([names.get(word, word) for word in words]) == 2
    assert r"caf\xe9" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == [strange]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_waited_for_is_written_all_the_same(tmp_path, monkeypatch, number):
    """Shared folders of virtual machines know no fsync of a directory; a disk that fails is another matter."""
    honest = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        honest(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if number == errno.EINVAL else pytest.raises(OSError):
        write_atomic(tmp_path / "file", "text")
        assert (tmp_path / "file").read_text() == "text"


def test_a_refusal_takes_the_folders_above_that_it_made(tmp_path):
    with pytest.raises(UserError), make_folder(tmp_path / "runs" / "deep" / "ours", begun="config.toml"):
        raise UserError("No.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("platform", [files.sys.platform, "elsewhere"])
def test_many_files_are_replaced_together(tmp_path, monkeypatch, platform):
    """Where a file system cannot be waited for as a whole, every file is."""
    honest, waited = os.fsync, []
    monkeypatch.setattr(files.sys, "platform", platform)
    monkeypatch.setattr(os, "fsync", lambda handle: (waited.append(handle), honest(handle))[1])
    (tmp_path / "7").write_bytes(b"old")
    contents = {str(number): os.urandom(number) for number in range(40)}
    assert write_together(tmp_path, contents) == [tmp_path / name for name in contents]
    assert found(tmp_path) == contents, "and nothing temporary"
    assert len(waited) == (1 if platform == "linux" else 41), "the last one is for the names"


def test_a_full_disk_leaves_all_as_it_was(tmp_path, monkeypatch):
    write_together(tmp_path, OLD)
    honest = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if data != b"12":
            return honest(path, data)
        honest(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_together(tmp_path, {name: name.encode() for name in OLD})
    monkeypatch.undo()
    assert found(tmp_path) == OLD


def test_what_the_disk_did_not_take_replaces_nothing(tmp_path, monkeypatch):
    """A late error, which only waiting shows."""

    class Library:
        def __init__(self, *_given: object, **_named: object) -> None:
            ctypes.set_errno(errno.EIO)

        def syncfs(self, _handle: int) -> int:
            return -1

    write_together(tmp_path, OLD)
    monkeypatch.setattr(files.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    with pytest.raises(OSError, match="Input/output error"):
        write_together(tmp_path, {name: name.encode() for name in OLD})
    assert found(tmp_path) == OLD
