"""Is resuming exact? A run killed by SIGKILL again and again, beside the same run left in peace.

    python benchmarks/kill_resume.py --kills 20

Kills come at random moments of training, some of them while a checkpoint is being written, some while the process
starts; every restart uses another number of loader threads. At the end weights, averages and optimizer state of both
runs must be the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tyro

TENSORS = ("weights", "average", "optimizer")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to torment it."""

    kills: int = 20
    """SIGKILLs that must hit a living process."""
    while_saving: int = 5
    """How many of them wait for a checkpoint that is being written."""
    source: str = "builtin:digits"
    steps: int = 300
    precision: str = "bf16"
    save_every: float = 0.2
    """Seconds between checkpoints."""
    seed: int = 0
    """Of the moments of the kills."""
    config: Path | None = None
    """Settings of the run, as TOML."""


def command(options: Options, run: Path, workers: int) -> list[str]:
    """The same command for the first start and every restart, but for the loader threads."""
    words = [sys.executable, "-m", "snowmelt", "train", options.source, "--out", run, "--steps", options.steps]
    words += ["--precision", options.precision, "--save-every", options.save_every, "--workers", workers]
    words += [] if options.config is None else ["--config", options.config]
    return [str(word) for word in words]


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool], limit: float = 90) -> None:
    """Return when the condition holds, the process ended, or time is up."""
    end = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < end and not condition():
        time.sleep(0.0005)


def is_training(process: subprocess.Popen[bytes], run: Path) -> bool:
    """Whether this process, not one before it, has begun to train."""
    try:
        status = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return False
    return status["pid"] == process.pid and status["state"] == "training"


def is_saving(process: subprocess.Popen[bytes], run: Path) -> bool:
    """Whether this process is writing a checkpoint of a step after the first right now; what was left of others does
    not count."""
    writing = (run / "checkpoints").glob(f".writing-0*-{process.pid}")
    return any(int(path.name.split("-")[1]) > 0 for path in writing)


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the tensors of the newest checkpoint."""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    return {name: hashlib.sha256((newest / f"{name}.safetensors").read_bytes()).hexdigest() for name in TENSORS}


def torment(options: Options, run: Path) -> tuple[int, int]:
    """Start and kill until there were enough kills, then let it end; how many kills, and how many hit a save."""
    chance, kills, in_save = random.Random(options.seed), 0, 0  # noqa: S311
    while kills < options.kills:
        process = subprocess.Popen(command(options, run, workers=kills % 4), stderr=subprocess.DEVNULL)
        if kills % 7 == 6:
            time.sleep(chance.uniform(0, 5))
        elif kills < options.while_saving:
            wait_for(process, partial(is_saving, process, run))
        else:
            wait_for(process, partial(is_training, process, run))
            time.sleep(chance.uniform(0, 3))
        in_save += is_saving(process, run)
        if process.poll() is not None:
            print(f"finished after {kills} kills; give more --steps for more of them")
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        print(f"kill {kills}: {sorted(path.name for path in (run / 'checkpoints').glob('*'))}", flush=True)
    subprocess.run(command(options, run, workers=2), check=True, stderr=subprocess.DEVNULL)
    return kills, in_save


def main(options: Options) -> int:
    """Compare, print, and return 0 when the bytes are the same."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        peaceful, tormented = Path(folder) / "peaceful", Path(folder) / "tormented"
        subprocess.run(command(options, peaceful, workers=1), check=True, stderr=subprocess.DEVNULL)
        kills, in_save = torment(options, tormented)
        same = fingerprint(peaceful) == fingerprint(tormented)
    print(f"{kills} kills, {in_save} of them while saving: {'byte-identical' if same else 'DIFFERENT'}")
    return 0 if same and kills == options.kills else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
