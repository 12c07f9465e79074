"""Is resuming exact? A run killed by SIGKILL again and again, beside the same run left in peace.

    python benchmarks/kill_resume.py --kills 20

Kills come at random moments, some of them while a checkpoint is being written; every restart uses another number of
loader threads. At the end weights, averages and optimizer state of both runs must be the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
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


def command(options: Options, run: Path, workers: int) -> list[str]:
    """The same command for the first start and every restart, but for the loader threads."""
    words = [sys.executable, "-m", "snowmelt", "train", options.source, "--out", run, "--steps", options.steps]
    words += ["--precision", options.precision, "--save-every", options.save_every, "--workers", workers]
    return [str(word) for word in words]


def wait_for_save(process: subprocess.Popen[bytes], run: Path, limit: float) -> None:
    """Return in the middle of a checkpoint being written, or when the process ended or time is up."""
    end = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < end:
        if any((run / "checkpoints").glob(".writing-*")):
            return


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the tensors of the newest checkpoint."""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    return {name: hashlib.sha256((newest / f"{name}.safetensors").read_bytes()).hexdigest() for name in TENSORS}


def torment(options: Options, run: Path) -> tuple[int, int]:
    """Start and kill until there were enough kills, then let it end; how many kills, and how many hit a save."""
    chance, kills, in_save = random.Random(options.seed), 0, 0  # noqa: S311
    while kills < options.kills:
        process = subprocess.Popen(command(options, run, workers=kills % 4), stderr=subprocess.DEVNULL)
        if kills < options.while_saving:
            time.sleep(4)
            wait_for_save(process, run, limit=20)
        else:
            time.sleep(chance.uniform(1, 9))
        in_save += any((run / "checkpoints").glob(".writing-*"))
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
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
