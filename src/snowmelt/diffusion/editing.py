"""Editing: functions on denoise functions, paths and levels; samplers do not notice any of it.

    inpainting       x0 = known where it is known                                  (replacement)
    RePaint          the same, on a path that falls back again and again           (`grids.jumping`)
    variation        the picture with noise, and the rest of the schedule          (SDEdit: `cut`)
    inversion        DDIM backwards: x_l from x_m = decay x_l + w x0(x_l), solved for x_l
    interpolation    along the great circle between two noises                     (`slerp`)
    inverse problem  x0 + sigma^2 / alpha d log p(y | x) / dx,  y = A x0 + std noise,
                     p(y | x) = N(y; A x0(x), std^2 + r^2 A A^T),  r^2 the variance of x0 when x is known

(Lugmayr et al. 2022, arXiv:2201.09865, RePaint; Meng et al. 2021, arXiv:2108.01073, SDEdit; Song et al. 2020,
arXiv:2010.02502, DDIM; Hong et al. 2023, arXiv:2311.18387, exact inversion; Chung et al. 2022, arXiv:2209.14687, DPS;
Song et al. 2023, "Pseudoinverse-guided diffusion models", PiGDM, for r.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.grids import jumping
from snowmelt.diffusion.multistep import DATA, Weights, combined
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.schedules import Schedule
from snowmelt.diffusion.walk import Step, evaluate
from snowmelt.shapes import Grid, Images, Level, Levels

Operator: TypeAlias = Callable[[Images], Tensor]
"""What an observation shows of pictures: a linear function, perhaps to another size or number of channels."""


# filling in


def inpainted(denoise: Denoise, known: Images, unknown: Tensor) -> Denoise:
    """Know the picture where `unknown` is 0, ask `denoise` where it is 1, mix between; broadcasts over the batch.

    That is replacement: a step of DDIM carries a known pixel from alpha_l x0 + sigma_l noise to alpha_m x0 + sigma_m
    noise with one and the same noise, and a step of DDPM draws q(x_m | x_l, x0), so the known part is at every level
    what the forward process would have made of it, and no sampler need know of the mask.
    """
    return lambda x, log_snr: torch.lerp(known.to(x), denoise(x, log_snr), unknown.to(x))


def cut(schedule: Schedule, strength: float) -> Schedule:
    """The clean end of a schedule, up to the time `strength` in (0, 1]: a walk on it begins with the picture in sight.

    SDEdit begins it at `add_noise(x0, noise, schedule(strength))`.
    """
    return lambda time: schedule(strength * time)


# between noises


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """(batch, ...) the noise at `share` of the way from `start` (0) to `end` (1): angles and lengths change evenly.

    A straight line would pass through noise that is too weak, by up to sqrt(2) half-way.
    """
    first, second = start.flatten(1), end.flatten(1)
    lengths = first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True)
    first, second = (rows / length.clamp(min=1e-12) for rows, length in zip((first, second), lengths, strict=True))
    # Of unit vectors, in the form that is exact for small and large angles alike (Kahan).
    angle = 2 * torch.atan2((first - second).norm(dim=1, keepdim=True), (first + second).norm(dim=1, keepdim=True))
    # sin(s angle) / sin(angle) -> s as the angle goes to 0
    parts = [torch.where(angle > 1e-6, torch.sin(s * angle) / torch.sin(angle), s) for s in (1 - share, share)]
    direction = parts[0] * first + parts[1] * second
    return (lengths[0].lerp(lengths[1], share) * direction).reshape(start.shape)


# inversion


def inversion(
    denoise: Denoise, image: Images, log_snrs: Grid, *, rounds: int = 8, tolerance: float = 1e-5
) -> Iterator[Step]:
    """From a picture to the noise that DDIM on `log_snrs` turns into it; the `x` of the last step is that noise.

    A step of DDIM x_m = decay x_l + w x0(x_l) is undone by asking again: x_l = (x_m - w x0(x_l)) / decay, from the
    guess that x0 has not changed. One round a level is about as good as DDIM inversion; more make it the exact inverse.

    Args:
        log_snrs: rising, as for the sampler; walked backwards.
        rounds: evaluations at each level, at most.
        tolerance: root mean square by which the step may miss the cleaner image.
    """
    cleanest, *falling = log_snrs.cpu().double().flip(0)
    alpha, _ = alpha_sigma(cleanest, image)
    settle = partial(_settled, denoise, rounds=rounds)
    yield (step := settle(alpha * image, cleanest, lambda x, x0: x + alpha * (image - x0), tolerance=tolerance))
    for level in falling:
        clean, noisy = float(step.log_snr), float(level)
        guess = combined(DATA.weights([clean], clean, noisy, 0.0), step.x, [step.x0])
        way_back = DATA.weights([noisy], noisy, clean, 0.0)
        undone = partial(_undone, step.x, way_back)
        yield (step := settle(guess, level, undone, tolerance=tolerance / way_back.decay))


def _undone(after: Images, weights: Weights, _x: Images, x0: Images) -> Images:
    """The image from which a step with these weights and x0 leads to `after`."""
    return (after - weights.parts[0] * x0) / weights.decay


def _settled(
    denoise: Denoise,
    x: Images,
    level: Level,
    improve: Callable[[Images, Images], Images],
    *,
    rounds: int,
    tolerance: float,
) -> Step:
    """x = improve(x, x0(x)), with the x0 of the last question; images of a batch share the rounds.

    Putting the answer in again and again need not converge, so each round combines all before it (Anderson's
    acceleration), and an image keeps its best.
    """
    asked: list[Images] = []
    changes: list[Images] = []
    best, least = None, torch.full((len(x),), math.inf, device=x.device)
    for _ in range(rounds):
        x0 = evaluate(denoise, x, level).x0
        change = improve(x, x0) - x
        size = change.square().flatten(1).mean(1).sqrt()
        better = (size < least).reshape(-1, 1, 1, 1)
        improved = Step(x + change, level, x0)
        best = (
            improved
            if best is None
            else Step(torch.where(better, improved.x, best.x), level, torch.where(better, x0, best.x0))
        )
        least = torch.minimum(size, least)
        if bool((least <= tolerance).all()):
            break
        asked.append(x)
        changes.append(change)
        x = anderson(asked, changes)
    assert best is not None, "at least one round"
    return best


def anderson(asked: list[Images], changes: list[Images], memory: int = 6) -> Images:
    """Where the change would be nothing, if it were linear in the images asked about, after the last of them.

    (Walker & Ni 2011, "Anderson acceleration for fixed-point iterations".)
    """
    where, change = asked[-1], changes[-1]
    if len(asked) == 1:
        return where + change
    # In double precision, which not every device has: first to the processor, then to doubles.
    steps, bends = (
        torch.stack([of[-1] - other for other in of[-memory:-1]], 1).flatten(2).cpu().double()
        for of in (asked, changes)
    )
    gram = bends @ bends.mT
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30).reshape(-1, 1, 1)
    shares = torch.linalg.solve(
        gram + ridge * torch.eye(gram.shape[1]).to(gram), bends @ change.flatten(1)[..., None].cpu().double()
    )
    return where + change - ((steps + bends).mT @ shares).reshape(where.shape).to(where)


def psnr(images: Images, wanted: Images) -> Levels:
    """Peak signal-to-noise ratio of each image in decibels; the peak is 2, from -1 to 1. Infinite for equal ones."""
    return 10 * torch.log10(4 / (images - wanted).square().flatten(1).mean(1))


# inverse problems


def observed(
    denoise: Denoise, operator: Operator, value: Tensor, std: float, *, spread: float = 0.5, rounds: int = 30
) -> Denoise:
    """What the picture is, given also that `operator(picture)` was seen as `value` with noise of `std`.

    The gradient goes through `denoise`, so put thresholds around the result, not inside. Exact for Gaussian data of
    standard deviation `spread` in every direction. With `spread` 0 it is DPS, which takes x0(x) for certain and so
    pulls much too hard where there is noise.

    Args:
        operator: linear; its transpose is found by differentiation.
        value: for the whole batch, or one for all.
        rounds: of conjugate gradients, at most; without blur two suffice.
    """

    def guided(x: Images, log_snr: Tensor) -> Images:
        alpha, sigma = alpha_sigma(log_snr, x)
        variance = spread**2 * sigma**2 / (alpha**2 * spread**2 + sigma**2)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            x0 = denoise(leaf, log_snr)
            seen, transposed = _with_transpose(operator, x0.detach())
            push = conjugate_gradients(
                lambda part: std**2 * part + variance * operator(transposed(part)), value.to(x) - seen, rounds
            )
            (gradient,) = torch.autograd.grad(x0, leaf, transposed(push))
        return x0.detach() + sigma**2 / alpha * gradient

    return guided


def _with_transpose(operator: Operator, images: Images) -> tuple[Tensor, Callable[[Tensor], Images]]:
    """A images, and y -> A^T y."""
    at = images.requires_grad_()
    seen = operator(at)

    def transposed(part: Tensor) -> Images:
        (back,) = torch.autograd.grad(seen, at, part, retain_graph=True)
        return back

    return seen.detach(), transposed


@torch.no_grad()
def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], wanted: Tensor, rounds: int, tolerance: float = 1e-6
) -> Tensor:
    """x with matrix(x) = wanted for each image by itself; the matrix symmetric and positive."""

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((1, 2, 3), keepdim=True)

    x, left = torch.zeros_like(wanted), wanted
    direction, size = left, dot(left, left)
    enough = tolerance**2 * size
    for _ in range(rounds):
        if bool((size <= enough).all()):
            break
        across = matrix(direction)
        length = torch.where(size > enough, size / dot(direction, across), 0)
        x, left = x + length * direction, left - length * across
        before, size = size, dot(left, left)
        direction = left + torch.where(before > 0, size / before, 0) * direction
    return x


def shrunk(factor: int) -> Operator:
    """The mean of every square of `factor` x `factor` pixels: a small picture of a large one."""
    return lambda images: functional.avg_pool2d(images, factor)


def blurred(width: float) -> Operator:
    """A Gaussian blur of standard deviation `width` pixels; outside the picture its edge goes on."""
    radius = max(1, math.ceil(3 * width))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / width) ** 2)
    kernel = kernel / kernel.sum()

    def operator(images: Images) -> Images:
        weights = kernel.to(images).expand(images.shape[1], 1, 1, -1)
        groups = images.shape[1]
        padded = functional.pad(images, (radius,) * 4, mode="replicate")
        across = functional.conv2d(padded, weights, groups=groups)
        return functional.conv2d(across, weights.mT, groups=groups)

    return operator


def greyed(images: Images) -> Tensor:
    """The luma of colour pictures after ITU-R 601, one channel."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def shown(known: Tensor) -> Operator:
    """A picture where `known` is 1, and 0 elsewhere."""
    return lambda images: images * known.to(images)


# the choices


class Fill(NamedTuple):
    """A way of inpainting: what the denoiser is told, and the path it is asked along."""

    denoise: Callable[[Denoise, Images, Tensor, float], Denoise]
    """(denoise, known, unknown, standard deviation of the data) -> Denoise, as `inpainted`."""
    path: Callable[[Grid], Grid]


def _replaced(denoise: Denoise, known: Images, unknown: Tensor, _spread: float) -> Denoise:
    return inpainted(denoise, known, unknown)


def _posterior(denoise: Denoise, known: Images, unknown: Tensor, spread: float) -> Denoise:
    seen = shown(1 - unknown)
    return inpainted(observed(denoise, seen, seen(known), std=0.02, spread=spread), known, unknown)


def _straight(log_snrs: Grid) -> Grid:
    return log_snrs


FILLS: dict[str, Fill] = {
    "replace": Fill(_replaced, _straight),
    "repaint": Fill(_replaced, partial(jumping, times=5, length=5)),
    "posterior": Fill(_posterior, _straight),
}
