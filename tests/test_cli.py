"""The command line: instant help, and for every ordinary mistake one sentence, exit code 2, and nothing written."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snowmelt.cli import VERBS
from snowmelt.cli import run as cli


def test_help_names_every_verb(capsys):
    assert cli(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in VERBS)


def test_help_imports_nothing_heavy():
    """What makes the help instant; the time itself is a benchmark's business."""
    code = (
        "import sys; from snowmelt.cli import run; run(['--help']); "
        "print(sorted({'torch', 'numpy', 'tyro', 'matplotlib', 'PIL', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_needs_no_torch(verb):
    code = (
        "import sys\nfrom snowmelt.cli import run\n"
        f"try: run(['{verb}', '--help'])\nexcept SystemExit as e: print('code', e.code, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "code 0 False"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a folder of text, one of one image, and one of two good images."""
    monkeypatch.chdir(tmp_path)
    for name in ("text", "one", "good", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    (tmp_path / "notes").write_text("a file")
    for number in range(12):
        image = Image.fromarray(np.full((16, 16, 3), number * 20, np.uint8))
        image.save(tmp_path / "good" / f"{number}.png")
    image.save(tmp_path / "one" / "a.png")
    (tmp_path / "bad.toml").write_text("[training]\nlerning_rate = 1.0\n")
    (tmp_path / "type.toml").write_text('[training]\nbatch = "many"\n')
    (tmp_path / "no.toml").write_text("[[[")
    (tmp_path / "section.toml").write_text("[data]\nsize = 8\n")
    (tmp_path / "flat.toml").write_text("training = 5\n")
    (tmp_path / "average.toml").write_text("[training]\naverage = 0.5\n")
    (tmp_path / "steps.toml").write_text("[training]\nsteps = 5\n")
    (tmp_path / "words.toml").write_text('[training]\nseconds = "10m"\n')
    (tmp_path / "short.toml").write_text("[training]\nseconds = 2\n")
    (tmp_path / "fp16.toml").write_text('[training]\nprecision = "fp16"\n')
    return tmp_path


MISTAKES = {
    "unknown verb": (["trian", "good"], "did you mean 'train'?"),
    "nothing to train on": (["train"], "Name a folder of images"),
    "missing folder": (["train", "nowhere"], "nowhere"),
    "no images": (["train", "empty"], "empty"),
    "folder of text": (["train", "text"], "text"),
    "one image": (["train", "one"], "at least 2"),
    "a file that is no archive": (["train", "notes"], "notes"),
    "unknown option": (["train", "good", "--step", "5"], "has no option '--step'; did you mean '--steps'?"),
    "size that does not divide": (["train", "good", "--size", "30"], "--size 28 or --size 32"),
    "size for the network": (["train", "good", "--size", "44"], "40 or --size 48"),
    "too short": (["train", "good", "--for", "5s"], "--for 5s is too short"),
    "no duration": (["train", "good", "--for", "soon"], "write it like 90s, 20m"),
    "steps and time": (["train", "good", "--for", "1m", "--steps", "5"], "not both"),
    "no steps": (["train", "good", "--steps", "0"], "--steps 0 trains nothing"),
    "unknown schedule": (["train", "good", "--schedule", "cosin"], "did you mean 'cosine'?"),
    "unknown prediction": (["train", "good", "--predicts", "nois"], "did you mean 'noise'?"),
    "unknown weight": (["train", "good", "--weight", "minsnr"], "did you mean 'min_snr'?"),
    "unknown model": (["train", "good", "--model", "difusion"], "did you mean 'diffusion'?"),
    "fp16": (["train", "good", "--precision", "fp16"], "--precision bf16 or fp32"),
    "unknown device": (["train", "good", "--device", "cuda:9"], "There is no device 'cuda:9'"),
    "unknown key": (["train", "good", "--config", "bad.toml"], "did you mean 'learning_rate'?"),
    "wrong type": (["train", "good", "--config", "type.toml"], "type.toml"),
    "seconds in words": (["train", "good", "--config", "words.toml"], "seconds"),
    "too few seconds": (["train", "good", "--config", "short.toml"], "[training] seconds = 2 is too short"),
    "fp16 in settings": (["train", "good", "--config", "fp16.toml"], "--precision bf16 or fp32"),
    "no TOML": (["train", "good", "--config", "no.toml"], "not readable as TOML"),
    "missing settings": (["train", "good", "--config", "nowhere.toml"], "nowhere.toml"),
    "infinite rate": (["train", "good", "--learning-rate", "inf"], "training.learning_rate is inf"),
    "no rate": (["train", "good", "--learning-rate", "nan"], "training.learning_rate is nan"),
    "foreign section": (["train", "good", "--config", "section.toml"], "unknown section 'data'"),
    "no section": (["train", "good", "--config", "flat.toml"], "must be a section, [training]"),
    "no such average": (["train", "good", "--config", "average.toml"], "training.average is 0.5"),
    "steps and time in settings": (["train", "good", "--for", "1m", "--config", "steps.toml"], "by steps and by time"),
    "unknown optimizer": (["train", "good", "--optimizer", "adam"], "did you mean 'adamw'?"),
    "too many workers": (["train", "good", "--workers", "10000"], "--workers is 10000"),
    "resume with more": (["train", "--resume", "good", "--steps", "5"], "leave --steps away"),
    "resume nothing": (["train", "--resume", "nowhere"], "There is no run at nowhere"),
    "resume no run": (["train", "--resume", "good"], "good is not a run"),
    "resume and source": (["train", "good", "--resume", "good"], "leave the source and --out away"),
    "out is something else": (["train", "good", "--out", "text"], "text exists and is not a run"),
    "out is a file": (["train", "good", "--out", "notes"], "notes is a file"),
    "batch of none": (["train", "good", "--batch", "0"], "--batch is 0"),
    "prepare nothing": (["prepare", "nowhere"], "nowhere"),
    "prepare one": (["prepare", "one"], "at least 2"),
    "sample nothing": (["sample", "nowhere"], "There is no run at nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(here, capsys, name):
    words, said = MISTAKES[name]
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert cli(words) == 2
    err = capsys.readouterr().err
    assert said in err, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


@pytest.mark.parametrize("kind", ["torch on a processor", "torch on a GPU", "Python"])
def test_without_memory_there_is_a_sentence(here, capsys, monkeypatch, kind):
    """torch says so in words only, where a processor has no more."""
    import torch

    train = importlib.import_module("snowmelt.train")

    def greedy(_options):
        if kind == "torch on a processor":
            torch.empty(2**60, dtype=torch.uint8)
        raise MemoryError if kind == "Python" else torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train_or_plan", greedy)
    assert cli(["train", "good"]) == 2
    assert "not enough memory; use a smaller --batch" in capsys.readouterr().err
    monkeypatch.setattr(train, "train_or_plan", lambda _options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        cli(["train", "good"])


def test_a_value_of_the_wrong_type_has_exit_code_2(here):
    with pytest.raises(SystemExit) as left:
        cli(["train", "good", "--steps", "many"])
    assert left.value.code == 2


def test_a_closed_pipe_is_no_traceback():
    words = f"{sys.executable} -m snowmelt --help | head -1"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Snowmelt") and not done.stderr


def test_the_environment_is_only_set_by_the_command_line():
    code = "import os, snowmelt, snowmelt.device; print('GOMP_SPINCOUNT' in os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert out.strip() == "False"


def test_what_is_compiled_first_is_known_without_torch():
    """Which would take a second to import, while the compiler waits for what it is told."""
    code = (
        "import sys; from pathlib import Path; from snowmelt import cli; from snowmelt.sample import SampleOptions\n"
        "print(cli._draws_in_bf16(SampleOptions(Path('nowhere'))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
