"""Kernels in C are compiled where they can be, and where not everything is the same without them."""

import gc
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from snowmelt.config import DataConfig, UNetConfig
from snowmelt.device import Precision
from snowmelt.models import MODELS, build_model
from snowmelt.networks import convolution, group_norm, kernels
from snowmelt.networks.group_norm import channels_last_pays
from snowmelt.networks.unet import UNet
from snowmelt.presets import preset

CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    """Nothing is compiled yet, and nothing of it stays."""
    kernels.forget()
    yield
    kernels.forget()


def nothing_compiled() -> bool:
    return convolution.compiled(torch.float32) is None and group_norm.compiled(torch.float32) is None


def is_gcc() -> bool:
    """Only its OpenMP is that of torch."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        return False
    said = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=False).stdout
    return "Free Software Foundation" in said


@pytest.mark.skipif(not is_gcc(), reason="there is no GCC here")
def test_where_there_is_a_compiler_everything_compiles():
    """Otherwise a mistake in a C file would only make all slower, and skip its tests."""
    assert convolution.gradients(torch.float32) and all(map(group_norm.gradients, group_norm.FLAGS))
    known = subprocess.run(
        ["cc", "-march=native", "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    for functions, kind in ((convolution.FOR_ANSWERS, ()), (convolution.FOR_GRADIENTS, kernels.GRADIENTS)):
        made = kernels.library("convolution", functions, (*group_norm.FLAGS[torch.bfloat16], *kind))
        assert (made is not None) == ("__AVX512BF16__" in known)


def test_without_a_compiler_all_is_the_same(fresh, monkeypatch):
    """A U-Net's answer and gradients; torch's own differ by rounding, which Winograd's transformations multiply."""
    if nothing_compiled():
        pytest.skip("there is no C compiler here")
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(16, 32), attention=(False, True)), channels=3, classes=0)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.1)
    net = net.to(memory_format=torch.channels_last)
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])

    def both() -> list[torch.Tensor]:
        net.zero_grad()
        answer = net(x, time)
        answer.square().mean().backward()
        return [answer.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    fast = both()
    kernels.forget()
    monkeypatch.setattr(kernels, "COMPILE", ("no-such-compiler",))
    assert nothing_compiled() and not channels_last_pays(CPU)
    slow = both()
    largest = max(float(t.abs().max()) for t in slow[1:])
    assert len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        # Biases of keys have no gradient but rounding, hence the absolute part.
        assert torch.allclose(one, other, rtol=1e-3, atol=2e-5 * largest)


PICKY = "import subprocess, sys; sys.exit('-DGRADIENTS' in sys.argv or subprocess.call(sys.argv[1:]))"


def test_where_only_gradients_do_not_compile_networks_learn_with_torch(fresh, monkeypatch):
    monkeypatch.setattr(kernels, "COMPILE", (sys.executable, "-c", PICKY, *kernels.COMPILE))
    if nothing_compiled():
        pytest.skip("there is no C compiler here")
    layer, norm = convolution.Convolution(16, 16), group_norm.GroupNorm(4, 16, epsilon=1e-5)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)

    def ours() -> list[bool]:
        return [convolution.kernels_for(x, layer.weight) is not None, group_norm.kernels_for(x) is not None]

    with torch.no_grad():
        assert ours() == [True, True]
        answer = norm(layer(x))
    assert ours() == [False, False] and not channels_last_pays(CPU)
    # Winograd's convolution is five times as far from the exact one as torch's, 5e-7 of an answer's spread.
    torch.testing.assert_close(norm(layer(x)), answer, rtol=0, atol=2e-5)
    norm(layer(x)).square().sum().backward()
    assert layer.weight.grad is not None and norm.weight.grad is not None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("compiler", ["false", "true", "sleep", "no-such-compiler"])
def test_a_compiler_that_fails_is_silent(compiler, fresh, monkeypatch, capfd):
    """One that ends with an error, one that makes nothing, one that does not end, and none at all."""
    command = (sys.executable, "-c", "import time; time.sleep(60)") if compiler == "sleep" else (compiler,)
    monkeypatch.setattr(kernels, "COMPILE", command)
    monkeypatch.setattr(kernels, "SECONDS", 0.2 if compiler == "sleep" else 20.0)
    assert nothing_compiled()
    gc.collect()
    assert capfd.readouterr() == ("", "")


BEGIN = """
import os, sys, time
from snowmelt.networks import kernels
kernels.COMPILE, kernels.GPUS = (sys.executable, "-c", "import time; time.sleep(60)"), ()
start = time.monotonic()
kernels.begin()
print(len(os.listdir(sys.argv[1])), time.monotonic() - start < 5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")
def test_begin_does_not_wait_and_leaves_nothing_behind(tmp_path):
    """A process that ends before its compilers: it is not waited for, and their four temporary folders are gone."""
    command = [sys.executable, "-c", BEGIN, str(tmp_path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=50)
    assert ended.stdout.split() == ["4", "True"] and ended.stderr == ""
    assert list(Path(tmp_path).iterdir()) == []


def test_two_threads_compile_once(fresh):
    """Whoever comes second waits for the same library, also where it comes while the first is compiling."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: convolution.compiled(torch.float32), range(2)))
    if found[0] is None:
        pytest.skip("there is no C compiler here that makes convolution.c")
    assert found[0] is found[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_family_says_whether_kernels_compute_its_layers(name):
    model = build_model(preset(DataConfig(16, 3), name), Precision(torch.device("cpu")))
    ours = any(isinstance(layer, convolution.Convolution | group_norm.GroupNorm) for layer in model.modules())
    assert MODELS[name].kernels == ours
