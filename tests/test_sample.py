"""Sampling: a picture is a function of its seed and number, and its note draws it again."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.device import Precision
from snowmelt.evaluation import drawing
from snowmelt.models.base import Drawing
from snowmelt.networks import kernels
from snowmelt.run import Run
from snowmelt.sample import SampleOptions, sample, wanted_pictures
from snowmelt.training import previews

pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")


@pytest.fixture(scope="module")
def digits(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "run"
    words = ["--steps", "30", "--batch", "16", "--precision", "fp32", "--config", str(tiny)]
    assert cli(["train", "builtin:digits", "--out", str(out), *words]) == 0
    return out


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    ("sampler", "precision", "most"), [("ddim", "fp32", 1), ("ddpm", "fp32", 1), ("ddim", "bf16", 3)]
)
def test_picture_17_of_seed_5_is_the_same_in_any_batch(digits, tmp_path, sampler, precision, most):
    common = {"run": digits, "seeds": (5,), "steps": 10, "sampler": sampler, "precision": precision}
    sample(SampleOptions(**common, out=tmp_path / "many", count=20, batch=20))
    sample(SampleOptions(**common, out=tmp_path / "seven", count=20, batch=7))
    sample(SampleOptions(**common, out=tmp_path / "alone", count=1, first=17))
    many, seven, alone = (pixels(tmp_path / name / "seed5-00017.png") for name in ("many", "seven", "alone"))
    # One level of 255: kernels sum in another order for another batch size, and 10 steps can carry that to a rounding;
    # to one of bfloat16, of 1/256 of an answer, three: seen in 64 pictures of MNIST, in eight steps.
    assert abs(many - seven).max() <= most and abs(many - alone).max() <= most
    other = pixels(tmp_path / "many" / "seed5-00007.png")
    assert abs(other - many).max() > most, "another picture of the same class is another picture"


def test_the_note_draws_the_picture_again(digits, tmp_path):
    sample(SampleOptions(digits, out=tmp_path / "a", count=3, classes=("7", "3"), steps=8, guidance=2.0))
    note = json.loads((tmp_path / "a" / "seed0-00001.json").read_text())
    assert note["class"] == "3" and note["guidance"] == 2.0 and note["steps"] == 8
    words = shlex.split(note["command"])
    assert cli([*words[1:], "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(pixels(tmp_path / "a" / "seed0-00001.png"), pixels(tmp_path / "b" / "seed0-00001.png"))


def test_a_picture_in_bf16_is_nearly_that_in_fp32(digits, tmp_path, monkeypatch, capsys):
    """A run that was trained in bf16 draws so where the processor has it; the note says it, and draws it again
    elsewhere."""
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('precision = "fp32"', 'precision = "bf16"'))

    def drawn(name: str, there: bool, **more: str) -> tuple[np.ndarray, dict]:
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda: there)
        sample(SampleOptions(run, out=tmp_path / name, count=1, steps=8, **more))
        return pixels(tmp_path / name / "seed0-00000.png"), json.loads(
            (tmp_path / name / "seed0-00000.json").read_text()
        )

    (auto, note), (exact, plain) = drawn("auto", True), drawn("exact", True, precision="fp32")
    assert "drawn in bf16 as the run was trained" in " ".join(capsys.readouterr().err.split())
    assert (note["precision"], plain["precision"]) == ("bf16", "fp32")
    # bfloat16 keeps 8 bits; eight answers, each wrong by 1/256 of a picture's range, are seldom wrong the same way.
    assert 0 < abs(auto - exact).max() <= 8 and abs(auto - exact).mean() < 1
    elsewhere, there = drawn("elsewhere", False)
    assert there["precision"] == "fp32" and np.array_equal(elsewhere, exact)
    begun: list[tuple[tuple[str, ...], bool]] = []
    monkeypatch.setattr(kernels, "begin", lambda flags, gradients: begun.append((flags, gradients)))
    for words in (note["command"], plain["command"], f"snowmelt sample {digits} --count 1 --steps 8"):
        assert cli([*shlex.split(words)[1:], "--out", str(tmp_path / "again")]) == 0
        same = pixels(tmp_path / "again" / "seed0-00000.png")
        assert np.array_equal(same, auto if words is note["command"] else exact)
    assert begun == [(kernels.BF16, False), ((), False), ((), False)], (
        "what is going to be needed is compiled while torch is imported"
    )


def test_grid_and_strip(digits, tmp_path):
    files = sample(SampleOptions(digits, out=tmp_path, count=20, steps=12, grid=True, strip=True, batch=6))
    assert [path.name for path in files[-2:]] == ["grid.png", "strip.png"]
    assert len(files) == 2 * 20 + 2
    grid, strip = Image.open(tmp_path / "grid.png"), Image.open(tmp_path / "strip.png")
    tile = 64 + 2
    assert grid.size == (10 * tile + 2, 2 * tile + 2), "ten classes side by side"
    assert strip.size == (12 * tile + 2, 16 * tile + 2), "eleven moments and the picture"
    columns = np.asarray(strip).astype(float)
    first, last = columns[2:66, 2:66], columns[2:66, 11 * tile + 2 : 11 * tile + 66]
    picture = np.asarray(grid)[2:66, 2:66]
    assert np.array_equal(last, picture), "the strip ends with the picture"
    assert abs(first - picture).mean() > 20, "and begins with noise"


def test_guidance_one_is_none_and_classes_matter(digits, tmp_path):
    def draw(name: str, **more: object) -> np.ndarray:
        sample(SampleOptions(digits, out=tmp_path / name, count=1, steps=5, **more))
        return pixels(tmp_path / name / "seed0-00000.png")

    plain = draw("plain", classes=("0",))
    assert np.array_equal(plain, draw("one", classes=("0",), guidance=1.0))
    assert not np.array_equal(plain, draw("guided", classes=("0",), guidance=3.0))
    assert not np.array_equal(plain, draw("other", classes=("1",)))
    assert np.array_equal(draw("none", classes=("0",), guidance=0.0), draw("none2", classes=("1",), guidance=0.0)), (
        "a scale of 0 forgets the class"
    )


def test_an_eta_that_is_asked_for_is_that_of_every_step(digits, tmp_path):
    def drawn(*words: str) -> np.ndarray:
        out = tmp_path / "-".join(words)
        assert cli(["sample", str(digits), "--count", "1", "--steps", "8", "--out", str(out), *words]) == 0
        return pixels(out / "seed0-00000.png")

    late = drawn("--sampler", "dpmpp_2m_late")
    assert np.array_equal(drawn("--sampler", "dpmpp_2m_late", "--eta", "0"), drawn("--sampler", "dpmpp_2m"))
    assert np.array_equal(drawn("--sampler", "dpmpp_2m_late", "--eta", "1"), drawn("--sampler", "dpmpp_2m_sde"))
    assert not np.array_equal(late, drawn("--sampler", "dpmpp_2m")), "else this test would see nothing"


@pytest.mark.parametrize(
    "words",
    [
        ["--sampler", "dpmpp_2m", "--spacing", "karras", "--steps", "6"],
        ["--sampler", "unipc", "--levels", "-8", "-4", "-1", "2", "6"],
        ["--sampler", "ddpm", "--variance", "analytic", "--steps", "6"],
        ["--sampler", "dpmpp_2m", "--eta", "0.5", "--steps", "6"],
        ["--sampler", "dpmpp_2m", "--mean-first", "--steps", "6"],
        ["--sampler", "restart", "--steps", "8", "--threshold", "dynamic"],
        ["--guidance", "2", "--away-from", "early", "--guidance-range", "-4", "4", "--steps", "6"],
        ["--guidance", "4", "--guide", "projected", "--guidance-rescale", "0.5", "--steps", "6"],
    ],
    ids=lambda words: "-".join(words[1:4:2]),
)
def test_every_way_of_drawing_is_its_own_and_is_noted(digits, tmp_path, words):
    plain = ["sample", str(digits), "--count", "1", "--seeds", "3", "--steps", "6"]
    assert cli([*plain, "--out", str(tmp_path / "plain")]) == 0
    assert cli([*plain[:-2], *words, "--out", str(tmp_path / "a"), "--strip"]) == 0
    name = "seed3-00000.png"
    drawn = pixels(tmp_path / "a" / name)
    assert abs(drawn - pixels(tmp_path / "plain" / name)).max() > 1
    note = json.loads((tmp_path / "a" / name).with_suffix(".json").read_text())
    assert cli([*shlex.split(note["command"])[1:], "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(drawn, pixels(tmp_path / "b" / name))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--sampler ddpm", "--variance forward"),
        ("--guidance 4", "--guide projected"),
        ("--guidance 4", "--guidance-rescale 1"),
        ("--guidance 4", "--guidance-range -2 4"),
        ("--guidance 30", "--threshold dynamic"),
    ],
)
def test_each_option_of_drawing_makes_a_difference(digits, tmp_path, words, option):
    plain = ["sample", str(digits), "--count", "1", "--steps", "6", *words.split()]
    assert cli([*plain, "--out", str(tmp_path / "without")]) == 0
    assert cli([*plain, *option.split(), "--out", str(tmp_path / "with")]) == 0
    without, drawn = (pixels(tmp_path / name / "seed0-00000.png") for name in ("without", "with"))
    assert abs(drawn - without).max() > 1


def test_a_run_that_was_never_shown_pictures_without_class_is_not_asked_for_them(digits, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    settings = (run / "config.toml").read_text()
    (run / "config.toml").write_text(settings.replace("label_dropout = 0.1", "label_dropout = 0.0"))
    words = [
        ["sample", str(run), "--guidance", "2"],
        ["edit", "vary", str(run), str(run / "grid.png")],
        ["evaluate", str(run), "--measure", "bits", "--unconditional"],
    ]
    for one in words:
        assert cli(one) == 2 and "knows pictures only with their class" in capsys.readouterr().err
    assert cli([*words[0], "--away-from", "early", "--count", "1", "--steps", "2", "--out", str(tmp_path)]) == 0


def test_states_of_a_tenth_a_quarter_and_a_half_are_kept(digits):
    assert checkpoint.steps_saved(Run.open(digits).snapshots) == [3, 8, 15]


def test_the_measured_variance_is_kept_with_the_weights_it_belongs_to(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "MEASURED_LEVELS", 8)
    monkeypatch.setattr(drawing, "MEASURED_PICTURES", 16)
    words = ["sample", str(digits), "--count", "1", "--sampler", "ddpm", "--variance", "analytic", "--steps", "4"]
    kept = digits / "evaluations" / "variance.json"
    kept.unlink(missing_ok=True)
    assert cli([*words, "--out", str(tmp_path)]) == 0
    before = json.loads(kept.read_text())
    assert all(0 <= power <= 1.1 for power in before["noise_power"]), "of what is left, none can be known beyond all"
    nobodys = {name: values for name, values in before.items() if name != "weights"}
    for spoiled in (nobodys, {**before, "weights": "others"}, {**before, "noise_power": [1.0]}, []):
        kept.write_text(json.dumps(spoiled))
        assert cli([*words, "--out", str(tmp_path)]) == 0
        assert json.loads(kept.read_text()) == before
    kept.unlink()
    assert cli([*words, "--out", str(tmp_path), "--precision", "bf16"]) == 0
    assert json.loads(kept.read_text()) == before, "whatever was drawn in when it was measured"
    early = checkpoint.steps_saved(Run.open(digits).snapshots)[0]
    assert cli([*words, "--out", str(tmp_path), "--state", str(early)]) == 0
    of_early = json.loads(kept.read_text())
    assert all(of_early[name] != before[name] for name in ("weights", "noise_power"))
    assert of_early["log_snr"] == before["log_snr"]


def test_detail_is_what_is_finer_than_two_pixels():
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 3, 4, 4)
    flat = torch.rand(1, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = [drawing.detail(images) for images in (board, flat, 0.5 * board + flat, torch.cat([board, flat]))]
    assert found == pytest.approx([1, 0, 0.25, 0.5], abs=1e-6)


def first_of(run: Path) -> np.ndarray:
    """The first picture of a run's final grid."""
    return np.asarray(Image.open(run / "grid.png").crop((2, 2, 66, 66))).astype(int)


def enlarged(folder: Path) -> np.ndarray:
    """A picture that was drawn, as a grid shows it: two levels off at most, one for the size of the batch, and
    enlarging may round it once more."""
    first = Image.open(folder / "seed0-00000.png").resize((64, 64), Image.Resampling.BICUBIC)
    return np.asarray(first).astype(int)


@pytest.mark.parametrize(("smooth", "sampler"), [(0.0, "dpmpp_2m_late"), (1e9, "dpmpp_2m")])
def test_a_run_draws_with_the_sampler_that_suits_it(tiny, tmp_path, monkeypatch, smooth, sampler):
    monkeypatch.setattr(previews, "SMOOTH", smooth)
    run, words = tmp_path / "run", ["--steps", "3", "--batch", "16", "--precision", "fp32", "--config", str(tiny)]
    assert cli(["train", "builtin:digits", "--out", str(run), *words]) == 0
    assert f"Sampler: {sampler} (the fresh noise of dpmpp_2m_late leaves " in (run / "log.txt").read_text()

    def drawn(*more: str) -> str:
        name = tmp_path / f"drawn{'-'.join(more)}"
        usual = ["--steps", str(previews.DRAWING.steps), "--count", "1", "--classes", "0", "--out", str(name)]
        assert cli(["sample", str(run), *usual, *more]) == 0
        return json.loads((name / "seed0-00000.json").read_text())["sampler"]

    assert drawn() == sampler and drawn("--sampler", "ddim") == "ddim"
    assert abs(first_of(run) - enlarged(tmp_path / "drawn")).max() <= 2, "and so are the final pictures drawn"
    kept = run / "evaluations" / drawing.SUITED
    for spoiled in ("{", '{"sampler": "ddpm"}', "[1]"):
        kept.write_text(spoiled)
        assert drawn() == "dpmpp_2m_late"


def test_the_mean_of_a_class_stands_for_one_answer(digits, tmp_path):
    """The network is asked once less; the means are kept, and made again where what was kept is damaged."""
    kept = digits / "evaluations" / drawing.MEANS
    words = [
        "sample",
        str(digits),
        "--count",
        "1",
        "--classes",
        "3",
        "--mean-first",
        "--sampler",
        "ddim",
        "--steps",
        "4",
    ]
    kept.unlink(missing_ok=True)
    assert cli([*words, "--out", str(tmp_path / "a")]) == 0
    before, name = kept.read_bytes(), "seed0-00000.png"
    for spoiled in (b"", before[:-8], save({"means": torch.zeros(2, 1, 8, 8)}), save({"others": torch.zeros(1)})):
        kept.write_bytes(spoiled)
        assert cli([*words, "--out", str(tmp_path / "b")]) == 0
        assert kept.read_bytes() == before and np.array_equal(
            pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name)
        )
    run = Run.open(digits)
    model, state = run.load_model(Precision(torch.device("cpu")))
    drawing.make_ready(run, state, model, Drawing(mean_first=True))
    asked: list[int] = []
    model.denoiser.backbone.register_forward_hook(lambda *_: asked.append(1))
    data = run.open_pictures()
    threes = [row for row in data.train if data.labels[row] == 3]
    mean = np.asarray(data.images[threes], float).mean(0)[..., 0]
    # Also where levels begin at no whole number, and where a path comes back to where it began.
    for way, fewer in (
        (Drawing(sampler="ddim", steps=3), 0),
        (Drawing(sampler="ddim", steps=3, schedule="linear"), 0),
        (Drawing(sampler="dpmpp_2m_sde", levels=(-8.1, -2.0, 4.0)), 1),
        (Drawing(sampler="restart", levels=(-1.5, 0.0, 2.0, 4.0)), 1),
    ):
        counts: list[int] = []
        for each in (way, dataclasses.replace(way, mean_first=True)):
            asked.clear()
            first, *_ = model.sample(lambda _: torch.randn(2, 1, 8, 8), torch.tensor([3, 5]), each)
            counts.append(len(asked))
        # Half a level, by rounding.
        np.testing.assert_allclose((first.x0[0, 0].numpy() + 1) * 127.5, mean, atol=0.51)
        assert counts[1] == counts[0] - fewer
        assert way.sampler == "restart" or counts == [way.answers, way.answers - fewer]


def test_the_mean_of_mirrored_pictures_is_the_same_on_both_sides(digits, tmp_path, monkeypatch):
    """As pictures are that were trained on; and a class of which the pictures say nothing is like all of them."""
    run = Run.open(shutil.copytree(digits, tmp_path / "run"))
    facts = dataclasses.replace(run.config.data, classes=("a", "b"), counts=(1, 1))
    config = dataclasses.replace(run.config, data=facts, training=dataclasses.replace(run.config.training, flip=True))
    data = dataclasses.replace(run.open_pictures(), classes=(), labels=None)
    monkeypatch.setattr(Run, "open_pictures", lambda _run: data)
    run = Run(run.path, config)
    means = drawing.mean_images(run)
    assert means.shape == (3, 1, 8, 8) and torch.equal(means, means.flip(3))
    assert torch.equal(means[0], means[2]) and torch.equal(means[1], means[2])


def test_unconditional_pictures_have_classes_as_often_as_the_data(digits, tmp_path):
    options = SampleOptions(digits, unconditional=True, count=2000)
    run = Run.open(digits)
    labels = [one.label for one in wanted_pictures(options, run)]
    counts = np.bincount(labels, minlength=10)
    expected = 2000 * np.array(run.config.data.counts) / sum(run.config.data.counts)
    # Four standard errors of a share of 0.1 in 2,000 draws.
    assert (abs(counts - expected) < 4 * np.sqrt(expected * 0.9)).all()
    again = [one.label for one in wanted_pictures(dataclasses.replace(options, first=17, count=1), run)]
    assert again == [labels[17]], "the class of a picture does not depend on what is drawn beside it"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sampler", "ddi"], "did you mean 'ddim'?"),
        (["--classes", "seven"], "There is no class 'seven'"),
        (["--schedule", "cosin"], "did you mean 'cosine'?"),
        (["--count", "0"], "--count is 0; give at least 1"),
        (["--batch", "0"], "--batch is 0; give at least 1"),
        (["--seeds"], "--seeds names no seed"),
        (["--levels", "1", "--mean-first"], "give another level"),
        (["--guidance", "2", "--mean-first"], "--mean-first goes with neither"),
        (["--steps", "0"], "--steps is 0; give 1 to 100,000"),
        (["--first", "-1"], "--first is -1"),
        (["--unconditional", "--classes", "1"], "exclude each other"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--count", "1000000000"], "draw them in parts"),
        (["--device", "cuda:9"], "There is no device 'cuda:9'"),
        (["--nosuch", "1"], "has no option '--nosuch'"),
        (["--spacing", "karas"], "did you mean 'karras'?"),
        (["--levels", "2", "1"], "do not rise"),
        (["--levels", "-1", "1", "--steps", "7"], "--levels and --steps exclude each other"),
        (["--steps", "100000000"], "give 1 to 100,000"),
        (["--levels", "-800", "0", "5"], "Levels lie between -25 and 25"),
        (["--levels", "0", "5", "--spacing", "time"], "leave --spacing away"),
        (["--away-from", "early"], "--away-from does nothing without guidance"),
        (["--guidance", "2", "--guidance-rescale", "5"], "give a share from 0 to 1"),
        (["--sampler", "ddpm", "--variance", "learned"], "has not learned a variance"),
        (["--variance", "forward"], " has no variance to choose"),
        (["--sampler", "unipc", "--eta", "0.5"], "unipc has no fresh noise to choose"),
        (["--sampler", "ddpm", "--eta", "0"], "take one of ddim, euler"),
        (["--eta", "1.5"], "--eta is 1.5"),
        (["--eta", "nan"], "--eta is nan"),
        (["--guidance", "2", "--guidance-range", "4", "-4"], "is empty"),
        (["--away-from", "late"], "There is no estimate to go away from 'late'"),
        (["--threshold", "clam"], "did you mean 'clamp'?"),
    ],
)
def test_mistakes_are_one_sentence(digits, tmp_path, capsys, words, said):
    before = sorted(digits.rglob("*"))
    assert cli(["sample", str(digits), "--out", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists() and sorted(digits.rglob("*")) == before


def test_a_directory_that_is_no_run(tmp_path, capsys):
    assert cli(["sample", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert cli(["sample", str(tmp_path / "nowhere")]) == 2
    assert "There is no run at" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_how_to_get_one(digits, tmp_path, capsys):
    Run.create(tmp_path / "run", Run.open(digits).config)
    assert cli(["sample", str(tmp_path / "run")]) == 2
    assert "has no checkpoint yet; train it with" in capsys.readouterr().err
