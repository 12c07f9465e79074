"""What is asked of the hardware: which way of computing pays, and what happens where one cannot be had."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from snowmelt.config import Config, DataConfig, TrainingConfig, UNetConfig
from snowmelt.data.stream import Batch
from snowmelt.device import LEAST_COMPILED, Precision, changes_for, compile_training, improved
from snowmelt.models import build_learner
from snowmelt.seeds import generator

CPU = torch.device("cpu")


class Small(nn.Module):
    """A network with a part that has a name, and dropout as a trace of whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, *, shift=0.0):
        return self.inner(x) + shift


def unable(*_given, **_named):
    raise RuntimeError("no compiler here\nand a long story")


def test_training_is_compiled_and_evaluation_is_not(monkeypatch):
    calls, said = [], []

    def pretend(forward, **_named):
        return lambda *given, **named: (calls.append(1), forward(*given, **named))[1]

    monkeypatch.setattr(torch, "compile", pretend)
    network, x = Small(), torch.ones(2, 3)
    names, expected = list(network.state_dict()), network(x, shift=1.0)
    compile_training(network, said.append)
    assert torch.equal(network(x, shift=1.0), expected) and calls == [1]
    network.eval()
    assert torch.equal(network(x, shift=1.0), expected) and calls == [1]
    assert list(network.state_dict()) == names and said == []
    network.train()
    network(x).sum().backward()
    assert network.inner.weight.grad is not None


@pytest.mark.parametrize("when", ["at once", "when called"])
def test_without_a_compiler_training_goes_on(monkeypatch, when):
    monkeypatch.setattr(torch, "compile", unable if when == "at once" else lambda _forward, **_named: unable)
    network, said = Small(), []
    expected = network(torch.ones(2, 3))
    compile_training(network, said.append)
    assert all(torch.equal(network(torch.ones(2, 3)), expected) for _ in range(3))
    assert said == ["no compiler here"], "said once"


def test_changes_are_kept_where_they_pay():
    tried = []

    def step(precision):
        tried.append(precision)
        if precision.compiled:
            unable()
        time.sleep(0.001 if precision.layout == "channels_last" else 0.005)

    found = improved(Precision(CPU, "bf16"), step, before=0.005, seconds=0.0)
    assert found.precision == Precision(CPU, "bf16", "channels_last") and 0.001 <= found.seconds < 0.004
    assert tried[-1] == Precision(CPU, "bf16", "channels_last", compiled=True), "one on top of the other"
    assert found.reasons[0].startswith("channels_last: yes (")
    assert found.reasons[1] == "compiled: no (no compiler here)"
    slower = improved(Precision(CPU), lambda _precision: time.sleep(0.005), before=0.004, seconds=0.0)
    assert slower.precision == Precision(CPU) and slower.seconds == 0.004
    assert [reason.split(" (")[0] for reason in slower.reasons] == ["channels_last: no", "compiled: no"]


def test_only_a_gpu_compiles():
    assert changes_for(CPU, 1e9) == ["layout"]
    cuda = torch.device("cuda")
    assert changes_for(cuda, LEAST_COMPILED) == ["layout", "compile"] and changes_for(cuda, 60.0) == ["layout"]


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
    """Ten times 96 MiB are 245,760 pages of 4 KiB: a part of them is fetched each time, or none.

    Unless told to, the C library gives them back only where nothing that was taken later lies above them.
    """
    faults = {
        way: int(subprocess.run([sys.executable, "-c", KEPT, way], capture_output=True, check=True, text=True).stdout)
        for way in ("kept", "given back")
    }
    assert faults["kept"] < 1000
    if faults["given back"] < 1000:
        pytest.skip("here memory is kept anyway")
