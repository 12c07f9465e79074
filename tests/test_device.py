"""What is asked of the hardware: which way of computing pays, and what happens where one cannot be had."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import stirred
from snowmelt import checkpoint, device
from snowmelt.config import Config, DataConfig, TrainingConfig, UNetConfig
from snowmelt.data.prepared import Prepared
from snowmelt.data.stream import Batch
from snowmelt.device import LEAST_COMPILED, Precision, changes_for, faster_precision, improved
from snowmelt.errors import Stopped
from snowmelt.models import build_learner, build_model
from snowmelt.networks import kernels
from snowmelt.recording import Replayed, forget_tried, speed_up
from snowmelt.run import Run
from snowmelt.seeds import generator

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "size", "first", "most"),
    [(None, 32, 2, 4), ("", 32, 2, 4), ("no", 32, 2, 4), (None, 8, 1, 1), ("1", 32, 1, 1), ("3", 8, 1, 1)],
)
def test_threads_are_one_for_each_core_and_no_more_than_were_asked_for(monkeypatch, asked, size, first, most):
    """Two cores with room for four threads: what torch takes at first is what OMP_NUM_THREADS says, else two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(device, "AT_FIRST", int(asked) if (asked or "").isdecimal() else 2)
    monkeypatch.setattr(device, "cores", lambda: 4)
    assert (device.threads_for(size), device.most_threads(size)) == (first, most)


@pytest.mark.parametrize(("found", "threads"), [(1, 2), (2, 2), (4, 4), (64, 4)])
def test_a_run_draws_with_as_many_threads_as_it_trained_with(tmp_path, monkeypatch, found, threads):
    """But with one for each core at least, and no more than there is room for."""
    counts = []
    monkeypatch.setattr(device, "threads_for", lambda _size: 2)
    monkeypatch.setattr(device, "most_threads", lambda _size: 4)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    network = UNetConfig(channels=(32, 64), attention=(False, True))
    run = Run.create(
        tmp_path / "run", Config(DataConfig(8, 1), network=network, training=TrainingConfig(steps=1, threads=found))
    )
    model = build_model(run.config, Precision(CPU))
    checkpoint.save(run.checkpoints, 1, {"average": model.state_dict()}, {})
    run.load_model(Precision(CPU))
    assert counts == [threads]


@pytest.mark.parametrize(
    ("asked", "trained", "there", "name"),
    [
        ("auto", "bf16", True, "bf16"),
        ("auto", "bf16", False, "fp32"),
        ("auto", "fp32", True, "fp32"),
        ("bf16", "fp32", False, "bf16"),
        ("fp32", "bf16", True, "fp32"),
    ],
)
def test_a_run_draws_in_what_it_was_trained_in(tmp_path, monkeypatch, asked, trained, there, name):
    """Where the processor has it; and in what was asked for everywhere."""
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: there)
    network = UNetConfig(channels=(32, 64), attention=(False, True))
    training = TrainingConfig(steps=1, precision=trained)
    run = Run.create(tmp_path / "run", Config(DataConfig(8, 1), network=network, training=training))
    assert run.drawing_precision("cpu", asked) == Precision(CPU, name)
    monkeypatch.setattr(device, "pick_device", torch.device)
    assert run.drawing_precision("cuda", asked).name == (asked if asked != "auto" else "fp32"), "not measured there"


def test_whether_a_processor_multiplies_bf16_is_what_linux_says():
    """And what torch says."""
    told = Path("/proc/cpuinfo")
    if not told.exists() or platform.machine() != "x86_64":
        pytest.skip("no list of what the processor can do")
    assert kernels.multiplies_bf16() == ("avx512_bf16" in told.read_text()) == torch.cpu._is_avx512_bf16_supported()


def test_torch_takes_as_many_threads_as_it_is_told():
    """What `AT_FIRST` relies on, where torch would take more, and that it is taken before anything says how many."""
    code = "import snowmelt.device, torch; torch.set_num_threads(2); print(snowmelt.device.AT_FIRST)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize(
    ("ratio", "given", "threads"), [(1.2, (), 4), (1.02, (), 2), (0.5, (), 2), (1.2, ("threads",), 3)]
)
def test_more_threads_are_taken_where_they_are_faster(monkeypatch, ratio, given, threads):
    """By a clock that goes by how many compute, in a run by time that has time to try."""
    from snowmelt.training import measure

    now, counts = [0.0], [2]

    class Learns:
        def update(self, *_given):
            now[0] += 0.1 / (ratio if counts[-1] == 4 else 1.0)

    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "threads_for", lambda _size: 2)
    monkeypatch.setattr(measure, "most_threads", lambda _size: 4)
    monkeypatch.setattr(measure, "learner_of", lambda *_given: Learns())
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    training = TrainingConfig(seconds=600.0, batch=2, threads=3 if given else 1)
    config = Config(DataConfig(8, 1), network=UNetConfig(channels=(32, 64), attention=(False, True)), training=training)
    rows = np.arange(4)
    pixels = np.zeros((4, 8, 8, 1), np.uint8)
    data = Prepared(Path(), pixels, None, (), None, rows, rows[:0], 0.0, 0.5, "threads")
    found = measure.measure(config, data, CPU, asked="fp32", given=given)
    assert found.threads == counts[-1] == threads
    assert [reason for reason in found.reasons if "threads" in reason] == (
        [] if given else [f"4 threads: {'yes' if threads == 4 else 'no'} ({ratio:.2f} times as fast as 2)"]
    )
    brief = measure.measure(config, data, CPU, asked="fp32", given=given, thorough=False)
    assert brief.threads == (3 if given else 2) and not any("threads" in reason for reason in brief.reasons)


def test_what_one_format_took_is_given_back_before_the_next_is_tried(monkeypatch):
    """In the order of what happens: memory is given back, a learner is made; and once more at the end."""
    from snowmelt.training import measure

    happened: list[str] = []

    def learner(_config, precision, _failed):
        happened.append(precision.name)
        return SimpleNamespace(update=lambda *_given: time.sleep(0.001))

    monkeypatch.setattr(measure, "learner_of", learner)
    monkeypatch.setattr(measure, "forget_tried", lambda _device: happened.append("given back"))
    monkeypatch.setattr(device, "convolution_ratio", lambda _device: 1.0)
    rows = np.arange(4)
    data = Prepared(Path(), np.zeros((4, 8, 8, 1), np.uint8), None, (), None, rows, rows[:0], 0.0, 0.5, "formats")
    network = UNetConfig(channels=(32, 64), attention=(False, True))
    training = TrainingConfig(steps=10, batch=2)
    measure.measure(Config(DataConfig(8, 1), network=network, training=training), data, CPU, asked="auto")
    assert happened[:4] == ["given back", "fp32", "given back", "bf16"] and happened[-1] == "given back"


class Small(nn.Module):
    """A network with a part that has a name, and dropout as a trace of whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, *, shift=0.0):
        return self.inner(x) + shift


def unable(*_given, **_named):
    raise RuntimeError("no compiler here\nand a long story")


@pytest.mark.parametrize(("short", "again", "rounds"), [(0.01, 0.0, 2), (0.5, 0.0, 1), (0.5, 23.0, 1), (0.5, 24.0, 2)])
def test_formats_are_timed_in_turns_where_there_is_time_for_it(monkeypatch, short, again, rounds):
    """By a clock that steps move: bf16 takes half of the time, but ten times as long while a neighbour is busy, which
    it is through the first turn. With steps of half a second a second one would take four of 1 s and of 5 s."""
    turns = ["fp32", "bf16"] * rounds
    now, seen = [0.0], list[str]()

    def step(precision: Precision) -> None:
        if seen[-1:] != [precision.name]:
            seen.append(precision.name)
        busy = seen == ["fp32", "bf16"]
        now[0] += short * {"fp32": 2, "bf16": 10 if busy else 1}[precision.name]

    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(device, "convolution_ratio", lambda _device: 1.0)
    monkeypatch.setattr(device, "multiplies_bf16", lambda: False)
    found = faster_precision(CPU, step, seconds=3.0, again=lambda _: again)
    assert seen == turns
    assert found.precision == ("bf16" if rounds > 1 else "fp32")
    assert found.seconds == pytest.approx(short if rounds > 1 else 2 * short)
    # Two warm-ups of each, and a step may begin before the time is over.
    assert short > 0.01 or now[0] < 3.0 + 4 * 10 * short + 4 * 2 * short


@pytest.mark.parametrize(("freed", "chosen", "turns"), [(1, "bf16", 2), (3, "bf16", 4), (4, "fp32", 4)])
def test_a_surprise_is_tried_again(monkeypatch, freed, chosen, turns):
    """bf16 takes half of the time, but ten times as long in the turns before a neighbour has gone."""
    now, seen = [0.0], list[str]()

    def step(precision: Precision) -> None:
        if seen[-1:] != [precision.name]:
            seen.append(precision.name)
        busy = seen.count("bf16") <= freed
        now[0] += short * {"fp32": 2, "bf16": 10 if busy else 1}[precision.name]

    short = 0.01
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(device, "convolution_ratio", lambda _device: 1.0)
    monkeypatch.setattr(device, "multiplies_bf16", lambda: True)
    assert faster_precision(CPU, step).precision == chosen and seen == ["fp32", "bf16"] * turns
    # A format that is asked for is no surprise.
    seen.clear()
    faster_precision(CPU, step, names=("bf16",))
    assert seen == ["bf16"] and now[0] < 2 * 3.0 * turns
    # Nor is it one where bf16 is not expected.
    monkeypatch.setattr(device, "multiplies_bf16", lambda: False)
    seen.clear()
    faster_precision(CPU, step)
    assert seen == ["fp32", "bf16"] * 2
    # A turn takes four steps of 0.2 and 1 s each: one, two and three more are 4.8, 9.6 and 14.4 s.
    monkeypatch.setattr(device, "multiplies_bf16", lambda: True)
    short, freed = 0.1, 9
    for patience, made in ((4.0, 1), (9.0, 2), (14.0, 3), (99.0, 4)):
        seen.clear()
        assert faster_precision(CPU, step, again=lambda _, patience=patience: patience).precision == "fp32"
        assert seen == ["fp32", "bf16"] * made


@pytest.mark.parametrize(
    ("kind", "multiplies", "ratios"),
    # How many times faster bf16 is, and what is taken.
    [
        ("cpu", True, {1.5: "bf16", 1.05: "bf16", 0.95: "bf16", 0.85: "fp32"}),
        ("cpu", False, {1.5: "bf16", 1.15: "bf16", 1.05: "fp32", 0.95: "fp32"}),
        ("cuda", True, {1.15: "bf16", 1.05: "fp32", 0.95: "fp32"}),
    ],
)
def test_the_format_that_is_not_expected_must_win_clearly(monkeypatch, kind, multiplies, ratios):
    """By a tenth: on one processor bf16 is what is expected, elsewhere it is what must win. Where it is expected, one
    convolution that a neighbour has made slow does not decide."""
    now = [0.0]

    def step(precision: Precision) -> None:
        now[0] += 0.01 * (ratio if precision.name == "fp32" else 1.0)

    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    slow = kind == "cpu" and multiplies
    monkeypatch.setattr(device, "convolution_ratio", lambda _device: 0.05 if slow else 1.0)
    monkeypatch.setattr(device, "synchronize", lambda _device: None)
    monkeypatch.setattr(device, "multiplies_bf16", lambda: multiplies)
    for ratio, chosen in ratios.items():
        found = faster_precision(torch.device(kind), step)
        assert found.ratio == pytest.approx(ratio) and found.precision == chosen
    if not slow:
        monkeypatch.setattr(device, "convolution_ratio", lambda _device: 0.05)
        now[0], before = 0.0, found
        found = faster_precision(torch.device(kind), step, timed=False)
        assert found.precision == "fp32" and now[0] == 0.0 and before.ratio != found.ratio


def test_training_is_compiled_and_evaluation_is_not(monkeypatch):
    calls, said = [], []

    def pretend(forward, **_named):
        return lambda *given, **named: (calls.append(1), forward(*given, **named))[1]

    monkeypatch.setattr(torch, "compile", pretend)
    network, x = Small(), torch.ones(2, 3)
    names, expected = list(network.state_dict()), network(x, shift=1.0)
    speed_up(network, Precision(CPU, compiled=True), said.append)
    assert torch.equal(network(x, shift=1.0), expected) and calls == [1]
    network.eval()
    assert torch.equal(network(x, shift=1.0), expected) and calls == [1]
    assert list(network.state_dict()) == names and said == []
    network.train()
    network(x).sum().backward()
    assert network.inner.weight.grad is not None


@pytest.mark.parametrize("when", ["at once", "when called"])
@pytest.mark.parametrize("ways", [{"compiled": True}, {"compiled": True, "recorded": True}], ids=["alone", "recorded"])
def test_without_a_compiler_training_goes_on(monkeypatch, when, ways):
    monkeypatch.setattr(torch, "compile", unable if when == "at once" else lambda _forward, **_named: unable)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda network, given, **_named: network(*given))
    network, said = Small(), []
    expected = network(torch.ones(2, 3))
    speed_up(network, Precision(CPU, **ways), said.append)
    assert all(torch.equal(network(torch.ones(2, 3)), expected) for _ in range(3))
    assert said == ["no compiler here"], "said once"


def record(network, given, **_named):
    """What torch does to a module that it records, but for the recording; each call of the copy is noted."""
    plain, network.notes = network.forward, []

    def replay(*tensors):
        network.notes.append([len(tensors), gc.isenabled()])
        return plain(*tensors)

    network.notes.append([len(given), gc.isenabled()])
    network.forward = replay


def test_training_is_recorded_once(monkeypatch):
    """What was left away is not a tensor to record; meanwhile nothing is collected, which would break a recording."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    network, said, x = Small(), [], torch.ones(2, 3)
    expected = network(x)
    speed_up(network, Precision(CPU, recorded=True), said.append)
    assert all(torch.equal(network(x, None), expected) for _ in range(2))
    assert network.notes == [[1, False], [1, True], [1, True]] and said == []
    network.eval()
    assert torch.equal(network(x), expected) and len(network.notes) == 3


def test_what_is_left_away_before_a_tensor_is_left_away_when_replayed(monkeypatch):
    class Told(Small):
        def forward(self, x, scale=None, told=None, more=None):
            assert scale is None and more is None
            return self.inner(x + told)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    network, x, told = Told(), torch.ones(2, 3), torch.rand(2, 3)
    expected = network(x, None, told)
    speed_up(network, Precision(CPU, recorded=True), pytest.fail)
    assert all(torch.equal(network(x, None, told, None), expected) for _ in range(2))
    assert network.notes == [[2, False], [2, True], [2, True]]


@pytest.mark.parametrize("fails", [False, True])
def test_a_function_is_replayed_after_its_first_calls(monkeypatch, fails):
    """With a graph that calls, on tensors that pass for those of a GPU."""
    calls = []

    class Graph:
        def replay(self):
            function.answer.copy_(function.function(*function.given))

    def double(x):
        calls.append(x)
        return 2 * x

    @contextmanager
    def graph(_graph):
        if fails:
            raise RuntimeError("cannot be recorded")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(Replayed, "DEVICE", "cpu")
    function = Replayed(double)
    answers = [function(torch.full((), float(number))) for number in range(6)]
    assert torch.stack(answers).tolist() == [0, 2, 4, 6, 8, 10]
    assert (function.graph is None) == fails and len(calls) == (6 if fails else 7), "recorded, and then three times"


def test_what_was_tried_is_gone(monkeypatch):
    """Recorded networks refer to themselves: only a collection frees them."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr("snowmelt.recording.is_gpu", lambda _device: True)
    gc.disable()
    try:
        network = Small()
        speed_up(network, Precision(CPU, recorded=True), pytest.fail)
        network(torch.ones(2, 3))
        left = weakref.ref(network)
        del network
        assert left() is not None
        forget_tried(CPU)
        assert left() is None
    finally:
        gc.enable()


def test_dropout_draws_the_same_after_a_recording(monkeypatch):
    """A recording calls the network to warm up."""

    def warm(network, given, **named):
        network(*given)
        record(network, given, **named)

    class Dropping(Small):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warm)
    network, x, answers = Dropping(), torch.ones(50, 3), []
    for _ in range(3):
        torch.manual_seed(4)
        answers.append(network(x))
        speed_up(network, Precision(CPU, recorded=True), pytest.fail)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_without_memory_to_record_training_goes_on(monkeypatch):
    """Without, there may be enough; in a network that only computes there is nothing to leave away."""

    def greedy(*_given, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", greedy)
    network, said = Small(), []
    expected = network(torch.ones(2, 3))
    speed_up(network, Precision(CPU, recorded=True), said.append)
    assert torch.equal(network(torch.ones(2, 3)), expected) and said == ["no memory to record it"]
    monkeypatch.setattr(torch, "compile", lambda _forward, **_named: greedy)
    speed_up(network, Precision(CPU, compiled=True), said.append)
    with pytest.raises(torch.OutOfMemoryError):
        network(torch.ones(2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_what_a_gpu_records_is_what_it_computes():
    """Updates enough for all to be replayed, at rates that change, one of them bad; every weight.

    A GPU's sums have no fixed order, which Muon multiplies in weak directions: 5 % of the change.
    """
    network = UNetConfig(channels=(16, 32), attention=(False, True), dropout=0.1)
    config, device = Config(DataConfig(16, 3), network=network), torch.device("cuda")
    learners = [build_learner(config, Precision(device, recorded=recorded)) for recorded in (False, True)]
    start = stirred(build_learner(config, Precision(CPU)).model).to(device).state_dict()
    for learner in learners:
        learner.model.load_state_dict(start)
    speed_up(learners[1].model.compilable, learners[1].model.precision, pytest.fail)
    for learner in learners:
        for step in range(8):
            images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(step)).to(device)
            images = images * (float("inf") if step == 6 else 1)
            rng = generator(0, "train", step, device=device)
            assert bool(learner.update(Batch(images, None), rng, 1e-4 * (1 + step)).finite) == (step != 6)
            if learner is learners[0]:
                learner.optimizer.replayed = None
    assert learners[1].optimizer.replayed.graph is not None
    one, other = (learner.model.state_dict() for learner in learners)
    for name, weight in one.items():
        if not name.endswith("to_k.bias"):
            assert (weight - other[name]).norm() < 0.05 * (weight - start[name]).norm(), name


@pytest.fixture
def clock(monkeypatch):
    """What `improved` reads; steps move it."""
    now = [0.0]
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds):
        now[0] += seconds

    return takes


def test_changes_are_kept_where_they_pay(clock):
    tried = []

    def step(precision):
        tried.append(precision)
        if precision.compiled:
            unable()
        clock(0.001 if precision.layout == "channels_last" else 0.005)

    found = improved(Precision(CPU, "bf16"), step, before=0.005, seconds=0.0)
    assert found.precision == Precision(CPU, "bf16", "channels_last") and found.seconds == pytest.approx(0.001)
    assert Precision(CPU, "bf16", "channels_last", compiled=True) in tried, "one on top of the other"
    assert tried[-1] == Precision(CPU, "bf16", "channels_last", recorded=True), "without what could not be made"
    assert found.reasons[0].startswith("channels_last: yes (")
    assert found.reasons[1] == "compiled: no (no compiler here)"
    slower = improved(Precision(CPU), lambda _precision: clock(0.005), before=0.004, seconds=0.0)
    assert slower.precision == Precision(CPU) and slower.seconds == 0.004
    assert [reason.split(" (")[0] for reason in slower.reasons] == ["channels_last: no", "compiled: no", "recorded: no"]


def test_a_signal_is_no_failure_of_a_compiler():
    def step(_precision):
        raise Stopped("Nothing was planned.", 15)

    with pytest.raises(Stopped):
        improved(Precision(CPU), step, before=0.004, seconds=0.0)


def test_the_compiler_takes_the_layout_that_it_is_fast_in(clock):
    """Even where that layout alone is slow; not where a person has set the layout."""

    def step(precision):
        clock(0.001 if precision.compiled else 0.01 if precision.layout == "channels_last" else 0.005)

    for given, layout in (((), "channels_last"), (("layout",), "default")):
        changes = [name for name in ("layout", "compile") if name not in given]
        found = improved(Precision(CPU), step, before=0.005, changes=changes, given=given, seconds=0.0)
        assert found.precision == Precision(CPU, layout=layout, compiled=True)


def test_only_a_gpu_compiles():
    assert changes_for(CPU, 1e9) == ["layout"]
    cuda = torch.device("cuda")
    assert changes_for(cuda, LEAST_COMPILED) == ["layout", "compile", "record"]
    assert changes_for(cuda, 60.0) == ["layout", "record"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_layout_changes_no_result(optimizer):
    """Three updates of kernels of all kinds; what is left is the order of the sums. It all comes back bit for bit."""
    config = Config(
        DataConfig(8, 3),
        network=UNetConfig(channels=(16, 32), attention=(False, True)),
        training=TrainingConfig(optimizer=optimizer),
    )
    learners = [build_learner(config, Precision(CPU, "fp32", layout)) for layout in ("default", "channels_last")]
    chance = torch.Generator().manual_seed(0)
    start = {name: weight.clone() for name, weight in learners[0].model.state_dict().items()}
    images = [torch.randn(4, 3, 8, 8, generator=chance) for _ in range(4)]
    for step, batch in enumerate(images[:3]):
        for learner in learners:
            assert learner.update(Batch(batch, None), generator(0, "train", step), 1e-2).finite
    one, other = (learner.model.state_dict() for learner in learners)
    kernel = other["denoiser.backbone.down_blocks.0.resnets.0.conv1.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    for name, weight in one.items():
        moved = (weight - start[name]).norm()
        # Keys need no bias, whose gradient is but rounding; AdamW's steps have one size whatever the gradient.
        if not name.endswith("to_k.bias"):
            assert moved > 0 and (weight - other[name]).norm() < 0.02 * moved, name
    resumed = build_learner(config, Precision(CPU, "fp32", "channels_last"))
    resumed.model.load_state_dict({name: weight.contiguous() for name, weight in other.items()})
    kept = {name: tensor.clone().contiguous() for name, tensor in learners[1].optimizer_tensors().items()}
    resumed.load_optimizer(kept)
    for learner in (learners[1], resumed):
        learner.update(Batch(images[3], None), generator(0, "train", 3), 1e-2)
    again = resumed.model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in learners[1].model.state_dict().items())


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(encoding="utf-8")
KEPT = """
import resource, sys, torch
from snowmelt.device import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def taken():
    parts = [torch.ones(6 * 2**20) for _ in range(4)]
    del parts
for _ in range(3):
    taken()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    taken()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library keeps memory in its own way")
@pytest.mark.skipif(HUGE, reason="pages of 2 MiB are too few to count")
def test_memory_that_was_freed_is_taken_again_without_the_system():
    """Four times 24 MiB are 24,576 pages of 4 KiB: at least a quarter of them is fetched every one of ten times, or all
    of them once at most, where something small lies in the way and the heap has to grow.

    Unless told to, the C library gives them back only where nothing that was taken later lies above them.
    """
    each_time = 10 * 24_576 // 4
    faults = {
        way: int(subprocess.run([sys.executable, "-c", KEPT, way], capture_output=True, check=True, text=True).stdout)
        for way in ("kept", "given back")
    }
    assert faults["kept"] < each_time
    if faults["given back"] < each_time:
        pytest.skip("here memory is kept anyway")


GIVEN_BACK = """
import sys, torch
from pathlib import Path
from snowmelt.device import keep_memory
from snowmelt.recording import forget_tried
keep_memory()
parts = [torch.ones(6 * 2**20) for _ in range(4)]
last = torch.ones(2**20)
del parts
if sys.argv[1] == "given back":
    forget_tried(torch.device("cpu"))
print(int(Path("/proc/self/statm").read_text().split()[1]))
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library keeps memory in its own way")
def test_memory_of_what_was_only_tried_is_given_back():
    """Four times 24 MiB, which something that is still there lies above; half of it at least is not resident then."""
    resident = {
        way: int(subprocess.run([sys.executable, "-c", GIVEN_BACK, way], capture_output=True, check=True).stdout)
        for way in ("kept", "given back")
    }
    assert (resident["kept"] - resident["given back"]) * os.sysconf("SC_PAGE_SIZE") > 48 * 2**20
