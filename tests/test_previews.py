"""The pictures of previews, drawn a few at a time."""

from types import SimpleNamespace

import pytest
import torch

from snowmelt.config import DataConfig
from snowmelt.diffusion.walk import Step
from snowmelt.models.base import Drawing
from snowmelt.presets import preset
from snowmelt.training import previews
from snowmelt.training.previews import MOMENTS, Previews


class Halving:
    """Draws by halving the noise and adding the class, and says how many pictures it was asked for."""

    at_once = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample(self, noise, labels, drawing):
        x = noise(0)
        self.asked.append(len(x))
        for _ in range(drawing.count):
            x0 = x / 2 + (0 if labels is None else labels[:, None, None, None])
            yield Step(x, torch.zeros(()), x0)
            x = x0


def drawer(classes: tuple[str, ...], *, stop: bool = False) -> tuple[Previews, Halving]:
    config = preset(DataConfig(4, 1, classes=classes), "diffusion")
    model, one = Halving(), object.__new__(Previews)
    # Of a run, a model and a stop only what drawing needs, which the check of types would not take.
    one.__dict__.update(run=SimpleNamespace(config=config), model=model, device=torch.device("cpu"))
    one.__dict__.update(stop=SimpleNamespace(requested=stop), log=print)
    return one, model


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_a_few_at_a_time_are_the_same_pictures(monkeypatch, classes):
    monkeypatch.setattr(previews, "drawn_at_once", lambda _: 64)
    one, model = drawer(classes)
    whole, count = one.draw(), 8 * len(classes) or 36
    monkeypatch.setattr(previews, "drawn_at_once", lambda _: 7)
    other, parts = drawer(classes)
    few = other.draw()
    assert whole is not None and few is not None
    assert model.asked == [count] and sum(parts.asked) == count and max(parts.asked) == 7
    assert torch.equal(whole.pictures, few.pictures) and len(whole.pictures) == count
    # A strip: the first picture of each row, from its noise on.
    moments = min(MOMENTS, previews.DRAWING.count)
    assert len(whole.strip) == len(few.strip) == moments + 1 and all(map(torch.equal, whole.strip, few.strip))
    rows = len(classes) or 6
    assert len(few.strip[0]) == rows and torch.equal(few.strip[-1], few.pictures[:: one.columns])


@pytest.mark.parametrize(
    ("at_once", "most", "tried", "each"),
    [(False, 100.0, 6, 15 * 1.0), (False, 12.0, 4, 15 * 1.0), (True, 100.0, 1, 10.0)],
)
def test_all_are_foreseen_from_the_first(monkeypatch, at_once, most, tried, each):
    """By a clock that steps move: the first takes ten seconds, one beside a neighbour five, all others one."""
    monkeypatch.setattr(previews, "drawn_at_once", lambda _: 9)
    monkeypatch.setattr(previews, "DRAWING", Drawing(steps=15))
    now, durations = [0.0], [10.0, 1.0, 1.0, 5.0, *[1.0] * 20]
    monkeypatch.setattr(previews, "time", SimpleNamespace(monotonic=lambda: now[0]))
    one, model = drawer(())
    model.at_once, honest = at_once, model.sample

    def sample(*given):
        for step, duration in zip(honest(*given), durations, strict=False):
            now[0] += duration
            yield step

    monkeypatch.setattr(model, "sample", sample)
    seconds, pictures, times = one.foreseen(most)
    assert model.asked == [9] and len(pictures) == 9 and times == 4
    assert now[0] == sum(durations[:tried]) and seconds == 4 * each


def test_a_run_that_is_stopped_draws_nothing(monkeypatch):
    one, model = drawer((), stop=True)
    assert one.draw() is None and one.draw_at_last() is None and len(model.asked) == 2
    monkeypatch.setattr(previews, "drawn_at_once", lambda _: 20)

    class Later:
        @property
        def requested(self) -> bool:
            return len(model.asked) == 4

    one.__dict__["stop"] = Later()
    assert one.draw() is None and model.asked[2:] == [20, 16]


@pytest.mark.parametrize(
    ("classes", "seconds", "count"),
    [((), 20.0, 36), ((), 21.0, 18), ((), 60.0, 12), ((), 1000.0, 6), (("a", "b", "c"), 1000.0, 6)],
)
def test_where_drawing_takes_long_there_are_fewer(classes, seconds, count):
    """In 20 seconds, for which all pictures would take `seconds`; of a class at least two."""
    one, _ = drawer(classes)
    said = list[str]()
    one.__dict__["log"] = said.append
    whole = 8 * len(classes) or 36
    assert one.limit(seconds, 20.0) == count / whole and len(said) == (count < whole)
    drawn = one.draw()
    assert drawn is not None and len(drawn.pictures) == count
    assert one.limit(seconds / one.divisor, 20.0) == 1, "asked again, it stays so"
