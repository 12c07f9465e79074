"""Editing as a verb: what is kept, what is told, what can be made again, and every mistake as one sentence."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import stirred
from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.config import Config, DataConfig, UNetConfig
from snowmelt.data.pixels import to_pixels
from snowmelt.device import Precision
from snowmelt.diffusion.guidance import THRESHOLDS
from snowmelt.edit import EDITS, edit
from snowmelt.edits.canvas import Canvas
from snowmelt.edits.kinds import KINDS
from snowmelt.edits.options import (
    EnlargeOptions,
    InpaintOptions,
    InterpolateOptions,
    InvertOptions,
    RestoreOptions,
    VaryOptions,
)
from snowmelt.models import build_model
from snowmelt.prepare import PrepareOptions, prepare
from snowmelt.presets import facts_of
from snowmelt.run import Run


def make_run(path: Path, **data: object) -> Path:
    """A run with a network that has learned nothing, but is one."""
    network = UNetConfig(channels=(8, 16), attention=(False, True), head_channels=8)
    config = Config(DataConfig(size=8, std=0.5, **{"channels": 1, **data}), network=network)
    model = stirred(build_model(config, Precision(torch.device("cpu"))))
    run = Run.create(path, config)
    checkpoint.save(run.checkpoints, 1, {"average": model.state_dict()}, {})
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("edit") / "grey", classes=("a", "b"), counts=(1, 1))


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("edit") / "colour", channels=3)


def painted(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8).squeeze()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with photos and masks."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(painted(8, 8, 1)).save("small.png")
    Image.fromarray(painted(8, 8)).save("coloured.png")
    Image.fromarray(painted(12, 16)).save("wide.png")
    Image.fromarray(painted(4, 4, 1)).save("tiny.png")
    half = np.zeros((8, 8), np.uint8)
    half[4:] = 255
    Image.fromarray(half).save("half.png")
    Image.fromarray(half.repeat(2, 0).repeat(2, 1)[:12]).save("wide-mask.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("tall.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    Path("notes.png").write_text("no picture")
    Path("broken.png").write_bytes(Path("small.png").read_bytes()[:60])
    Path("folder").mkdir()
    return tmp_path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def note(path: Path) -> dict[str, object]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def pictures(files: list[Path]) -> list[Path]:
    return [path for path in files if path.suffix == ".png" and not path.stem.endswith("sheet")]


def test_the_kinds_have_options_and_functions():
    assert list(EDITS) == list(KINDS)


@pytest.mark.parametrize("fill", ["repaint", "replace", "posterior"])
def test_inpainting_keeps_what_is_black_in_the_mask(grey, here, fill):
    files = edit(InpaintOptions(run=grey, photo=Path("small.png"), mask=Path("half.png"), fill=fill, steps=4, count=2))
    photo, (one, other) = pixels(Path("small.png")), map(pixels, pictures(files))
    assert np.array_equal(one[:4], photo[:4]) and np.array_equal(other[:4], photo[:4])
    assert not np.array_equal(one[4:], other[4:]) and not np.array_equal(one[4:], photo[4:])
    assert note(files[0])["share filled"] == 0.5
    assert Image.open(files[-1]).width == 4 * 66 + 2, "photo, what is known of it, and two fillings"


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_threshold_leaves_what_is_known(grey, here, threshold):
    """Far-out guesses make the dynamic one divide whole pictures."""
    words = [
        "inpaint",
        str(grey),
        "small.png",
        "--mask",
        "half.png",
        "--class",
        "a",
        "--guidance",
        "30",
        "--steps",
        "3",
    ]
    words += ["--fill", "replace", "--count", "1", "--out", "kept", "--threshold", threshold]
    assert cli(["edit", *words]) == 0
    (drawn,) = pictures(list(Path("kept").glob("*.png")))
    assert np.array_equal(pixels(drawn)[:4], pixels(Path("small.png"))[:4])


def test_a_mask_as_large_as_the_photo_is_cropped_like_it(grey, here):
    """16 x 12 with the mask from row 8: the middle 12 x 12 shrink to 8 x 8, and rows from 5.33 on are white."""
    files = edit(InpaintOptions(run=grey, photo=Path("wide.png"), mask=Path("wide-mask.png"), steps=2, count=1))
    assert note(files[0])["share filled"] == pytest.approx(3 / 8)


def test_a_variation_of_no_strength_is_the_photo(colour, here):
    def varied(strength: float) -> np.ndarray:
        options = VaryOptions(run=colour, photo=Path("coloured.png"), strength=strength, steps=5, count=1)
        return pixels(pictures(edit(options))[0])

    photo = pixels(Path("coloured.png"))
    # At the clean end, log-SNR +10, noise is 0.0067 of a range of 2: a level or two of 255.
    assert abs(varied(0.001) - photo).max() <= 8
    assert abs(varied(0.9) - photo).mean() > 20


def test_the_ends_of_an_interpolation(grey, here):
    files = edit(InterpolateOptions(run=grey, first="small.png", second="3", steps=40, count=3, class_name="b"))
    assert [note(path)["number"] for path in pictures(files)] == [0, 1, 2]
    assert note(files[0])["shares"] == [0.0, 0.5, 1.0]
    # A network that has learned nothing is no smooth one: 40 dB is a hundredth of the range.
    assert note(files[0])["reconstruction PSNR of the first in dB"] > 40, "inverted and drawn again"
    words = ["--seeds", "3", "--count", "1", "--steps", "40", "--sampler", "ddim", "--precision", "fp32"]
    words += ["--classes", "b"]
    assert cli(["sample", str(grey), *words]) == 0
    sampled = pixels(grey / "samples" / "seed3-00000.png")
    # Kernels sum in another order for another batch.
    assert abs(pixels(files[4]) - sampled).max() <= 1, "picture 0 of seed 3"


def test_inversion_reports_how_well_it_went(grey, here, capsys):
    files = edit(InvertOptions(run=grey, photo=Path("small.png"), steps=40, out=Path("out")))
    facts = note(files[0])
    assert facts["reconstruction PSNR in dB"] > 50
    assert f"PSNR {facts['reconstruction PSNR in dB']:.1f} dB" in capsys.readouterr().err
    noise = load_file(files[2])["noise"]
    assert noise.shape == (1, 1, 8, 8) and float(noise.std()) == pytest.approx(facts["std of the noise"], abs=1e-4)
    assert {path.parent for path in files} == {Path("out")}


def test_enlarging_answers_to_the_small_picture(grey, here):
    files = edit(EnlargeOptions(run=grey, photo=Path("tiny.png"), steps=20, count=2, noise=0.05))
    small = pixels(Path("tiny.png"))
    for path in pictures(files):
        shrunk = pixels(path).reshape(4, 2, 4, 2).mean((1, 3))
        # --noise of 0.05 in a range of 2 is 6 levels of 255; a walk of 20 steps comes within three times that.
        assert np.sqrt(np.square(shrunk - small).mean()) < 20
    assert min(note(files[0])["agreement PSNR in dB"]) > 20


@pytest.mark.parametrize("damage", ["blur", "grey"])
def test_restoring_answers_to_the_damaged_photo(colour, here, damage):
    Image.fromarray(np.linspace(30, 200, 64).reshape(8, 8).astype(np.uint8)).save("smooth.png")
    files = edit(RestoreOptions(run=colour, photo=Path("smooth.png"), damage=damage, steps=20, count=1, noise=0.05))
    assert note(files[0])["agreement PSNR in dB"][0] > 20
    assert pixels(files[0]).shape == (8, 8, 3)


def test_the_note_makes_the_edit_again(grey, here):
    options = VaryOptions(
        run=grey, photo=Path("small.png"), count=2, steps=4, seed=5, class_name="a", guidance=2.0, guide="projected"
    )
    files = edit(options)
    facts = note(files[0])
    assert (facts["class"], facts["guidance"], facts["edit"]) == ("a", 2.0, "vary")
    words = shlex.split(str(facts["command"]))
    assert cli([*words[1:], "--out", "again"]) == 0
    for path in pictures(files):
        assert np.array_equal(pixels(path), pixels(Path("again") / path.name))


MISTAKES = {
    "no kind": ([], "needs to know which kind; choose one of: inpaint"),
    "an unknown kind": (["inpant"], "did you mean 'inpaint'?"),
    "no run": (["vary", "nowhere", "small.png"], "There is no run at nowhere"),
    "a folder that is no run": (["vary", "folder", "small.png"], "folder is not a run"),
    "no photo": (["vary", "RUN", "nothing.png"], "There is no file nothing.png"),
    "a folder as photo": (["vary", "RUN", "folder"], "folder is a folder; name one photo in it"),
    "a photo that is none": (["vary", "RUN", "notes.png"], "notes.png is no photo that can be used"),
    "a broken photo": (["invert", "RUN", "broken.png"], "broken.png is no photo that can be used"),
    "a broken photo to enlarge": (["enlarge", "RUN", "broken.png"], "broken.png is no photo that can be used"),
    "a mask of the wrong size": (
        ["inpaint", "RUN", "small.png", "--mask", "tall.png"],
        "The mask tall.png has 8 x 9 pixels; make it as large as the photo, 8 x 8.",
    ),
    "no mask": (["inpaint", "RUN", "small.png", "--mask", "no.png"], "There is no file no.png; name a mask"),
    "a mask that is none": (["inpaint", "RUN", "small.png", "--mask", "notes.png"], "notes.png is no mask"),
    "an empty mask": (["inpaint", "RUN", "small.png", "--mask", "black.png"], "black everywhere"),
    "an unknown fill": (["inpaint", "RUN", "small.png", "--mask", "half.png", "--fill", "paint"], "'repaint'?"),
    "no steps": (["vary", "RUN", "small.png", "--steps", "0"], "--steps is 0; give at least 1"),
    "no rounds": (["invert", "RUN", "small.png", "--rounds", "0"], "--rounds is 0; give at least 1"),
    "no pictures": (["vary", "RUN", "small.png", "--count", "0"], "--count is 0; give at least 1"),
    "too many": (["vary", "RUN", "small.png", "--count", "1000"], "more than 64 pictures"),
    "too strong": (
        ["vary", "RUN", "small.png", "--strength", "1.5"],
        "--strength is 1.5; give a number above 0 up to 1",
    ),
    "no strength": (["vary", "RUN", "small.png", "--strength", "0"], "--strength is 0.0"),
    "strength that is none": (["vary", "RUN", "small.png", "--strength", "nan"], "--strength is nan"),
    "too many steps": (
        ["vary", "RUN", "small.png", "--steps", "99999999"],
        "--steps is 99999999; give at most 10,000",
    ),
    "no noise": (["enlarge", "RUN", "tiny.png", "--noise", "0"], "--noise is 0.0; give a number above 0"),
    "a factor that does not divide": (["enlarge", "RUN", "tiny.png", "--factor", "3"], "choose one of: 2, 4, 8"),
    "an unknown damage": (["restore", "RUN", "small.png", "--damage", "blurr"], "did you mean 'blur'?"),
    "a blur wider than the picture": (
        ["restore", "RUN", "small.png", "--width", "1e12"],
        "--width is 1e+12, more than the pictures have; give at most 8",
    ),
    "a guide without inverse": (
        ["invert", "RUN", "small.png", "--class", "a", "--guidance", "2", "--guide", "projected"],
        "--guide projected goes by what it has drawn before",
    ),
    "a guide without inverse between pictures": (
        ["interpolate", "RUN", "1", "small.png", "--class", "a", "--guidance", "2", "--guide", "projected"],
        "cannot be drawn backwards",
    ),
    "a mistake with a place to be made": (["vary", "RUN", "nothing.png", "--out", "new/place"], "no file nothing.png"),
    "colours of a grey run": (["restore", "RUN", "small.png", "--damage", "grey"], "this run draws in grey"),
    "an unknown sampler": (["vary", "RUN", "small.png", "--sampler", "ddi"], "did you mean 'ddim'?"),
    "an unknown class": (["vary", "RUN", "small.png", "--class", "c"], "There is no class 'c'"),
    "an unknown guide": (["vary", "RUN", "small.png", "--guide", "project"], "did you mean 'projected'?"),
    "guidance to no class": (["vary", "RUN", "small.png", "--guidance", "2"], "say which with --class"),
    "no early state": (
        ["vary", "RUN", "small.png", "--guidance", "2", "--away-from", "early"],
        "has kept no early state",
    ),
    "guidance that needs classes": (["vary", "COLOUR", "small.png", "--guidance", "2"], "--guidance holds a picture"),
    "a class of a run without": (["vary", "COLOUR", "small.png", "--class", "a"], "trained without classes"),
    "an end that is none": (["interpolate", "RUN", "1", "two"], "There is no file two"),
    "no such device": (["vary", "RUN", "small.png", "--device", "cuda:9"], "There is no device 'cuda:9'"),
    "an unknown option": (
        ["vary", "RUN", "small.png", "--strenth", "1"],
        "snowmelt edit vary has no option '--strenth'",
    ),
    "a place that is a file": (
        ["vary", "RUN", "small.png", "--steps", "1", "--out", "notes.png"],
        "choose another --out",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(grey, colour, here, capsys, name):
    words, said = MISTAKES[name]
    runs = {"RUN": str(grey), "COLOUR": str(colour)}
    before = {path: path.stat().st_mtime_ns for folder in (here, grey, colour) for path in folder.rglob("*")}
    assert cli(["edit", *(runs.get(word, word) for word in words)]) == 2
    err = capsys.readouterr().err.replace("\n\n", "\n").lstrip("\n")
    assert said in err, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert {path: path.stat().st_mtime_ns for folder in (here, grey, colour) for path in folder.rglob("*")} == before


def test_a_place_that_cannot_be_written_is_told_before_drawing(grey, here, capsys, monkeypatch):
    monkeypatch.setitem(KINDS, "vary", lambda canvas, options: pytest.fail("drawn"))
    assert cli(["edit", "vary", str(grey), "small.png", "--out", "notes.png/inside"]) == 2
    assert "notes.png/inside cannot be written" in capsys.readouterr().err


def test_photos_with_long_names_have_edits_with_shorter_ones(grey, here):
    """Bytes count, of which letters may have three."""
    names = ["\u5199" * 80 + end for end in ("a.png", "b.png")]
    for name in names:
        Path(name).write_bytes(Path("small.png").read_bytes())
    files = edit(InterpolateOptions(run=grey, first=names[0], second=names[1], count=2, steps=2))
    assert len(files) == 5 and all(path.exists() and len(path.name.encode()) < 200 for path in files)


def test_between_seeds_any_guide_will_do(grey, here):
    words = ["--class", "a", "--guidance", "2", "--guide", "projected", "--steps", "2", "--count", "2"]
    assert cli(["edit", "interpolate", str(grey), "1", "2", *words, "--out", "guided"]) == 0
    assert len(list(Path("guided").glob("*-0000[01].png"))) == 2


def test_help_names_the_kinds(capsys):
    with pytest.raises(SystemExit) as left:
        cli(["edit", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n  {kind} " in said for kind in EDITS)


def test_a_photo_is_cut_as_the_prepared_pictures_were(here):
    """Also where training was given a folder prepared before, and no word of how."""
    for name in ("one", "other"):
        Path("pictures").mkdir(exist_ok=True)
        Image.fromarray(painted(12, 16, seed=len(name))).save(f"pictures/{name}.png")
    prepared = prepare(PrepareOptions("pictures", size=8, fit="pad", background="#ff0080"))
    data = facts_of(prepared)
    canvas = object.__new__(Canvas)
    canvas.__dict__.update(
        run=Run.create(here / "run", Config(data)), model=SimpleNamespace(precision=Precision(torch.device("cpu")))
    )
    photo = canvas.photo(Path("wide.png"))
    # 12 x 16 pixels are 6 x 8 there, with a line of the background above and one below.
    for line in (0, -1):
        assert to_pixels(photo)[0, line].tolist() == [[255, 0, 128]] * 8
    assert photo.shape == (1, 3, 8, 8) and len(to_pixels(photo)[0, 1].unique(dim=0)) > 4
