"""The optimizer: what goes to Muon, that it moves the network's own weights, and that its state comes back whole."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from snowmelt.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.ema import Average
from snowmelt.errors import UserError
from snowmelt.models import build_learner, muon
from snowmelt.models.muon import JORDAN, LARGE, MIRRORED, PHASES, Muon, factors
from snowmelt.models.optimizer import Optimizer
from snowmelt.networks.unet import UNet
from snowmelt.recording import Replayed
from snowmelt.seeds import generator


def network() -> UNet:
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(16, 16), attention=(False, False)), channels=1, classes=3)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return net


def orthogonal(stacks: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The products of the factors, of stacks with as many rows together, as Muon takes them."""
    wide = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    answers = dict[int, torch.Tensor]()
    for rows in {x.shape[1] for x in wide}:
        places = [place for place, x in enumerate(wide) if x.shape[1] == rows]
        found = factors([wide[place] for place in places], dtype)
        answers |= {place: factor @ x for place, (factor, x) in zip(places, found, strict=True)}
    return [
        answers[place].mT if stack.shape[1] > stack.shape[2] else answers[place] for place, stack in enumerate(stacks)
    ]


def backward(net: UNet, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 8, 8, generator=rng)
    net(x, torch.tensor([3.0, 700.0]), torch.tensor([0, 2])).square().mean().backward()


def test_muon_steps_are_orthogonal_for_inner_matrices_only():
    net = network()
    optimizer = Optimizer(net, TrainingConfig(optimizer="muon", weight_decay=0.0))
    assert "conv_in.weight" not in optimizer.sources and "conv_out.weight" not in optimizer.sources
    assert not any("embedding" in name and "linear" not in name for name in optimizer.sources)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    backward(net, 0)
    assert optimizer.step(1e-2)
    for name, weight in net.named_parameters():
        change = (weight.detach() - before[name]).flatten(1) if weight.ndim > 1 else None
        if name in optimizer.sources:
            assert change is not None
            # Four Newton-Schulz steps bring the singular values that a gradient has (few, from a batch of
            # two) to about 0.7 to 1.2; 0.2 sqrt(larger side) matches the size of an AdamW step.
            values = torch.linalg.svdvals(change) / (1e-2 * 0.2 * max(change.shape) ** 0.5)
            assert 0.5 < values.max() < 1.4, name
        else:
            assert not torch.equal(weight.detach(), before[name]), f"{name} was left behind"


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_comes_back_bit_for_bit(name):
    config = TrainingConfig(optimizer=name)
    whole, parts = network(), network()
    one = Optimizer(whole, config)
    for seed in range(4):
        backward(whole, seed)
        one.step(1e-3)
    two = Optimizer(parts, config)
    for seed in range(2):
        backward(parts, seed)
        two.step(1e-3)
    resumed = network()
    resumed.load_state_dict(parts.state_dict())
    three = Optimizer(resumed, config)
    three.load({key: value.clone() for key, value in two.tensors().items()})
    for seed in range(2, 4):
        backward(resumed, seed)
        three.step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert one.tensors().keys() == three.tensors().keys()
    assert all(torch.equal(value, three.tensors()[key]) for key, value in one.tensors().items())


def test_only_large_matrices_are_made_orthogonal_in_bfloat16():
    """Bit for bit in float32 those of 128 rows; of 256 rows within what 8 bits and another iteration leave of singular
    values, 0.67 to 1.3 in both."""

    def moved(dtype: torch.dtype, rows: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(rows)
        weight = nn.Parameter(torch.zeros(rows, 300))
        weight.grad = torch.randn(weight.shape, generator=random)
        optimizer = Muon([weight], weight_decay=0.0, dtype=dtype)
        optimizer.step()
        return weight.detach()

    small, large = ([moved(dtype, rows) for dtype in (torch.float32, torch.bfloat16)] for rows in (128, LARGE))
    assert torch.equal(*small) and not torch.equal(*large)
    away = large[0] - large[1]
    assert float(away.norm() / large[0].norm()) < 0.35


@pytest.mark.parametrize(("kept", "named"), [("muon", "adamw"), ("adamw", "muon")])
def test_state_of_another_optimizer_is_refused(kept, named):
    net = network()
    one = Optimizer(net, TrainingConfig(optimizer=kept))
    backward(net, 0)
    one.step(1e-3)
    with pytest.raises(UserError, match="another optimizer"):
        Optimizer(network(), TrainingConfig(optimizer=named)).load(one.tensors())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    net = network()
    optimizer = Optimizer(net, TrainingConfig(optimizer=name))
    before = [weight.detach().clone() for weight in net.parameters()]
    backward(net, 0)
    net.conv_in.weight.grad[0, 0, 0, 0] = float("nan")
    assert not optimizer.step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not optimizer.tensors()


def record(replayed: Replayed, given: tuple[torch.Tensor, ...]) -> None:
    """What a GPU does, but for the recording: the function of the tensors that were given then, whatever is in them."""

    def replay():
        replayed.answer = replayed.function(*replayed.given)

    replayed.given, replayed.graph = [one.clone() for one in given], SimpleNamespace(replay=replay)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_device_that_is_not_waited_for_steps_alike(name, recorded, monkeypatch):
    """Also over updates that are not finite, by gradient or by loss, the first among them: they leave no trace.

    Sums of a product and a weight may round once or twice: 1e-6 of weights below 1. What is put back lies elsewhere,
    so it is recorded anew.
    """
    if recorded:
        monkeypatch.setattr(Replayed, "DEVICE", "cpu")
        monkeypatch.setattr(Replayed, "_record", record)
    config, zero = TrainingConfig(optimizer=name), torch.zeros(())
    seen, unseen = network(), network()
    one, two = Optimizer(seen, config), Optimizer(unseen, config)
    for number in range(4):
        backward(unseen, 9)
        if number % 2:
            unseen.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        assert not two.step_unseen(1e-2, zero if number % 2 else zero / 0)
        backward(seen, number)
        backward(unseen, number)
        rate = 1e-3 / (1 + number)
        assert one.step(rate) and two.step_unseen(rate, zero)
        assert two.replayed and (two.replayed.graph is not None) == (recorded and number in (1, 3))
        if number == 1:
            two.load({key: value.clone() for key, value in two.tensors().items()})
    for a, b in zip(seen.parameters(), unseen.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert one.tensors().keys() == two.tensors().keys()
    for key, value in one.tensors().items():
        torch.testing.assert_close(value, two.tensors()[key], rtol=1e-5, atol=1e-6)


class Fetched(TorchDispatchMode):
    """Counts the numbers that are fetched from tensors: a device would be waited for each time."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", ["constant", "learned"])
def test_a_device_that_is_not_waited_for_is_never_waited_for(weight):
    config = Config(
        DataConfig(8, 1, ("a", "b")),
        network=UNetConfig(channels=(16, 16), attention=(False, True), dropout=0.1),
        diffusion=DiffusionConfig(weight=weight),
        training=TrainingConfig(),
    )
    learner = build_learner(config, Precision(torch.device("cpu"), "bf16"))
    average, batch = Average(learner.averaged, 0.1), Batch(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))
    for waits in (True, False):
        learner.waits = waits
        for step in (1, 2):
            with Fetched() as fetched:
                learner.update(batch, generator(0, "train", step), 1e-3)
                average.update(step)
            assert bool(fetched.count) == waits


def test_muon_is_that_of_torch(monkeypatch: pytest.MonkeyPatch):
    """Ten steps beside `torch.optim.Muon`, which rounds to bfloat16 (0.4 %) in every product.

    It iterates from another scale and with one quintic, which ours is given here.
    """
    monkeypatch.setitem(PHASES, torch.float32, (5 * (JORDAN,),))
    monkeypatch.setattr(muon, "_scale", lambda gram: gram.diagonal(dim1=1, dim2=2).sum(1).rsqrt()[:, None, None])
    rng = torch.Generator().manual_seed(3)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16)]
    starts = [torch.randn(shape, generator=rng) for shape in shapes]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    mine = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for optimizer in (mine, reference):
        optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=rng)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    for start, one, other in zip(starts, ours, theirs, strict=True):
        moved = (other - start).norm()
        assert (one - other).norm() < 0.02 * moved


def test_the_iteration_makes_matrices_orthogonal():
    """Every singular value ends between 0.72 and 1.29, where the quintics swing, if it was no smaller than 0.01.

    Also the only one of a matrix of rank one, which begins at 1: beyond 1.01 the quintics explode.
    """
    rank_one = torch.arange(1, 33.0)[:, None] * torch.linspace(-1, 1, 300)
    assert 0.72 < torch.linalg.svdvals(orthogonal([rank_one[None]])[0]).max() < 1.29
    for rows, columns in ((12, 18), (12, 30), (257, 300), (257, 600)):
        matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
        for given in (matrices, matrices.mT):
            values = torch.linalg.svdvals(orthogonal([given])[0])
            assert values.min() > 0.72 and values.max() < 1.29


@pytest.mark.parametrize("rows", [32, MIRRORED + 1])
@pytest.mark.parametrize("columns", [1, 9])
def test_matrices_are_made_orthogonal_alike(rows: int, columns: int):
    """Square and long ones, whole products and strips; also where singular values lie far apart.

    Beside double precision, from the fourth root of the sum of the singular values' fourth powers: 1e-3.
    """
    rng = torch.Generator().manual_seed(1)
    for spread in (0, 3):
        matrices = torch.randn(2, rows, columns * rows, generator=rng)
        u, values, v = torch.linalg.svd(matrices, full_matrices=False)
        values = values * torch.logspace(0, -spread, rows)
        matrices = (u * values[:, None]) @ v
        x = matrices.double() / values.double().pow(4).sum(1).pow(1 / 4)[:, None, None]
        for a, b, c in PHASES[torch.float32][0]:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        assert (orthogonal([matrices])[0] - x).norm() < 1e-3 * x.norm()


def test_matrices_are_made_orthogonal_together_as_alone():
    """Some with as many rows and other lengths, some tall, some square. Products of other sizes round differently, by
    1e-7, which three iterations multiply by 78 where singular values are small: 2e-5."""
    rng = torch.Generator().manual_seed(4)
    stacks = [torch.randn(shape, generator=rng) for shape in ((2, 16, 40), (1, 90, 16), (3, 16, 16), (2, 24, 80))]
    for one, stack in zip(orthogonal(stacks), stacks, strict=True):
        torch.testing.assert_close(one, orthogonal([stack])[0], rtol=0, atol=2e-5)


def test_bfloat16_makes_matrices_orthogonal_too(monkeypatch: pytest.MonkeyPatch):
    """Square and long ones; beside the same quintics in float32 within 6 %: each of eight products rounds by 2^-9,
    weak directions most.

    Where singular values lie far apart the smallest are below the rounding; the large ones must not grow.
    """
    monkeypatch.setitem(PHASES, torch.float32, (4 * (JORDAN,),))
    rng = torch.Generator().manual_seed(2)
    for shape in ((4, 48, 48), (4, 48, 432), (4, 432, 48)):
        matrices = torch.randn(shape, generator=rng)
        exact, rounded = orthogonal([matrices])[0], orthogonal([matrices], torch.bfloat16)[0].float()
        assert (rounded - exact).norm() < 0.06 * exact.norm()
        weak = torch.randn(shape[0], shape[1], 4, generator=rng) @ torch.randn(shape[0], 4, shape[2], generator=rng)
        values = torch.linalg.svdvals(orthogonal([weak + 0.01 * matrices], torch.bfloat16)[0].float())
        assert values.max() < 1.25


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_device_without_operations_over_lists_steps_alike(name, monkeypatch):
    """Of the norm of all gradients, as on a Mac's GPU: torch refuses to be asked for them there."""
    from torch.nn.utils import clip_grad
    from torch.utils import _foreach_utils

    nets = [network(), network()]
    for net, present in zip(nets, (True, False), strict=True):
        if not present:
            for module in (_foreach_utils, clip_grad):
                monkeypatch.setattr(module, "_device_has_foreach_support", lambda _: False)
        optimizer = Optimizer(net, TrainingConfig(optimizer=name, clip=1e-3))
        backward(net, 0)
        assert optimizer.step(1e-3)
    # Sums of a norm in another order.
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(net.parameters() for net in nets), strict=True))
