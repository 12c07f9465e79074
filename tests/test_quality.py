"""Measuring a run: the same figures every time, whole or not at all, and for a model that only copies, the truth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from snowmelt.cli import run as cli
from snowmelt.data.pixels import to_images
from snowmelt.diffusion.walk import Step
from snowmelt.evaluating import quality
from snowmelt.evaluating.draw import Drawn, Order, draw
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluation.features import random_space
from snowmelt.models.base import Drawing
from snowmelt.models.vae import VAEModel
from snowmelt.networks import kernels
from snowmelt.run import Run, lock
from snowmelt.terminal import Log, console

pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")

SAMPLES = ["--samples", "100", "--processes", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A VAE of the digits after three steps: it draws at once, and grey."""
    path = tmp_path_factory.mktemp("quality") / "run"
    words = ["train", "builtin:digits", "--size", "8", "--model", "vae", "--steps", "3", "--precision", "fp32"]
    assert cli([*words, "--out", str(path)]) == 0
    return Run.open(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache, monkeypatch):
    monkeypatch.setenv("SNOWMELT_CACHE", str(cache))


def figures(run: Run) -> dict:
    return json.loads((run.path / "evaluations" / "quality" / "figures.json").read_text())


def test_figures_say_what_they_are_and_repeat(run, capsys):
    assert cli(["evaluate", str(run.path), "--spaces", "random", *SAMPLES]) == 0
    said = capsys.readouterr()
    assert "Drawing 100 pictures" in said.err and "takes about" in said.err, "the price is told before"
    found = figures(run)
    assert found["samples"] == 100 and found["reference"] == "all pictures", "180 held-out digits are too few"
    names = {(figure["metric"], figure["space"]) for figure in found["figures"]}
    assert {("frechet", "random"), ("kid", "random"), ("coverage", "random"), ("patches", "pixels")} <= names
    for figure in found["figures"]:
        assert (figure["value"] is None) == bool(figure["reason"])
        if figure["value"] is not None:
            assert figure["low"] <= figure["value"] <= figure["high"]
    kid = next(figure for figure in found["figures"] if figure["metric"] == "kid")
    assert kid["low"] > kid["floor_high"], "three steps of training draw nothing like a digit"
    assert len(found["memorization"]["pairs"]) == 16
    pairs = run.path / "evaluations" / "quality" / "pairs"
    assert len(list(pairs.glob("*.png"))) == 32

    assert cli(["evaluate", str(run.path), "--spaces", "random", *SAMPLES]) == 0
    again = figures(run)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}

    # What is not measured now is kept, of the same pictures; of others it would be wrong.
    for measure in ("copies", "quality"):
        assert cli(["evaluate", str(run.path), "--spaces", "random", "--measure", measure, *SAMPLES]) == 0
        kept = figures(run)
        assert kept["figures"] == found["figures"] and kept["spaces"] == found["spaces"]
        assert kept["memorization"]["copies"] == found["memorization"]["copies"]
        assert len(list(pairs.glob("*.png"))) == 32
    older = {name: value for name, value in figures(run).items() if name != "precision"}
    for before, same in ((older | {"precision": "bf16"}, False), (older, True)):
        (pairs.parent / "figures.json").write_text(json.dumps(before))
        assert cli(["evaluate", str(run.path), "--spaces", "random", "--measure", "copies", *SAMPLES]) == 0
        assert figures(run)["precision"] == "fp32"
        assert figures(run)["figures"] == (found["figures"] if same else [])
    assert cli(["evaluate", str(run.path), "--measure", "copies", "--samples", "99", "--processes", "1"]) == 0
    assert figures(run)["figures"] == [] and figures(run)["memorization"]


def test_pictures_are_measured_as_the_run_would_draw_them(run, monkeypatch):
    """What is asked for comes first, then what it was trained in, where the processor has that."""
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: True)
    options = EvaluateOptions(run.path, samples=4)
    assert quality.order_of(run, options).precision == "fp32"
    assert quality.order_of(run, dataclasses.replace(options, precision="bf16")).precision == "bf16"
    trained = dataclasses.replace(run.config.training, precision="bf16")
    later = dataclasses.replace(run, config=dataclasses.replace(run.config, training=trained))
    assert quality.order_of(later, options).precision == "bf16"
    assert quality.order_of(later, dataclasses.replace(options, precision="fp32")).precision == "fp32"


def test_held_out_pictures_are_the_reference_where_they_are_enough(run, monkeypatch):
    data = run.open_pictures()
    monkeypatch.setattr(quality, "ENOUGH", len(data.held_out))
    rows, words = quality.reference_of(data)
    assert np.array_equal(rows, data.held_out) and words == "held-out pictures"
    # In 128 dimensions a Frechet distance needs more of them.
    assert quality.reference_of(data, random_space(data.channels))[1] == "all pictures"
    monkeypatch.setattr(quality, "ENOUGH", len(data.held_out) + 1)
    rows, words = quality.reference_of(data)
    assert np.array_equal(rows, np.arange(len(data.images))) and words == "all pictures"


def test_errors_on_training_and_held_out_pictures_are_told_apart(run, monkeypatch):
    """Those of the rows that they are called by."""
    data = run.open_pictures()

    def errors_of(_learner: object, _data: object, rows: np.ndarray, **_: object) -> dict[str, torch.Tensor]:
        return {"loss": torch.from_numpy(np.isin(rows, data.held_out)) + torch.rand(len(rows))}

    monkeypatch.setattr(quality, "errors_of", errors_of)
    (gap,) = quality._gaps(run, data, EvaluateOptions(run.path))
    assert 0 < gap.train < 1 < gap.held_out < 2


def test_a_drawing_is_what_is_asked_for(run):
    asked = EvaluateOptions(run.path, sampler="ddim", steps=7, guidance=3.0)
    assert quality.drawing_of(asked) == Drawing(sampler="ddim", steps=7, guidance=3.0)
    assert quality.drawing_of(EvaluateOptions(run.path)) == Drawing()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_processes_draws_the_same(run, precision):
    order = Order(str(run.path), "newest", Drawing(), 3, tuple(range(5, 135)), 64, "cpu", precision)
    alone, two = draw(order, 1), draw(order, 2)
    # Another batch rounds differently: by one grey level at most; in bfloat16 by 1/256 of a number of this one step.
    most = {"fp32": 1, "bf16": 3}[precision]
    assert np.abs(alone.pixels.astype(int) - two.pixels).max() <= most
    assert alone.labels is not None and two.labels is not None and (alone.labels == two.labels).all()
    other = draw(dataclasses.replace(order, precision={"fp32": "bf16", "bf16": "fp32"}[precision]), 1)
    assert np.abs(other.pixels.astype(int) - two.pixels).max() > 0, "and not in what it was not asked for"
    part = draw(dataclasses.replace(order, numbers=(20, 7)), 1)
    assert np.abs(part.pixels.astype(int) - alone.pixels[[15, 2]]).max() <= most, "a picture is its seed and number"


def test_a_model_that_repeats_its_training_pictures_is_found_out(run, monkeypatch):
    data = run.open_pictures()

    def copying(self, noise, labels, drawing):
        x = noise(0)
        rows = data.train[(x.flatten(1)[:, 0].double().abs() * 1e6).long().numpy() % len(data.train)]
        x0 = to_images(torch.from_numpy(np.ascontiguousarray(data.images[rows])))
        yield Step(x, torch.tensor(-10.0), x0)

    monkeypatch.setattr(VAEModel, "sample", copying)
    assert cli(["evaluate", str(run.path), "--spaces", "random", *SAMPLES]) == 0
    found = figures(run)["memorization"]
    assert found["copies"]["low"] > 0.9 and found["copies"]["false_alarms"] <= 0.01
    assert found["pairs"][0]["distance"] == 0
    kid = next(figure for figure in figures(run)["figures"] if figure["metric"] == "kid")
    assert kid["low"] < kid["floor_high"], "and its distances look perfect, which is why copies are counted"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "1"], "--samples is 1; give at least 2"),
        (["--processes", "-1"], "--processes is -1"),
        (["--spaces", "trianed"], "did you mean 'trained'?"),
        (["--spaces", "dinov2"], "give their path with --dinov2"),
        (["--inception", "nowhere.pth"], "nowhere.pth"),
        (["--state", "7"], "There is no kept state"),
        (["--state", "before"], "leave --state before away"),
        (["--sampler", "ddmp"], "did you mean 'ddpm'?"),
        (["--steps", "0"], "--steps is 0"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(run, capsys, words, said):
    before = {path: path.stat().st_mtime for path in (run.path / "evaluations").rglob("*")}
    assert cli(["evaluate", str(run.path), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert {path: path.stat().st_mtime for path in (run.path / "evaluations").rglob("*")} == before


def test_a_run_still_training_is_refused(run, capsys):
    run.write_status("training")
    try:
        with lock(run.path):
            assert cli(["evaluate", str(run.path), *SAMPLES]) == 2
        assert "is still training; wait for it" in capsys.readouterr().err
    finally:
        run.write_status("finished")


def test_a_failure_leaves_the_earlier_figures(run, tmp_path, monkeypatch):
    assert cli(["evaluate", str(run.path), "--spaces", "random", *SAMPLES]) == 0
    before = figures(run)

    def torn(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quality, "save_png", torn)
    with pytest.raises(OSError, match="No space"):
        options = quality.EvaluateOptions(run.path, samples=64, processes=1)
        quality.measure_quality(run, options, [], Log(console(), tmp_path / "log.txt"))
    assert figures(run) == before


def test_drawn_pictures_know_their_time(run):
    drawn = draw(Order(str(run.path), "newest", Drawing(), 0, (0, 1), 64, "cpu", "fp32"), 1)
    assert isinstance(drawn, Drawn) and drawn.seconds > 0 and drawn.pixels.shape == (2, 8, 8, 1)
