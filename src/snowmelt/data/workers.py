"""Decoding in other processes: all cores, results in order, and a file that kills or stalls its decoder costs one line.

A worker is `python -m snowmelt.data.workers`, started afresh (never forked: the caller may run threads and torch) and
spoken to over its pipes. In: one JSON line per chunk of entries. Out: a dot after every entry, which tells the caller
where a process died, then one JSON line and the raw pixels. It imports neither torch nor the caller's main module.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
from PIL import Image

from snowmelt.data.decode import Picture, Recipe, decode, shorter_side
from snowmelt.data.formats import HEAD_BYTES, recognise
from snowmelt.data.source import MAX_FILE_BYTES, Entry, Listing, Read, Unusable, open_reader

try:
    import resource
except ImportError:  # Windows: no limits there but the one on waiting
    resource = None

CPU_SECONDS = 10.0
WAIT_SECONDS = 60.0  # generous, as it also counts time stolen by other programs and slow disks
MEMORY_BYTES = 4 << 30
_LONG_BYTES = 1 << 18
_HEADERS_BYTES = (1 << 14, 1 << 18)  # most headers are within the first; those with thumbnails or profiles may not be
_CHUNK_FILES = 32
_DONE = b"."
_CHUNK_PIXELS = 1 << 23

QUOTA = Path("/sys/fs/cgroup/cpu.max")

Outcome = Picture | int | str
"""A decoded picture, a shorter side in pixels, or the reason why there is neither."""


def cores() -> int:
    """The processor cores this process may use, or as many as a container's quota of time is worth."""
    if sys.platform != "win32" and hasattr(os, "sched_getaffinity"):
        present = len(os.sched_getaffinity(0))
    else:
        present = os.cpu_count() or 1
    try:
        # "200000 100000", microseconds of each period, or "max 100000": cgroup v2.
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):
        return present
    return min(present, max(1, math.ceil(quota / period)))


# the caller's side


@dataclass
class _Worker:
    """One process, restarted when it dies."""

    listing: Listing
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0  # when it began its present file, 0 while idle
    stopped: bool = False

    def start(self) -> tuple[IO[bytes], IO[bytes]]:
        if self.process is None:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder),
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            }
            self.process = subprocess.Popen(  # noqa: S603  the same interpreter, fixed arguments
                # -P: the folder a person stands in must not lend its modules to the decoder.
                [sys.executable, "-P", "-m", __name__, self.listing.kind, str(self.listing.path), str(CPU_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            if not self._pipes()[1].readline() and not self.stopped:
                raise RuntimeError(
                    "no decoding process could be started: try `python -m snowmelt.data.workers folder . 1`"
                )
        return self._pipes()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def run(self, recipe: Recipe | None, entries: Sequence[Entry]) -> list[Outcome]:
        """The outcome of every entry; one that ends the process is blamed, the others are done by a new process."""
        if self.stopped or not entries:
            return []
        done = 0
        try:
            given, taken = self.start()
            self.since = time.monotonic()
            _send(given, recipe, entries)
            while done < len(entries):
                if taken.read(1) != _DONE:
                    raise EOFError
                done += 1
                self.since = time.monotonic()
            return _receive(taken)
        except (EOFError, OSError, ValueError):
            if self.stopped:
                return []
            done = min(done, len(entries) - 1)
            reason = self.autopsy()
        finally:
            self.since = 0.0
        return [*self.run(recipe, entries[:done]), reason, *self.run(recipe, entries[done + 1 :])]

    def autopsy(self) -> str:
        """The reason for the report after the process has died, which is then forgotten."""
        assert self.process is not None
        code = self.process.wait()
        stalled = bool(self.since) and time.monotonic() - self.since >= WAIT_SECONDS
        self.close()
        if stalled or code == -getattr(signal, "SIGPROF", 0):
            return f"took more than {CPU_SECONDS:.0f} seconds to decode"
        return f"made its decoder crash ({f'signal {-code}' if code < 0 else f'code {code}'})"

    def close(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in self._pipes():
            with suppress(OSError):
                pipe.close()
        self.process = None


class Pool:
    """Workers on one listing."""

    def __init__(self, listing: Listing, count: int) -> None:
        self.workers = [_Worker(listing) for _ in range(count)]
        self.idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="snowmelt-decode")

    def outcomes(self, recipe: Recipe | None, entries: Sequence[Entry]) -> Iterator[Outcome]:
        """In the order of `entries`: pictures made by `recipe`, or shorter sides where it is None."""
        files = _CHUNK_FILES if recipe is None else max(1, min(_CHUNK_FILES, _CHUNK_PIXELS // (3 * recipe.size**2)))
        chunks = (entries[start : start + files] for start in range(0, len(entries), files))
        # Two chunks per worker in flight: nobody waits, and memory stays bounded.
        flying = deque(self._submit(recipe, chunk) for chunk in islice(chunks, 2 * len(self.workers)))
        while flying:
            yield from self._await(flying.popleft())
            flying.extend(self._submit(recipe, chunk) for chunk in islice(chunks, 1))

    def _submit(self, recipe: Recipe | None, chunk: Sequence[Entry]) -> Future[list[Outcome]]:
        return self.threads.submit(self._run, recipe, chunk)

    def _run(self, recipe: Recipe | None, chunk: Sequence[Entry]) -> list[Outcome]:
        worker = self.idle.get()
        try:
            return worker.run(recipe, chunk)
        finally:
            self.idle.put(worker)

    def _await(self, future: Future[list[Outcome]]) -> list[Outcome]:
        while True:
            with suppress(TimeoutError):
                return future.result(timeout=1.0)
            for worker in self.workers:
                since, process = worker.since, worker.process
                if process is not None and since and time.monotonic() - since > WAIT_SECONDS:
                    process.kill()  # its thread sees the pipe close and blames the file

    def close(self) -> None:
        for worker in self.workers:
            worker.stopped = True
            if worker.process is not None:
                worker.process.kill()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.close()


@contextmanager
def decoding_pool(listing: Listing, count: int) -> Generator[Pool]:
    """A pool of at most `count` processes, fewer for few files; all are gone when the block ends."""
    pool = Pool(listing, max(1, min(count, -(-len(listing.entries) // (2 * _CHUNK_FILES)))))
    try:
        yield pool
    finally:
        pool.close()


# the wire


def _send(pipe: IO[bytes], recipe: Recipe | None, entries: Sequence[Entry]) -> None:
    files = [(entry.name, entry.size, entry.where) for entry in entries]
    job = {"recipe": None if recipe is None else asdict(recipe), "files": files}
    pipe.write(json.dumps(job).encode() + b"\n")
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[Outcome]:
    answers = json.loads(pipe.readline())
    return [_picture(pipe, answer) if isinstance(answer, dict) else answer for answer in answers]


def _picture(pipe: IO[bytes], answer: dict[str, Any]) -> Picture:
    shape = tuple(answer["shape"])
    pixels = np.frombuffer(pipe.read(math.prod(shape)), np.uint8)
    return Picture(pixels.reshape(shape), tuple(answer["changes"]), answer["coloured"])


def _answer(pipe: IO[bytes], outcomes: Sequence[Outcome]) -> None:
    pictures = [outcome for outcome in outcomes if isinstance(outcome, Picture)]
    pipe.write(json.dumps([_head(outcome) for outcome in outcomes]).encode() + b"\n")
    pipe.writelines(picture.pixels.tobytes() for picture in pictures)
    pipe.flush()


def _head(outcome: Outcome) -> dict[str, Any] | int | str:
    if not isinstance(outcome, Picture):
        return outcome
    return {"shape": outcome.pixels.shape, "changes": outcome.changes, "coloured": outcome.coloured}


# the worker's side


def treat(read: Read, entry: Entry, recipe: Recipe | None) -> Outcome:
    """Read and decode one entry, or measure its shorter side where there is no recipe."""
    try:
        if entry.size > MAX_FILE_BYTES:
            raise Unusable(f"larger than {MAX_FILE_BYTES >> 20} MB")
        if recipe is None:
            return _measure(read, entry)
        if entry.size > _LONG_BYTES:
            recognise(read(entry, HEAD_BYTES))  # not to read a whole video only to see that it is none
        return decode(_whole(read, entry), entry.name, recipe)
    except Unusable as reason:
        return str(reason)
    except MemoryError:
        return "needs too much memory to decode"
    except OSError as error:
        return f"cannot be read ({error.strerror or 'input error'})"


def _whole(read: Read, entry: Entry) -> bytes:
    data = read(entry, MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise Unusable(f"larger than {MAX_FILE_BYTES >> 20} MB")
    return data


def _measure(read: Read, entry: Entry) -> int:
    for prefix in _HEADERS_BYTES:
        if entry.size > prefix:
            head = read(entry, prefix)
            recognise(head[:HEAD_BYTES])
            with suppress(Unusable):
                return shorter_side(head)
    return shorter_side(_whole(read, entry))


def _limit() -> None:
    """Bound memory, and let Ctrl-C be the caller's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit and a better sentence
    if resource is not None:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _stopwatch(seconds: float) -> None:
    """End this process by SIGPROF after so many seconds of processor time; 0 stops the watch."""
    if resource is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main(kind: str, path: str, cpu_seconds: float) -> None:
    """Serve chunks from standard input until it closes."""
    # Whatever a decoder's C code prints must not land among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit()
    read = open_reader(kind, Path(path))
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        job: dict[str, Any] = json.loads(line)
        recipe = _recipe(job["recipe"])
        outcomes: list[Outcome] = []
        for name, size, where in job["files"]:
            _stopwatch(cpu_seconds)
            outcomes.append(treat(read, Entry(name, size, where), recipe))
            _stopwatch(0)
            answers.write(_DONE)
            answers.flush()
        _answer(answers, outcomes)


def _recipe(fields: dict[str, Any] | None) -> Recipe | None:
    if fields is None:
        return None
    return Recipe(fields["size"], tuple(fields["background"]), fields["fit"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
