"""The prepared format: opened as written, and refused with one sentence when anything is amiss."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import zoo
from snowmelt.data import prepared
from snowmelt.data.prepared import (
    HEADER_BYTES,
    Prepared,
    flat_share,
    is_prepared,
    mean_pictures,
    npy_header,
    open_prepared,
)
from snowmelt.errors import UserError
from snowmelt.prepare import PrepareOptions, prepare
from snowmelt.presets import FLAT, facts_of


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(12):
        place = folder / "x" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(zoo.noise(number, 12)).save(place / f"{number}.png")
    rows = [json.dumps({"file_name": "a/0.png", "text": "a line\u2028of text"})]
    (folder / "x" / "metadata.jsonl").write_text("\n".join(rows))
    return prepare(PrepareOptions(str(folder / "x"), out=folder / "out"), Console(file=io.StringIO()))


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original.path, tmp_path / "copy")


def test_what_is_opened(original):
    assert original.images.shape == (12, 12, 12, 3) and (original.size, original.channels) == (12, 3)
    assert original.classes == ("a", "b") and original.labels is not None
    assert original.labels.dtype == np.int64 == original.train.dtype == original.held_out.dtype
    assert original.captions is not None and original.captions[0] == "a line\u2028of text"
    assert sorted([*original.train, *original.held_out]) == list(range(12))
    assert isinstance(original.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        original.images[0] = 0


def test_a_copy_elsewhere_is_the_same_dataset(original, copy):
    assert open_prepared(copy).fingerprint == original.fingerprint


def test_plain_numpy_reads_it(original):
    np.testing.assert_array_equal(np.load(original.path / "images.npy"), original.images)


def test_drawings_are_flat_and_photographs_are_not(monkeypatch):
    """Of half of the pictures a quarter is white: 8 columns, which are 7 pairs of 31. Noise in grey has a pair in 256
    by chance, coloured noise none. Of larger pictures only places a 32nd apart are compared."""
    chance = np.random.default_rng(0)
    for channels, by_chance in ((1, 1 / 256), (3, 0.0)):
        pixels = chance.integers(0, 256, (40, 32, 32, channels), dtype=np.uint8)
        rows = np.arange(30)
        data = Prepared(Path(), pixels, None, (), None, rows, rows[:0], 0.0, 0.5, "flat")
        assert flat_share(data) == pytest.approx(by_chance, abs=1e-3)
        pixels[15:30, :, :8] = 255
        expected = (7 / 31 + by_chance * 24 / 31 + by_chance) / 2
        found = flat_share(data)
        assert found == pytest.approx(expected, abs=1e-3)
        assert facts_of(data).flat == round(found, 4)
        monkeypatch.setattr(prepared, "LOOKED_BYTES", 1)
        assert flat_share(data) == pytest.approx(expected, abs=2e-3), "sixteen will do, from first to last"
        monkeypatch.undo()
        doubled = dataclasses.replace(data, images=pixels.repeat(2, 1).repeat(2, 2))
        assert flat_share(doubled) == flat_share(data), "though every pixel has one beside it that is alike"


@pytest.mark.parametrize(
    ("name", "size", "drawn"), [("emoji", 32, True), ("mnist-train", 32, True), ("dogs", 64, False)]
)
def test_real_pictures_are_told_apart(tmp_path, name, size, drawn):
    source = Path(__file__).parents[2] / "shared" / "data" / f"{name}.zip"
    if not source.exists():
        pytest.skip("the real pictures are not here")
    with zipfile.ZipFile(source) as archive:
        names = [one for one in archive.namelist() if one.lower().endswith((".png", ".jpg", ".jpeg"))]
        archive.extractall(tmp_path / "pictures", names[:: max(1, len(names) // 40)])
    made = prepare(
        PrepareOptions(str(tmp_path / "pictures"), tmp_path / "data", size=size), Console(file=io.StringIO())
    )
    flat = facts_of(made).flat
    assert (flat > 1.5 * FLAT) if drawn else (flat < FLAT / 2)


def test_mean_pictures_are_those_of_the_classes(original, monkeypatch):
    """However many rows are read at once; a class without a training picture has the mean of all."""
    monkeypatch.setattr(prepared, "_CHUNK_BYTES", 3 * original.images[0].nbytes)
    of_a, of_b, of_all = mean_pictures(original)
    rows = {label: [row for row in original.train if original.labels[row] == label] for label in (0, 1)}
    for mean, some in ((of_a, rows[0]), (of_b, rows[1]), (of_all, original.train)):
        np.testing.assert_array_equal(mean, np.asarray(original.images[some], float).mean(0).round())
    of_a, of_b, of_all = mean_pictures(dataclasses.replace(original, train=np.array(rows[0])))
    np.testing.assert_array_equal(of_b, of_all)
    np.testing.assert_array_equal(of_a, of_all)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (10**9, 1024, 1024, 3), (0, 8, 8, 1)])
def test_the_header_has_one_length(shape):
    assert len(npy_header(shape)) == HEADER_BYTES


def edit(path, **changes):
    facts = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(facts | changes))


def shorten(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 7])


DAMAGES = {
    "images cut": lambda path: shorten(path / "images.npy"),
    "images longer": lambda path: (path / "images.npy").open("ab").write(b"x"),
    "images gone": lambda path: (path / "images.npy").unlink(),
    "images empty": lambda path: (path / "images.npy").write_bytes(b""),
    "images are pickled": lambda path: np.save(path / "images.npy", np.array([{}]), allow_pickle=True),
    "labels cut": lambda path: shorten(path / "labels.npy"),
    "labels differ": lambda path: np.save(path / "labels.npy", np.zeros(12, np.int64)),
    "labels gone": lambda path: (path / "labels.npy").unlink(),
    "split differs": lambda path: np.save(path / "held_out.npy", np.array([3])),
    "captions differ": lambda path: (path / "captions.json").write_text("[]"),
    "captions broken": lambda path: (path / "captions.json").write_text("["),
    "shape": lambda path: edit(path, shape=[12, 12, 12, 1]),
    "shape is odd": lambda path: edit(path, shape=[12]),
    "shape is text": lambda path: edit(path, shape="12"),
    "settings": lambda path: edit(path, settings={"size": 12}),
    "classes": lambda path: edit(path, classes=["a", "c"]),
    "pixels": lambda path: edit(path, pixels="0" * 64),
    "fingerprint": lambda path: edit(path, fingerprint="0" * 64),
    "mean is text": lambda path: edit(path, mean="half"),
    "a key is missing": lambda path: (path / "dataset.json").write_text(
        json.dumps({"kind": "snowmelt prepared dataset", "format": 1})
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence(name, copy):
    DAMAGES[name](copy)
    with pytest.raises(UserError, match="is damaged") as caught:
        open_prepared(copy)
    assert "\n" not in str(caught.value)


def test_a_later_format_is_named(copy):
    edit(copy, format=2)
    with pytest.raises(UserError, match="later Snowmelt"):
        open_prepared(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"kind": "other"}'])
def test_other_folders_are_not_prepared(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "dataset.json"):
        assert not is_prepared(path)
        with pytest.raises(UserError, match=r"no prepared dataset|does not exist"):
            open_prepared(path)
