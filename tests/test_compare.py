"""Comparing: the verdict says what the intervals support, the time is shared alike, mistakes are one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.compare import NO_TIME, CompareOptions, compare
from snowmelt.comparing import duel
from snowmelt.comparing import entry as entries
from snowmelt.comparing.budget import AIM, LEAST_SAMPLES, samples_over_time, samples_within, shares
from snowmelt.comparing.duel import Ledger
from snowmelt.comparing.plots import ROLES, mark_of
from snowmelt.comparing.verdict import RETRAINED, groups, told_apart, verdict
from snowmelt.errors import UserError
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.run import Run

LOWER = ("frechet", "kid", "patches")


def figure(metric: str, value: float | None, half: float = 0.1, space: str = "trained") -> dict:
    value = None if value is None else float(value)
    return {
        "metric": metric,
        "title": metric,
        "space": space,
        "better": "lower" if metric in LOWER else "higher",
        "value": value,
        "low": None if value is None else value - half,
        "high": None if value is None else value + half,
        "error": None if value is None else half,
        "reason": "" if value is not None else "There are too few pictures.",
    }


def entry(name: str, figures: list[dict], *, model: str = "", copies: float = 0.0, seconds: float = 0.01) -> dict:
    found = {"share": copies, "low": max(0.0, copies - 0.01), "high": copies + 0.01, "false_alarms": 0.005}
    return {
        "name": name,
        "model": model or name,
        "quality": {
            "figures": figures,
            "classes": None,
            "memorization": {"copies": found, "duplicates": 2, "held_out": 100},
        },
        "seconds_per_picture": seconds,
        "bits_per_dim": None,
    }


def three(diffusion: float, gan: float, vae: float, half: float = 0.1) -> list[dict]:
    values = {"vae": vae, "gan": gan, "diffusion": diffusion}
    return [entry(name, [figure(metric, value, half) for metric in LOWER]) for name, value in values.items()]


def test_far_apart_is_ranked_and_near_is_not():
    assert verdict(three(1, 5, 9))["table"][0]["order"] == [["diffusion"], ["gan"], ["vae"]]
    # Half widths of 0.1 each: 1.96 standard errors of the difference are 0.14, and three times that is 0.42.
    assert verdict(three(1.0, 1.4, 1.45))["table"][0]["order"] == [["diffusion", "gan"], ["vae"]]
    assert told_apart((1.0, 0.1), (1.43, 0.1)) and not told_apart((1.0, 0.1), (1.42, 0.1))
    assert RETRAINED == 3


def test_only_pairs_that_are_told_apart_are_said_to_win():
    """The GAN and the VAE stand in different groups, but only diffusion is told apart from the VAE."""
    found = verdict(three(1.0, 1.4, 1.45))
    assert found["table"][0]["wins"] == [["diffusion", "vae"]]
    assert "the GAN" not in found["sentences"][0]


def test_more_is_better_where_it_is():
    assert groups({"a": (0.2, 0.01), "b": (0.9, 0.01)}, better="higher") == [["b"], ["a"]]
    assert groups({"a": (0.2, 0.01), "b": (0.9, 0.01)}, better="lower") == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (three(1, 5, 9), "Diffusion draws the pictures nearest to yours."),
        (three(5, 1, 9), "The GAN draws the pictures nearest to yours."),
        (three(1, 1, 1), "No model is better than the others beyond chance."),
        (three(1, 1, 9), "The GAN and diffusion are at the front by every distance."),
        ([entry(n, [figure("frechet", None)]) for n in ("vae", "gan")], "too few pictures"),
    ],
)
def test_the_headline_says_who_wins_or_that_nobody_does(runs, said):
    assert said in verdict(runs)["headline"]


def test_the_best_of_some_is_not_called_alone():
    runs = three(1.0, 5, 1.1)
    for run, value in zip(runs, (1.0, 5.0, 2.0), strict=True):  # VAE, GAN, diffusion
        run["quality"]["figures"].append(figure("frechet", value, space="random"))
    assert verdict(runs)["headline"] == "The VAE is at the front by every distance, though not alone in most of them."


@pytest.mark.parametrize(
    ("floor", "said"), [(0.2, "left: frechet 1 with diffusion"), (0.99, "none that could be seen")]
)
def test_how_far_the_best_is_from_real_pictures_is_said(floor, said):
    runs = three(1, 5, 9)
    for run in runs:
        for one in run["quality"]["figures"]:
            one |= {"floor": floor, "floor_high": floor + 0.1}
    (sentence,) = (one for one in verdict(runs)["sentences"] if one.startswith("Distance that is left"))
    assert said in sentence and f"where real pictures get {floor}" in sentence


def test_a_winner_by_one_distance_only_is_no_winner():
    runs = [
        entry("gan", [figure("frechet", 1), figure("kid", 9)]),
        entry("diffusion", [figure("frechet", 9), figure("kid", 1)]),
    ]
    found = verdict(runs)
    assert "no single winner" in found["headline"]
    assert "the GAN and diffusion each win some" in found["sentences"][0]


def test_two_runs_of_a_family_are_called_by_their_names():
    runs = [
        entry("small", [figure("frechet", 1)], model="diffusion"),
        entry("large", [figure("frechet", 9)], model="diffusion"),
    ]
    assert verdict(runs)["headline"] == "Small draws the pictures nearest to yours."


def test_no_two_runs_look_the_same():
    assert len({(ROLES[index % len(ROLES)], mark_of(index)) for index in range(64)}) == 64


def test_how_long_a_picture_takes_is_said_in_seconds_where_it_is_long():
    lines = verdict([entry("vae", [], seconds=0.004), entry("gan", [], seconds=1.25)])
    assert "4 ms with the VAE, 1.25 s with the GAN" in json.dumps(lines, ensure_ascii=False)


def test_copies_are_told_only_beyond_false_alarms():
    clean, guilty = entry("vae", [figure("frechet", 1)]), entry("gan", [figure("frechet", 1)], copies=0.2)
    assert any("Copies of training pictures: the GAN (20.0%" in said for said in verdict([clean, guilty])["sentences"])
    assert any("not shown for any model (at most 1.0%" in said for said in verdict([clean, clean])["sentences"])
    # Of real held-out pictures 2.5 % would be found too: twins and false alarms.
    usual = entry("gan", [figure("frechet", 1)], copies=0.03)
    assert any("not shown for any model" in said for said in verdict([clean, usual])["sentences"])


def test_missing_numbers_are_left_out_and_not_ranked():
    runs = [
        entry("vae", [figure("frechet", None), figure("kid", 1)]),
        entry("gan", [figure("frechet", 1), figure("kid", 5)]),
    ]
    assert [row["metric"] for row in verdict(runs)["table"]] == ["kid"]


def test_the_time_is_shared_alike_and_never_overspent():
    for seconds in (240.0, 1800.0, 36_000.0):
        for spent in (5.0, 60.0):
            found = shares(seconds, spent, 3)
            assert spent + 3 * found.each + found.measuring == pytest.approx(AIM * seconds)
    with pytest.raises(UserError, match="too little of 180 s is left"):
        shares(180.0, 80.0, 3)


def test_fewer_pictures_are_drawn_where_time_is_short_and_as_many_of_each():
    assert [samples_over_time(samples) for samples in (2000, 1100, 800, 150)] == [300, 275, 256, 150]
    assert samples_within(1000.0, lambda samples: 0.1 * samples, 2000) == 2000
    # 75 % of 600 s, of which 30 s are spent whatever is drawn.
    assert samples_within(600.0, lambda samples: 30 + 0.1 * samples, 20_000) == 4200
    assert samples_within(600.0, lambda samples: 0.1 * (samples + 4 * samples_over_time(samples)), 20_000) == 3300
    assert samples_within(1.0, lambda samples: samples, 2000) == 100, "below a hundred nothing could be said"
    assert samples_within(1.0, lambda samples: samples, 50) == 50


def test_the_ledger_keeps_what_was_spent_and_refuses_other_options(tmp_path):
    ledger = Ledger.open(tmp_path / "plan.json", {"seed": 0})
    with pytest.raises(KeyboardInterrupt), ledger.phase("vae"):
        raise KeyboardInterrupt
    ledger.shares = shares(1800.0, 10.0, 3)
    ledger.save()
    again = Ledger.open(tmp_path / "plan.json", {"seed": 0})
    assert again.shares == ledger.shares and again.spent == ledger.spent and again.total > 0
    with pytest.raises(UserError, match=r"other options \(--seed\)"):
        Ledger.open(tmp_path / "plan.json", {"seed": 1})
    with pytest.raises(UserError, match="--for"):
        Ledger.open(tmp_path / "plan.json", {"seed": 0, "duration": "1h"})
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        Ledger.open(tmp_path / "plan.json", {"seed": 0})


def test_a_refused_command_can_be_corrected(tmp_path):
    """Of one that is refused at once nothing is kept, and what pictures do not depend on may change until the time is
    shared out or something is measured."""
    path, wrong, right = tmp_path / "plan.json", {"dinov2": "a", "size": 8}, {"dinov2": "b", "size": 8}
    ledger = Ledger.open(path, wrong)
    with pytest.raises(UserError), ledger.phase("pictures"):
        raise UserError("No such colour.")
    assert not path.exists()
    with ledger.phase("pictures"):
        pass
    with pytest.raises(UserError), ledger.phase("encoder"):
        raise UserError("These are no weights.")
    assert path.exists() and Ledger.open(path, right).request == right
    with pytest.raises(UserError, match=r"other options \(--size\)"):
        Ledger.open(path, {"dinov2": "a", "size": 16})
    with ledger.phase("measuring"):
        pass
    with pytest.raises(UserError, match=r"other options \(--dinov2\)"):
        Ledger.open(path, right)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict[str, Path]:
    """A few tiny finished runs of the built-in digits, one of them at another size."""
    pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")
    folder = tmp_path_factory.mktemp("compare")
    assert cli(["prepare", "builtin:digits", "--out", str(folder / "data"), "--size", "8"]) == 0
    runs = {family: folder / family for family in ("vae", "gan", "diffusion")}
    for family, path in runs.items():
        words = ["train", str(folder / "data"), "--model", family, "--steps", "1", "--out", str(path)]
        assert cli([*words, "--precision", "fp32"]) == 0
    config = Run.open(runs["vae"]).config
    larger = Run.create(folder / "other", dataclasses.replace(config, data=dataclasses.replace(config.data, size=16)))
    larger.write_status("finished")
    return runs | {"other": folder / "other", "data": folder / "data"}


def test_pictures_that_were_prepared_need_not_be_there(digits, tmp_path, monkeypatch):
    """As when a comparison of those on a stick goes on without it."""

    def duel(*_: object) -> None:
        raise UserError("Under way.")

    monkeypatch.setattr(sys.modules["snowmelt.compare"], "_duel", duel)
    shutil.copytree(digits["data"], tmp_path / "out" / "data")
    with pytest.raises(UserError, match="Under way"):
        compare(CompareOptions((str(tmp_path / "stick"),), out=tmp_path / "out"))


def unfinished(digits, tmp_path) -> Path:
    path = tmp_path / "unfinished"
    shutil.copytree(digits["vae"], path)
    (path / "status.json").write_text(json.dumps({"state": "stopped"}))
    return path


def odd(tmp_path) -> Path:
    """Four prepared pictures of a size that models cannot halve often enough."""
    chance, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(chance.integers(0, 256, (44, 44, 3), np.uint8)).save(folder / f"{index}.png")
    assert cli(["prepare", str(folder), "--size", "44", "--out", str(tmp_path / "odd")]) == 0
    return tmp_path / "odd"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name the pictures"),
        (["RUN"], "One run alone is no comparison"),
        (["RUN", "RUN"], "named twice"),
        (["RUN", "OTHER"], "compare runs with pictures of one kind"),
        (["RUN", "UNFINISHED"], "is not finished (stopped); finish it with `snowmelt train --resume"),
        (["RUN", "DATA"], "is no run"),
        (["RUN", "GAN", "--for", "10m"], "leave --for away"),
        (["DATA", "--models", "vae,gam"], "did you mean 'gan'?"),
        (["DATA", "--models", "vae,vae"], "names a model twice"),
        (["DATA", "--for", "10s"], "too short to train and measure"),
        (["DATA", "--for", "soon"], "is no duration"),
        (["DATA", "--samples", "1"], "--samples is 1"),
        (["DATA", "--size", "16"], "is prepared already; leave --size away"),
        (["DATA", "--spaces", "trained", "randon"], "did you mean 'random'?"),
        (["builtin:digitz"], "digitz"),
        (["builtin:digits", "--background", "blu"], "blu"),
        ([__file__], "is no folder, zip or tar"),
        (["ODD"], "Pictures of 44 pixels do not divide by 8"),
        (["nowhere"], "There is no file or folder nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(digits, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": digits["vae"], "GAN": digits["gan"], "OTHER": digits["other"], "DATA": digits["data"]}
    places["UNFINISHED"] = unfinished(digits, tmp_path) if "UNFINISHED" in words else tmp_path
    places["ODD"] = odd(tmp_path) if "ODD" in words else tmp_path
    before = sorted(tmp_path.rglob("*"))
    assert cli(["compare", *(str(places.get(word, word)) for word in words)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_finished_runs_are_compared(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("SNOWMELT_CACHE", str(tmp_path / "cache"))
    words = ["compare", *(str(digits[name]) for name in ("vae", "gan", "diffusion"))]
    assert (
        cli([*words, "--samples", "64", "--spaces", "random", "--processes", "1", "--out", str(tmp_path / "out")]) == 0
    )
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["vae", "gan", "diffusion"]
    for run in found["runs"]:
        assert run["quality"]["samples"] == 64 and run["parameters"] > 1000 and run["steps"] == 1
        assert (tmp_path / "out" / run["sheet"]).is_file()
        assert run["over_time"][-1]["share"] == 1.0
        assert not (digits[run["name"]] / "evaluations" / "quality").exists(), "a run keeps its own evaluation"
    # A GAN has no likelihood; the others have.
    assert [run["bits_per_dim"] is None for run in found["runs"]] == [False, True, False]
    assert found["verdict"]["headline"] and found["seconds"] is None
    assert NO_TIME not in found["not_measured"], "an encoder that nobody asked for has not taken too long"
    for name in ("report.html", "report.md", "compare.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_what_was_drawn_in_another_precision_is_measured_again(digits):
    run, options = Run.open(digits["vae"]), EvaluateOptions(digits["vae"])
    keys = [entries._key(run, dataclasses.replace(options, precision=name), []) for name in ("fp32", "bf16", "auto")]
    assert keys[0] != keys[1] and keys[0] == keys[2], "the run was trained in fp32"


def test_runs_of_the_same_name_are_told_apart():
    assert entries.folder_names([Path("/a/b/vae"), Path("/c/b/vae"), Path("/c/d/gan")]) == [
        "a/b/vae",
        "c/b/vae",
        "c/d/gan",
    ]


def test_a_comparison_trains_all_for_the_same_time_and_measures_them(digits, tmp_path, monkeypatch):
    """With one step each in place of that time."""
    asked, out, states = list[list[str]](), tmp_path / "out", list[str]()

    def train(words: list[str], path: Path, _stop: object) -> None:
        asked.append(words)
        place = words.index("--for")
        assert cli([*words[:place], "--steps", "1", *words[place + 2 :], "--precision", "fp32"]) == 0

    honest = entries.draw
    monkeypatch.setattr(duel, "_train", train)
    monkeypatch.setattr(entries, "draw", lambda order, *more: (states.append(order.state), honest(order, *more))[1])
    monkeypatch.setattr("snowmelt.evaluating.draw.seconds_per_picture", lambda *_: 0.2)
    monkeypatch.setenv("SNOWMELT_CACHE", str(tmp_path / "cache"))
    words = ["compare", str(digits["data"]), "--for", "4m", "--models", "vae,gan", "--spaces", "random", "--flip"]
    assert cli([*words, "--seed", "3", "--processes", "1", "--out", str(out)]) == 0
    found = json.loads((out / "compare.json").read_text())
    assert [run["model"] for run in found["runs"]] == ["vae", "gan"] and found["seconds"] == 240
    assert (out / "report.html").is_file() and found["seed"] == 3
    times = {one[one.index("--for") + 1] for one in asked}
    assert len(asked) == 2 and len(times) == 1 and 30 < float(times.pop().removesuffix("s")) < 90
    assert all("--flip" in one and one[one.index("--seed") + 1] == "3" for one in asked)
    # At 0.4 s for one of each no more are drawn than must be, where 2,000 are usual.
    assert json.loads((out / "plan.json").read_text())["samples"] == LEAST_SAMPLES
    assert states == [*map(str, checkpoint.steps_saved(Run.open(out / "vae").snapshots)), "newest"] * 2
    options = CompareOptions((str(digits["data"]),), out=out)
    again = duel._command(options, "vae", digits["data"], out / "vae", 9.0)
    assert again[:3] == ["train", "--resume", str(out / "vae")]


def test_an_interrupted_comparison_saves_and_says_how_to_go_on(digits, tmp_path):
    out = tmp_path / "out"
    words = ["compare", str(digits["data"]), "--for", "4m", "--models", "vae", "--spaces", "random", "--out", str(out)]
    command = [sys.executable, "-m", "snowmelt", *words]
    environment = {**os.environ, "SNOWMELT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (out / "vae" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, "it never began"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in said and "Traceback" not in said
    assert json.loads((out / "vae" / "status.json").read_text())["state"] == "stopped"
    assert json.loads((out / "plan.json").read_text())["spent"]["vae"] > 0
    assert not (out / "compare.json").exists()
