"""The charts of the explaining page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.explaining.network import StepBack
from snowmelt.explaining.parts import HALF, Appearance
from snowmelt.explaining.process import REACH, Process, bell, betas_of, histogram
from snowmelt.pages.charts import Chart, Draw, Paint
from snowmelt.pictures import moments_of

POINTS = 250
"""Of a curve; one through all 1000 steps would say no more."""
_HALVES = ([0, 0.5, 1], ["0", "½", "1"])
_PART_ROLES = {"outline": "signal", "colour": "noise", "texture": "third"}


def series(name: str) -> str:
    """The role of a schedule beside the chosen one, which is drawn in ink."""
    return f"series{list(SCHEDULES).index(name) % 8}"


# the process


def schedule_charts(process: Process, chosen: str) -> list[Chart]:
    """alpha, beta, alpha_bar, signal, noise and log-SNR, beside those of the other schedules with as many steps."""
    bars, betas = process.alpha_bars[1:], process.betas
    tables = {name: betas_of(schedule, process.steps) for name, schedule in SCHEDULES.items() if name != chosen}
    others = {name: (one, (1 - one).log().cumsum(0).exp()) for name, one in tables.items()}
    every = {**others, chosen: (betas, bars)}
    kinds: list[tuple[str, Callable[[Any, Any], Any], dict[str, Any]]] = [
        (r"$\alpha_t = 1 - \beta_t$: what one step keeps", lambda beta, bar: 1 - beta, {"ylim": (0.949, 1.001)}),
        (r"$\beta_t$: the noise of one step", lambda beta, bar: beta, {"yscale": "log", "ylim": (2e-5, 1.3)}),
        (r"$\bar\alpha_t$: what is left of the photo's variance", lambda beta, bar: bar, {}),
        (r"$\sqrt{\bar\alpha_t}$: signal", lambda beta, bar: bar.sqrt(), {}),
        (r"$\sqrt{1 - \bar\alpha_t}$: noise", lambda beta, bar: (1 - bar).sqrt(), {}),
        ("log-SNR", lambda beta, bar: bar.log() - (-bar).log1p(), {"ylim": (-12, 12)}),
    ]
    return [Chart(_curves(every, chosen, pick, look), title, (4.2, 2.6)) for title, pick, look in kinds]


def _curves(every: dict[str, Any], chosen: str, pick: Callable[[Any, Any], Any], look: dict[str, Any]) -> Draw:
    def curves(axes: Any, paint: Paint) -> None:
        for name, (beta, bar) in every.items():
            wide, role = (2.6, "ink") if name == chosen else (1.1, series(name))
            places = moments_of(len(beta), POINTS)
            times = [place + 1 for place in places]
            axes.plot(times, pick(beta, bar)[places], color=paint(role), linewidth=wide, label=name)
        axes.set(xlabel="step t", xlim=(0, len(every[chosen][0])), **look)

    return curves


def mixture(process: Process) -> Chart:
    """Signal and noise over t, with a line for the slider to move."""

    def draw(axes: Any, paint: Paint) -> None:
        times = moments_of(process.steps + 1, POINTS)
        bars = process.alpha_bars[times]
        axes.plot(times, bars.sqrt(), color=paint("signal"), linewidth=2.2)
        axes.plot(times, (1 - bars).sqrt(), color=paint("noise"), linewidth=2.2)
        axes.axvline(0, color=paint("ink"), linewidth=1.2, gid="now")
        axes.set(xlabel="step t", xlim=(0, process.steps), ylim=(0, 1.03))
        axes.set_yticks(*_HALVES)

    return Chart(draw, "signal and noise", (4.2, 2.0))


def ridges(process: Process, moments: list[int]) -> Chart:
    """The histogram of every moment, one above the other, the photo on top and the bell curve below."""

    def draw(axes: Any, paint: Paint) -> None:
        heights = [histogram(process, t) for t in moments]
        top = min(1.25, max(one.counted.max().item() for one in heights))
        for row, (t, one) in enumerate(zip(moments, heights, strict=True)):
            base = -row * 0.62
            bars = one.counted.clamp(max=top)
            axes.fill_between(one.places, base, base + bars, step="mid", color=paint("signal"), alpha=0.38, linewidth=0)
            if one.expected.any():
                axes.plot(one.places, base + one.expected.clamp(max=top), color=paint("signal"), linewidth=1.3)
            axes.plot(one.places, base + bell(one.places), color=paint("noise"), linewidth=1, linestyle=(0, (2, 2)))
            axes.text(-REACH, base + 0.08, f"t = {t}", color=paint("ink"), fontsize=8.5)
        axes.set(
            xlabel="pixel value", xlim=(-REACH, REACH), yticks=[], ylim=(-(len(moments) - 1) * 0.62 - 0.02, top + 0.05)
        )
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)

    return Chart(draw, "Pixel values flowing to the bell curve", (5.0, 5.6))


# the network


def gap_chart(steps: list[StepBack]) -> Chart:
    """Means and standard deviations of the true and the learned step."""

    def draw(axes: Any, paint: Paint) -> None:
        later = [one for one in steps if one.t > 1]
        times = [one.t for one in later]
        axes.plot(times, [one.wide_std for one in later], color=paint("faint"), linewidth=1.3, linestyle=(0, (3, 2)))
        axes.plot(times, [one.true_std for one in later], color=paint("signal"), linewidth=2)
        axes.plot(times, [one.mean_gap for one in later], color=paint("noise"), linewidth=2)
        axes.set(xlabel="step t", xscale="log", yscale="log")

    return Chart(draw, "means and standard deviations")


def kl_chart(steps: list[StepBack]) -> Chart:
    """The divergence of each step, for both variances."""

    def draw(axes: Any, paint: Paint) -> None:
        later = [one for one in steps if one.t > 1]
        times = [one.t for one in later]
        axes.plot(times, [one.kl_wide for one in later], color=paint("faint"), linewidth=1.3, linestyle=(0, (3, 2)))
        axes.plot(times, [one.kl_true for one in later], color=paint("signal"), linewidth=2)
        axes.set(xlabel="step t", xscale="log", yscale="log")

    return Chart(draw, "KL of each step, bits per value")


def parts_chart(ts: list[int], found: dict[str, Appearance]) -> Chart:
    """How much of each part is there, from noise (left) to picture."""

    def draw(axes: Any, paint: Paint) -> None:
        for name, one in found.items():
            colour = paint(_PART_ROLES[name])
            axes.plot(ts, one.shares, color=colour, linewidth=2.2)
            axes.plot(ts[one.half], HALF, "o", color=colour, markersize=7)
        axes.axhline(HALF, color=paint("faint"), linewidth=1, linestyle=(0, (3, 2)))
        axes.set(xlabel="step t, from noise to picture", xlim=(max(ts), 0), ylim=(0, 1.03))
        axes.set_yticks(*_HALVES)

    return Chart(draw, "how much of each part is there", (5.0, 2.7))


def error_chart(steps: list[StepBack], held_out: dict[float, float]) -> Chart:
    """The error of the belief by level: of this photo, and of the run's held-out pictures."""

    def draw(axes: Any, paint: Paint) -> None:
        axes.plot([one.log_snr for one in steps], [one.belief_error for one in steps], color=paint("signal"), lw=2)
        axes.plot(list(held_out), list(held_out.values()), "o-", color=paint("noise"), linewidth=1.4, markersize=5)
        axes.set(xlabel="log-SNR, from noise to picture", yscale="log", xticks=range(-10, 11, 5))

    return Chart(draw, "error of the belief by level", (5.0, 2.7))
