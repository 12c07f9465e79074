"""Evaluating: a model of known density gets its known bits; figures are reproducible; mistakes are one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.config import Config, DataConfig, DiffusionConfig, UNetConfig
from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import open_prepared, spread_rows
from snowmelt.device import Precision
from snowmelt.diffusion.exact import GaussianMixture
from snowmelt.diffusion.noise import add_noise, alpha_sigma
from snowmelt.diffusion.process import data_term
from snowmelt.evaluating.bits import _held_out as held_out
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.models import build_model
from snowmelt.run import Run
from snowmelt.seeds import generator

pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")

QUICK = ["--pictures", "12", "--terms", "20", "--ode-steps", "12", "--probes", "1"]
FEW = ["--terms", "5", "--ode-steps", "2"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """A run that has not learned anything: its network still answers 0, and so it is the exact denoiser of Gaussian
    pixels of mean 0 and the deviation of the training pictures (the "edm" row)."""
    path = tmp_path_factory.mktemp("evaluate") / "run"
    assert cli(["prepare", "builtin:digits", "--out", str(path / "data"), "--size", "8"]) == 0
    data = open_prepared(path / "data")
    about = DataConfig(data.size, data.channels, data.classes, std=data.std, fingerprint=data.fingerprint)
    network = UNetConfig(channels=(8,), attention=(False,), groups=4, head_channels=8)
    run = Run.create(path, Config(about, network=network, diffusion=DiffusionConfig(predicts="edm")))
    model = build_model(run.config, Precision(torch.device("cpu")))
    checkpoint.save(run.checkpoints, 0, {"average": model.state_dict()}, {})
    return path


def report(run: Path) -> dict:
    return json.loads((run / "evaluations" / "bits.json").read_text())


def test_a_model_of_known_density_gets_its_known_bits(untrained, capsys):
    assert cli(["evaluate", str(untrained), "--measure", "bits", *QUICK, "--bound-steps", "100000"]) == 0
    out, err = capsys.readouterr()
    assert "evaluations of the network for each: 21 for the bound, 49 for the ODE" in err
    assert all(word in out for word in ("prior", "steps", "data", "bound", "ODE", "bound - ODE"))

    found = report(untrained)
    data, std = open_prepared(untrained / "data"), Run.open(untrained).config.data.std
    assert found["rows"] == spread_rows(data.held_out, 12).tolist(), "spread over all that were held out"
    images = to_images(torch.from_numpy(np.ascontiguousarray(data.images[found["rows"]]))).double()
    noise = torch.stack([torch.randn(1, 8, 8, generator=generator(0, "bits", row, 0)) for row in found["rows"]])
    level = torch.tensor(10.0, dtype=torch.float64)
    alpha, sigma = alpha_sigma(level, images)
    z = add_noise(images, noise.double(), level)
    gaussian = GaussianMixture(torch.ones(1), torch.zeros(1, 1, 8, 8), torch.tensor([std]))
    decoded = data_term(images, gaussian.denoise(z, level), sigma / alpha).flatten(1).sum(1)
    drawn = (noise.double() ** 2 / 2 + (2 * math.pi * sigma**2).log() / 2).flatten(1).sum(1)
    expected = (-gaussian.log_density(z, level) - drawn + decoded) / (64 * math.log(2))
    # Float32 in the network, and steps of 1.7 in log-SNR. The start at log-SNR -10 is 4.5e-5 short of the prior.
    ode = torch.tensor(found["per_picture"]["ode"], dtype=torch.float64)
    torch.testing.assert_close(ode, expected, rtol=0, atol=2e-3)

    figures = found["bits_per_dim"]
    assert abs(figures["difference"]["mean"]) < 3 * figures["difference"]["standard_error"], "the two roads agree"
    for name, figure in figures.items():
        values = np.array(found["per_picture"][name])
        assert math.isclose(figure["mean"], values.mean(), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(figure["standard_error"], values.std(ddof=1) / math.sqrt(12), rel_tol=1e-9, abs_tol=1e-12)
    parts = sum(figures[name]["mean"] for name in ("prior", "steps", "data"))
    assert math.isclose(parts, figures["bound"]["mean"], rel_tol=1e-9)


def test_the_same_command_gives_the_same_figures_in_any_batch(untrained):
    once: list[dict] = []
    for batch in ("64", "5"):
        assert cli(["evaluate", str(untrained), "--measure", "bits", *QUICK, *FEW, "--batch", batch]) == 0
        once.append(report(untrained))
    for name, values in once[0]["per_picture"].items():
        # Float32 kernels sum in another order for another size of batch.
        assert np.allclose(values, once[1]["per_picture"][name], rtol=0, atol=1e-4)
    assert {key: once[0][key] for key in ("rows", "options", "weights")} == {
        key: once[1][key] for key in ("rows", "options", "weights")
    }
    assert cli(["evaluate", str(untrained), "--measure", "bits", *QUICK, *FEW, "--seed", "1"]) == 0
    assert report(untrained)["per_picture"]["bound"] != once[0]["per_picture"]["bound"]


@pytest.mark.parametrize("more", [["--variance", "forward"], ["--cleanest", "5"]], ids=lambda more: more[0])
def test_what_is_asked_of_bits_changes_them(untrained, more):
    few = ["evaluate", str(untrained), "--measure", "bits", *QUICK, *FEW]
    bounds = list[list[float]]()
    for words in ([], more):
        assert cli([*few, *words]) == 0
        bounds.append(report(untrained)["per_picture"]["bound"])
    assert all(abs(plain - asked) > 1e-3 for plain, asked in zip(*bounds, strict=True))


def test_without_condition_no_class_is_told(untrained):
    run, options = Run.open(untrained), EvaluateOptions(untrained, pictures=4)
    assert held_out(run, options).labels is not None
    assert held_out(run, dataclasses.replace(options, unconditional=True)).labels is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure", "bit"], "There is no measure 'bit'; did you mean 'bits'?"),
        (["--measure"], "There is nothing to measure"),
        (["--measure", "bits", "--pictures", "1"], "--pictures is 1; give at least 2"),
        (["--measure", "bits", "--bound-steps", "1"], "--bound-steps is 1; give at least 2"),
        (["--measure", "bits", "--ode-steps", "-1"], "--ode-steps is -1; give at least 0"),
        (["--measure", "bits", "--cleanest", "11"], "--cleanest is 11; give a log-SNR above -10 and up to 10"),
        (["--measure", "bits", "--cleanest", "-10"], "--cleanest is -10"),
        (["--measure", "bits", "--cleanest", "nan"], "--cleanest is nan"),
        (["--measure", "bits", "--cleanest", "11", "--variance", "analytic"], "--cleanest is 11"),
        (["--measure", "bits", "--bound-steps", "1000001"], "--bound-steps is 1000001; give at most 1,000,000"),
        (["--measure", "bits", "--ode-steps", "10001"], "--ode-steps is 10001; give at most 10,000"),
        (["--measure", "bits", "--variance", "forwards"], "did you mean 'forward'?"),
        (["--measure", "bits", "--variance", "learned"], "was not taught a variance"),
        (["--measure", "bits", "--device", "cuda:9"], "There is no device 'cuda:9'"),
        (["--measur"], "did you mean '--measure'?"),
    ],
)
def test_mistakes_are_one_sentence(untrained, capsys, words, said):
    before = sorted(untrained.rglob("*"))
    assert cli(["evaluate", str(untrained), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(untrained.rglob("*")) == before


def test_a_run_of_another_family_is_refused_before_anything_is_trained(untrained, tmp_path, capsys, monkeypatch):
    run = Run.create(tmp_path / "run", dataclasses.replace(Run.open(untrained).config, model="gan"))
    for name in ("checkpoints", "data"):
        (run.path / name).symlink_to(untrained / name)
    monkeypatch.setattr("snowmelt.evaluating.quality.open_spaces", lambda *_words, **_more: pytest.fail("trained"))
    assert cli(["evaluate", str(run.path), "--measure", "quality", "bits"]) == 2
    assert "has no likelihood; leave bits out of --measure" in capsys.readouterr().err


def test_a_run_without_its_pictures_says_so(untrained, tmp_path, capsys):
    Run.create(tmp_path / "run", Run.open(untrained).config)
    (tmp_path / "run" / "checkpoints").symlink_to(untrained / "checkpoints")
    (tmp_path / "run" / "data").mkdir()
    assert cli(["evaluate", str(tmp_path / "run"), "--measure", "bits"]) == 2
    err = capsys.readouterr().err
    assert "are gone; put" in err and "snowmelt prepare" in err and err.count("\n") == 1


def test_other_pictures_than_those_of_the_training_are_refused(untrained, tmp_path, capsys):
    config = Run.open(untrained).config
    for fingerprint, said in (("another", "are not the ones"), ("", "imported without pictures; import it again")):
        run = tmp_path / (fingerprint or "none")
        Run.create(run, dataclasses.replace(config, data=dataclasses.replace(config.data, fingerprint=fingerprint)))
        for part in ("checkpoints", "data"):
            (run / part).symlink_to(untrained / part)
        assert cli(["evaluate", str(run), "--measure", "bits"]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
        assert not (run / "evaluations").exists()
