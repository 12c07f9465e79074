"""Preparing: every file meets its fate, and the same pictures give the same bytes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import zoo
from snowmelt.data import assemble, workers
from snowmelt.data.decode import Recipe, decode, to_grey
from snowmelt.data.prepared import Prepared
from snowmelt.data.source import Entry
from snowmelt.errors import UserError
from snowmelt.prepare import PrepareOptions, prepare

WHITE = (255, 255, 255)
DATA = Path(__file__).parents[2] / "shared" / "data"


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(source: Path | str, out: Path, **options: object) -> Prepared:
    return prepare(PrepareOptions(str(source), out=out, **options), quiet())


def report(path: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((path / "report.json").read_text())["files"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pictures(folder: Path, count: int, side: int = 8, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(zoo.noise(1000 + number, side)).save(folder / f"{number:04}.png")
    return folder


def state(folder: Path) -> list[tuple]:
    found = []
    for root, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            status = (Path(root) / name).lstat()
            found.append((root, name, status.st_size, status.st_mtime_ns, status.st_mode, status.st_ino))
    return sorted(found)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The zoo, prepared once: its folder, what was expected, what it was before, and the result."""
    folder = tmp_path_factory.mktemp("zoo") / "animals"
    expected = zoo.build(folder)
    before = state(folder)
    out = folder.parent / "out"
    result = run(folder, out, size=zoo.SIDE, workers=2)
    return folder, expected, before, result


# fates


def test_every_file_of_the_zoo_meets_its_fate(built):
    _, expected, _, result = built
    found = report(result.path)
    assert len(expected) > 100
    assert found.keys() == expected.keys()
    wrong = {
        name: (found[name], want)
        for name, want in expected.items()
        if found[name]["fate"] != want[0] or want[1] not in "; ".join(found[name]["reasons"])
    }
    assert not wrong
    assert sum(row["fate"] != "skipped" for row in found.values()) == len(result.images)
    assert all(row["reasons"] for row in found.values() if row["fate"] != "used"), "a reason for everything"


def test_reports_hold_no_address_and_one_line_per_file(built):
    _, expected, _, result = built
    text = (result.path / "report.txt").read_text()
    assert "0x7f" not in text and str(result.path.parent) not in text
    assert sum(line.startswith("skipped: ") for line in text.splitlines()) == sum(
        fate == "skipped" for fate, _ in expected.values()
    )


def test_the_source_is_only_read(built):
    folder, _, before, _ = built
    assert state(folder) == before


def test_prepared_twice_identical_bytes_whatever_the_workers(built, tmp_path):
    folder, _, _, result = built
    again = run(folder, tmp_path / "elsewhere", size=zoo.SIDE, workers=1)
    assert contents(again.path) == contents(result.path)


def test_good_pixels_equal_a_reference_decode(built):
    folder, _, _, result = built
    rows = used_rows(result)
    for name in ("good.png", "good.bmp", "good.tif", "good.ppm", "good.jpg", "good.webp", "UPPER.JPEG", "grey.jpg"):
        reference = np.asarray(Image.open(folder / name).convert("RGB"))
        np.testing.assert_array_equal(rows[name], reference, err_msg=name)


def used_rows(result: Prepared) -> dict[str, np.ndarray]:
    names = [name for name, row in report(result.path).items() if row["fate"] in ("used", "changed")]
    return dict(zip(names, result.images, strict=True))


def test_orientations_1_to_8_give_the_same_upright_picture(built):
    rows = used_rows(built[3])
    for orientation in range(1, 9):
        np.testing.assert_array_equal(rows[f"turned-{orientation}.png"], zoo.noise(90))


def test_odd_modes_keep_their_values(built):
    rows = used_rows(built[3])
    for name, seed in {"deep-grey.png": 50, "deep.tif": 52, "whole.tif": 53, "float.tif": 54}.items():
        np.testing.assert_array_equal(rows[name][..., 0], zoo.noise(seed, channels=1), err_msg=name)
    np.testing.assert_array_equal(rows["deep-color.png"], zoo.noise(51))
    # Eight bits of L, a and b cannot name every colour of sRGB: two levels on average.
    assert np.abs(rows["lab.tif"].astype(int) - zoo.noise(26)).mean() < 2
    # Its profile says that red is green and green is red.
    assert np.abs(rows["profile.png"].astype(int) - zoo.noise(33)[..., [1, 0, 2]]).max() <= 3


def test_the_middle_frame_does_not_leak_in(built):
    rows = used_rows(built[3])
    for name in ("several.png", "several.tif"):
        np.testing.assert_array_equal(rows[name], zoo.noise(70), err_msg=name)


# decoding, without processes


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 30, 40)])
def test_transparency_shows_the_background(background):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255  # hidden red that must not bleed
    pixels[:4, :, 3] = 255
    made = decode(zoo.encode(Image.fromarray(pixels), "PNG"), "x.png", Recipe(8, background, "crop")).pixels
    assert (made[4:] == background).all()
    assert (made[:4] == (255, 0, 0)).all()


def test_hidden_colours_do_not_bleed_when_resized():
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., :3] = (255, 0, 0)
    made = decode(zoo.encode(Image.fromarray(pixels), "PNG"), "x.png", Recipe(8, (10, 20, 30), "crop")).pixels
    assert (made == (10, 20, 30)).all()


def test_a_16_bit_gradient_keeps_its_mean():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    made = decode(zoo.deep_png(ramp), "ramp.png", Recipe(64, WHITE, "crop")).pixels
    assert abs(made.mean() / 255 - ramp.mean() / 65535) < 1e-3
    assert made.min() == 0 and made.max() == 255 and len(np.unique(made)) == 256


def test_pixel_art_of_the_right_size_is_untouched():
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (16, 17, 3), dtype=np.uint8)
    made = decode(zoo.encode(Image.fromarray(pixels), "PNG"), "x.png", Recipe(16, WHITE, "crop")).pixels
    np.testing.assert_array_equal(made, pixels[:, :16])


def test_crop_takes_the_middle_and_pad_keeps_everything():
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (0, 0, 255)
    data = zoo.encode(Image.fromarray(pixels), "PNG")
    assert (decode(data, "x.png", Recipe(16, WHITE, "crop")).pixels == (0, 0, 255)).all()
    padded = decode(data, "x.png", Recipe(48, (1, 2, 3), "pad")).pixels
    np.testing.assert_array_equal(padded[16:32], pixels)
    assert (padded[:16] == (1, 2, 3)).all() and (padded[32:] == (1, 2, 3)).all()


def test_a_big_photo_is_close_to_a_full_decode():
    photo = Image.fromarray(zoo.noise(3, 1500))
    data = zoo.encode(photo, "JPEG", quality=95)
    made = decode(data, "x.jpg", Recipe(64, WHITE, "crop")).pixels.astype(int)
    reference = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(made - reference).mean() < 1  # of 255 levels: decoding at an eighth costs no visible quality


def test_grey_is_pillows_luma():
    pixels = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_grey(pixels)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


# choices


def test_grey_and_size_are_chosen_from_the_data(tmp_path):
    for number in range(6):
        Image.fromarray(zoo.noise(number, 30, channels=1)).convert("RGB").save(
            pictures(tmp_path / "x", 0) / f"{number}.png"
        )
    made = run(tmp_path / "x", tmp_path / "out")
    assert (made.size, made.channels) == (28, 1)
    assert run(tmp_path / "x", tmp_path / "out", color="rgb", size=12).images.shape == (6, 12, 12, 3)


def test_one_coloured_cover_does_not_colour_a_hundred_scans(tmp_path):
    folder = pictures(tmp_path / "x", 1)
    for number in range(1, 110):
        Image.fromarray(zoo.noise(number, 8, channels=1)).save(folder / f"{number:04}.png")
    made = run(folder, tmp_path / "out")
    assert made.channels == 1
    assert report(made.path)["0000.png"]["reasons"] == ["its colour was removed"]
    np.testing.assert_array_equal(made.images[0], to_grey(zoo.noise(1000, 8)))
    assert run(folder, tmp_path / "forced", color="grey").fingerprint == made.fingerprint


def test_large_pictures_are_not_made_larger_than_64(tmp_path):
    assert run(pictures(tmp_path / "x", 3, side=100), tmp_path / "out").size == 64


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("JPEG", {"quality": 95}, 1 << 14),
        ("JPEG", {"quality": 95, "exif": b"Exif\0\0" + bytes(50_000)}, 1 << 19),
        ("JPEG", {"quality": 95, "icc_profile": bytes(500_000)}, 1 << 21),
        ("PNG", {}, 1 << 14),
        ("TIFF", {"compression": "tiff_lzw"}, 1 << 21),  # its directory comes last
        ("WEBP", {"lossless": True}, 1 << 21),
        ("BMP", {}, 1 << 14),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_picture_is_measured_from_as_little_as_tells_its_size(kind, options, most):
    file = io.BytesIO()
    Image.fromarray(zoo.noise(1, 500)).crop((0, 0, 500, 400)).save(file, kind, **options)
    data, taken = file.getvalue(), []

    def read(_: Entry, limit: int) -> bytes:
        taken.append(min(limit, len(data)))
        return data[:limit]

    assert workers.treat(read, Entry("picture", len(data)), None) == 400
    assert sum(taken) <= most


def test_statistics_are_of_the_training_images(tmp_path):
    made = run(pictures(tmp_path / "x", 30), tmp_path / "out")
    values = made.images[made.train].astype(np.float64) / 255 * 2 - 1
    assert made.mean == pytest.approx(values.mean(), abs=1e-12)
    assert made.std == pytest.approx(values.std(), abs=1e-12)


def test_builtin_digits(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    made = run("builtin:digits", tmp_path / "out")
    assert made.images.shape == (1797, 8, 8, 1)
    assert made.classes == tuple("0123456789") and made.labels is not None
    truth = datasets.load_digits()
    order = np.argsort(truth.target, kind="stable")
    np.testing.assert_array_equal(made.labels, truth.target[order])
    np.testing.assert_array_equal(made.images[..., 0], np.round(truth.images[order] * 255 / 16 + 1e-9))
    assert run("builtin:digits", tmp_path / "large", size=16).images.shape == (1797, 16, 16, 1)


# containers


def archives(folder: Path, place: Path) -> list[Path]:
    with zipfile.ZipFile(place / "x.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(path, f"wrapped/{path.relative_to(folder)}")
    made = [place / "x.zip"]
    for mode in ("", "gz", "xz"):
        made.append(place / f"x.tar.{mode}")
        with tarfile.open(made[-1], f"w:{mode}") as archive:
            archive.add(folder, "deep/er")
    return made


def test_a_zip_and_tars_are_what_their_folder_is(tmp_path):
    folder = tmp_path / "x"
    for name in ("2", "10"):
        pictures(folder / name, 5, first=int(name))
    rows = [json.dumps({"file_name": "10/0012.png", "text": "zwölf"})]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    plain = run(folder, tmp_path / "plain")
    assert plain.classes == ("2", "10"), "in natural order"
    assert plain.labels is not None and plain.labels.tolist() == [1] * 5 + [0] * 5
    assert plain.captions is not None and plain.captions[2] == "zwölf" and not any(plain.captions[3:])
    for number, archive in enumerate(archives(folder, tmp_path)):
        before = state(folder), archive.read_bytes()
        assert run(archive, tmp_path / str(number)).fingerprint == plain.fingerprint, archive.name
        assert (state(folder), archive.read_bytes()) == before


def test_bad_members_of_a_zip_cost_one_line_each(tmp_path):
    source = tmp_path / "x.zip"
    good = [zoo.encode(Image.fromarray(zoo.noise(seed)), "PNG") for seed in range(4)]
    with zipfile.ZipFile(source, "w") as archive:
        for number, data in enumerate(good):
            archive.writestr(f"../../{number}.png" if number == 0 else f"{number}.png", data)
        archive.writestr("crc.png", good[0])
        archive.writestr("__MACOSX/._0.png", b"x")
    whole = bytearray(source.read_bytes())
    place = whole.index(b"crc.png") + 7 + 60
    whole[place] ^= 0xFF
    source.write_bytes(whole)
    found = report(run(source, tmp_path / "out").path)
    assert "checksum" in found["crc.png"]["reasons"][0]
    assert found["../../0.png"]["fate"] == "used"
    assert found["__MACOSX/._0.png"]["reasons"] == ["system file"]
    assert not (tmp_path.parent / "0.png").exists()


def test_a_tar_cut_short_gives_what_it_has(tmp_path):
    folder = pictures(tmp_path / "x", 6, side=32)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder, "x")
        archive.addfile(tarfile.TarInfo("link.png"), None)
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: len(data) * 7 // 10 // 512 * 512 + 100])
    made = run(tmp_path / "x.tar", tmp_path / "out")
    assert 2 <= len(made.images) < 6


# mishaps


def test_a_decoder_that_crashes_or_hangs_costs_one_line(tmp_path, monkeypatch):
    """The decoder is replaced in the worker processes by one that dies of its input."""
    patch = """
import os, signal, time
import snowmelt.data.decode as module
whole = module.decode
def decode(data, name, recipe):
    if name.startswith("0003"): os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("0005"):
        while True: pass
    if name.startswith("0007"): time.sleep(1000)
    if name.startswith("0009"): raise MemoryError
    return whole(data, name, recipe)
module.decode = decode
"""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(patch)
    monkeypatch.syspath_prepend(tmp_path / "patch")
    monkeypatch.setattr(workers, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(workers, "WAIT_SECONDS", 2.0)
    made = run(pictures(tmp_path / "x", 12), tmp_path / "out")
    reasons = {name: row["reasons"][0] for name, row in report(made.path).items() if row["fate"] == "skipped"}
    assert reasons.keys() == {f"{number:04}.png" for number in (3, 5, 7, 9)}
    assert "crash (signal 11)" in reasons["0003.png"]
    assert "seconds" in reasons["0005.png"] and "seconds" in reasons["0007.png"]
    assert "memory" in reasons["0009.png"]
    assert len(made.images) == 8


def test_a_file_that_vanishes_or_becomes_a_pipe_costs_one_line(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "x", 6)
    listed = assemble.list_source

    def spoil(path):
        listing = listed(path)
        (folder / "0001.png").unlink()
        (folder / "0002.png").unlink()
        os.mkfifo(folder / "0002.png")
        return listing

    monkeypatch.setattr(assemble, "list_source", spoil)
    found = report(run(folder, tmp_path / "out").path)
    assert found["0001.png"]["reasons"] == ["vanished during the run"]
    assert found["0002.png"]["reasons"] == ["no longer a regular file"]


def test_interrupted_leaves_nothing_behind(tmp_path):
    source = tmp_path / "x.zip"
    files = [zoo.encode(Image.fromarray(zoo.noise(number, 16)), "PNG") for number in range(50)]
    with zipfile.ZipFile(source, "w") as archive:
        # Enough for seconds of work, so that the interrupt comes before the end also on a busy machine.
        for number in range(20_000):
            archive.writestr(f"{number}.png", files[number % 50])
    # A process started in the background of a script is born deaf to SIGINT, and so would be its children.
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    script += "from pathlib import Path; from snowmelt.prepare import *;"
    script += "prepare(PrepareOptions(sys.argv[1], out=Path(sys.argv[2])))"
    out = tmp_path / "new" / "out"
    process = subprocess.Popen([sys.executable, "-c", script, source, out], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("new/.out.preparing-*/images.npy")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip"]


def test_leftovers_of_a_killed_attempt_are_removed_and_a_live_one_is_not(tmp_path):
    folder = pictures(tmp_path / "x", 4)
    (tmp_path / ".out.preparing-1").mkdir()
    (tmp_path / ".out.preparing-1" / "images.npy").write_bytes(b"half")
    (tmp_path / ".out.preparing-2").mkdir()
    import fcntl

    descriptor = os.open(tmp_path / ".out.preparing-2", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    run(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.preparing-2", "out", "x"]
    os.close(descriptor)


def test_a_failed_attempt_keeps_the_older_dataset(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "x", 4)
    before = contents(run(folder, tmp_path / "out").path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assemble, "write_reports", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(folder, tmp_path / "out", size=12)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x"]
    # As a power cut leaves it between the two renames.
    (tmp_path / "out").rename(tmp_path / ".out.replaced-1")
    with pytest.raises(UserError, match="No space left on device"):
        run(folder, tmp_path / "out", size=12)
    assert contents(tmp_path / "out") == before
    monkeypatch.undo()
    assert run(folder, tmp_path / "out", size=12).size == 12, "and is replaced when it goes well"


# mistakes


def make_text(folder: Path) -> None:
    (folder / "a.txt").write_text("words")
    (folder / "b.md").write_text("more words")


MISTAKES = {
    "missing": (lambda place: place / "nowhere", {}, "no file or folder"),
    "empty": (lambda place: place, {}, "is empty"),
    "text": (lambda place: make_text(place) or place, {}, "no usable images.*text"),
    "one image": (lambda place: pictures(place, 1), {}, "only one usable image"),
    "copies": (lambda place: [pictures(place / name, 1) for name in "ab"] and place, {}, "the same picture"),
    "size 30": (lambda place: pictures(place, 3), {"size": 30}, "multiple of 4.*28 or 32"),
    "size 4": (lambda place: pictures(place, 3), {"size": 4}, "choose 8"),
    "size 5000": (lambda place: pictures(place, 3), {"size": 5000}, "choose 1024"),
    "background": (lambda place: pictures(place, 3), {"background": "whiet"}, "no colour"),
    "seed": (lambda place: pictures(place, 3), {"seed": -1}, "seed"),
    "workers": (lambda place: pictures(place, 3), {"workers": 0}, "workers"),
    "inside": (lambda place: pictures(place, 3), {"out": "inside"}, "inside the source"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(name, tmp_path):
    make, options, pattern = MISTAKES[name]
    (tmp_path / "place").mkdir()
    source = make(tmp_path / "place")
    out = tmp_path / "place" / "inside" if "out" in options else tmp_path / "new" / "out"
    before = state(tmp_path)
    with pytest.raises(UserError, match=pattern) as caught:
        run(source, out, **{key: value for key, value in options.items() if key != "out"})
    assert "\n" not in str(caught.value)
    assert state(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04 no zip", b"\x1f\x8b no gzip", b"BZh no bzip2"])
def test_a_damaged_archive_is_one_sentence(content, tmp_path):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "x.zip", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_other_peoples_folders_are_not_touched(tmp_path):
    folder = pictures(tmp_path / "x", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a prepared dataset's"):
        run(folder, tmp_path / "mine")
    out = run(folder, tmp_path / "out").path
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a prepared dataset's"):
        run(folder, out)
    with pytest.raises(UserError, match="prepared dataset already"):
        run(out, tmp_path / "third")
    with pytest.raises(UserError, match="is a file"):
        run(folder, folder.parent / "out" / "notes.txt")


def test_an_unknown_builtin_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'digits'"):
        run("builtin:digit", tmp_path / "out")


# real pictures


@pytest.mark.skipif(not (DATA / "emoji.zip").exists(), reason="needs ../shared/data/emoji.zip")
def test_emoji(tmp_path):
    with zipfile.ZipFile(DATA / "emoji.zip") as whole, zipfile.ZipFile(tmp_path / "x.zip", "w") as some:
        for name in ["metadata.jsonl", *whole.namelist()[:300]]:
            some.writestr(name, whole.read(name))
        lines = whole.read("metadata.jsonl").splitlines()
    made = run(tmp_path / "x.zip", tmp_path / "out")
    assert made.images.shape == (300, 64, 64, 3)
    assert made.classes == () and made.captions is not None
    truth = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    names = [name for name, row in report(made.path).items() if row["fate"] == "changed"]
    assert list(made.captions) == [truth[name] for name in names]
    complaints = [row for row in report(made.path).values() if "not in the source" in "".join(row["reasons"])]
    assert len(complaints) == len(lines) - 300, "one line for every picture that is named and missing"


@pytest.mark.skipif(not (DATA / "mnist-test.zip").exists(), reason="needs ../shared/data/mnist-test.zip")
def test_mnist_keeps_every_pixel_and_class(tmp_path):
    made = run(DATA / "mnist-test.zip", tmp_path / "out")
    assert made.images.shape == (10000, 28, 28, 1)
    assert made.classes == tuple("0123456789") and made.labels is not None
    with zipfile.ZipFile(DATA / "mnist-test.zip") as archive:
        for row, name in enumerate(sorted(archive.namelist())[:200]):
            np.testing.assert_array_equal(made.images[row, ..., 0], np.asarray(Image.open(archive.open(name))))
    shares = np.bincount(made.labels[made.held_out]) / np.bincount(made.labels)
    assert np.abs(shares - 0.05).max() < 0.002, "every class gives its share"


def test_no_torch_is_imported():
    code = (
        "import sys, snowmelt.prepare, snowmelt.data.assemble, snowmelt.data.workers; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("said", "most"), [("200000 100000", 2), ("50000 100000", 1), ("250000 100000", 3)])
def test_a_containers_quota_of_time_counts_as_cores(tmp_path, monkeypatch, said, most):
    (tmp_path / "cpu.max").write_text(said + "\n")
    whole = workers.cores()
    monkeypatch.setattr(workers, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 8)
    assert workers.cores() == most
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert workers.cores() == 8 and whole >= 1


def test_what_finder_leaves_and_links_are_no_obstacle(tmp_path, monkeypatch):
    """A folder that was looked into, and a link to a folder: what is in it is replaced, where it lies."""
    folder = pictures(tmp_path / "x", 3)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".DS_Store").write_bytes(b"Bud1")
    (tmp_path / "link").symlink_to("there")
    for _ in range(2):
        run(folder, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "images.npy").is_file()
        (tmp_path / "there" / ".DS_Store").write_bytes(b"Bud1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there", "x"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="folder you are in"):
        run(folder, Path())


def test_what_lies_beside_pictures_needs_no_room(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "x", 3)
    for number in range(50):
        (folder / f"{number}.TXT").write_text("a picture")
    # Of 8 x 8 pixels each, in colour and in grey.
    monkeypatch.setattr(assemble.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 8 * 8 * 4))
    assert len(run(folder, tmp_path / "out").images) == 3
    pictures(folder, 1, first=3)
    with pytest.raises(UserError, match="only 0 MB are free"):
        run(folder, tmp_path / "other")
