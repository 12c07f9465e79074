"""Listing, names, classes, captions and the split: functions of names and digests alone."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snowmelt.data.annotations import find_classes, held_out_count, hold_out, read_captions
from snowmelt.data.formats import misnamed, recognise
from snowmelt.data.source import Unusable, is_litter, list_source, natural, open_reader, tidy_name
from snowmelt.errors import UserError
from snowmelt.files import printable

# listing


def test_a_folder_is_listed_in_the_order_of_its_names_and_read_in_place(tmp_path):
    for name in ("b/2", "b/10", "a", "B", "ä"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    listing = list_source(tmp_path)
    assert [entry.name for entry in listing.entries] == ["B", "a", "b/10", "b/2", "ä"]
    read = open_reader(listing.kind, tmp_path)
    assert [read(entry, 3).decode("utf-8", "ignore") for entry in listing.entries] == ["B", "a", "b/1", "b/2", "ä"]


def test_a_linked_folder_is_followed_once(tmp_path):
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "x.png").write_text("x")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "link").symlink_to("../outside")
    (tmp_path / "source" / "other").symlink_to("../outside")
    (tmp_path / "outside" / "up").symlink_to("../source")
    listing = list_source(tmp_path / "source")
    assert [entry.name for entry in listing.entries] == ["link/deep/x.png"]
    assert sorted(name for name, _ in listing.skipped) == ["link/up", "other"]


def test_zip_names_without_the_flag_are_read_as_utf8(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("Gr__e.png", b"x")
    data = (tmp_path / "x.zip").read_bytes().replace(b"Gr__e.png", "Grüe.png".encode())
    (tmp_path / "x.zip").write_bytes(data)
    assert [entry.name for entry in list_source(tmp_path / "x.zip").entries] == ["Grüe.png"]


def test_an_encrypted_member_is_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    assert list_source(tmp_path / "x.zip").skipped == (("a.png", "encrypted"),)


def test_what_is_no_source_is_one_sentence(tmp_path):
    (tmp_path / "x.txt").write_text("words")
    for path in (tmp_path / "nowhere", tmp_path / "x.txt", Path("/dev/null")):
        with pytest.raises(UserError):
            list_source(path)


# names


@given(st.binary(max_size=30))
def test_any_name_is_printed_as_text(raw):
    text = printable(raw.decode("utf-8", "surrogateescape"))
    assert text.isprintable()
    assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text


def test_names():
    assert sorted(["10", "2", "a10", "a9", "1"], key=natural) == ["1", "2", "10", "a9", "a10"]
    assert natural("007") == natural("7") != natural("8" * 5000)
    assert tidy_name("./a//b/./c") == "a/b/c"
    assert is_litter("__MACOSX/a.png") and is_litter("a/.hidden/b.png") and not is_litter("../a.b/c.png")
    assert misnamed("a/x.png", "JPEG") == "is a JPEG named .png"
    assert misnamed("a.png/x", "JPEG") == "" == misnamed("x.JPE", "JPEG")


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_recognised_or_refused_with_a_reason(head):
    try:
        assert recognise(head).isupper()
    except Unusable as reason:
        assert str(reason)


# classes


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["a/1", "a/2", "b/1", "b/2"], ("a", "b")),
        (["root/a/1", "root/a/2", "root/b/1", "root/b/deep/2"], ("a", "b")),
        (["train/a/1", "train/b/1", "test/a/1", "test/b/1"], ("a", "b")),
        (["2/x", "2/y", "10/x", "10/y"], ("2", "10")),
        (["a/1", "a/2", "b/1", "2"], None),  # one lies at the top
        (["a/1", "a/2", "a/3"], None),  # one folder is no choice
        (["a/1", "b/1", "c/1"], None),  # a folder for every picture
        (["train/1", "train/2", "test/1", "test/2"], None),  # parts, not classes
        (["1", "2"], None),
    ],
)
def test_sub_folders_are_classes_where_they_can_be(names, classes):
    found = find_classes(names)
    assert (found[1] if found else None) == classes
    if found:
        folders = [next(part for part in name.split("/") if part in found[1]) for name in names]
        assert [found[1][label] for label in found[0]] == folders


# captions


def test_captions_and_complaints():
    lines = [
        b'{"file_name": "a.png", "text": "one"}',
        b"",
        b'{"file_name": "sub/b.png", "text": "\xc3\xa4", "other": 1}',
        b"{broken",
        b"[1]",
        b'{"file_name": "a.png", "text": "again"}',
        b'{"file_name": "c.png"}',
        b'{"file_name": "nowhere.png", "text": "x"}',
        b"\xff\xfe",
        b"[" * 100_000,
        '{"file_name": "u\u0308.png", "text": "decomposed"}'.encode(),
    ]
    names = ["x/a.png", "x/sub/b.png", "x/c.png", "x/\u00fc.png"]
    captions, complaints = read_captions({"x/metadata.jsonl": b"\n".join(lines)}, names)
    assert captions == {"x/a.png": "one", "x/sub/b.png": "ä", "x/\u00fc.png": "decomposed"}
    assert [place.rpartition(" ")[2] for place, _ in complaints] == ["4", "5", "6", "7", "8", "9", "10"]


# the split


def test_how_many_are_held_out():
    wanted = {2: 1, 20: 2, 99: 9, 100: 50, 500: 50, 600: 60, 1000: 100, 2000: 100, 60000: 3000}
    assert {count: held_out_count(count) for count in wanted} == wanted
    assert all(0.05 <= held_out_count(count) / count <= 0.1 for count in range(500, 5000))


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=400).filter(lambda values: len(set(values)) > 1),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_a_picture_and_its_copies_lie_on_one_side(values, kinds, seed):
    digests = [bytes([value]) for value in values]
    labels = np.arange(len(values), dtype=np.int64) % kinds
    held_out = hold_out(digests, labels, seed)
    inside = {values[row] for row in held_out}
    outside = {values[row] for row in set(range(len(values))) - set(held_out.tolist())}
    assert inside and outside and not inside & outside
    assert (np.diff(held_out) > 0).all()


def test_the_split_is_of_the_seed_and_in_proportion():
    digests = [number.to_bytes(4, "big") for number in range(3000)]
    labels = np.repeat(np.arange(3), (1500, 1000, 500)).astype(np.int64)
    first = hold_out(digests, labels, 0)
    np.testing.assert_array_equal(first, hold_out(digests, labels, 0))
    assert len(first) == 150 and np.bincount(labels[first]).tolist() == [75, 50, 25]
    # Two independent draws of a twentieth share a twentieth of their members.
    assert len(np.intersect1d(first, hold_out(digests, labels, 1))) < 30


@pytest.mark.parametrize("sizes", [(1, 99), (*[1] * 10, 90), (2, 2, 1, 1, 300)])
def test_a_class_keeps_a_picture_to_train_on(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    held_out = hold_out([number.to_bytes(4, "big") for number in range(len(labels))], labels, 0)
    assert len(held_out) == held_out_count(len(labels))
    assert (np.bincount(labels) - np.bincount(labels[held_out], minlength=len(sizes)) >= 1).all()


def test_a_class_keeps_its_only_picture_though_another_class_has_a_copy():
    """One of 0 is the only one of 1."""
    labels = np.repeat(np.arange(2), (60, 1)).astype(np.int64)
    for seed in range(20):
        assert 60 not in hold_out([bytes([number % 60]) for number in range(61)], labels, seed)


def test_where_every_class_is_of_one_picture_some_are_held_out():
    labels = np.arange(100, dtype=np.int64)
    assert len(hold_out([bytes([number]) for number in range(100)], labels, 0)) == 50


def test_copies_of_one_picture_cannot_be_split():
    with pytest.raises(UserError, match="same picture"):
        hold_out([b"x"] * 5, None, 0)
