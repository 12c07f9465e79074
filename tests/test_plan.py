"""The plan: the learning rate's shape, and a run by time that ends in time on simulated machines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from snowmelt.config import TrainingConfig
from snowmelt.training.plan import LOOKS, Plan

RATE = 1e-3
SECONDS = 600.0
ENDING = 4.0
"""Seconds the simulated run needs for its final pictures."""

Machine = Callable[[float], float]
"""Seconds a step takes, by the share of the time that has passed."""


def by_steps(tmp_path: Path, steps: int) -> Plan:
    return Plan.open(tmp_path / "plan.json", TrainingConfig(steps=steps, learning_rate=RATE))


@dataclass
class Ended:
    """What became of a simulated run."""

    step: int
    elapsed: float
    rates: list[float]
    plan: Plan


def simulate(path: Path, machine: Machine, *, begin: int = 0, elapsed: float = 0.0, until: int | None = None) -> Ended:
    """Drive a plan as the loop does: step, measure, decide; the last moments are the ending's."""
    plan = Plan.open(path, TrainingConfig(seconds=SECONDS, learning_rate=RATE))
    step, durations, rates = begin, list[float](), list[float]()
    while not plan.finished(step) and step != until:
        step += 1
        rates.append(plan.learning_rate(step))
        durations = [*durations[-99:], machine(elapsed / SECONDS)]
        elapsed += durations[-1]
        if plan.decides_at(step, elapsed, elapsed):
            plan.decide(step, elapsed=elapsed, per_step=fmean(durations), per_watch=0.0, ending=ENDING)
    return Ended(step, elapsed + ENDING, rates, plan)


@pytest.mark.parametrize("steps", [1, 10, 100, 5000])
def test_the_rate_rises_and_falls_to_nearly_nothing(tmp_path, steps):
    plan = by_steps(tmp_path, steps)
    rates = [plan.learning_rate(step) for step in range(1, steps + 1)]
    assert min(rates) > 0 and max(rates) <= RATE
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]), "it only rises before its highest value"
    assert rates[top:] == sorted(rates[top:], reverse=True), "and only falls after it"
    # The last update has one step's share of the fall.
    assert rates[-1] <= RATE / max(1.0, 0.6 * steps) * (1 + 1e-12)
    assert max(rates) == RATE or steps < 10


def test_a_run_by_steps_ends_after_them(tmp_path):
    plan = by_steps(tmp_path, 7)
    assert [plan.finished(step) for step in (0, 6, 7)] == [False, False, True]
    assert not plan.decides_at(5, 1e9, 1e9) and not (tmp_path / "plan.json").exists()


def test_moments_are_due_once_each(tmp_path):
    plan = by_steps(tmp_path, 1000)
    assert [step for step in range(1001) if plan.due(step, [0.01, 0.5, 1.0])] == [10, 500, 1000]


@pytest.mark.parametrize("per_step", [0.02, 0.3, 7.0])
def test_a_steady_machine_is_measured_once(tmp_path, per_step):
    """3 % of jitter never moves the horizon, and the run uses its time and no more."""
    rng = random.Random(0)  # noqa: S311
    ended = simulate(tmp_path / "plan.json", lambda _: per_step * rng.uniform(0.97, 1.03))
    horizons = {horizon for _, horizon in ended.plan.decisions}
    assert len(horizons) == 1 and len(ended.plan.decisions) >= LOOKS
    # Aimed at 98.5 %; the mean of a hundred jittery steps is good to half a percent, and a step is a whole one.
    assert 0.95 * SECONDS - per_step < ended.elapsed <= SECONDS


@pytest.mark.parametrize("change", [1.3, 1 / 1.3, 2.0])
def test_a_machine_that_changes_speed_half_way_still_ends_in_time(tmp_path, change):
    rng = random.Random(1)  # noqa: S311

    def machine(share: float) -> float:
        return 0.1 * (change if share > 0.5 else 1) * rng.uniform(0.97, 1.03)

    ended = simulate(tmp_path / "plan.json", machine)
    assert abs(ended.elapsed - SECONDS) < 0.05 * SECONDS
    assert len({horizon for _, horizon in ended.plan.decisions}) > 1


def test_a_reopened_plan_repeats_its_decisions(tmp_path):
    """A resumed run, on a machine that has become slower, follows what was decided, up to the last decision."""
    path = tmp_path / "plan.json"
    first = simulate(path, lambda share: 0.5 if share < 0.5 else 0.6, until=900)
    again = Plan.open(path, TrainingConfig(seconds=SECONDS, learning_rate=RATE))
    assert again.decisions == first.plan.decisions and len(again.decisions) > 3
    assert all(again.horizon(step) == first.plan.horizon(step) for step in range(901))
    last = again.decisions[-1][0]
    assert not any(again.decides_at(step, 1e9, 0.0) for step in range(last + 1)), "what is decided stays so"
    assert any(again.decides_at(step, 1e9, 0.0) for step in range(last + 1, last + 200))


def test_a_decision_is_on_disk_before_it_counts(tmp_path):
    path = tmp_path / "plan.json"
    plan = Plan.open(path, TrainingConfig(seconds=100.0, learning_rate=RATE))
    assert plan.horizon(10) is None and not plan.finished(10) and not plan.due(10, [0.1])
    plan.decide(10, elapsed=10.0, per_step=1.0, per_watch=8.0, ending=5.0)
    # 98.5 % of 100 s, less 10 gone and 13 for pictures, leaves 75 steps of 1 s.
    assert plan.horizon(10) == 85 and Plan.open(path, plan.config).horizon(10) == 85
    assert plan.horizon(9) is None


def test_a_run_out_of_time_ends_at_once(tmp_path):
    """Also when a look at the clock falls on every step: each must not grant one step more."""
    plan = Plan.open(tmp_path / "plan.json", TrainingConfig(seconds=100.0))
    plan.decide(4, elapsed=10.0, per_step=10.0, per_watch=0.0, ending=5.0)
    assert plan.horizon(4) == 12
    step, elapsed = 4, 10.0
    while not plan.finished(step):
        step, elapsed = step + 1, elapsed + 40.0
        if plan.decides_at(step, elapsed, elapsed):
            plan.decide(step, elapsed=elapsed, per_step=20.0, per_watch=0.0, ending=5.0)
    assert elapsed <= 130.0


def test_a_machine_that_is_suddenly_slow_ends_when_the_time_is_up(tmp_path):
    """Fifty times as slow from half of the time on: the next look at a fixed step would be three times as far away."""
    ended = simulate(tmp_path / "plan.json", lambda share: 0.1 if share < 0.5 else 5.0)
    assert SECONDS <= ended.elapsed <= SECONDS + 5.0 + ENDING


def test_a_run_that_goes_on_measures_the_machine_it_is_on(tmp_path):
    """For as long as it did at first, 4 % of the time; also where another process had decided before."""
    plan = Plan.open(tmp_path / "plan.json", TrainingConfig(seconds=SECONDS))
    plan.decide(10, elapsed=30.0, per_step=0.1, per_watch=0.0, ending=ENDING)
    first, horizon = plan.decisions[0]
    fixed = first + (horizon - first) // LOOKS
    assert plan.decides_at(fixed, 100.0, 130.0) and not plan.decides_at(fixed + 1, 100.0, 130.0)
    again = Plan.open(tmp_path / "plan.json", plan.config)
    assert not any(again.decides_at(step, 23.9, 230.0) for step in range(fixed, horizon)), "nothing is known yet"
    assert again.decides_at(fixed + 1, 24.0, 230.0)
    again.decide(fixed + 1, elapsed=230.0, per_step=1.0, per_watch=0.0, ending=ENDING)
    assert again.horizon(fixed + 1) == fixed + 1 + int(0.985 * SECONDS - 230 - ENDING)
    assert not again.decides_at(fixed + 2, 25.0, 231.0)


def test_when_the_time_is_up_nothing_that_was_decided_holds(tmp_path):
    """As of a process that was killed between a decision and its next checkpoint, and of one that measured nothing."""
    plan = Plan.open(tmp_path / "plan.json", TrainingConfig(seconds=SECONDS))
    assert plan.decides_at(1, 1.0, SECONDS)
    plan.decide(10, elapsed=30.0, per_step=0.1, per_watch=0.0, ending=ENDING)
    plan.decide(900, elapsed=120.0, per_step=0.1, per_watch=0.0, ending=ENDING)
    again = Plan.open(tmp_path / "plan.json", plan.config)
    assert not again.decides_at(800, 100.0, 500.0) and again.decides_at(800, 100.0, SECONDS)
    again.decide(800, elapsed=SECONDS, per_step=5.0, per_watch=0.0, ending=ENDING)
    assert again.finished(800) and again.decisions == Plan.open(tmp_path / "plan.json", plan.config).decisions
    assert [step for step, _ in again.decisions] == [10, 800]


def test_time_kept_for_the_last_preview_is_not_trained_in(tmp_path):
    """At the horizon no preview is to come, so a look there would find its time free, which is drawn in next."""
    plan = Plan.open(tmp_path / "plan.json", TrainingConfig(seconds=100.0))
    plan.decide(4, elapsed=10.0, per_step=1.0, per_watch=20.0, ending=5.0)
    # 98.5 - 10 - 20 - 5 = 63.5 steps; one look in (67 - 4) // 16 = 3, so that step 67 is one of theirs.
    assert plan.horizon(4) == 67 and plan.decides_at(64, 60.0, 85.0) and plan.finished(67)
    assert not plan.decides_at(67, 63.0, 88.0)


@pytest.mark.parametrize("machine", [lambda s: 0.1 if s < 0.5 else 0.13, lambda s: 0.9], ids=["slows", "slow"])
def test_a_reopened_plan_repeats_every_learning_rate(tmp_path, machine):
    """A resumed run knows decisions before it reaches their steps, and must not use them earlier than the first did."""
    first = simulate(tmp_path / "plan.json", machine)
    again = Plan.open(tmp_path / "plan.json", TrainingConfig(seconds=SECONDS, learning_rate=RATE))
    assert [step for step, rate in enumerate(first.rates, 1) if again.learning_rate(step) != rate] == []


def test_a_run_by_time_warms_up_without_a_drop(tmp_path):
    rates = simulate(tmp_path / "plan.json", lambda _: 0.9).rates[:100]
    assert rates == sorted(rates)
