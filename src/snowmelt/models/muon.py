"""Muon: the momentum of a matrix replaced by the nearest orthogonal one, so that no direction of it is left behind.

    momentum = 0.95 momentum + 0.05 gradient,       direction = 0.05 gradient + 0.95 momentum
    weight  <- (1 - rate decay) weight - rate 0.2 sqrt(max(rows, columns)) orthogonal(direction)

It is `torch.optim.Muon` in another order, with fewer iterations (`_scale`, `PHASES`): matrices with as many rows are
made orthogonal together, and in the arithmetic that the device is fast in. torch's always computes in bfloat16, which
a processor without it has to imitate: there a whole training step of the digits' network took 0.70 s of processor
time with it, and 0.25 s with this.
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982, for the 0.2.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

# torch's fused operations over lists of tensors are its documented building blocks, but bear private names.
_lerp, _mul = torch._foreach_lerp_, torch._foreach_mul_  # pyright: ignore
_add, _sub = torch._foreach_add_, torch._foreach_sub  # pyright: ignore

Quintic = tuple[float, float, float]
JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
PHASES: dict[torch.dtype, tuple[tuple[Quintic, ...], ...]] = {
    torch.float32: (((8.0172, -22.9410, 16.6113), (3.6416, -2.7255, 0.5370), (2.6686, -1.9831, 0.4533)),),
    torch.bfloat16: ((JORDAN, JORDAN), (JORDAN, JORDAN)),
}
"""Coefficients of x, x^3 and x^5, an iteration after the other; after each phase x is multiplied by its polynomials.

The three together take singular values from 0.01 to 1.01 nearest to 1, to between 0.72 and 1.29 (Amsel et al. 2025,
arXiv:2505.16932, for the principle); the largest is 1, so that some rounding does no harm. bfloat16 is too inexact for
so steep a first one, and for the polynomials of more than two: four times that of Jordan et al. end between 0.67 and
1.2."""
MOMENTUM = "momentum_buffer"
"""What is kept of each weight."""
STRIPS, MIRRORED = 4, 256
"""A symmetric product of so many rows or more is computed in strips, on a processor in float32."""
LARGE = 256
"""Rows of a matrix from which bfloat16 is faster on a processor that has it; half as many are level, fewer slower."""
ROOM = 2**22
"""Numbers in all matrices that a processor makes orthogonal together: more do not stay in its caches."""


def _wide(matrices: Tensor) -> Tensor:
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def factors(stacks: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """For each of several stacks two whose product is about the nearest orthogonal matrix, by Newton and Schulz.

    Every iteration multiplies x by a polynomial of x x^T, so its products with x can wait: the polynomials are
    multiplied first, and x by them once. For a kernel of 3 x 3 that is 2.5 times less work, in float32; and x x^T are
    alike for all x with as many rows, however long they are, so they are multiplied together.

    Args:
        stacks: (count, rows, columns), as many rows in all, and no fewer columns than rows.
        dtype: that products are computed in, float32 or bfloat16; the factors have it too.
    """
    stacks = [stack.to(dtype) for stack in stacks]
    counts, waiting = [len(x) for x in stacks], list[Tensor]()
    for first, *others in PHASES[dtype]:
        if waiting:
            stacks = [torch.bmm(one, x) for one, x in zip(waiting, stacks, strict=True)]
        gram = torch.cat([_symmetric(x, x.mT) for x in stacks])
        # Scaling the small matrices spares a copy of the long ones.
        scale = torch.ones_like(gram[:, :1, :1], dtype=torch.float32) if waiting else _scale(gram)
        gram = (gram * scale**2).to(dtype)
        product = factor = _polynomial(gram, first)
        for quintic in others:
            # Polynomials of one matrix: they commute, so that all their products are symmetric.
            gram = _symmetric(_symmetric(factor, gram), factor)
            factor = _polynomial(gram, quintic)
            product = _symmetric(factor, product)
        waiting = list((product * scale).to(dtype).split(counts))
    return list(zip(waiting, stacks, strict=True))


def _scale(gram: Tensor) -> Tensor:
    """1 / a bound of the largest singular value of x, from x x^T: the fourth root of the sum of their fourth powers.

    With as much work as the usual norm it is up to rows^(1/4) times nearer to the largest, which saves an iteration.
    """
    norm = torch.linalg.vector_norm(gram, dim=(1, 2), dtype=torch.float32)
    return norm.clamp(min=1e-14).rsqrt()[:, None, None]


def _polynomial(gram: Tensor, quintic: Quintic) -> Tensor:
    """What x is multiplied by, for gram = x x^T."""
    a, b, c = quintic
    if _mirrored(gram):
        factor = _symmetric(gram, gram).mul_(c).add_(gram, alpha=b)
    else:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def _mirrored(a: Tensor) -> bool:
    """Whether half of a product with as many rows should be copied from the other half."""
    return a.device.type == "cpu" and a.dtype == torch.float32 and a.shape[1] >= MIRRORED


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """a b (count, rows, rows), which the caller knows to be symmetric: most below the diagonal is not computed.

    In strips of rows, each from the diagonal on: 10 of 16 blocks.
    """
    if not _mirrored(a):
        return torch.bmm(a, b)
    rows = a.shape[1]
    answer = a.new_empty(len(a), rows, rows)
    for begin in range(0, rows, height := -(-rows // STRIPS)):
        end = begin + height
        answer[:, begin:end, begin:] = a[:, begin:end] @ b[:, :, begin:]
        answer[:, end:, begin:end] = answer[:, begin:end, end:].mT
    return answer


class Muon(torch.optim.Optimizer):
    """See the module; all parameters are matrices.

    Args:
        dtype: that products of matrices of `LARGE` rows or more are computed in on a CPU; on a GPU all are in bfloat16.

    Attributes:
        found_inf: on the device, 1 for a gradient that is not finite: `step` then changes nothing. As in `torch.amp`.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(list(params), {"lr": 1e-3, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            # Those of one shape beside each other, after others with as many rows.
            weights.sort(key=lambda weight: (min(weight.shape), weight.shape))
            for _, alike in groupby(weights, key=lambda weight: min(weight.shape)):
                some = list(alike)
                while some:
                    sizes = accumulate(weight.numel() for weight in some)
                    count = len(some) if some[0].is_cuda else max(1, sum(size <= ROOM for size in sizes))
                    self._update(some[:count], group)
                    del some[:count]

    def _update(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        rate, decay = group["lr"], group["weight_decay"]
        kept = 1.0 if self.found_inf is None else self.found_inf == 0
        shapes = [list(alike) for _, alike in groupby(weights, key=lambda weight: weight.shape)]
        stacks = [_wide(stack) for stack in self._directions(shapes, group["momentum"])]
        fast = self.dtype if stacks[0].shape[1] >= LARGE else torch.float32
        updates = factors(stacks, torch.bfloat16 if weights[0].is_cuda else fast)
        for alike, (factor, x) in zip(shapes, updates, strict=True):
            scale = rate * 0.2 * max(alike[0].shape) ** 0.5
            if self.found_inf is None and factor.dtype == alike[0].dtype:
                for weight, *parts in zip(map(_wide, alike), factor, x, strict=True):
                    weight.addmm_(*parts, beta=1 - rate * decay, alpha=-scale)
            else:
                moved = torch.bmm(factor, x).to(alike[0].dtype).mul_(-scale * kept)
                moved = moved if moved.shape[1:] == alike[0].shape else moved.mT.contiguous()
                whole: list[Tensor] = [*alike]
                _mul(whole, 1 - kept * (rate * decay))
                _add(whole, moved.unbind())

    def _directions(self, shapes: list[list[nn.Parameter]], momentum: float) -> list[Tensor]:
        """Takes the gradients into the momenta; where a gradient is not finite, on the device, nothing and zeros.

        Returns:
            A stack for the weights of each shape.
        """
        weights, gradients = [weight for alike in shapes for weight in alike], list[Tensor]()
        for weight in weights:
            assert weight.grad is not None
            if not self.state[weight]:
                self.state[weight][MOMENTUM] = torch.zeros_like(weight)
            gradients.append(weight.grad)
        buffers = [self.state[weight][MOMENTUM] for weight in weights]
        if self.found_inf is None:
            stacks = [torch.empty(len(alike), *alike[0].shape, device=alike[0].device) for alike in shapes]
            directions = [direction for stack in stacks for direction in stack]
            _lerp(buffers, gradients, 1 - momentum)
            for gradient, buffer, direction in zip(gradients, buffers, directions, strict=True):
                torch.lerp(gradient, buffer, momentum, out=direction)
            return stacks
        # A device is given few operations on many matrices: each takes a processor's time to ask for.
        finite, bad, alike = self.found_inf == 0, self.found_inf != 0, iter(gradients)
        # Products of infinities would not be 0.
        stacks = [torch.stack([*islice(alike, len(some))]).masked_fill_(bad, 0) for some in shapes]
        directions = [direction for stack in stacks for direction in stack]
        steps = _sub(directions, buffers)
        _mul(steps, finite * (1 - momentum))
        _add(buffers, steps)
        _lerp(directions, buffers, momentum)
        return stacks
