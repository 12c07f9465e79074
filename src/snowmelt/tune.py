"""`snowmelt tune`: which few levels draw best with this run.

Candidates come from trajectories of the run itself (`tuning/search.py`): levels at which few steps draw what many
draw. Many steps need not draw best, since a network that has not learned everything is followed into all its errors,
and fresh noise forgets a part of them. So the last word has the distance to real pictures (`tuning/judge.py`): the
best candidates, and what fewer steps have found, are moved for as long as that brings them nearer to these, and many
other pictures decide between the nearest of each kind and, once more, what fewer steps have found. The first answer,
to nothing but noise, is the mean of the pictures wherever that helps, and costs nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from snowmelt.errors import UserError, choose
from snowmelt.late import import_torch
from snowmelt.terminal import console

FEWEST, MOST = 3, 30
"""Steps that levels are found for."""


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Find the levels at which few steps draw best with a run; `snowmelt sample` then uses them."""

    run: tyro.conf.Positional[Path]
    """A run of a diffusion model."""
    counts: tuple[int, ...] = (5, 6, 8, 10)
    """Numbers of steps to find levels for."""
    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm")
    """The multistep samplers to search them for; of each number of steps the best one becomes the default."""
    pictures: int = 256
    """Trajectories to learn from."""
    seed: int = 1_000_000
    """Of their noise; pictures that are drawn later should have another one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the network computes in; auto is what `snowmelt sample` draws in."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


def tune(options: TuneOptions) -> Path:
    """Search, judge by real pictures, keep the levels in the run and return the file that holds them.

    Raises:
        UserError: for every mistake in the options, or training pictures that are gone, before anything is computed.
    """
    # Late, so that the command line stays instant.
    import_torch()
    from rich.progress import Progress
    from rich.table import Table

    from snowmelt.checkpoint import digest_of
    from snowmelt.evaluation.drawing import keep_tuned, mean_images
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run
    from snowmelt.tuning.judge import (
        FINAL,
        FINALISTS,
        JUDGED,
        MOVED,
        STARTS,
        Judge,
        Judged,
        best_of,
        moved_on,
        respaced,
        short,
    )
    from snowmelt.tuning.search import FINE, TRIED, USUAL, Bench, costs_of, even, learned, searched, trials, walks

    check(options)
    run = Run.open(Path(options.run))
    run.check_idle("tune")
    model, state = run.load_model(run.drawing_precision(options.device, options.precision))
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} holds a {run.config.model} model, which draws in a single step: nothing to tune.")
    if len(run.open_pictures().train) < 2:
        raise UserError(f"{run.path} was trained on one picture, beside which nothing can be judged; train on more.")
    # Now, since a run that is trained on meanwhile loses this state.
    weights = digest_of(state)
    model.means = mean_images(run).to(model.precision.device)
    screen = console()
    with Progress(console=screen, transient=True) as progress:
        judging = progress.add_task("Candidates", start=False)
        judge = Judge.of(run, model, options.seed, lambda count: progress.advance(judging, count))
        tries = trials(options.samplers, options.counts)
        progress.console.print(
            f"Drawing {options.pictures} pictures in {FINE} steps, {TRIED} of them {tries:,} times in "
            f"{min(options.counts)} to {max(options.counts)} steps, {JUDGED} others with every candidate, "
            f"and {FINAL:,} with the last few of each number of steps."
        )
        drawn = walks(model, pictures=options.pictures, seed=options.seed, progress=progress)
        found, parts = learned(drawn)
        trying = progress.add_task("Levels", total=tries)
        bench = Bench(model, parts, lambda: progress.advance(trying))
        costs = costs_of(found, options.samplers)
        spaced = {count: even(bench, count) for count in options.counts}
        # What both suggest is judged once.
        candidates = {
            count: list(dict.fromkeys((*spaced[count], *searched(bench, costs, count)))) for count in options.counts
        }
        more = STARTS * MOVED * JUDGED + (FINALISTS + 1) * FINAL
        progress.update(judging, total=sum(len(these) * JUDGED + more for these in candidates.values()))
        progress.start_task(judging)
        judged = {count: [Judged(judge.distance(one), one) for one in these] for count, these in candidates.items()}
        kept, fewer = dict[int, Judged](), None
        for count, these in sorted(judged.items()):
            heir = None if fewer is None else respaced(fewer, count)
            kept[count] = best_of(judge.final, moved_on(judge.distance, these, len(spaced[count]), heir), heir)
            fewer = kept[count].drawing
    file = keep_tuned(run, weights, {count: one.drawing for count, one in kept.items()})
    table = Table("steps", "best", "distance", *map(short, USUAL))
    for count, these in judged.items():
        shown = (kept[count], *these[: len(USUAL)])
        table.add_row(str(count), kept[count].words(), *(f"{one.distance:.4g}" for one in shown))
    screen.print(table)
    screen.print(
        f"Distances are Frechet distances of {JUDGED} drawn from {len(judge.real):,} training pictures, in the space "
        "of random convolutions: of the best, and of samplers (2m: dpmpp_2m, ...) at their usual levels. "
        f"{FINAL:,} others decided, which show rare failures too; but by these it came so far, so its own flatters it "
        "a little."
    )
    screen.print(f"Wrote {file}; snowmelt sample {run.path} --steps {options.counts[-1]} uses it.", markup=False)
    return file


def check(options: TuneOptions) -> None:
    """Refuse what cannot be tuned."""
    from snowmelt.diffusion.samplers import SAMPLERS
    from snowmelt.tuning.search import TRIED

    for name in options.samplers:
        how = choose(SAMPLERS, name, "sampler").how
        if how is None or how.draws:
            raise UserError(f"{name} is no multistep sampler without fresh noise; tune ddim, dpmpp_2m, ipndm, ...")
    for count in options.counts:
        if not FEWEST <= count <= MOST:
            raise UserError(f"--counts has {count}; give numbers of steps from {FEWEST} to {MOST}.")
    if not options.samplers or not options.counts:
        raise UserError("--samplers and --counts need a value each; leave them away for the usual ones.")
    if options.pictures < TRIED:
        raise UserError(f"--pictures is {options.pictures}; give at least {TRIED}.")
