"""Drawing many pictures to be measured: spread over processes, each picture the same, but for rounding, however many
there are.

A worker is `python -m snowmelt.evaluating.draw`, started afresh and spoken to over its pipes. In: one JSON line, what
to draw, and when everybody is ready an empty line. Out: a line when it is ready, then the raw pixels of each batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from rich.progress import Progress

from snowmelt.data.pixels import to_pixels
from snowmelt.data.workers import cores
from snowmelt.device import make_precision, pick_device
from snowmelt.errors import UserError
from snowmelt.evaluation.drawing import class_by_chance, in_parts, make_ready, noise_of
from snowmelt.models import MODELS
from snowmelt.models.base import Drawing, Model
from snowmelt.run import Run
from snowmelt.tables import from_table, to_tables
from snowmelt.terminal import console

FEWEST = 256
"""Pictures that are worth a process of their own, which takes seconds to start and draws a little faster than a thread
more; never where they are drawn in a single step."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be drawn: pictures by number, each of a class by chance, as often as the training pictures have it."""

    run: str
    state: str
    drawing: Drawing
    seed: int
    numbers: tuple[int, ...]
    batch: int
    device: str
    precision: str
    threads: int = 0
    """Of the arithmetic; 0: as the run would have it."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures, and what they took."""

    pixels: np.ndarray
    """uint8 (count, height, width, channels)."""
    labels: np.ndarray | None
    """int64 (count,): the class each was drawn as."""
    seconds: float
    """Of the drawing alone, all processes side by side."""


def draw(order: Order, processes: int) -> Drawn:
    """The pictures of an order, in the order of their numbers.

    Args:
        processes: 0 for as many as are worth starting: one where there is a GPU, at most as many as there are cores.
    """
    run = Run.open(Path(order.run))
    count = _count(run, order, processes)
    with Progress(console=console(), transient=True) as progress:
        task = progress.add_task(f"Drawing {len(order.numbers)} pictures", total=len(order.numbers))

        def advance(pictures: int) -> None:
            progress.advance(task, pictures)

        pixels, seconds = _here(order, advance) if count == 1 else _spread(run, order, count, advance)
    labels = labels_of(run, order)
    return Drawn(pixels, None if labels is None else np.array(labels, dtype=np.int64), seconds)


PILOT = 16
"""Pictures that are drawn to see how long one takes."""


def seconds_per_picture(order: Order, processes: int) -> float:
    """About how long a picture will take, seen on a few."""
    run, threads = Run.open(Path(order.run)), torch.get_num_threads()
    count = _count(run, order, processes)
    few = dataclasses.replace(order, numbers=order.numbers[:PILOT], threads=_threads(count))
    try:
        model = _opened(run, few)
        list(_batches(run, model, dataclasses.replace(few, numbers=few.numbers[:1])))
        begin = time.monotonic()
        list(_batches(run, model, few))
        return (time.monotonic() - begin) / len(few.numbers) / count
    finally:
        torch.set_num_threads(threads)


def _count(run: Run, order: Order, processes: int) -> int:
    """How many processes draw."""
    if processes:
        return min(processes, len(order.numbers))
    if MODELS[run.config.model].at_once or pick_device(order.device).type != "cpu":
        return 1
    return min(cores(), -(-len(order.numbers) // FEWEST))


def _threads(count: int) -> int:
    """Of each of so many processes; one alone takes what its run does."""
    return 0 if count == 1 else max(1, cores() // count)


def labels_of(run: Run, order: Order) -> list[int] | None:
    """The class of each picture."""
    data = run.config.data
    if not data.classes:
        return None
    return [class_by_chance(data, order.seed, number) for number in order.numbers]


def _here(order: Order, advance: Callable[[int], None]) -> tuple[np.ndarray, float]:
    run = Run.open(Path(order.run))
    model = _opened(run, order)
    begin, parts = time.monotonic(), list[np.ndarray]()
    for batch in _batches(run, model, order):
        parts.append(batch)
        advance(len(batch))
    return np.concatenate(parts), time.monotonic() - begin


def _opened(run: Run, order: Order) -> Model:
    model, state = run.load_model(make_precision(pick_device(order.device), order.precision), order.state)
    if order.threads:
        torch.set_num_threads(order.threads)
    make_ready(run, state, model, Drawing() if model.at_once else order.drawing)
    return model


def _batches(run: Run, model: Model, order: Order) -> Iterator[np.ndarray]:
    for numbers in in_parts(order.numbers, order.batch):
        noise, labels = noise_of(run.config.data, order.seed, numbers, model.precision.device)
        pictures = noise(0)
        for step in model.sample(noise, labels, order.drawing):
            pictures = step.x0
        yield to_pixels(pictures).cpu().numpy()


def _spread(run: Run, order: Order, count: int, advance: Callable[[int], None]) -> tuple[np.ndarray, float]:
    """The pictures of `count` processes, each drawing every `count`-th."""
    data = run.config.data
    threads = _threads(count)
    orders = [
        dataclasses.replace(order, numbers=order.numbers[place::count], threads=threads) for place in range(count)
    ]
    pixels = np.empty((len(order.numbers), data.size, data.size, data.channels), dtype=np.uint8)
    with ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile())
        workers = [stack.enter_context(_started(threads, errors)) for _ in orders]
        try:
            pipes = [_told(worker, one, errors) for worker, one in zip(workers, orders, strict=True)]
            for _, taken in pipes:
                _wait_ready(taken, errors)
            begin = time.monotonic()
            for given, _ in pipes:
                _send(given, "\n", errors)
            pool = stack.enter_context(ThreadPoolExecutor(count))
            waits = [
                pool.submit(_receive, taken, pixels, place, count, order.batch, advance, errors)
                for place, (_, taken) in enumerate(pipes)
            ]
            # One that is dead is noticed at once, and not when those before it have drawn everything.
            for wait in as_completed(waits):
                wait.result()
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
    return pixels, time.monotonic() - begin


def _started(threads: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(folder for folder in sys.path if folder)
    return subprocess.Popen(  # noqa: S603  the same interpreter, fixed arguments
        # -P: the folder a person stands in must not lend its modules.
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
    )


def _told(worker: subprocess.Popen[bytes], order: Order, errors: IO[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert worker.stdin is not None and worker.stdout is not None
    _send(worker.stdin, json.dumps(to_tables(order)) + "\n", errors)
    return worker.stdin, worker.stdout


def _send(pipe: IO[bytes], line: str, errors: IO[bytes]) -> None:
    try:
        pipe.write(line.encode())
        pipe.flush()
    except OSError as error:
        with suppress(OSError):
            # Else what it was not told is told once more when the process is waited for.
            pipe.close()
        raise _died(errors) from error


def _wait_ready(pipe: IO[bytes], errors: IO[bytes]) -> None:
    if not pipe.readline():
        raise _died(errors)


def _receive(
    pipe: IO[bytes],
    pixels: np.ndarray,
    place: int,
    count: int,
    batch: int,
    advance: Callable[[int], None],
    errors: IO[bytes],
) -> None:
    mine = pixels[place::count]
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        raw = pipe.read(rows.nbytes)
        if len(raw) != rows.nbytes:
            raise _died(errors)
        rows[:] = np.frombuffer(raw, dtype=np.uint8).reshape(rows.shape)
        advance(len(rows))


def _died(errors: IO[bytes]) -> UserError:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines() or ["it was killed, perhaps for its memory"]
    return UserError(f"A drawing process ended early ({lines[-1]}); try --processes 1, or a smaller --batch.")


def work(lines: IO[str], out: IO[bytes]) -> None:
    """What a worker does: read an order, get ready, and draw when told to."""
    order = from_table(Order, json.loads(lines.readline()), "the order")
    run = Run.open(Path(order.run))
    model = _opened(run, order)
    out.write(b"ready\n")
    out.flush()
    if not lines.readline():
        return
    for batch in _batches(run, model, order):
        out.write(np.ascontiguousarray(batch).tobytes())
        out.flush()


if __name__ == "__main__":
    work(sys.stdin, sys.stdout.buffer)
