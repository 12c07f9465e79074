"""What benchmarks share that train Snowmelt and its rivals for the same time and then draw with each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rivals import Rival
from snowmelt.config import DataConfig
from snowmelt.data.prepared import is_prepared
from snowmelt.device import synchronize
from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.grids import GRIDS
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.evaluation.drawing import in_parts, noise_of
from snowmelt.models.base import Drawing
from snowmelt.prepare import PrepareOptions, prepare
from snowmelt.terminal import console

TRIAL = 10
"""Updates that tell how many fit into the time."""
CPU = torch.device("cpu")


def data_of(source: str, out: Path, size: int | None = None) -> Path:
    """The prepared dataset that `source` is, or that is made of it in `out`, unless it was before."""
    data = Path(source)
    if not is_prepared(data):
        data = out / "data"
        if not is_prepared(data):
            prepare(PrepareOptions(source, data, size=size), console())
    return data


def found_in(out: Path, **settings: object) -> dict[str, Any]:
    """What a benchmark found before in `out`, by name; that and pictures prepared there must be of the same ones."""
    out.mkdir(parents=True, exist_ok=True)
    told, file, found = json.loads(json.dumps(settings, default=str)), out / "settings.json", out / "found.json"
    if found.exists() or (out / "data").exists():
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else "nobody knows what"
        if before != told:
            raise SystemExit(f"{out} was made with {before}, not {told}; choose another --out.")
    file.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}


def one_by_one(
    script: str,
    jobs: Iterable[tuple[str, float]],
    data: Path,
    options: Any,
    found: dict[str, Any],
    show: Callable[[dict[str, Any]], object],
) -> None:
    """Every job that was not done before, in a process of its own, and what is known after each.

    Args:
        script: the benchmark's file; with --worker it is told a job, and prints what it found as its last line.
        jobs: a system and its minutes.
        options: the benchmark's; found.json lies in its `out`.
        found: what was found before, by title; is added to.
    """
    new = {title: job for job in jobs if (title := f"{job[0]}, {job[1]:g} min") not in found}
    for title, (name, minutes) in new.items():
        told = json.dumps([name, str(data), minutes, {**vars(options), "out": str(options.out)}])
        done = subprocess.run([sys.executable, script, "--worker", told], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{title} failed; what it said is above.", file=sys.stderr)
            continue
        found[title] = json.loads(done.stdout.splitlines()[-1])
        (options.out / "found.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        show(found)
    if not new:
        show(found)


def updates_in(seconds: float, trial: Rival, device: torch.device = CPU) -> int:
    """How many updates of a rival fit into so many seconds, seen on a few after one to warm up."""
    trial.step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(TRIAL):
        trial.step()
        synchronize(device)
    return int(seconds * TRIAL / (time.perf_counter() - start))


def train_for(seconds: float, rival: Rival, device: torch.device = CPU) -> int:
    """Train a rival for so many seconds; how many updates it made. Scripts log each loss, and so wait for each step."""
    steps, begin = 0, time.time()
    while time.time() - begin < seconds:
        rival.step()
        synchronize(device)
        steps += 1
    return steps


def train_snowmelt(data: Path, seconds: float, run: Path, seed: int, *more: str) -> dict[str, Any]:
    """A run of `snowmelt train --for`, and what it says of itself."""
    words = ["train", str(data), "--for", f"{seconds:.0f}s", "--out", str(run), "--seed", str(seed), *more]
    done = subprocess.run([sys.executable, "-m", "snowmelt", *words], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def drawn(
    bind: Callable[[Tensor | None], Denoise],
    facts: DataConfig,
    drawing: Drawing,
    count: int,
    *,
    batch: int,
    device: torch.device = CPU,
) -> tuple[Tensor, float]:
    """So many pictures, each of a class by chance where there are classes, and the seconds that one took.

    Args:
        bind: classes, or None -> the denoiser that is told them.
    """
    parts = list[Tensor]()
    method, schedule = SAMPLERS[drawing.sampler], SCHEDULES[drawing.schedule or "cosine"]
    grid = GRIDS[drawing.spacing or method.grid](schedule, drawing.steps)
    begin = time.perf_counter()
    with torch.no_grad():
        for numbers in in_parts(range(count), batch):
            source, labels = noise_of(facts, 0, numbers, device)
            *_, last = method.sampler(bind(labels), source(0), grid, source)
            parts.append(last.x0.cpu())
    return torch.cat(parts), (time.perf_counter() - begin) / max(1, count)
