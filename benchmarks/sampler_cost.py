"""What a step of each sampler costs beside the network: milliseconds, and the share of a call of MNIST's network.

    python benchmarks/sampler_cost.py [--batch 16]

The denoiser is replaced by one that answers at once; what is left is the sampler's own. Both are medians, the network
measured in turn with the samplers, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from snowmelt.config import DataConfig
from snowmelt.device import Precision
from snowmelt.diffusion.grids import GRIDS
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import cosine
from snowmelt.models import build_model
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.presets import preset

STEPS = 20
ROUNDS = 7


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    batch = parser.parse_args().batch
    data = DataConfig(28, 1, tuple("0123456789"), (1,) * 10, 0.6)
    model = build_model(preset(data, "diffusion"), Precision(torch.device("cpu"), layout="channels_last"))
    assert isinstance(model, DiffusionModel)
    x, labels, noise = (
        torch.randn(batch, 1, 28, 28),
        torch.zeros(batch, dtype=torch.long),
        torch.randn(batch, 1, 28, 28),
    )
    denoise = model.bind(labels)
    calls: list[float] = []
    own: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    with torch.no_grad():
        for _ in range(ROUNDS):
            calls.append(seconds(lambda: denoise(x, torch.tensor(0.0))))
            for name, method in SAMPLERS.items():
                grid = GRIDS[method.grid](cosine, STEPS)
                own[name].append(seconds(lambda: list(method(lambda x, _: x, noise, grid, lambda _: noise))) / STEPS)  # noqa: B023
    call = median(calls)
    print(f"one call of the network, {batch} pictures, on one thread: {1e3 * call:.1f} ms\n")
    print("| sampler | ms per step | share of a call |\n|---|---:|---:|")
    for name, times in own.items():
        print(f"| `{name}` | {1e3 * median(times):.3f} | {median(times) / call:.2%} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
