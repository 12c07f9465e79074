"""A newcomer's path, typed as a newcomer would: a folder of holiday pictures, three commands, new pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def snowmelt(*words: str, here: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snowmelt", *words]
    # One thread, since other tests run beside it and two threads would wait for one another.
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=here, env=quiet, capture_output=True, text=True, timeout=200)


def test_three_commands(tmp_path):
    chance = np.random.default_rng(0)
    folder = tmp_path / "Bilder vom Urlaub ☀"
    folder.mkdir()
    for number in range(30):
        pixels = chance.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{number:03d}.JPG", quality=80)
    (folder / "notes.txt").write_text("not a picture")
    prepared = snowmelt("prepare", folder.name, here=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert "30 pictures used" in prepared.stdout and "1 file" in prepared.stdout
    trained = snowmelt("train", folder.name, "--steps", "4", "--size", "16", "--out", "runs/mine", here=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "Draw more with: snowmelt sample runs/mine" in trained.stderr
    drawn = snowmelt("sample", "runs/mine", "--count", "4", "--steps", "4", "--grid", "--out", "new", here=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    pictures = [f"seed0-{number:05d}.{ending}" for number in range(4) for ending in ("json", "png")]
    assert names == ["grid.png", *pictures]
    assert Image.open(tmp_path / "new" / "seed0-00002.png").size == (16, 16)
    assert json.loads((tmp_path / "new" / "seed0-00002.json").read_text())["number"] == 2


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize("name, channels", [("emoji", 3), ("dogs", 3)])
def test_real_pictures_train_and_draw(name, channels, tmp_path):
    done = snowmelt("train", str(SHARED / f"{name}.zip"), "--steps", "3", "--size", "16", "--out", "run", here=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "run" / "grid.png").getbands() == ("R", "G", "B")[:channels]
