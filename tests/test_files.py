"""Files are there whole or not at all, whoever waits for the disk."""

from __future__ import annotations

import errno
import os

import pytest

from snowmelt import files
from snowmelt.files import write_together


def test_many_files_are_replaced_together(tmp_path):
    (tmp_path / "7").write_bytes(b"old")
    contents = {str(number): os.urandom(number) for number in range(40)}
    assert write_together(tmp_path, contents) == [tmp_path / name for name in contents]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents, "and nothing temporary"


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    honest, old = files.write_synced, {str(number): b"old" for number in range(20)}
    write_together(tmp_path, old)

    def full(path, data):
        if data == b"12":
            path.write_bytes(data[:1])
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, data)

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        write_together(tmp_path, {name: name.encode() for name in old})
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found.keys() == old.keys() and found["12"] == b"old"
    assert all(data in (b"old", name.encode()) for name, data in found.items())
