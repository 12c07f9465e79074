"""A run trains, its files tell its story, faults are survived, and time is kept."""

import dataclasses
import errno
import json
import math
import shlex
import shutil
import signal
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snowmelt import checkpoint, presets
from snowmelt.cli import run as cli
from snowmelt.config import DataConfig
from snowmelt.data.prepared import open_prepared
from snowmelt.device import Precision
from snowmelt.errors import UserError
from snowmelt.evaluation.memorization import Gap
from snowmelt.models import build_learner
from snowmelt.models.diffusion import DiffusionLearner, DiffusionModel
from snowmelt.presets import (
    AUGMENT,
    BRIEF,
    BRIEF_RATE,
    DROPOUT,
    FLAT,
    LINEAR,
    LINEAR_LIMIT,
    OFTEN,
    REPEATED,
    ROOM,
    SMALLEST_BATCH,
    WIDENED,
    WIDEST,
    facts_of,
    network_for,
    preset,
    width_for,
)
from snowmelt.run import Run, lock
from snowmelt.train import TrainOptions, train
from snowmelt.training import fitting, loop, session, watch
from snowmelt.training.alarms import learned_by_heart, spread_ratio
from snowmelt.training.forecast import TRAINED, updates_in
from snowmelt.training.measure import Measured
from snowmelt.training.options import overrides_of, resolve

QUICK = ("--precision", "fp32", "--config")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Settings of a network small enough for tests."""
    path = tmp_path / "small.toml"
    path.write_text("[network]\nchannels = [16, 16]\nattention = [false, false]\n[training]\nbatch = 16\n")
    return path


def draw_pictures(folder: Path) -> Path:
    """Forty colour pictures in two classes: bright above, or bright below."""
    chance = np.random.default_rng(0)
    for label, rows in (("above", slice(0, 8)), ("below", slice(8, 16))):
        (folder / label).mkdir(parents=True)
        for number in range(20):
            pixels = chance.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[rows] += 180
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """As a person has them."""
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, prepared."""
    folder = tmp_path_factory.mktemp("ready")
    assert cli(["prepare", str(draw_pictures(folder / "pictures")), "--out", str(folder / "data")]) == 0
    return folder / "data"


def start(source: Path, out: Path, small: Path, *more: str) -> int:
    return cli(["train", str(source), "--out", str(out), *QUICK, str(small), *more])


def test_a_run_tells_its_story(pictures, small, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(session, "outlook", lambda curve, updates: f"{curve[-1][0]} images in {updates} updates.")
    assert start(pictures, out, small, "--steps", "30") == 0
    run = Run.open(out)
    assert run.status()["state"] == "finished" and run.status()["step"] == 30
    assert run.config.data.classes == ("above", "below") and run.config.data.channels == 3
    assert checkpoint.steps_saved(run.checkpoints)[-1] == 30
    lines = run.metrics()
    assert lines[-1]["images"] == 30 * 16
    assert any("held_out_loss" in line for line in lines) and any("error at log-SNR +0" in line for line in lines)
    for name in ("curves.png", "grid.png", "strip.png", "previews/000000030.png"):
        Image.open(out / name).verify()
    assert "Held-out loss" in (out / "report.md").read_text()
    assert all(
        "480 images in 30 updates." in (out / name).read_text() for name in ("report.md", "log.txt", "status.json")
    )
    log = (out / "log.txt").read_text()
    assert "Precision" not in log, "an asked-for precision is not measured"
    assert "was skipped" not in log


@pytest.mark.parametrize("flip", [(), ("--flip",)], ids=["as they are", "mirrored"])
def test_a_network_is_shown_what_its_pictures_say(pictures, small, tmp_path, monkeypatch, flip):
    """From the first step on, in the weights and in their average, and the same when it begins again."""
    out, honest, streams = tmp_path / "run", session.Stream, list[dict]()
    monkeypatch.setattr(session, "Stream", lambda *data, **more: (streams.append(more), honest(*data, **more))[1])
    assert start(pictures, out, small, "--steps", "2", *flip) == 0
    run = Run.open(out)
    assert streams[0]["flip"] == bool(flip)

    def known(name: str) -> dict[str, torch.Tensor]:
        tensors = checkpoint.load(run.newest_checkpoint(), name)
        return {key: tensor for key, tensor in tensors.items() if ".first." in key}

    weights, average, data = known("weights"), known("average"), open_prepared(out / "data")
    mean = torch.from_numpy(data.images[data.train] / 127.5 - 1).mean(0).permute(2, 0, 1).float()
    found = weights["denoiser.first.mean"]
    if flip:
        # Every other one is mirrored: as good as symmetric, for pictures that differ by chance only.
        mean = (mean + mean.flip(2)) / 2
    assert torch.allclose(found, mean, atol=0.1 if flip else 1e-5)
    assert weights["denoiser.first.basis"].norm() > 0
    assert all(torch.equal(average[key], tensor) for key, tensor in weights.items())
    shutil.rmtree(run.checkpoints)
    run.write_status("stopped")
    assert cli(["train", "--resume", str(out)]) == 0
    assert all(torch.equal(known("weights")[key], tensor) for key, tensor in weights.items())


def test_a_plan_is_said_and_nothing_is_left(pictures, small, tmp_path, capsys):
    before = set(tmp_path.iterdir())
    assert start(pictures, tmp_path / "run", small, "--for", "60s", "--plan") == 0
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "16 x 16, colour, 2 classes" in said and "images/s" in said and "of 16 images" in said
    assert set(tmp_path.iterdir()) == before, "no run, and no prepared pictures"
    assert start(pictures, tmp_path / "run", small, "--steps", "30", "--plan", "--flip") == 0
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "about 30 of 16 images: 480, 13 times each picture" in said
    assert "shown beside the best linear estimate, along up to 64 directions changes half" in said
    assert "changes half of the pictures mirrored average" in said


def test_short_times_have_small_batches_unless_asked(small):
    data = DataConfig(28, 1, pictures=57_000)
    batches = [preset(data, "diffusion", images=images).training.batch for images in (2_000, 10**6, None)]
    assert batches == [SMALLEST_BATCH, 64, 64]
    assert preset(DataConfig(64, 3), "diffusion", images=10**6).training.batch == 32
    for size in (28, 64):
        sized = DataConfig(size, 1, pictures=57_000)
        rates = [preset(sized, "diffusion", images=images).training.learning_rate for images in (3_000, 10**6, None)]
        assert rates[0] == BRIEF_RATE > rates[1] == rates[2], "few updates are large ones"
    rates = [preset(data, "diffusion", images=images).training.learning_rate for images in (3_000, 10**6, None)]
    options = TrainOptions("pictures", duration="60s")
    for section, values in (("training", {"optimizer": "adamw"}), ("network", {"channels": [64, 64, 64]})):
        asked = {"training": {}, section: values}
        assert resolve(data, options, asked, images=3_000).training.learning_rate == rates[2]
    assert resolve(data, options, {"training": {"batch": 48}}, images=5_000).training.batch == 48
    assert resolve(data, options, {}, images=2_000).training.batch == SMALLEST_BATCH


def test_brief_runs_have_a_small_network_unless_somebody_says_how_it_looks():
    data, options = DataConfig(32, 3, pictures=50_000), TrainOptions("pictures", duration="60s")
    usual, brief = (preset(data, "diffusion", images=images).network for images in (BRIEF, BRIEF - 1))
    assert usual == preset(data, "diffusion").network == network_for(data)
    assert set(brief.channels) == {usual.channels[0]} and not brief.middle_attention and not any(brief.attention)
    large = DataConfig(64, 3, pictures=50_000)
    usual_large, brief_large = (
        preset(large, "diffusion", images=images).network for images in (2 * BRIEF, 2 * BRIEF - 1)
    )
    assert usual_large == network_for(large) != brief_large, "of larger pictures twice as many are few"
    asked = {"training": {}, "network": {"dropout": 0.1}}
    assert resolve(data, options, asked, images=5_000).network == dataclasses.replace(usual, dropout=0.1)


def test_whoever_asks_for_what_others_predict_can_export_the_run():
    """No other library shows a network a linear estimate, or counts on a clamp; who asks for both has both."""
    data, options = DataConfig(32, 3), TrainOptions("pictures")
    kinds = ({}, LINEAR), ({"predicts": "v"}, 0), ({"predicts": "v", "linear": 8}, 8), ({"predicts": "edm"}, LINEAR)
    for given, directions in kinds:
        diffusion = resolve(data, options, {"training": {}, "diffusion": given}).diffusion
        assert (diffusion.linear, diffusion.censored) == (directions, given.get("predicts") != "v")
    given = {"predicts": "v", "censored": True}
    assert resolve(data, options, {"training": {}, "diffusion": given}).diffusion.censored


def test_pictures_that_are_seen_again_and_again_are_changed():
    """Where a run sees each of them 300 times; not where nobody knows how often, or where somebody says otherwise."""
    data = DataConfig(32, 3, pictures=1000)
    seen = (None, REPEATED * 1000 - 1, REPEATED * 1000)
    assert [preset(data, "diffusion", images=images).diffusion.augment for images in seen] == [0, 0, AUGMENT]
    asked = {"training": {}, "diffusion": {"augment": 0.0}}
    options = TrainOptions("pictures", duration="60s")
    assert resolve(data, options, asked, images=10**9).diffusion.augment == 0


@pytest.mark.parametrize(("size", "limit"), [(32, LINEAR_LIMIT), (64, 2 * LINEAR_LIMIT)])
def test_long_runs_of_drawings_are_shown_no_linear_estimate(size, limit):
    """By time, by steps, and where nobody knows how long; not where somebody says otherwise."""
    data, options = DataConfig(size, 3, flat=FLAT), TrainOptions("pictures")
    photographs = dataclasses.replace(data, flat=FLAT - 0.01)
    assert preset(photographs, "diffusion", images=10**7).diffusion.linear == LINEAR
    by_steps = {"training": {"steps": 10**6}, "diffusion": {}}
    assert resolve(photographs, options, by_steps).diffusion.linear == LINEAR
    shown = [preset(data, "diffusion", images=images).diffusion.linear for images in (None, limit - 1, limit)]
    assert shown == [LINEAR, LINEAR, 0]
    for steps, given, directions in (
        (limit // 100 - 1, {}, LINEAR),
        (limit // 100, {}, 0),
        (limit // 100, {"linear": 8}, 8),
        (10, {"predicts": "v"}, 0),
    ):
        asked = {"training": {"steps": steps, "batch": 100}, "diffusion": given}
        assert resolve(data, options, asked).diffusion.linear == directions


def test_steps_say_how_often_pictures_are_seen_too():
    data, options = DataConfig(32, 3, pictures=100), TrainOptions("pictures")
    for steps, given, augment in ((299, {}, 0), (300, {}, AUGMENT), (300, {"augment": 0.0}, 0)):
        asked = {"training": {"steps": steps, "batch": 100}, "diffusion": given}
        assert resolve(data, options, asked).diffusion.augment == augment


@pytest.mark.parametrize("size", [8, 32, 64, 256])
def test_longer_runs_of_a_cpu_are_worth_a_wider_network(size):
    """The longer the wider, up to a bound, and the less so the fewer pictures there are; each width can be built."""
    data = DataConfig(size, 3, pictures=50_000)
    usual, one = network_for(data), WIDENED * (16 if size == 8 else 1)
    widths = [width_for(data, int(factor**4 * one)) for factor in (0.1, 1.2, 1.3, 1.9, 3.1, WIDEST, 9)]
    assert widths == [1, 1, 1.5, 2, 3, WIDEST, WIDEST]
    few = [dataclasses.replace(data, pictures=int(factor**2 * ROOM)) for factor in (0, 1, 2.1)]
    assert [width_for(data, 100 * one) for data in few] == [1, 1, 2]
    for halves in range(2, 9):
        config = preset(data, "diffusion", images=10**6, width=halves / 2)
        assert config.network == dataclasses.replace(usual, channels=tuple(halves * c // 2 for c in usual.channels))
        build_learner(config, Precision(torch.device("meta")))
    own = {"training": {}, "network": {"dropout": 0.1}}
    kept = resolve(data, TrainOptions("pictures"), own, images=10**6, width=2.0).network
    assert kept == dataclasses.replace(usual, dropout=0.1)


def test_only_a_gpu_with_time_has_the_larger_network():
    """One without time takes larger batches at least."""
    data = DataConfig(32, 3, pictures=50_000)
    usual = preset(data, "diffusion")
    quick = preset(data, "diffusion", gpu=True)
    assert quick.network == usual.network and quick.training.batch == 4 * usual.training.batch
    large = preset(data, "diffusion", gpu=True, large=True)
    assert large.network.channels == (128, 256, 256) and large.training.batch == 512
    assert (quick.diffusion.linear, large.diffusion.linear) == (LINEAR, 0)
    assert large.training.learning_rate < usual.training.learning_rate
    asked = resolve(data, TrainOptions("pictures"), {"training": {"optimizer": "adamw"}}, gpu=True, large=True)
    assert asked.training.learning_rate == large.training.learning_rate, "whatever takes the steps"
    assert preset(DataConfig(8, 1), "diffusion", gpu=True, large=True).network.channels == (32, 64)
    assert preset(data, "vae", gpu=True, large=True) == preset(data, "vae")
    dropouts = [
        preset(data, "diffusion", images=images, gpu=True, large=True).network.dropout
        for images in (None, OFTEN * data.pictures - 1, OFTEN * data.pictures)
    ]
    assert dropouts == [0, 0, DROPOUT], "for pictures that are seen again and again"


@pytest.mark.parametrize(
    ("large", "minutes", "said", "measured"),
    [
        # Images/s of the larger network; what is said; at which widths and with how much dropout it measures.
        (5000.0, 10, "a larger one, which sees 2,9", [(128, 0), (128, 0), (128, DROPOUT)]),
        (500.0, 10, "a larger one would see 29", [(128, 0), (128, 0), (32, 0), (32, 0)]),
        (400.0, 10, "a larger one would see 23", [(128, 0), (32, 0), (32, 0)]),
        (None, 10, "a larger one cannot be trained: OutOfMemoryError: CUDA out of mem", [(128, 0), (32, 0), (32, 0)]),
        (5000.0, 4, "", [(32, 0), (32, 0)]),
    ],
    ids=["chosen", "too slow", "far too slow", "too large", "no time"],
)
def test_a_larger_network_is_measured_before_it_is_chosen(
    ready, tmp_path, monkeypatch, capsys, large, minutes, said, measured
):
    """It is compiled only if that may help, and measured as it will be: with dropout, for so few pictures."""
    seen = []

    def measure(config, **given):
        wide = config.network.channels[0] == 128
        seen.append((config.network.channels[0], config.network.dropout))
        if wide and large is None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return Measured("fp32", 1, large if wide else 20_000.0, "channels_last", compile=True, record=True)

    monkeypatch.setattr(fitting, "measure", measure)
    monkeypatch.setattr(fitting, "is_gpu", lambda _device: True)
    assert cli(["train", str(ready), "--out", str(tmp_path / "run"), "--for", f"{minutes}m", "--plan"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert said in words and "fp32, channels_last, compiled, recorded, 1 CPU threads" in words
    assert seen == measured


@pytest.mark.parametrize(("minutes", "widths"), [(1, [32]), (10, [32, 32]), (600, [32, 32, 48])])
def test_a_longer_run_is_measured_with_its_own_network(ready, tmp_path, monkeypatch, capsys, minutes, widths):
    """A hundred images a second; which precision is faster for the narrow network need not be so for the usual one."""
    seen: list[tuple[int, bool, str]] = []

    def measure(config, *, asked, **_given):
        seen.append((config.network.channels[0], config.network.middle_attention, asked))
        return Measured("fp32", 1, 100.0)

    monkeypatch.setattr(presets, "ROOM", 0.01)
    monkeypatch.setattr(fitting, "measure", measure)
    monkeypatch.setattr(fitting, "is_gpu", lambda _device: False)
    assert cli(["train", str(ready), "--out", str(tmp_path / "run"), "--for", f"{minutes}m", "--plan"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"widths {widths[-1]}, " in said
    assert ("1.5 times as wide as usual, which sees about 1,959,591 images" in said) == (48 in widths)
    # Of a brief run the precision is known; each other network is asked for its own, and has attention.
    later = [(width, True, "auto") for width in widths[1:]]
    assert seen == [(32, False, "auto"), *(later or [(32, False, "fp32")])]


def test_each_decision_is_said_once_and_a_network_measured_once(ready, tmp_path, monkeypatch, capsys):
    """By its last measurement; a VAE, whose network does not depend on the time, is measured for its batch at most."""
    seen: list[str] = []

    def measure(config, *, asked, **_given):
        seen.append(asked)
        ratio = ("Precision: fp32 (bf16 trains 0.5 times as fast as fp32 here)",) if asked == "auto" else ()
        return Measured("fp32", 1, 1e5, reasons=(*ratio, f"channels_last: yes ({len(seen)})"))

    monkeypatch.setattr(fitting, "measure", measure)
    monkeypatch.setattr(fitting, "is_gpu", lambda _device: False)
    for model, measured in (("diffusion", ["auto", "auto"]), ("vae", ["auto", "fp32"])):
        seen.clear()
        out = tmp_path / model
        assert cli(["train", str(ready), "--out", str(out), "--for", "10m", "--plan", "--model", model]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert seen == measured
        assert said.count("Precision: fp32 (") == 1 and said.count("channels_last: yes (") == 1
        assert "channels_last: yes (2)." in said


@pytest.mark.parametrize(("speed", "batch", "rate"), [(20_000.0, 256, 3e-3), (1000.0, 128, 3e-3), (300.0, 32, 6e-3)])
def test_a_slow_gpu_takes_smaller_batches(ready, tmp_path, monkeypatch, capsys, speed, batch, rate):
    """Thirty seconds, by images/s: enough updates are left, as on a CPU."""
    monkeypatch.setattr(fitting, "measure", lambda _config, **_given: Measured("fp32", 1, speed))
    monkeypatch.setattr(fitting, "is_gpu", lambda _device: True)
    assert cli(["train", str(ready), "--out", str(tmp_path / "run"), "--for", "30s", "--plan"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert f" of {batch} images" in words and f"{rate:g} by muon" in words


def test_a_gpu_tries_what_may_be_faster_and_says_what_came_of_it(ready, small, tmp_path, monkeypatch):
    """The way a GPU goes, on a CPU that passes for one, without a compiler."""
    from snowmelt import device
    from snowmelt.training import measure

    def unable(*_given, **_named):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", unable)
    for module in (device, measure):
        monkeypatch.setattr(module, "is_gpu", lambda _device: True)
    monkeypatch.setattr(device, "LEAST_COMPILED", 0.0)
    honest = device.time_of
    monkeypatch.setattr(device, "time_of", lambda precision, step, _seconds: honest(precision, step, 0.0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _name: None)
    assert start(ready, tmp_path / "run", small, "--steps", "3") == 0
    log, config = (tmp_path / "run" / "log.txt").read_text(), Run.open(tmp_path / "run").config
    assert "compiled: no (no compiler here)." in log and not config.training.compile
    assert "recorded: no (" in log and not config.training.record, "without a GPU there is nothing to record"
    assert f"channels_last: {'yes' if config.training.layout == 'channels_last' else 'no'} (" in log
    small.write_text(small.read_text() + 'compile = true\nrecord = true\nlayout = "channels_last"\n')
    assert start(ready, tmp_path / "asked", small, "--steps", "3") == 0
    log, training = (tmp_path / "asked" / "log.txt").read_text(), Run.open(tmp_path / "asked").config.training
    assert training.ways[1:] == ("channels_last", "compiled", "recorded"), "what is asked for is kept"
    assert "The network is computed as it is (no compiler here)." in log and "channels_last: " not in log


def test_six_pictures_train(small, tmp_path):
    """One is held out: its error is written, but a single one has no deviation, and nothing is beyond doubt."""
    (tmp_path / "few").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "few" / f"{number}.png")
    assert start(tmp_path / "few", tmp_path / "run", small, "--steps", "3") == 0
    run = Run.open(tmp_path / "run")
    assert len(open_prepared(run.path / "data").held_out) == 1
    (line,) = (line for line in run.metrics()[-1:] if "held_out_loss" in line)
    assert math.isfinite(line["train_loss"]) and math.isfinite(line["spread"])
    assert not any(line.get("alarm") == "memorization" for line in run.metrics()) and not run.before.exists()


def test_pictures_learned_by_heart_are_told_once_and_the_state_before_is_kept(pictures, small, tmp_path, monkeypatch):
    """And that they are all alike, once a fifth of the training is over."""
    times = list[bool]()

    def errors(self, rows):
        held_out = rows is self.data.held_out
        times.append(held_out)
        loss = 0.9 if held_out and sum(times) > 2 else 0.1
        return {watch.LOSS: torch.linspace(loss - 0.01, loss + 0.01, 20)}

    monkeypatch.setattr(watch.Watch, "_errors", errors)
    monkeypatch.setattr(watch.Watch, "_spread", lambda self, drawn: 0.3)
    assert start(pictures, tmp_path / "run", small, "--steps", "30") == 0
    run = Run.open(tmp_path / "run")
    measured = [line for line in run.metrics() if "held_out_loss" in line]
    assert len(measured) > 4 and all(line["train_loss"] == pytest.approx(0.1) for line in measured)
    assert [line["held_out_loss"] for line in measured] == pytest.approx([0.1] * 2 + [0.9] * (len(measured) - 2))
    (by_heart,) = (line["step"] for line in run.metrics() if line.get("alarm") == "memorization")
    assert by_heart == measured[2]["step"] and int(run.state_of("before").name) == measured[1]["step"]
    (alike,) = (line["step"] for line in run.metrics() if line.get("alarm") == "collapse")
    assert alike == next(line["step"] for line in measured if "spread" in line and line["step"] >= 6)


@pytest.mark.parametrize(("low", "beyond_doubt"), [(0.6, True), (0.4, False)])
def test_a_gap_is_beyond_doubt_at_twice_its_interval(low, beyond_doubt):
    assert learned_by_heart(Gap("loss", 1.0, 2.0, 1.0, low, 2 - low)) is beyond_doubt


def test_the_held_out_error_falls(pictures, small, tmp_path):
    start(pictures, tmp_path / "run", small, "--steps", "80")
    losses = [line["held_out_loss"] for line in Run.open(tmp_path / "run").metrics() if "held_out_loss" in line]
    # Untrained it says nothing, and is wrong by the whole variance. Two flat classes are learnt within 80 steps.
    assert losses[-1] < 0.5 * losses[0]


def test_non_finite_steps_are_skipped_then_rolled_back(pictures, small, tmp_path, monkeypatch):
    honest = DiffusionLearner.update
    poisoned = {5, 12, 13, 14}
    rates = list[float]()

    def update(self, batch, rng, learning_rate):
        rates.append(learning_rate)
        if len(rates) in poisoned:
            batch = batch._replace(images=batch.images * math.nan)
        return honest(self, batch, rng, learning_rate)

    monkeypatch.setattr(DiffusionLearner, "update", update)
    out = tmp_path / "run"
    assert start(pictures, out, small, "--steps", "20", "--save-every", "0") == 0
    state = checkpoint.read_state(Run.open(out).newest_checkpoint())
    assert state["step"] == 20 and state["skipped"] == 4
    assert state["rollbacks"] == 1
    log = (out / "log.txt").read_text()
    assert "Step 5 was skipped" in log and "back to step 11" in log and "0.5 of the learning rate" in log
    assert rates[14:17] == pytest.approx([rate / 2 for rate in rates[11:14]]), "steps 12 to 14 once more"
    for name in ("weights", "average"):
        for tensor in checkpoint.load(Run.open(out).newest_checkpoint(), name).values():
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize(("poisoned", "rollbacks"), [((5,), 0), ((5, 12, 13, 14), 1)])
def test_a_device_that_is_not_waited_for_trains_alike(ready, small, tmp_path, monkeypatch, poisoned, rollbacks):
    """As on a GPU, which is asked only now and then whether updates were finite; the same run comes of it.

    Where a device is not waited for, a product is rounded before it is added to the weights: some 1e-7 each time, which
    so many updates multiply by some hundred.
    """
    honest, init = DiffusionLearner.update, DiffusionLearner.__init__
    calls = dict.fromkeys(("waits", "lags"), 0)

    def update(self, batch, rng, learning_rate):
        calls["waits" if self.waits else "lags"] += 1
        if calls["waits" if self.waits else "lags"] in poisoned:
            batch = batch._replace(images=batch.images * math.nan)
        return honest(self, batch, rng, learning_rate)

    monkeypatch.setattr(DiffusionLearner, "update", update)
    assert start(ready, tmp_path / "waits", small, "--steps", "18") == 0
    monkeypatch.setattr(
        DiffusionLearner, "__init__", lambda self, model: (init(self, model), setattr(self, "waits", 0))[0]
    )
    assert start(ready, tmp_path / "lags", small, "--steps", "18") == 0
    assert calls["lags"] >= 18
    states, weights, lines = [], [], []
    for name in ("waits", "lags"):
        run = Run.open(tmp_path / name)
        newest = run.newest_checkpoint()
        state = checkpoint.read_state(newest)
        states.append([state[key] for key in ("step", "images", "skipped", "rollbacks", "in_a_row")])
        weights.append({part: checkpoint.load(newest, part) for part in ("weights", "average", "optimizer")})
        lines.append([(line["step"], line["loss"]) for line in run.metrics() if "loss" in line])
        assert "Step 5 was skipped" in (run.path / "log.txt").read_text()
    assert states[0] == states[1] == [18, 18 * 16, len(poisoned), rollbacks, 0]
    (steps, losses), (others, other_losses) = (zip(*one, strict=True) for one in lines)
    assert steps == others and len(steps) == 18 - (poisoned == (5,))
    assert losses == pytest.approx(other_losses, rel=1e-4)
    for part, tensors in weights[0].items():
        if (part, poisoned) != ("average", (5,)):  # there the weights count once more, where the CPU left them out
            for name, value in tensors.items():
                torch.testing.assert_close(value, weights[1][part][name], rtol=1e-3, atol=1e-4)


def test_a_run_that_never_recovers_says_so(ready, small, tmp_path, monkeypatch, capsys):
    honest = DiffusionLearner.update

    def update(self, batch, rng, learning_rate):
        return honest(self, batch._replace(images=batch.images * math.nan), rng, learning_rate)

    monkeypatch.setattr(DiffusionLearner, "update", update)
    assert start(ready, tmp_path / "run", small, "--steps", "20") == 2
    assert "lower --learning-rate" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(ready, small, tmp_path, monkeypatch, capsys):
    honest = checkpoint.write_synced
    written = {"count": 0}

    def write(path, data):
        written["count"] += "checkpoints" in path.parts
        if written["count"] > 9:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write)
    out = tmp_path / "run"
    assert start(ready, out, small, "--steps", "6", "--save-every", "0") == 2
    said = capsys.readouterr().err
    assert "The disk is full: a checkpoint needs" in said and f"--resume {out}" in said
    monkeypatch.undo()
    run = Run.open(out)
    assert checkpoint.steps_saved(run.checkpoints) == [0, 1], "each of 4 files: 0 and 1 whole, 2 not"
    assert not list(run.checkpoints.glob(".writing-*"))
    assert cli(["train", "--resume", str(out)]) == 0
    assert Run.open(out).status()["state"] == "finished"


def test_the_second_trainer_is_refused_and_told_of_the_first(ready, small, tmp_path):
    out = tmp_path / "run"
    start(ready, out, small, "--steps", "2")
    Run.open(out).write_status("stopped")
    with lock(out), pytest.raises(UserError, match=rf"trained by process {__import__('os').getpid()} on "):
        train(TrainOptions(resume=out))


def test_the_same_command_continues_and_another_one_does_not(ready, small, tmp_path, capsys):
    out = tmp_path / "run"
    start(ready, out, small, "--steps", "4")
    before = (out / "config.toml").read_bytes()
    assert start(ready, out, small, "--steps", "4", "--workers", "0") == 0
    assert "finished" in capsys.readouterr().err
    assert start(ready, out, small, "--steps", "5") == 2
    assert "--steps" in capsys.readouterr().err
    assert (out / "config.toml").read_bytes() == before


def test_time_is_kept(pictures, small, tmp_path):
    import time

    begin = time.monotonic()
    assert start(pictures, tmp_path / "run", small, "--for", "30s") == 0
    taken = time.monotonic() - begin
    # 5 % of 30 s is 1.5 s; the lower bound is looser because a shared machine may suddenly become faster at the end,
    # and then draws and plots in two seconds what it was seen to need seven for.
    assert 20 < taken < 31.5
    decisions = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert decisions[0][0] < 0.2 * decisions[-1][1], "the horizon is fixed early"


@pytest.mark.parametrize(("seconds", "early"), [(60.0, False), (600.0, True), (None, True)])
def test_a_short_run_spends_its_time_on_training(tmp_path, monkeypatch, seconds, early):
    """A preview of ten seconds is 17 % of a minute: only the last one is drawn, and only that one is reckoned with."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from snowmelt.config import TrainingConfig
    from snowmelt.training import watch
    from snowmelt.training.plan import Plan

    config = TrainingConfig(steps=100) if seconds is None else TrainingConfig(seconds=seconds)
    # Of a watch only what the decision needs: it is made without a run, a learner or pictures.
    one = object.__new__(watch.Watch)
    one.plan, one.average = Plan(config, tmp_path / "plan.json", [(0, 100)]), SimpleNamespace(applied=nullcontext)
    one.preview_seconds = one.errors_seconds = 10.0
    drawn: list[int] = []

    def preview(self: watch.Watch, progress: watch.Progress) -> None:
        drawn.append(progress.step)
        self.spent += 10.0

    monkeypatch.setattr(watch.Watch, "preview", preview)
    monkeypatch.setattr(watch.Watch, "_measure", lambda *_: drawn.append(-1))
    left = one.seconds_left(5, 50.0)
    for step in range(1, 101):
        one.preview_if_due(watch.Progress(step=step, elapsed=6.0 * step))
    assert drawn[-1] == 100 and (len(drawn) > 1) is early
    assert left > 10 if early else left == 10


def test_what_previews_take_follows_the_machine():
    """Foreseen beside another process that has gone since: an update takes a quarter of the time, and so does a
    preview, but for the two seconds of its plot."""
    from snowmelt.training import watch

    one = object.__new__(watch.Watch)
    one.preview_seconds, one.errors_seconds, one.plotting_seconds, one.drawing_seconds = 10.0, 1.0, 2.0, 6.0
    one.keep_pace(0.4)
    assert (one.preview_seconds, one.errors_seconds, one.drawing_seconds) == (10.0, 1.0, 6.0)
    one.keep_pace(0.1)
    assert one.preview_seconds == pytest.approx(4.0) and one.errors_seconds == pytest.approx(0.25)
    assert one.drawing_seconds == pytest.approx(1.5)
    one.preview_seconds = 1.0
    one.keep_pace(0.2)
    assert one.preview_seconds == 1.0, "less than a plot is known of it"


def test_bf16_is_active_when_asked_for(ready, small, tmp_path):
    from snowmelt.device import Precision
    from snowmelt.models import build_learner

    start(ready, tmp_path / "run", small, "--steps", "1")
    config = Run.open(tmp_path / "run").config
    precision = Precision(torch.device("cpu"), "bf16")
    learner = build_learner(config, precision)
    denoise = learner.model.bind(None)
    images = torch.zeros(1, 3, 16, 16)
    precision.assert_active(learner.model, lambda: denoise(images, torch.tensor(0.0)))
    with pytest.raises(RuntimeError, match="bf16 was asked for"):
        precision.assert_active(learner.model, lambda: learner.model.denoiser(images, torch.tensor(0.0)))


def test_what_a_kill_before_the_run_existed_leaves_is_no_obstacle(pictures, small, tmp_path):
    out = tmp_path / "run"
    (out / "data.preparing").mkdir(parents=True)
    assert start(pictures, out, small, "--steps", "2") == 2, "something of the person's own is respected"
    (out / "data.preparing").rename(out / ".data.preparing-123")
    (out / "log.txt").write_text("a line\n")
    (out / ".config.toml.123.tmp").write_text("half")
    assert start(pictures, out, small, "--steps", "2") == 0


def test_a_single_training_picture_is_no_measure_of_variety(tmp_path):
    (tmp_path / "two").mkdir()
    for grey in (70, 80):
        Image.new("L", (8, 8), grey).save(tmp_path / "two" / f"{grey}.png")
    assert cli(["prepare", str(tmp_path / "two"), "--out", str(tmp_path / "data")]) == 0
    drawn = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8)
    assert spread_ratio(drawn, open_prepared(tmp_path / "data"), columns=2, classes=0) is None


def test_other_pictures_that_an_interrupted_call_prepared_are_not_taken_for_the_run_s(ready, pictures, small, tmp_path):
    out = tmp_path / "run"
    assert cli(["prepare", str(pictures), "--out", str(out / "data"), "--size", "8"]) == 0
    assert start(ready, out, small, "--steps", "2") == 2 and not (out / "config.toml").exists()
    assert (out / "data" / "images.npy").exists(), "somebody may want them"
    shutil.copytree(out / "data", tmp_path / "same")
    assert start(tmp_path / "same", out, small, "--steps", "2") == 0, "the same ones"


def test_what_preparing_took_is_not_trained_in(ready, monkeypatch):
    """Of a run of a minute, half of which is gone, the images of half a minute are foreseen."""
    monkeypatch.setattr(fitting, "measure", lambda _config, **_given: Measured("fp32", 1, 100.0))
    data, options, told = open_prepared(ready), TrainOptions(str(ready), duration="60s"), []

    def choice(**facts):
        told.append(facts)
        return resolve(facts_of(data), options, overrides_of(options), **facts)

    for spent in (0.0, 30.0, 90.0):
        config, speed = fitting.fitted(choice, data, torch.device("cpu"), given={}, log=lambda _: None, spent=spent)
        assert updates_in(config, speed, spent) == int(TRAINED * max(0, 60 - spent) * 100) // config.training.batch
    assert [facts["images"] for facts in told if facts.get("images")] == [6000, 3000]


def test_five_minutes_try_a_larger_network_also_after_preparing(ready, monkeypatch):
    """On a GPU."""
    monkeypatch.setattr(fitting, "measure", lambda _config, **_given: Measured("fp32", 1, 1e5))
    monkeypatch.setattr(fitting, "is_gpu", lambda _device: True)
    options, widths = TrainOptions(str(ready), duration="5m"), []
    for spent in (0.0, 60.0):
        data = open_prepared(ready)
        choice = partial(resolve, facts_of(data), options, overrides_of(options))
        config, _ = fitting.fitted(choice, data, torch.device("cpu"), given={}, log=lambda _: None, spent=spent)
        widths.append(config.network.channels[0])
    assert widths == [128, 128]


def test_a_torn_line_of_metrics_and_a_strange_status_do_no_harm(ready, small, tmp_path):
    out = tmp_path / "run"
    start(ready, out, small, "--steps", "3")
    run = Run.open(out)
    whole = run.metrics()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo{"step": 4}\n[]\n{"loss": 1}\n')
    (out / "status.json").write_text("[1]")
    assert run.metrics() == whole and run.status() == {}


@pytest.mark.parametrize(
    ("settings", "words", "said"),
    [
        ("", ["--size", "5000"], "Pictures of 5000 pixels are too large; use --size 1024 or less"),
        ("", ["--size", "-8"], "data.size is -8"),
        ("network.dropout = 2.0", [], "network.dropout is 2.0"),
        ("network.blocks = 1000000000", [], "too large to be built"),
        ("a = 1" + "0" * 5000, [], "not readable as TOML"),
        ("a = " + "[" * 100_000, [], "not readable as TOML"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_writes_nothing(pictures, tmp_path, capsys, settings, words, said):
    (tmp_path / "settings.toml").write_text(settings)
    out = tmp_path / "run"
    assert cli(["train", str(pictures), "--out", str(out), "--config", str(tmp_path / "settings.toml"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("written", "option", "asked"), [("auto", "auto", None), ("fp32", "auto", "fp32"), ("fp16", "fp32", "fp32")]
)
def test_a_precision_may_be_written_down_and_the_option_wins(tmp_path, written, option, asked):
    settings = tmp_path / "mine.toml"
    settings.write_text(f'[training]\nprecision = "{written}"\n')
    overrides = overrides_of(TrainOptions("pictures", config=settings, precision=option))
    assert overrides["training"].get("precision") == asked


@pytest.mark.parametrize(
    ("file", "was", "now", "said"),
    [
        (
            "config.toml",
            'optimizer = "muon"',
            'optimizer = "adam"',
            "no optimizer 'adam'; did you mean 'adamw'",
        ),
        ("config.toml", "steps = 2", "steps = 2\nseconds = 60.0", "has to give steps or seconds"),
        ("config.toml", "steps = 2", "", "has to give steps or seconds"),
        ("rollbacks.json", "", "not a number", "rollbacks.json is damaged"),
    ],
)
def test_what_was_altered_in_a_run_is_named(ready, small, tmp_path, capsys, file, was, now, said):
    out = tmp_path / "run"
    assert start(ready, out, small, "--steps", "2") == 0
    Run.open(out).write_status("stopped")
    path = out / file
    before = path.read_text() if path.exists() else ""
    assert was in before
    path.write_text(before.replace(was, now) if was else now)
    capsys.readouterr()
    assert cli(["train", "--resume", str(out)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_what_was_seen_before_a_rollback_does_not_count():
    from snowmelt.training import watch

    one = object.__new__(watch.Watch)
    one.losses, one.speeds = {"loss": [9.0]}, deque([(0.0, 320), (1.0, 640)], maxlen=40)
    one.forget()
    one.speeds += [(2.0, 16), (3.0, 48)]
    assert one.images_per_second() == 32 and not one.losses


def test_pictures_of_one_colour_have_a_deviation_that_can_be_divided_by(pictures, tmp_path):
    assert cli(["prepare", str(pictures), "--out", str(tmp_path / "data")]) == 0
    flat = dataclasses.replace(open_prepared(tmp_path / "data"), std=0.0)
    assert facts_of(flat).std == 1e-6


@pytest.mark.parametrize("where", ["metrics.jsonl", "previews"])
def test_a_disk_that_fills_up_elsewhere_is_one_sentence(ready, small, tmp_path, monkeypatch, capsys, where):
    from snowmelt import pictures as sheets

    def full(*_words: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "previews":
        monkeypatch.setattr(sheets, "write_atomic", full)
    else:
        monkeypatch.setattr(Run, "append_metrics", full)
    out = tmp_path / "run"
    assert start(ready, out, small, "--steps", "4") == 2
    err = capsys.readouterr().err
    assert "The disk is full" in err.splitlines()[-1] and "Traceback" not in err
    monkeypatch.undo()
    assert cli(["train", "--resume", str(out)]) == 0


PREPARING = shlex.split("--seed 3 --background black --fit pad --color grey --classes none")


def test_pictures_that_are_gone_are_asked_for(pictures, small, tmp_path, capsys):
    """By the command that makes them again as they were."""
    out = tmp_path / "the run"
    start(pictures, out, small, "--steps", "2", *PREPARING)
    data = Run.open(out).config.data
    assert (data.background, data.fit, data.channels, data.classes) == ("#000000", "pad", 1, ())
    Run.open(out).write_status("stopped")
    shutil.rmtree(out / "data")
    assert cli(["train", "--resume", str(out)]) == 2
    program, *words = shlex.split(capsys.readouterr().err.split("`")[1])
    assert program == "snowmelt" and cli(words) == 0 and cli(["train", "--resume", str(out)]) == 0
    shutil.rmtree(out / "data")
    Run.open(out).write_status("stopped")
    pictures.rename(pictures.with_name("elsewhere"))
    assert cli(["train", "--resume", str(out)]) == 2
    pictures.with_name("elsewhere").rename(pictures)
    assert f"put {out / 'data'} or {pictures} back" in capsys.readouterr().err


def test_a_prepared_dataset_is_trained_on_where_it_is(pictures, small, tmp_path, capsys):
    prepared = tmp_path / "prepared"
    assert cli(["prepare", str(pictures), "--out", str(prepared)]) == 0
    assert start(prepared, tmp_path / "run", small, "--steps", "2", "--size", "16") == 2
    assert "is prepared already; leave --size away" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert start(prepared, tmp_path / "run", small, "--steps", "2") == 0
    assert not (tmp_path / "run" / "data").exists()


def test_settings_win_over_what_is_chosen(pictures, tmp_path):
    settings = tmp_path / "mine.toml"
    learning = '[training]\nsteps = 3\nseed = 7\nprecision = "fp32"\n'
    settings.write_text(f"[network]\nchannels = [16]\nattention = [false]\n{learning}")
    assert cli(["train", str(pictures), "--out", str(tmp_path / "run"), "--config", str(settings)]) == 0
    config = Run.open(tmp_path / "run").config
    assert config.training.steps == 3 and config.training.seconds is None and config.training.seed == 7
    assert config.network.channels == (16,) and config.training.precision == "fp32"
    settings.unlink()
    assert cli(["train", str(pictures), "--out", str(tmp_path / "run"), "--config", str(settings)]) == 2


def test_pictures_are_shown_mirrored_one_by_one(pictures, small, tmp_path, monkeypatch):
    """Half of them, also where they are so large that a batch holds one, or three."""
    assert start(pictures, tmp_path / "run", small, "--steps", "1", "--flip") == 0
    data = open_prepared(tmp_path / "run" / "data")
    true = torch.from_numpy(data.images[data.train] / 127.5 - 1).permute(0, 3, 1, 2).float()
    learner = build_learner(Run.open(tmp_path / "run").config, Precision(torch.device("cpu")))
    seen = list[torch.Tensor]()
    monkeypatch.setattr(DiffusionModel, "study", lambda _, batches: seen.extend(one.images for one in batches))
    for each in (1, 3, 64):
        seen.clear()
        monkeypatch.setattr(session, "AT_ONCE_BYTES", each * data.images[0].nbytes)
        session.study(learner, data, flip=True)
        assert len(seen) == -(-len(true) // each)
        mirrored = [not torch.allclose(*both, atol=1e-5) for both in zip(torch.cat(seen), true, strict=True)]
        assert mirrored == [number % 2 == 0 for number in range(len(true))]


def test_a_run_that_is_stopped_measures_nothing(pictures, small, tmp_path, monkeypatch):
    """A signal while errors are measured is heard after the batch at hand."""
    monkeypatch.setattr(watch, "drawn_at_once", lambda _: 4)
    asked, honest = list[int](), DiffusionLearner.held_out

    def held_out(self, batch, rng):
        asked.append(len(batch.images))
        if len(asked) == 4:
            signal.raise_signal(signal.SIGTERM)
        return honest(self, batch, rng)

    monkeypatch.setattr(DiffusionLearner, "held_out", held_out)
    out = tmp_path / "run"
    assert start(pictures, out, small, "--steps", "30") == 128 + signal.SIGTERM
    # One picture to see that the precision is active, then of the first measurement a batch of each kind at most.
    assert len(asked) <= 5 and max(asked) == 4
    assert not any("held_out_loss" in line for line in Run.open(out).metrics())
    assert Run.open(out).status()["state"] == "stopped"


def test_a_seed_decides_weights_pictures_and_noise(pictures, small, tmp_path, monkeypatch):
    honest, seeds = (session.Stream, loop.generator), list[tuple[str, int]]()

    def stream(*data, seed, **more):
        seeds.append(("pictures", seed))
        return honest[0](*data, seed=seed, **more)

    def generator(seed, *rest, **more):
        seeds.append(("noise", seed))
        return honest[1](seed, *rest, **more)

    monkeypatch.setattr(session, "Stream", stream)
    monkeypatch.setattr(loop, "generator", generator)
    assert start(pictures, tmp_path / "run", small, "--steps", "2", "--seed", "5") == 0
    assert set(seeds) == {("pictures", 5), ("noise", 5)}
    config, cpu = Run.open(tmp_path / "run").config, Precision(torch.device("cpu"))
    one, same, other = (
        build_learner(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed)), cpu)
        for seed in (5, 5, 6)
    )
    values = [learner.model.denoiser.backbone.conv_in.weight for learner in (one, same, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_seed_0_is_a_seed_too(tmp_path):
    """Said on the command line, it wins over that of --config."""
    path = tmp_path / "settings.toml"
    path.write_text("[training]\nseed = 3\n")
    assert overrides_of(TrainOptions("pictures", config=path))["training"]["seed"] == 3
    assert overrides_of(TrainOptions("pictures", config=path, seed=0))["training"]["seed"] == 0
