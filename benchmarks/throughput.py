"""Training steps per second of the same U-Net here and in `diffusers`, side by side.

    python benchmarks/throughput.py --networks small large default

Every contestant is a process of its own that trains when it is told to and waits otherwise. They take turns, so that
whatever else the machine does hits all alike; a figure is the median of its turns. The network has the same shapes
everywhere. A step is what each system does for one batch:

    diffusers       its train_unconditional.py: noise and times, forward, MSE, backward, clip, AdamW, cosine rate, EMA
    diffusers bf16  the same under bf16 autocast, as somebody who knows would add
    snowmelt        what `snowmelt train` does, in the precision that it would choose here

The network `default` is the one that `snowmelt train` takes for such pictures, and only Snowmelt trains it; to it alone
the linear estimate is shown.

Shares are of what torch's convolutions reach alone here in the same format, in the layout in which they are faster
(3 x 3 with 128 channels, forward and backward, in turn too). Operations are those of the network's forward and backward
pass with direct convolutions, the same for all: who needs fewer multiplications for them can exceed what convolutions
alone reach. Memory is the largest resident size, which for Snowmelt includes its comparison of formats before the
training.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from rivals import diffusers
from rivals import settings as settings_of
from snowmelt.config import UNetConfig

DEFAULT = "default"
SIZE, CHANNELS, PICTURES = 32, 3, 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    networks: tuple[str, ...] = ("small", "large")
    contestants: tuple[str, ...] = ("diffusers", "diffusers bf16", "snowmelt")
    batch: int | None = None
    """Pictures of a step; not given, 16, as in `diffusers`' script, and of `default` as many as `snowmelt train` takes
    at most."""
    turns: int = 7
    seconds: float = 3.0
    """Of a turn, at least; two steps at least."""


def unet_of(network: str) -> UNetConfig:
    """The network as our configuration says it."""
    from snowmelt.config import DataConfig
    from snowmelt.foreign.unet2d import network_of
    from snowmelt.presets import network_for

    return (
        network_for(DataConfig(SIZE, CHANNELS))
        if network == DEFAULT
        else network_of(settings(network), Path("benchmark"))[0]
    )


def batch_of(network: str, options: Options) -> int:
    """Pictures of a step."""
    from snowmelt.config import DataConfig
    from snowmelt.presets import preset

    if options.batch is not None:
        return options.batch
    return preset(DataConfig(SIZE, CHANNELS), "diffusion").training.batch if network == DEFAULT else 16


def settings(network: str) -> dict[str, Any]:
    """The config.json of a `UNet2DModel`; like ours its attention has one head."""
    return {**settings_of(network, SIZE, CHANNELS), "attention_head_dim": None}


# In a process of its own.


def diffusers_step(network: str, batch: int, *, bf16: bool) -> tuple[Callable[[], object], str, Any]:
    """A step of `diffusers`' script."""
    import torch

    pictures = torch.rand(PICTURES, CHANNELS, SIZE, SIZE) * 2 - 1
    rival = diffusers(pictures, settings(network), batch, bf16=bf16)
    return rival.step, rival.precision, rival.module


def snowmelt_step(network: str, batch: int) -> tuple[Callable[[], object], str, Any]:
    """A step of the loop of `snowmelt train`."""
    import numpy as np
    import torch

    from snowmelt.config import Config, DiffusionConfig, TrainingConfig
    from snowmelt.data.prepared import Prepared
    from snowmelt.data.stream import Stream
    from snowmelt.ema import Average
    from snowmelt.models import build_learner
    from snowmelt.presets import LINEAR, facts_of
    from snowmelt.seeds import generator
    from snowmelt.training.measure import measure as measured
    from snowmelt.training.measure import precision_of

    pixels = np.random.default_rng(0).integers(0, 256, (PICTURES, SIZE, SIZE, CHANNELS), dtype=np.uint8)
    rows = np.arange(PICTURES)
    data = Prepared(Path(), pixels, None, (), None, rows, rows[:0], 0.0, 0.5, "benchmark")
    config = Config(
        facts_of(data),
        network=unet_of(network),
        diffusion=DiffusionConfig(linear=LINEAR if network == DEFAULT else 0, censored=network == DEFAULT),
        training=TrainingConfig(steps=100_000, batch=batch),
    )
    cpu = torch.device("cpu")
    config = measured(config, data, cpu, asked="auto").settled(config)
    learner = build_learner(config, precision_of(config.training, cpu))
    average = Average(learner.averaged, config.training.average)
    stream = Stream(data, batch=batch, seed=0, flip=False, workers=0, device=cpu)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        update = learner.update(stream.at(done - 1), generator(0, "train", done), 1e-4)
        assert update.finite
        average.update(done)

    return step, config.training.precision, learner.model.denoiser.backbone


CONTESTANTS: dict[str, Callable[[str, int], tuple[Callable[[], object], str, Any]]] = {
    "diffusers": lambda network, batch: diffusers_step(network, batch, bf16=False),
    "diffusers bf16": lambda network, batch: diffusers_step(network, batch, bf16=True),
    "snowmelt": snowmelt_step,
}
CEILINGS = ("fp32", "bf16")


def convolution(layout: Any, *, bf16: bool) -> Callable[[], object]:
    """A convolution of torch's and its gradients, with maps as they come out of the layer before."""
    import torch

    layer = torch.nn.Conv2d(128, 128, 3, padding=1).to(memory_format=layout)
    x = torch.randn(16, 128, SIZE, SIZE, dtype=torch.bfloat16 if bf16 else torch.float32)
    x = x.contiguous(memory_format=layout).requires_grad_()

    def step() -> None:
        # Else they would be added to.
        x.grad = None
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = layer(x).sum()
        loss.backward()

    return step


def ceiling(*, bf16: bool) -> tuple[Callable[[], object], float]:
    """That in the layout in which it is faster here, and its floating-point operations."""
    import torch

    steps = [convolution(layout, bf16=bf16) for layout in (torch.contiguous_format, torch.channels_last)]
    taken: list[list[float]] = [[], []]
    for _ in range(7):
        for step, times in zip(steps, taken, strict=True):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
    faster = min((0, 1), key=lambda which: median(taken[which]))
    return steps[faster], 3 * 2 * 16 * 128 * 128 * 9 * SIZE**2


def operations_of(network: str, batch: int) -> float:
    """Floating-point operations of a forward and a backward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from snowmelt.networks.unet import UNet

    # On no device: only shapes are needed, and a process that begins later counts this one's memory as its own.
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        model = UNet(unet_of(network), channels=CHANNELS, classes=0)
        model(torch.randn(batch, CHANNELS, SIZE, SIZE), torch.zeros(batch)).sum().backward()
    return counted.get_total_flops()


def work(name: str, network: str, options: Options) -> None:
    """The process of a contestant: a line when it is ready, then a line for every turn."""
    import resource

    facts: dict[str, Any] = {}
    if name in CEILINGS:
        step, facts["operations"] = ceiling(bf16=name == "bf16")
    else:
        step, facts["precision"], model = CONTESTANTS[name](network, batch_of(network, options))
        facts["parameters"] = sum(weight.numel() for weight in model.parameters())
    step()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < options.seconds or count < 2:
            step()
            count += 1
        taken = (time.perf_counter() - begin) / count
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": taken, "memory": memory}), flush=True)


def start(name: str, network: str, options: Options) -> subprocess.Popen[str]:
    """A contestant's process."""
    told = json.dumps([name, network, dataclasses.asdict(options)])
    quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", told],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet,
    )


def heard(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that is JSON; libraries may print others."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a contestant ended early; what it said is above")


def measure(network: str, options: Options, screen: Console) -> None:
    """All contestants in turns, and the table."""
    processes: dict[str, subprocess.Popen[str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    contestants = [name for name in options.contestants if network != DEFAULT or name == "snowmelt"]
    if not contestants:
        return
    for name in (*contestants, *CEILINGS):
        # One after the other, since some choose how to compute by a measurement.
        processes[name] = start(name, network, options)
        facts[name] = heard(processes[name])
    names, batch = list(processes), batch_of(network, options)
    operations = operations_of(network, batch)
    times: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0)
    for _ in range(options.turns):
        for name, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            said = heard(process)
            times[name].append(said["seconds"])
            memory[name] = said["memory"]
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    reached = {name: facts[name]["operations"] / median(times[name]) for name in CEILINGS}
    table = Table(
        "", "parameters", "images/s", f"against {contestants[0]}", "GFLOP/s", "of the ceiling", "memory", "precision",
        title=f"{network}: {SIZE} x {SIZE}, batch {batch}; convolutions alone "
        + ", ".join(f"{name} {speed / 1e9:.0f} GFLOP/s" for name, speed in reached.items()),
    )  # fmt: skip
    for name in contestants:
        seconds, precision = median(times[name]), facts[name]["precision"]
        # Turn by turn: neighbours in time had the same machine.
        ratio = median(a / b for a, b in zip(times[contestants[0]], times[name], strict=True))
        alone = facts[precision]["operations"]
        share = median(operations / a / (alone / b) for a, b in zip(times[name], times[precision], strict=True))
        table.add_row(
            name, f"{facts[name]['parameters'] / 1e6:.2f} M", f"{batch / seconds:.1f}", f"{ratio:.2f} x",
            f"{operations / seconds / 1e9:.1f}", f"{share:.0%}", f"{memory[name] / 1e6:.0f} MB", precision,
        )  # fmt: skip
    screen.print(table)


def main(options: Options) -> None:
    """Measure each network."""
    for network in options.networks:
        measure(network, options, Console(width=130))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker, shape, fields = json.loads(sys.argv[2])
        work(worker, shape, Options(**fields))
    else:
        main(tyro.cli(Options))
