"""The convolution of ours beside torch's own in double precision."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from snowmelt.networks import convolution
from snowmelt.networks.convolution import SMALLEST, Convolution, compiled, kernels_for

HALF = torch.bfloat16


@pytest.fixture
def compiler():
    if compiled(torch.float32) is None:
        pytest.skip("there is no C compiler here that makes convolution.c")


@pytest.fixture
def half():
    if compiled(HALF) is None:
        pytest.skip("bfloat16 is left to torch here")


def last(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = 1 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(memory_format=torch.channels_last)


def away(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    assert one is not None and other is not None and one.shape == other.shape
    return float((one.double() - other).detach().abs().max() / other.detach().abs().max())


# Sides that tiles of 4 fill, do not fill, and are larger than; one panel of channels and several; more tiles than a
# thread takes at once.
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 32, 5, 7), (1, 48, 3, 3), (2, 16, 3, 13), (9, 64, 32, 32)])
@pytest.mark.parametrize("out", [16, 80])
def test_it_is_torchs_convolution_and_its_gradients(compiler, shape, out):
    torch.manual_seed(0)
    layer = Convolution(shape[1], out).to(memory_format=torch.channels_last)
    x = last(*shape, seed=0).requires_grad_()
    added = last(shape[0], out, *shape[2:], seed=8).contiguous().requires_grad_()
    assert kernels_for(x, layer.weight) is not None
    answer = layer(x, added)
    assert answer.is_contiguous(memory_format=torch.channels_last)
    slope = last(*answer.shape, seed=1).contiguous()
    answer.backward(slope)

    given = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    exact = F.conv2d(*given, padding=1) + added.detach()
    exact.backward(slope.double())
    # float32 rounds by 6e-8; the transformations multiply that by some hundred (Lavin & Gray 2015, section 7).
    for one, other in zip(
        (answer, x.grad, layer.weight.grad, layer.bias.grad), (exact, *(t.grad for t in given)), strict=True
    ):
        assert away(one, other) < 2e-5
    assert added.grad is not None and torch.equal(added.grad, slope)
    torch.testing.assert_close(layer(x), layer(x, torch.zeros_like(added)), rtol=0, atol=0)


# An odd number of tiles too, and of panels; the last has more weights than places, and sums over them in several parts.
@pytest.mark.parametrize(
    "shape", [(2, 16, 8, 8), (3, 32, 5, 7), (1, 48, 3, 3), (2, 16, 3, 13), (9, 64, 32, 32), (8, 512, 8, 8)]
)
@pytest.mark.parametrize("out", [16, 80])
def test_in_bfloat16_it_is_as_near_as_that_can_be(half, shape, out):
    """Transformed numbers are rounded by 2^-9 and the transformations multiply that by some five; so does rounding the
    answer. Means of squares, since the largest of many errors is some four times larger. Products of tiles are direct,
    and nearer."""
    torch.manual_seed(0)
    layer = Convolution(shape[1], out).to(memory_format=torch.channels_last)
    x = last(*shape, seed=0, dtype=HALF).requires_grad_()
    added = last(shape[0], out, *shape[2:], seed=8, dtype=HALF)
    with torch.autocast("cpu", HALF):
        assert kernels_for(x, layer.weight) is HALF
        answer = layer(x, added)
    assert answer.dtype is HALF and answer.is_contiguous(memory_format=torch.channels_last)
    slope = last(*answer.shape, seed=1, dtype=HALF)
    answer.backward(slope)

    given = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    exact = F.conv2d(*given, padding=1) + added.detach()
    exact.backward(slope.double())
    for one, other in zip((answer, x.grad, layer.weight.grad), (exact, *(t.grad for t in given[:2])), strict=True):
        assert one is not None and other is not None
        assert float((one.double() - other).detach().square().mean() / other.detach().square().mean()) < 0.015**2
        # Of a hundred thousand errors the largest is some five times the usual one, and so is the largest value.
        assert away(one, other) < 0.03
    # Those of the bias are float32 sums of what is given.
    assert away(layer.bias.grad, given[2].grad) < 1e-5


def test_kernels_that_the_system_does_not_allow_are_not_used(monkeypatch):
    """Tiles have to be asked for."""

    class Refused:
        def ready(self) -> int:
            return 0

    monkeypatch.setattr(convolution, "library", lambda *_: Refused())
    assert compiled(HALF) is None and kernels_for(last(2, 16, 8, 8, seed=0), torch.empty(16, 16, 3, 3)) is None


def test_bfloat16_is_rounded_to_the_nearest(half):
    """Of an answer of about 1 the last digit is 2^-8: cut off, not rounded, it would lose half of that on average."""
    layer = Convolution(32, 32).to(memory_format=torch.channels_last)
    nn.init.uniform_(layer.weight, 0, 2 / (9 * 32))
    x = last(8, 32, 32, 32, seed=2, dtype=HALF).abs()
    with torch.no_grad(), torch.autocast("cpu", HALF):
        exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        error = (layer(x).double() - exact) / exact
    assert float(error.mean().abs()) < 2**-12


def test_float32_maps_are_taken_in_bfloat16_under_autocast(half):
    """As torch does; their gradient is float32 again."""
    layer = Convolution(32, 16).to(memory_format=torch.channels_last)
    x = last(2, 32, 8, 8, seed=3).requires_grad_()
    with torch.autocast("cpu", HALF):
        answer = layer(x)
        same = layer(x.detach().to(HALF))
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    assert torch.equal(answer, same) and gradient.dtype is torch.float32 and gradient.isfinite().all()


def test_only_the_gradients_that_are_asked_for_are_computed(compiler):
    layer = Convolution(16, 16).to(memory_format=torch.channels_last).requires_grad_(False)
    x = last(2, 16, 8, 8, seed=2).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    layer.requires_grad_()
    layer(x.detach()).sum().backward()
    # The sum over all places has the number of places as its gradient by the bias.
    assert layer.bias.grad is not None and (layer.bias.grad == 2 * 8 * 8).all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(7, 32, 20, 20), (3, 64, 12, 12)], ids=["alone", "together"])
def test_a_picture_does_not_depend_on_its_batch_nor_on_threads(compiler, dtype, shape):
    """Bit for bit, and its gradient neither. Those of the weights are added in another order for each number of
    threads, which rounds by 6e-8 of some thousand numbers' sum; always alike with as many. Where maps are large each
    thread sums over its own tiles, where weights are many all sum together."""
    if compiled(dtype) is None:
        pytest.skip("bfloat16 is left to torch here")
    layer = Convolution(shape[1], 48).to(memory_format=torch.channels_last)
    x = last(*shape, seed=3, dtype=dtype).requires_grad_()

    def answer_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is HALF):
            assert kernels_for(x, layer.weight) is dtype
            return layer(x)

    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3, 3):
            torch.set_num_threads(number)
            answer = answer_of(x)
            found.append([answer, *torch.autograd.grad(answer, [x, *layer.parameters()], torch.ones_like(answer))])
        alone = [answer_of(picture[None].contiguous(memory_format=torch.channels_last)) for picture in x.detach()]
    finally:
        torch.set_num_threads(threads)
    one, three, again = found
    assert all(map(torch.equal, three, again)) and torch.equal(one[0], torch.cat(alone))
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])
    assert max(map(away, one, three)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_threads_without_a_tile_add_nothing(compiler, dtype):
    """289 tiles among 18 threads are 17 each, and none for the last; of 150 tiles of 32 places 9, and none either."""
    if compiled(dtype) is None:
        pytest.skip("bfloat16 is left to torch here")
    layer = Convolution(16, 16).to(memory_format=torch.channels_last)
    x = last(1, 16, 68, 68, seed=9, dtype=dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 18, 18):
            torch.set_num_threads(number)
            with torch.autocast("cpu", dtype, enabled=dtype is HALF):
                answer = layer(x)
            found.append(torch.autograd.grad(answer, list(layer.parameters()), torch.ones_like(answer)))
    finally:
        torch.set_num_threads(threads)
    one, many, again = found
    assert max(map(away, one, many)) < 1e-5 and all(map(torch.equal, many, again))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_picture_with_a_value_that_is_no_number_is_lost_alone(compiler, dtype):
    if compiled(dtype) is None:
        pytest.skip("bfloat16 is left to torch here")
    x = last(3, 16, 8, 8, seed=4, dtype=dtype)
    x[1, 0, 0, 0] = float("nan")
    with torch.autocast("cpu", dtype, enabled=dtype is HALF):
        answer = Convolution(16, 16).to(memory_format=torch.channels_last)(x)
    assert answer[[0, 2]].isfinite().all() and answer[1, :, 0, 0].isnan().all()


def test_other_maps_are_left_to_torch(compiler):
    def found(x: torch.Tensor, channels: int = 16, out: int = 16) -> object:
        return kernels_for(x, torch.empty(out, channels, 3, 3))

    x = last(2, 16, 8, 8, seed=5)
    assert found(x) is not None
    assert found(x.contiguous()) is None and found(x.double()) is None and found(x.to("meta")) is None
    assert found(x, out=24) is None and found(last(2, 8, 8, 8, seed=5), channels=8) is None
    # Too many channels for the weights: torch refuses that.
    assert found(last(2, 32, 8, 8, seed=5)) is None
    assert found(last(2, 16, 8, SMALLEST - 1, seed=6)) is None
    assert found(x.half()) is None and found(x.bfloat16()) is None
    with torch.autocast("cpu", HALF):
        assert (found(x) is None) == (compiled(HALF) is None)
        assert Convolution(16, 16)(x).dtype == Convolution(24, 24)(last(2, 24, 8, 8, seed=5)).dtype == HALF
    with torch.autocast("cpu", torch.float16):
        assert found(x) is None


def test_weights_are_those_of_a_convolution_of_torch(compiler):
    """In whatever layout: a state passes between the two."""
    plain = nn.Conv2d(16, 16, 3, padding=1)
    layer = Convolution(16, 16)
    layer.load_state_dict(plain.state_dict())
    x = last(2, 16, 8, 8, seed=7)
    assert not layer.weight.is_contiguous(memory_format=torch.channels_last)
    # Values of about 1, of which rounding takes 6e-8, times some hundred.
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=2e-5)


NO_MEMORY = """
import torch
from snowmelt.networks.convolution import compiled, gradients
print(compiled(torch.float32).convolve(None, None, None, None, None, 1, 4, 4, 2**22, 2**22, 0))
print(gradients(torch.float32).weight_gradient(None, None, None, None, 1, 4, 4, 2**22, 2**22))
"""


def test_where_there_is_no_memory_it_says_so(compiler):
    """36 x 2^44 numbers are more than addresses; the room of a thread for a tile, 7 GB, may or may not be had."""
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(int(failed) for failed in done.stdout.split()), done


THREADS = """
import threading
import torch
from snowmelt.networks.convolution import Convolution, kernels_for

torch.set_num_threads(1)
layer = Convolution(256, 256).to(memory_format=torch.channels_last)
x = torch.randn(1, 256, 8, 8).to(memory_format=torch.channels_last)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

drawn = []

def draw():
    with torch.no_grad():
        drawn.append(layer(x))
        drawn[:] = drawn[:1]

def several(count):
    for _ in range(count):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    return resident()

assert kernels_for(x, layer.weight) is not None
before = several(8)
print((several(24) - before) >> 20, len(drawn))
"""


def test_a_thread_that_ends_leaves_no_memory_behind(compiler):
    """As of a server that draws in a thread for each request: the transformed weights of a thread are 9 MiB here."""
    command = [sys.executable, "-c", THREADS]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50)
    grown, drawn = map(int, said.stdout.split())
    # Twenty-four threads that kept theirs would have 216 MiB.
    assert grown < 50 and drawn == 1 and said.stderr == ""
