"""Resuming is exact: interrupted in whatever way, a run ends with the bytes of one that never was."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.errors import UserError
from snowmelt.run import Run

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import kill_resume

pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")


def train(out: Path, *more: str) -> int:
    return cli(
        ["train", "builtin:digits", "--out", str(out), *(more if "--steps" in more else ("--steps", "30", *more))]
    )


# Fewer in bf16, which a processor without it has to imitate, many times slower.
@pytest.mark.parametrize(("precision", "steps", "cut"), [("fp32", 30, 18), ("bf16", 5, 3)])
def test_k_and_n_steps_are_k_plus_n_steps(tmp_path, tiny, monkeypatch, precision, steps, cut):
    more = ("--precision", precision, "--steps", str(steps), "--batch", "16", "--config", str(tiny))
    train(tmp_path / "whole", *more)
    from snowmelt.training import loop

    honest, calls = loop.generator, {"train": 0}

    def interrupting(seed, purpose, *counters, **where):
        calls["train"] += purpose == "train"
        if calls["train"] == cut:
            signal.raise_signal(signal.SIGINT)
            calls["train"] += 1
        return honest(seed, purpose, *counters, **where)

    monkeypatch.setattr(loop, "generator", interrupting)
    assert train(tmp_path / "parts", *more) == 128 + signal.SIGINT
    assert checkpoint.steps_saved(Run.open(tmp_path / "parts").checkpoints)[-1] == cut
    assert train(tmp_path / "parts", *more, "--workers", "3") == 0
    assert kill_resume.fingerprint(tmp_path / "whole") == kill_resume.fingerprint(tmp_path / "parts")
    lines = [Run.open(tmp_path / name).metrics() for name in ("whole", "parts")]
    # Previews are drawn as time allows, so only the lines of updates must agree.
    whole, parts = ([line["step"] for line in of if "loss" in line] for of in lines)
    assert whole == parts, "no line is lost or written twice"


def test_killed_again_and_again(tiny, capsys):
    options = kill_resume.Options(
        kills=2, while_saving=1, steps=60, precision="fp32", save_every=0.1, seed=1, config=tiny
    )
    assert kill_resume.main(options) == 0, capsys.readouterr().out


def test_sigterm_saves_and_leaves_with_the_line_that_continues(tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "snowmelt", "train", "builtin:digits", "--out", out, "--steps", "100000"]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, "it never began"
        time.sleep(0.1)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert time.monotonic() - begin < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert f"snowmelt train --resume {out}" in said.splitlines()[-1] and "Traceback" not in said
    assert Run.open(out).status()["state"] == "stopped"


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["weights.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(tmp_path_factory, finished, how, name, capsys):
    out = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished, out)
    run = Run.open(out)
    run.write_status("stopped")
    newest = run.newest_checkpoint()
    damage(newest / name, how)
    assert cli(["train", "--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and name in said and f"delete the folder {newest}" in said
    if (name, how) == ("average.safetensors", "truncated"):
        # Once for all: what was damaged is gone with the folder.
        shutil.rmtree(newest)
        assert cli(["train", "--resume", str(out)]) == 0, "the checkpoint before it still works"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    words = ["--steps", "3", "--save-every", "0", "--precision", "fp32", "--config", str(tiny)]
    assert cli(["train", "builtin:digits", "--out", str(out), *words]) == 0
    return out


def test_a_later_version_is_refused(tmp_path, finished, capsys):
    import json

    shutil.copytree(finished, tmp_path / "run")
    path = Run.open(tmp_path / "run").newest_checkpoint() / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99, "version": "9.0"}))
    assert cli(["sample", str(tmp_path / "run")]) == 2
    assert "later Snowmelt (9.0); upgrade" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_differs_where_a_run_goes_on_is_said(tmp_path, finished, monkeypatch):
    from snowmelt.training import session

    for path, expected in ((tmp_path / "same", 0), (tmp_path / "other", 2)):
        shutil.copytree(finished, path)
        Run.open(path).write_status("stopped")
        if expected:
            settings = path / "config.toml"
            settings.write_text(settings.read_text().replace('"default"', '"channels_last"'))
            monkeypatch.setattr(session, "cores", lambda: 0)
            monkeypatch.setattr(session, "gradients", lambda _: None)
        assert cli(["train", "--resume", str(path)]) == 0
        log = (path / "log.txt").read_text()
        assert "Continuing" in log and (log.count("cores here") + log.count("cannot be compiled here")) == expected


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    from snowmelt.training import signals

    clock, ended = [100.0], []
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(signal, "raise_signal", lambda number: ended.append(number))
    with signals.catch_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.signal == signal.SIGTERM
        clock[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [] and stop.signal == signal.SIGTERM
        clock[0] += 0.6
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_what_to_do_about_damage_depends_on_where_it_is(tmp_path, finished):
    """A newer checkpoint, or a snapshot, is no reason to go on from an earlier one."""
    shutil.copytree(finished, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    before, newest = checkpoint.steps_saved(run.checkpoints)
    for folder, step, said in (
        (run.checkpoints, newest, f"to go on from step {before}, the one before"),
        (run.checkpoints, before, "from which no training goes on"),
        (run.snapshots, checkpoint.steps_saved(run.snapshots)[-1], "from which no training goes on"),
    ):
        path = checkpoint.path_of(folder, step)
        (path / "average.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=f"delete the folder {path}.* {said}|delete the folder {path}, {said}"):
            checkpoint.load(path, "average")
