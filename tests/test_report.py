"""The report of a run: it holds what the run holds, at whatever stage, asks for nothing, and its timeline moves."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from conftest import open_page
from snowmelt.cli import run as cli
from snowmelt.config import Config, DataConfig
from snowmelt.evaluating.tables import quality_tables
from snowmelt.prepare import PrepareOptions, prepare
from snowmelt.report import ReportOptions, report
from snowmelt.reporting.course import BUDGET, previews
from snowmelt.reporting.page import settings, state_of
from snowmelt.run import Run, lock

HOSTILE = "<img src=x onerror=alert(1)>{{name}} $x$"
MOMENTS = (1, 40, 80)


def grey(value: int, size: int = 24) -> Image.Image:
    """One picture of a timeline that can be told from the others."""
    return Image.fromarray(np.full((size, size), value, np.uint8))


def pictures(folder: Path) -> Path:
    """Two classes, one with a hostile name, and files that are skipped."""
    rng = np.random.default_rng(0)
    for name, count in (("cats", 12), (HOSTILE.replace("/", ""), 6)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{index}.png")
    (folder / "cats" / "no <b>picture.png").write_text("words", encoding="utf-8")
    return folder


def measure(**more) -> dict:
    fields = {"metric": "frechet", "title": "Fréchet distance", "space": "trained", "better": "lower", "value": 7.31}
    fields |= {"low": 6.9, "high": 7.7, "floor": 1.25, "floor_low": 1.1, "floor_high": 1.4}
    return {**fields, "samples": 500, "real": 400, "reason": "", **more}


def figures() -> dict:
    nothing = dict.fromkeys(("value", "low", "high", "floor", "floor_low", "floor_high"))
    part = {"train": 0.1, "held_out": 0.12, "difference": 0.02, "low": 0, "high": 0.04}
    return {
        "checkpoint": "000000080",
        "samples": 1000,
        "real": 400,
        "reference": "held-out pictures",
        "seed": 0,
        "drawing": {"sampler": "ddim", "steps": 50},
        "seconds": {"drawing": 60, "per_picture": 0.06, "features": 3, "measuring": 4},
        "figures": [measure(), measure(metric="recall", title="Recall", **nothing, reason="Too few pictures for it.")],
        "classes": {
            "recognised": [0.9, 0.88, 0.92],
            "recognised_real": [0.97, 0.96, 0.98],
            "as_asked": [0.8, 0.7, 0.9],
            "balance": {"cats": 0.7},
            "balance_real": {"cats": 0.66},
            "distance": 0.04,
        },
        "memorization": {
            "samples": 1000,
            "training": 17,
            "copies": {"share": 0.021, "low": 0.012, "high": 0.035, "count": 21, "false_alarms": 0.004},
            "closer": {"share": 0.55, "low": 0.5, "high": 0.6},
            "duplicates": 1,
            "held_out": 24,
            "gap": [{"name": f"error at log-SNR {level:+d}", **part} for level in (-4, 0, 4)]
            + [{"name": name, **part} for name in ("held_out_loss", "squared error", "critic score", "active latents")],
            "pairs": [{"sample": 17, "training": 3, "flipped": True, "ratio": 0.137, "distance": 1.5, "flagged": True}],
        },
        "spaces": {"trained": {"about": "An encoder trained on the folder.", "dimension": 64}},
        "not_measured": ["DINOv2: its weights are not here."],
    }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run with everything a run can have, made without training."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "my <run>"
    path.mkdir()
    prepare(PrepareOptions(str(pictures(folder / "pictures")), out=path / "data", size=8))
    facts = json.loads((path / "data/dataset.json").read_text(encoding="utf-8"))
    counts = tuple(int(count) for count in np.bincount(np.load(path / "data/labels.npy"), minlength=2))
    data = DataConfig(8, 3, tuple(facts["classes"]), counts, facts["std"], facts["fingerprint"])
    run = Run.create(path, Config(data=data, version="0.0.7", request={"source": "pictures & co"}))
    for step in MOMENTS:
        line = {"step": step, "images": 64 * step}
        run.append_metrics(
            {**line, "loss": 1.5 / step, "learning_rate": 1e-3, "images_per_second": 30.5, "memory": 2**30}
        )
        levels = {f"error at log-SNR {level:+d}": 0.5 / step / (level + 9) for level in (-8, 0, 6)}
        run.append_metrics({**line, **levels, "KL bits": 0.1, "held_out_loss": 2.0 / step, "train_loss": 1.9 / step})
        grey(step).save(run.folder("previews") / f"{step:09d}.png")
    run.append_metrics({"step": 80, "images": 5120, "alarm": "memorization", "text": f"By heart, {HOSTILE}."})
    run.write_status("finished", step=80, horizon=80, images=5120, seconds=125.0, forecast="Half as much again.")
    for name in ("grid", "strip", "reconstructions"):
        grey(90).save(path / f"{name}.png")
    grey(120).save(run.folder("samples") / "seed0-00000.png")
    quality = path / "evaluations" / "quality"
    (quality / "pairs").mkdir(parents=True)
    for name in ("samples.png", "pairs/00-sample.png", "pairs/00-training.png"):
        grey(200).save(quality / name)
    (quality / "figures.json").write_text(json.dumps(figures()), encoding="utf-8")
    bits = {"bits_per_dim": {"bound": {"mean": 3.456, "standard_error": 0.012}}}
    (path / "evaluations" / "bits.json").write_text(json.dumps(bits), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(whole_run) -> Path:
    return report(ReportOptions(whole_run))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_page_holds_what_the_run_holds(page, whole_run):
    text = text_of(page)
    assert page == whole_run / "report.html"
    told = (
        "The training is finished, after 80 steps.|5,120 images seen|trained for 2:05|Snowmelt 0.0.7|cats|17 and 3"
        "|18 pictures used|1 files skipped|7.31|6.90 to 7.70|1.25|Too few pictures for it.|2.1 %|1.2 to 3.5 %|0.137"
        "|An encoder trained on the folder.|mirrored|DINOv2: its weights are not here.|3.46|± 0.012|KL bits"
        "|It began to learn pictures by heart|90.0 %|500 / 400|60 ms for each|4.0 %|drawn with sampler ddim, steps 50"
        "|Held-out pictures, and what the model makes|Half as much again."
    )
    for words in told.split("|"):
        assert words in text, words
    assert "could not be read" not in text
    assert text.count('<figure class="chart">') == 8, "seven curves and the gap"


def test_it_asks_for_nothing(page):
    text = text_of(page)
    assert "default-src 'none'" in text and "http:" not in text and "https:" not in text
    links = re.findall(r'<[a-z]+[^>]*?(?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all('alt="' in found for found in re.findall(r"<img[^>]*>", text))
    assert len(text) < 6_000_000


def test_names_are_only_shown(page):
    text = text_of(page)
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "<h1>my &lt;run&gt;</h1>" in text and "no &lt;b&gt;picture.png" in text
    assert "<b>picture" not in text and "onerror=alert(1)&gt;{{name}} $x$" in text


def test_a_timeline_of_large_previews_is_thinned_and_shrunk(tmp_path):
    """Noise does not compress: 26 previews of 200 x 200 are 3 MB."""
    run = Run.create(tmp_path / "run", Config(data=DataConfig(8, 3)))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    for step in range(26):
        noise.save(run.folder("previews") / f"{step:09d}.png", compress_level=1)
    text = previews(run)
    assert "24 of the 26 previews" in text and "JPEG" in text
    assert 500_000 < len(text) < 1.05 * BUDGET * 4 / 3 + 60_000


@pytest.mark.parametrize(
    "status, said",
    [
        ({"state": "training", "step": 30, "horizon": 120}, "interrupted after step 30 of 120 (25% of the way)"),
        ({"state": "stopped", "step": 30}, "stopped at step 30; it can be continued"),
        ({"state": "failed", "step": 3, "error": "The disk is full."}, "failed at step 3: The disk is full."),
        ({"state": "training", "step": "many", "horizon": []}, "interrupted after step 0"),
        ([], "has not said anything"),
    ],
)
def test_every_state_has_its_sentence(tmp_path, status, said):
    run = Run.create(tmp_path / "run", Config(data=DataConfig(8, 1)))
    (run.path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert said in state_of(run)


def test_a_run_that_was_imported_without_pictures_is_not_to_be_continued(tmp_path):
    run = Run.create(tmp_path / "run", Config(data=DataConfig(8, 1), request={"folder": "theirs"}))
    run.write_status("stopped", step=0)
    assert "no pictures to train on" in state_of(run)
    assert "--resume" not in settings(run) and "evaluate" not in settings(run)


def test_a_run_is_training_while_someone_holds_it(tmp_path):
    run = Run.create(tmp_path / "run", Config(data=DataConfig(8, 1)))
    run.write_status("training", step=30, horizon=120)
    with lock(run.path):
        assert "still training: step 30 of 120 (25% of the way)" in state_of(run) and "--resume" not in settings(run)
    assert "interrupted" in state_of(run) and "--resume" in settings(run)


def test_errors_by_heart_are_those_that_grow(page):
    text = text_of(page)
    assert "squared error" in text and "critic score" not in text and "active latents" not in text


def test_what_was_not_told_is_a_sentence(tmp_path, whole_run):
    """No recognised classes, no gap, one step of drawing, a reference that was learned from."""
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    found = figures() | {"drawing": {}, "reference": "all pictures", "not_measured": ["Errors: not kept."]}
    found["classes"] = {"recognised": None, "as_asked": None, "reason": "the encoder names 60 % of them"}
    found["memorization"]["gap"] = []
    (run / "evaluations/quality/figures.json").write_text(json.dumps(found), encoding="utf-8")
    text = text_of(report(ReportOptions(run)))
    for said in (
        "drawn in a single step",
        "The encoder names 60 % of them.",
        "Errors: not kept.",
        "learned from: a model",
    ):
        assert said in text, said
    assert "could not be read" not in text and "The gap" not in text


def test_a_run_of_nothing_but_its_settings(tmp_path):
    """As an import without pictures, or the first second of a run."""
    run = Run.create(tmp_path / "run", Config(data=DataConfig(8, 1), model="gan"))
    out = tmp_path / "elsewhere.html"
    text = text_of(report(ReportOptions(run.path, out=out)))
    told = "has no pictures yet|has no previews|not written down any losses|imported without pictures|no checkpoint yet"
    for words in (*told.split("|"), "were not measured yet", "generative adversarial", "model = &quot;gan&quot;"):
        assert words in text, words
    assert "could not be read" not in text and not (run.path / "report.html").exists()


def test_damage_is_told_where_it_is(whole_run, tmp_path):
    run = Path(shutil.copytree(whole_run, tmp_path / "damaged"))
    (run / "evaluations/quality/figures.json").write_text("{", encoding="utf-8")
    (run / "evaluations/bits.json").write_text('{"bits_per_dim": {"bound": "three"}}', encoding="utf-8")
    (run / "data/report.json").write_text('{"files": 3, "duplicates": [[1]]}', encoding="utf-8")
    (run / "grid.png").write_text("no picture", encoding="utf-8")
    (run / "previews/000000040.png").write_bytes(b"\x89PNG")
    (run / "samples/seed0-00000.png").write_bytes(b"")
    lines = ['{"step": 1, "images": "x", "loss": "NaN"}', '{"step": 2, "loss": NaN}', '{"step": 3', "[]", "5"]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = text_of(report(ReportOptions(run)))
    assert "The evaluation (quality/figures.json) could not be read" in text and "grid.png could not be read" in text
    assert "seed0-00000.png is damaged" in text and "All 3 previews" not in text
    (run / "evaluations/quality/figures.json").write_text(
        json.dumps({"figures": [3, {"value": True}], "memorization": [], "classes": {"balance": 3}, "seconds": "x"}),
        "utf-8",
    )
    (run / "data/images.npy").write_bytes(b"")
    text = text_of(report(ReportOptions(run)))
    assert "is damaged" in text and "Traceback" not in text


def test_mistakes_are_one_sentence(whole_run, page, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    grey(5).save(photo)
    for words, said in (
        ([str(tmp_path / "nowhere")], "There is no run at"),
        ([str(tmp_path)], "is not a run"),
        ([str(whole_run), "--out", str(photo)], "is not a report that could be replaced"),
        ([str(whole_run), "--out", str(tmp_path)], "is a folder"),
        ([str(whole_run), "--out", str(tmp_path / "no" / "page.html")], "There is no folder"),
    ):
        assert cli(["report", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.strip().count("\n") == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert cli(["report", str(whole_run)]) == 0, "a report replaces a report"


def test_the_timeline_moves_in_a_browser_and_the_page_fits(browser, page):
    tab, asked, complaints = open_page(browser, page, width=390)
    slider = tab.locator("#preview-slider")
    for place, step in enumerate(MOMENTS):
        slider.fill(str(place))
        assert tab.locator("[data-text=step]").inner_text() == str(step)
        assert tab.evaluate(SHOWN, "preview-stage") == step, "the picture is that of the moment"
    slider.press("ArrowLeft")
    assert tab.locator("[data-text=images]").inner_text() == f"{64 * MOMENTS[1]:,}"
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


SHOWN = """async id => {
  const image = document.getElementById(id), canvas = document.createElement("canvas");
  await image.decode();
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { colorSpace: "srgb" });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, 1, 1).data[0];
}"""


def test_a_terminal_says_what_the_page_says(capsys):
    """One of 25 real held-out pictures is a training picture to the eye: 24 others said what is usual."""
    found = figures() | {"spaces": {"trained": {"reference": "held-out pictures"}}}
    for table in quality_tables(found):
        Console(width=160).print(table)
    words = " ".join(capsys.readouterr().out.split())
    assert "twins │ 4.0 % │" in words and "others │ 0.4 % │" in words
