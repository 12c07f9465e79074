"""How long a person waits until a command answers, next to what the libraries need only to be imported.

    python benchmarks/startup.py

Each command is a process of its own; they take turns, so that whatever else the machine does hits all alike, and a
figure is the median of its turns. A ratio is of two neighbours in time, again the median. The first round is not
counted: it reads the files into memory and writes the compiled ones. Libraries that are not installed are skipped;
what `denoising_diffusion_pytorch` asks for beside and is not there is empty, as in rivals.py, which is in its favour.
Processor time is that of the command and its children together; where something else computes at the same time, it
says more than the clock.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from statistics import median

import tyro
from rich.console import Console
from rich.table import Table

from commands import Taken, timed

MISSING = "/no/such/folder"
EMPTY = """
import sys, types
from importlib.util import find_spec
for package, names in {"torchvision": ("transforms", "utils"), "accelerate": ("Accelerator",)}.items():
    if find_spec(package) is None:
        sys.modules[package] = types.ModuleType(package)
        vars(sys.modules[package]).update(dict.fromkeys(names))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    turns: int = 7


@dataclasses.dataclass(frozen=True)
class Command:
    """Arguments of Python, how it exits, and the library without which it cannot be run."""

    name: str
    arguments: tuple[str, ...]
    code: int = 0
    needs: str = "snowmelt"


def snowmelt(*arguments: str, code: int = 0) -> Command:
    """A command line of a person."""
    return Command(" ".join(("snowmelt", *arguments)), ("-m", "snowmelt", *arguments), code)


def imports(statement: str, needs: str, before: str = "") -> Command:
    """A program that only imports."""
    return Command(statement, ("-c", before + statement), needs=needs)


COMMANDS = (
    Command("python alone", ("-c", "pass")),
    snowmelt("--help"),
    snowmelt("train", "--help"),
    snowmelt("train", MISSING, code=2),
    imports("import torch", "torch"),
    imports("import diffusers", "diffusers"),
    imports("from diffusers import UNet2DModel, DDPMScheduler", "diffusers"),
    imports("import denoising_diffusion_pytorch", "denoising_diffusion_pytorch", EMPTY),
)
AGAINST = ("import torch", "from diffusers import UNet2DModel, DDPMScheduler")


def against(found: Sequence[Taken], other: Sequence[Taken] | None) -> str:
    """How many times shorter, turn by turn."""
    if other is None:
        return "-"
    return f"{median(theirs.clock / ours.clock for ours, theirs in zip(found, other, strict=True)):.2f} x"


def main(options: Options) -> None:
    """Take turns and print the table."""
    there = [command for command in COMMANDS if importlib.util.find_spec(command.needs) is not None]
    taken: dict[str, list[Taken]] = {command.name: [] for command in there}
    for turn in range(options.turns + 1):
        for command in there:
            one = timed([sys.executable, *command.arguments], command.code)
            if turn:
                taken[command.name].append(one)
    table = Table(
        "", "seconds", "processor seconds", *(f"sooner than {name}" for name in AGAINST),
        title=f"seconds until it ends; median of {options.turns} turns",
    )  # fmt: skip
    for command in COMMANDS:
        found = taken.get(command.name)
        if found is None:
            table.add_row(command.name, "skipped", "not here", *("" for _ in AGAINST))
            continue
        clock, work = median(one.clock for one in found), median(one.processor for one in found)
        ratios = (against(found, taken.get(name)) for name in AGAINST)
        table.add_row(command.name, f"{clock:.3f}", f"{work:.3f}", *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
