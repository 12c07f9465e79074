"""The search for few levels: its errors are those of real steps, its path is the best, its levels draw better."""

from __future__ import annotations

import dataclasses
import json
import shlex
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.device import Precision
from snowmelt.diffusion.exact import GaussianMixture
from snowmelt.diffusion.grids import log_snr_grid
from snowmelt.diffusion.multistep import COUNTED, DATA, NOISE, combined
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.diffusion.search import Costs, Trajectories
from snowmelt.diffusion.walk import Step
from snowmelt.errors import UserError
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluating.quality import order_of
from snowmelt.evaluation.drawing import keep_tuned, noise_of, suited, usual
from snowmelt.evaluation.metrics import frechet_of
from snowmelt.evaluation.neighbours import Pair
from snowmelt.files import write_atomic
from snowmelt.models.base import Drawing
from snowmelt.run import Run, lock
from snowmelt.tune import TuneOptions, tune
from snowmelt.tuning import judge, search

MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-0.8, 0.5], [0.6, 0.7], [0.1, -0.9]], dtype=torch.float64)[:, None, :, None],
    torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64),
)


def walks(levels: int, pictures: int = 24, seed: int = 0) -> list[Step]:
    grid = log_snr_grid(SCHEDULES["linear"], levels)
    x = torch.randn(pictures, 1, 2, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(SAMPLERS["dpmpp_3m"](MIXTURE.denoise, x, grid, lambda number: torch.zeros_like(x)))


@pytest.mark.parametrize("form", [DATA, NOISE, COUNTED])
@pytest.mark.parametrize("answers", [[3], [3, 1], [5, 2, 0]])
def test_errors_are_those_of_steps(form, answers):
    """Pixel by pixel: the step is made, and compared with where the trajectory was. Both in double precision."""
    walk, end = walks(10), 8
    found = Trajectories.of([walk[:], walks(10, 9, seed=1)])
    squares = []
    for way in (walk, walks(10, 9, seed=1)):
        start = way[answers[0]]
        nodes = [float(way[one].log_snr) for one in answers]
        weights = form.weights(nodes, nodes[0], float(way[end].log_snr), 0.0)
        x = combined(weights, start.x, [form.value(way[one]) for one in answers])
        alpha, _ = alpha_sigma(way[end].log_snr, x)
        squares.append(((x - way[end].x) / alpha).square().flatten())
    real = torch.cat(squares).mean().sqrt().item()
    assert found.error(form, answers, end) == pytest.approx(real, rel=1e-5)
    gap = torch.cat([(way[6].x0 - way[-1].x0).flatten() for way in (walk, walks(10, 9, seed=1))])
    assert found.last_error(6) == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-6)
    assert found.last_error(9) == 0


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_path_is_the_best_of_all(answers, count):
    costs = Costs.of(Trajectories.of([walks(9)]), NOISE, answers=answers).discounted(0.5, 0.5)

    def total(path: tuple[int, ...]) -> float:
        inner = sum(costs.following[k, i, j] for k, i, j in zip(path, path[1:], path[2:], strict=False))
        return costs.first[path[0], path[1]] + inner + costs.last[path[-1]]

    every = [(0, *rest) for rest in combinations(range(1, 9), count - 1)]
    best = min(every, key=total)
    path = tuple(costs.best(count))
    assert total(path) == pytest.approx(total(best), rel=1e-12) and path[0] == 0 and len(path) == count


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "ipndm"])
def test_searched_levels_draw_closer_than_usual_ones(name):
    """On noise that nothing was learned from; six levels of a mixture of three narrow Gaussians."""
    method, fresh = SAMPLERS[name], walks(100, 200, seed=5)
    trajectories = Trajectories.of([walks(31, 200)])
    places = Costs.of(trajectories, method.how.form, answers=method.how.order).discounted(0.7, 0.5).best(6)
    searched = torch.tensor([trajectories.levels[place] for place in places], dtype=torch.float64)

    def error(grid: torch.Tensor) -> float:
        x = fresh[0].x
        drawn = list(method(MIXTURE.denoise, x, grid, lambda number: torch.zeros_like(x)))[-1]
        return (drawn.x0 - fresh[-1].x0).square().mean().sqrt().item()

    usual = min(
        error(log_snr_grid(SCHEDULES["linear"], 6)), error(SCHEDULES["linear"](1 - torch.linspace(0, 1, 6).double()))
    )
    assert error(searched) < 0.8 * usual, (error(searched), usual)


def test_moved_levels_rise():
    levels = (-9.0, -4.0, 0.0, 6.0)
    for place in (1, 2, 3):
        for share in (0.9, -0.9):
            other = search.moved(levels, place, share)
            assert all(low < high for low, high in pairwise(other)) and other[0] == -9.0
            assert [one != two for one, two in zip(levels, other, strict=True)].index(True) == place


def test_moves_lead_to_the_least_distance():
    """Downhill to the noise, end, bend and start with the smallest of a known distance, in no more trials than allowed.

    Each is one move away from where it starts, so that each is found: 2 trials where the first direction is right (the
    one after it is worse) and 3 where it is not, of the 12 that there are.
    """
    start = Drawing(sampler="dpmpp_2m", levels=(-9.0, -4.0, 0.0, 6.0))
    aim = start
    for move, way in zip(judge.MOVES, (1, 1, -1, 1), strict=True):
        aim = move(aim, way)
    seen: list[Drawing] = []

    def distance(drawing: Drawing) -> float:
        seen.append(drawing)
        return sum(abs(one - other) for one, other in zip(shape(drawing), shape(aim), strict=True))

    def shape(drawing: Drawing) -> tuple[float, ...]:
        first, second, *_, last = drawing.levels
        return drawing.eta or 0.0, first, last, 5 * (second - first) / (last - first)

    found = judge.improved(
        lambda drawing: judge.Judged(distance(drawing), drawing), judge.Judged(distance(start), start)
    )
    assert found.distance == pytest.approx(0, abs=1e-9) and found.drawing.levels == pytest.approx(aim.levels)
    assert len(seen) - 1 <= judge.MOVED and len(set(seen)) == len(seen)
    assert aim.eta == 0.25 and aim.levels[0] == -8 and aim.levels[-1] == pytest.approx(5)


def test_the_best_of_both_kinds_is_moved():
    """The second of two is farther at first, and has the valley on its side; where there is one kind, it is that."""
    near, far = Drawing(sampler="ipndm", levels=(-9.0, 0.0, 6.0)), Drawing(sampler="deis", levels=(-9.0, 0.0, 6.0))

    def distance(drawing: Drawing) -> float:
        return 5.0 if drawing.sampler == "ipndm" else 10.0 - 3 * (6.0 - drawing.levels[-1])

    judged = [judge.Judged(distance(one), one) for one in (near, far)]
    best = min(judge.moved_on(distance, judged, 1), key=lambda one: one.distance)
    assert best.drawing.sampler == "deis" and best.distance < 5
    alone = judge.moved_on(distance, judged[:1], 1)
    assert judged[0] in alone and len(alone) > 1 and {one.drawing.sampler for one in alone} == {"ipndm"}


def test_moves_begin_also_at_what_fewer_steps_have_found():
    """A valley that bumps keep more steps from, and fewer do not: there the last level is lower."""
    usual = Drawing(sampler="unipc", levels=(-9.0, -4.0, 1.0, 6.0))
    found = Drawing(sampler="deis", levels=(-9.0, -8.0, -6.0, 4.0), mean_first=True)

    def distance(drawing: Drawing) -> float:
        return abs(drawing.levels[-1] - 3.0) if drawing.levels[-1] < 5 else 9.0 - (drawing == usual)

    start = judge.Judged(distance(usual), usual)
    assert min(one.distance for one in judge.moved_on(distance, [start], 1)) == start.distance
    ways = judge.moved_on(distance, [start], 1, judge.respaced(found, 4))
    # The mean is no answer of the network: four answers are five levels with it.
    begun = next(one for one in ways if one.drawing.sampler == "deis")
    assert begun.drawing.levels == pytest.approx((-9, -8.25, -7, -3.5, 4)) and begun.distance == 1
    best = min(ways, key=lambda one: one.distance)
    assert best.distance == pytest.approx(0, abs=1e-9) and best.drawing.levels[-1] == pytest.approx(3)
    assert best.drawing.answers == 4 and best.drawing.mean_first
    assert judge.respaced(found, 3) == found, "as many are the same"


def test_many_other_pictures_decide_between_samplers():
    """The luckiest of few pictures loses to another kind's nearest; of one kind only the nearest is asked again,
    whether its noise comes by name or by eta, and of five kinds the farthest is not."""
    levels = (-9.0, 0.0, 6.0)
    lucky, steady, noisy, plain, worse, quiet, far = (
        judge.Judged(few, Drawing(sampler=name, eta=eta, levels=levels))
        for few, name, eta in (
            (3.3, "dpmpp_2m_late", None),
            (3.6, "ipndm", None),
            (3.8, "dpmpp_2m_sde", None),
            (4.0, "dpmpp_2m", None),
            (3.9, "dpmpp_2m_sde", 0.75),
            (4.5, "dpmpp_2m_sde", 0.0),
            (15.0, "unipc", None),
        )
    )
    many = {lucky: 2.0, steady: 1.2, noisy: 1.5, plain: 1.3}
    seen: list[Drawing] = []

    def final(drawing: Drawing) -> float:
        seen.append(drawing)
        return next(distance for one, distance in many.items() if one.drawing == drawing)

    assert judge.best_of(final, [far, quiet, worse, plain, noisy, steady, lucky]) == steady
    assert {*seen} == {one.drawing for one in many} and len(seen) == judge.FINALISTS == 4
    many[far] = 0.0
    assert judge.best_of(final, [lucky, far]) == far, "few pictures do not decide"
    # What fewer steps have found is asked again whatever few pictures say of it; once, where they say it is near.
    seen.clear()
    many[worse] = 0.5
    judged = [quiet, worse, plain, noisy, steady, lucky]
    assert judge.best_of(final, judged, worse.drawing) == worse and len(seen) == judge.FINALISTS + 1
    seen.clear()
    assert judge.best_of(final, judged, steady.drawing) == steady and len(seen) == judge.FINALISTS


def test_there_are_no_moves_to_where_nothing_is():
    short = Drawing(sampler="dpmpp_2m", levels=(-0.4, 0.4))
    assert judge.ended(short, 1) is None and judge.started(short, 1) is None, "the levels would fall"
    assert judge.ended(Drawing(levels=(0.0, 24.5)), -1) is None, "beyond what is drawn"
    assert judge.fresher(short, -1) is None and judge.fresher(Drawing(sampler="ipndm"), 1) is None
    fresh = Drawing(sampler="dpmpp_2m_sde")
    assert judge.fresher(fresh, 1) is None and judge.fresher(fresh, -1).eta == 0.75
    assert judge.fresher(Drawing(sampler="dpmpp_2m_late"), 1) is None


# the verb


@pytest.fixture(scope="module")
def digits(tiny, tmp_path_factory) -> Path:
    pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")
    out = tmp_path_factory.mktemp("tune") / "run"
    words = ["--steps", "30", "--batch", "16", "--precision", "fp32", "--config", str(tiny)]
    assert cli(["train", "builtin:digits", "--out", str(out), *words]) == 0
    return out


def fewer(monkeypatch, *, fine: int, pictures: int, real: int) -> None:
    """Levels and pictures than people have, so that tuning takes seconds."""
    for module, name, value in (
        (search, "FINE", fine),
        (search, "TRIED", pictures),
        (search, "LARGEST_BATCH", pictures),
        (judge, "JUDGED", pictures),
        (judge, "FINAL", pictures),
        (judge, "REAL", real),
    ):
        monkeypatch.setattr(module, name, value)


def test_a_tuned_run_draws_at_the_levels_found(digits, tmp_path, capsys, monkeypatch):
    fewer(monkeypatch, fine=15, pictures=16, real=300)

    def drawn(*words: str) -> tuple[dict, bytes]:
        assert cli(["sample", str(digits), "--count", "1", "--out", str(tmp_path), *words]) == 0
        return json.loads((tmp_path / "seed0-00000.json").read_text()), (tmp_path / "seed0-00000.png").read_bytes()

    before, picture = drawn("--steps", "6")
    words = ["tune", str(digits), "--pictures", "32", "--counts", "4", "6", "--samplers", "ddim", "ipndm"]
    assert cli(words) == 0
    assert "Frechet distances of 16 drawn" in " ".join(capsys.readouterr().err.split())
    kept = json.loads((digits / "evaluations" / "levels.json").read_text())["steps"]
    assert kept.keys() == {"4", "6"} and all(asked(kept[count]) == int(count) for count in kept)
    after, other = drawn("--steps", "6")
    assert (after["sampler"], after["levels"]) == (kept["6"]["sampler"], kept["6"]["levels"]) and other != picture
    assert drawn(*shlex.split(after["command"])[3:]) == (after, other), "its note draws it again"
    again = shlex.split(before["command"])[3:]
    assert drawn(*again)[1] == picture, "and so does a note of before the tuning"
    for words in (["--steps", "7"], ["--steps", "6", "--spacing", "time"], ["--steps", "6", "--guidance", "2"]):
        assert drawn(*words)[0]["sampler"] == suited(Run.open(digits))
    run = Run.open(digits)
    options = EvaluateOptions(digits, steps=6)
    assert order_of(run, options).drawing.levels == tuple(kept["6"]["levels"])
    assert order_of(run, options).drawing.answers == 6
    assert order_of(run, dataclasses.replace(options, sampler="unipc")).drawing.levels == ()
    assert order_of(run, EvaluateOptions(digits)).drawing.levels == ()


def asked(drawing: dict) -> int:
    """How often the network is asked at these levels."""
    return len(drawing["levels"]) - drawing.get("mean_first", False)


def test_it_judges_what_sample_would_draw(digits, monkeypatch):
    """In the precision of that, or in the one that is asked for."""
    asked: list[str] = []

    def opened(_run: Run, precision: Precision, *_more: object) -> None:
        asked.append(precision.name)
        raise UserError("seen enough")

    monkeypatch.setattr(Run, "load_model", opened)
    monkeypatch.setattr(Run, "drawing_precision", lambda _run, _device, name: Precision(torch.device("cpu"), name))
    for name in ("fp32", "bf16"):
        with pytest.raises(UserError, match="enough"):
            tune(TuneOptions(digits, precision=name))
    assert asked == ["fp32", "bf16"]


def test_real_pictures_decide(digits, monkeypatch):
    """Those of small distance come to the final, whose smallest wins, whatever is nearest to many steps; each candidate
    draws the same pictures."""
    fewer(monkeypatch, fine=9, pictures=8, real=50)
    seen: list[Drawing] = []

    def distance(_judge: object, drawing: Drawing) -> float:
        seen.append(drawing)
        return {"dpmpp_2m_sde": 0.0, "unipc": 0.1}.get(drawing.sampler, 1.0)

    def final(_judge: object, drawing: Drawing) -> float:
        return 1.0 - (drawing.sampler == "unipc")

    monkeypatch.setattr(judge.Judge, "distance", distance)
    monkeypatch.setattr(judge.Judge, "final", final)
    options = TuneOptions(digits, counts=(4,), samplers=("ddim", "dpmpp_2m"), pictures=8)
    file = tune(options)
    assert json.loads(file.read_text())["steps"]["4"]["sampler"] == "unipc"
    assert {one.sampler for one in seen} >= {"dpmpp_2m", "unipc", "dpmpp_2m_sde", "dpmpp_2m_late"}
    assert all(one.answers == 4 for one in seen) and len(set(seen)) == len(seen)
    assert {(one.sampler, one.mean_first) for one in seen} >= {("dpmpp_2m", True), ("dpmpp_2m", False)}
    assert {one.sampler for one in seen} >= {Drawing().sampler}, "what draws when nothing is asked for"
    late = {one.levels for one in seen if one.sampler == "dpmpp_2m_late" and one.mean_first}
    assert len(late) == 2, "at its usual levels, and at searched ones"
    file.unlink()


def test_more_steps_begin_also_where_fewer_ended(digits, monkeypatch):
    """In whatever order they are asked for: what four steps found is judged at levels for six, and in the final."""
    fewer(monkeypatch, fine=9, pictures=8, real=50)
    seen: list[Drawing] = []
    finals: dict[int, list[Drawing]] = {4: [], 6: []}

    def distance(_judge: object, drawing: Drawing) -> float:
        seen.append(drawing)
        # Lower at 1.5 than at any usual end, so that what four steps find lies where no candidate for six does.
        return abs(drawing.levels[-1] - 1.5) if drawing.answers == 4 else 99.0

    def final(court: object, drawing: Drawing) -> float:
        finals[drawing.answers].append(drawing)
        return distance(court, drawing)

    monkeypatch.setattr(judge.Judge, "distance", distance)
    monkeypatch.setattr(judge.Judge, "final", final)
    file = tune(TuneOptions(digits, counts=(6, 4), samplers=("ddim",), pictures=8))
    kept = json.loads(file.read_text())["steps"]["4"]
    found = Drawing(**{**kept, "levels": tuple(kept["levels"])})
    assert found in seen
    assert judge.respaced(found, 6) in seen and judge.respaced(found, 6) in finals[6]
    file.unlink()


def test_the_judge_sees_what_is_nearer(digits, monkeypatch):
    """Real pictures lie nearer to the training pictures than noise, and what is drawn is measured as it is."""
    run = Run.open(digits)
    model, _ = run.load_model(Precision(torch.device("cpu")))
    drew: list[int] = []
    court = judge.Judge.of(run, model, 1, drew.append)
    real = frechet_of(Pair(court.real, court.space.features(run.open_pictures().images[:256])))
    drawing = Drawing(steps=3)
    drawn = court.distance(drawing)
    assert real < drawn == court.distance(drawing) and drew == [judge.JUDGED] * 2
    asked: list[int] = []

    def noise(data, seed, numbers, device):
        asked.extend(numbers)
        return noise_of(data, seed, numbers, device)

    monkeypatch.setattr(judge, "noise_of", noise)
    monkeypatch.setattr(judge, "FINAL", 300)
    assert real < court.final(drawing) and drew[2:] == [300]
    assert asked == [*range(judge.JUDGED, judge.JUDGED + 300)], "others than those of `distance`"


def test_levels_of_other_weights_are_not_used(digits):
    run = Run.open(digits)
    state = run.state_of("newest")

    def known_for(steps: int) -> Drawing | None:
        found = usual(run, state, Drawing(steps=steps), sampler=None)
        return None if found == Drawing(steps=steps, sampler=suited(run) or "") else found

    noisy = Drawing(sampler="dpmpp_2m", eta=0.25, levels=(-6.0, 0.0, 1.0, 5.0))
    mean = Drawing(sampler="deis", levels=(-5.0, 0.0, 2.0, 5.0), mean_first=True)
    weights = checkpoint.digest_of(state)
    path = keep_tuned(run, weights, {3: Drawing(sampler="ipndm", levels=(-5.0, 0.0, 5.0)), 4: noisy})
    assert keep_tuned(run, weights, {3: mean}) == path and known_for(3) == mean and known_for(4) is None
    keep_tuned(run, weights, {3: Drawing(sampler="ipndm", levels=(-5.0, 0.0, 5.0)), 4: noisy})
    assert known_for(3) == Drawing(sampler="ipndm", levels=(-5.0, 0.0, 5.0)) and known_for(4) == noisy
    assert known_for(5) is None
    known = json.loads(path.read_text())
    of = known["steps"]["3"]
    for damage in (
        {**known, "weights": "other"},
        {**known, "steps": {"3": {**of, "levels": [3, 1, 2]}}},
        {**known, "steps": {"3": {**of, "levels": [1, 2]}}},
        {**known, "steps": {"3": {**of, "mean_first": True}}},
        {**known, "steps": {"3": {**of, "sampler": "magic"}}},
        {**known, "steps": {"3": {**of, "eta": 0.5}}},
        {**known, "steps": {"3": {**of, "eta": "much"}}},
        {**known, "steps": {"3": {**of, "levels": [10**400, 1, 2]}}},
        {"steps": 3},
        [],
    ):
        path.write_text(json.dumps(damage))
        assert known_for(3) is None, damage
    path.unlink()
    assert known_for(3) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samplers", "ddpm"], "no multistep sampler"),
        (["--samplers", "dpmpp_2m_sde"], "no multistep sampler"),
        (["--samplers", "dpmpp_2m_late"], "no multistep sampler"),
        (["--samplers", "dimm"], "ddim"),
        (["--counts", "2"], "from 3"),
        (["--pictures", "3"], "at least 32"),
        (["--device", "abacus"], "no device"),
    ],
)
def test_mistakes_are_one_sentence(digits, words, said, capsys):
    path = digits / "evaluations" / "levels.json"
    before = path.read_bytes() if path.exists() else None
    assert cli(["tune", str(digits), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_run_still_training_is_refused(digits, capsys):
    """Its state would be another one when all is found."""
    run = Run.open(digits)
    before = run.status()
    run.write_status("training")
    try:
        with lock(digits):
            assert cli(["tune", str(digits)]) == 2
        assert "is still training; wait for it" in capsys.readouterr().err
    finally:
        write_atomic(digits / "status.json", json.dumps(before))


def test_a_gan_has_nothing_to_tune(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")
    out = str(tmp_path / "run")
    assert cli(["train", "builtin:digits", "--model", "gan", "--out", out, "--steps", "2"]) == 0
    capsys.readouterr()
    assert cli(["tune", out]) == 2
    assert "nothing to tune" in capsys.readouterr().err


def test_one_picture_is_refused_before_anything_is_drawn(tmp_path, tiny, capsys):
    (tmp_path / "two").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "two" / f"{number}.png")
    out = str(tmp_path / "run")
    words = ["--steps", "2", "--precision", "fp32", "--config", str(tiny)]
    assert cli(["train", str(tmp_path / "two"), "--out", out, *words]) == 0
    capsys.readouterr()
    assert cli(["tune", out]) == 2
    said = capsys.readouterr().err
    assert "was trained on one picture" in said and said.count("\n") == 1
