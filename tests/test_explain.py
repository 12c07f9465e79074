"""The explanation of a photo: its pixels and curves are the library's, its page asks for nothing, its slider moves."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import open_page, stirred
from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.config import Config, DataConfig, UNetConfig
from snowmelt.data.pixels import to_images, to_pixels
from snowmelt.device import make_precision
from snowmelt.diffusion.exact import gaussian_denoiser
from snowmelt.diffusion.process import alpha_bars, forward_jump, linear_betas, log_snr_table
from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.explain import ExplainOptions, explain
from snowmelt.explaining import charts, parts
from snowmelt.explaining.network import Network, StepBack, compare, falling, fitting_label, total_bits
from snowmelt.explaining.process import Process, betas_of, histogram, measured, walk_back, walked
from snowmelt.explaining.reverse import _errors
from snowmelt.models import build_model
from snowmelt.pages.charts import LIGHT
from snowmelt.pages.markup import fill, number
from snowmelt.pages.mathml import mathml
from snowmelt.run import Run
from snowmelt.seeds import noise_source

STEPS = 60
SIZE = 16


def photo_pixels() -> np.ndarray:
    """A sky, a sun and a meadow of stripes: something with outline, colour and texture."""
    row, column = np.mgrid[:SIZE, :SIZE]
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[..., 2] = 255 - 8 * row
    picture[(row - 4) ** 2 + (column - 11) ** 2 < 9] = (250, 220, 40)
    picture[row > 10] = (30, 140, 40)
    picture[(row > 10) & (column % 2 == 0)] = (90, 220, 60)
    return picture


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "my photo.png"
    Image.fromarray(photo_pixels()).save(path)
    return path


@pytest.fixture(scope="module")
def page(photo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "explained"
    return explain(ExplainOptions(photo, out=out, size=SIZE, steps=STEPS))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A colour run with classes, a small untrained network and held-out errors."""
    data = DataConfig(size=SIZE, channels=3, classes=("light", "dark"), counts=(8, 8))
    network = UNetConfig(channels=(8, 16), attention=(False, False), head_channels=8, middle_attention=False)
    made = Run.create(tmp_path_factory.mktemp("run") / "run", Config(data=data, network=network))
    weights = stirred(build_model(made.config, make_precision(torch.device("cpu"), "fp32"))).state_dict()
    checkpoint.save(made.folder("checkpoints"), 1, {"average": weights}, {"step": 1})
    made.append_metrics({"step": 1, "error at log-SNR -2": 0.4, "error at log-SNR +2": 0.1})
    return made.path


@pytest.fixture(scope="module")
def network_page(photo, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "explained"
    return explain(ExplainOptions(photo, run=run, out=out, steps=30))


def frames_of(page: Path, name: str = "forward-frames") -> list[dict]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S).group(1))


def source_of(page: Path, address: str) -> str:
    """The data address of a frame's picture, also where the frame points to one of the page."""
    if not address.startswith("#"):
        return address
    return re.search(rf'<img id="{address[1:]}" src="([^"]+)"', page.read_text(encoding="utf-8")).group(1)


def decoded(address: str) -> np.ndarray:
    kind, data = address.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


# the pixels and the numbers


def test_every_picture_of_the_slider_is_the_librarys(page):
    """Bit for bit: x_t = forward_jump(x_0, alpha_bar_t, noise), the noise that `snowmelt sample` starts from."""
    x0 = to_images(torch.from_numpy(photo_pixels())[None])
    noise = noise_source([0], [0], (3, SIZE, SIZE))(0)
    bars = [1.0, *alpha_bars(betas_of(SCHEDULES["linear"], STEPS)).tolist()]
    frames = frames_of(page)
    assert [frames[0]["t"], frames[-1]["t"]] == [0, STEPS] and len(frames) >= 40
    for frame in frames:
        expected = to_pixels(forward_jump(x0, bars[frame["t"]], noise))[0].numpy()
        assert np.array_equal(decoded(source_of(page, frame["images"]["x"])), expected), frame["t"]
        assert frame["shares"]["signal"] == pytest.approx(math.sqrt(bars[frame["t"]]), abs=1e-9)
    assert np.array_equal(decoded(source_of(page, frames[0]["images"]["x"])), photo_pixels())


def test_the_linear_schedule_is_ddpms_table():
    """To rounding: its levels are read from that table and turned back."""
    assert (betas_of(SCHEDULES["linear"], 1000) - linear_betas()).abs().max() < 1e-12


def test_the_curves_are_the_process():
    from matplotlib.figure import Figure

    process = Process.of(torch.zeros(1, 1, 8, 8), SCHEDULES["linear"], 1000, 0)
    betas = linear_betas()
    bars = alpha_bars(betas)
    expected = (1 - betas, betas, bars, bars.sqrt(), (1 - bars).sqrt(), log_snr_table(betas))
    drawn = charts.schedule_charts(process, "linear")
    for chart, values in zip(drawn, expected, strict=True):
        axes = Figure().subplots()
        chart.draw(axes, LIGHT.__getitem__)
        assert {line.get_label() for line in axes.lines} == set(SCHEDULES)
        line = next(line for line in axes.lines if line.get_label() == "linear")
        times = line.get_xdata().astype(int)
        assert (times[0], times[-1]) == (1, 1000)
        # The log-SNR divides by numbers of 1e-4, which costs the table's last digits.
        assert np.allclose(line.get_ydata(), values.numpy()[times - 1], rtol=1e-9, atol=1e-9), chart.title


def test_walking_and_jumping_agree():
    """Both have the weights of the equation, within five standard errors of a measurement over n values."""
    x0 = to_images(torch.from_numpy(photo_pixels())[None])
    process = Process.of(x0, SCHEDULES["linear"], 40, 0)
    forward = walked(process, [10, 25, 40], seed=0)
    n, power = forward.values, forward.copies * x0.square().sum().item()
    for one in forward.agreement:
        for found in (one.walked, one.jumped):
            assert abs(found.signal - one.equation.signal) < 5 * one.equation.noise / math.sqrt(power)
            assert abs(found.noise - one.equation.noise) < 5 * one.equation.noise / math.sqrt(2 * n)
    exact = measured(0.6 * x0, x0)
    assert exact.signal == pytest.approx(0.6, abs=1e-5) and exact.noise == pytest.approx(0, abs=1e-5)


def test_one_who_knows_the_photo_finds_back_to_it():
    x0 = to_images(torch.from_numpy(photo_pixels())[None])
    process = Process.of(x0, SCHEDULES["cosine"], 30, 0)
    way = list(walk_back(process, 0))
    assert [way[0].t, way[-1].t] == [29, 0]
    # The last step has no variance and gives the photo all of the weight.
    assert (way[-1].x - x0).abs().max() < 1e-12 and (way[0].x - x0).abs().mean() > 0.5


def test_a_histogram_is_a_density_and_what_the_equation_says():
    rng = torch.Generator().manual_seed(0)
    process = Process.of(torch.rand(1, 1, 64, 64, generator=rng) * 2 - 1, SCHEDULES["linear"], 1000, 0)
    for t in (300, 1000):
        one = histogram(process, t)
        width = (one.places[1] - one.places[0]).item()
        assert one.counted.sum().item() * width == pytest.approx(1, abs=1e-9)
        # 4096 values: the share of a bin has a standard error of at most sqrt(0.04 / 4096).
        assert ((one.counted - one.expected).abs() * width).max() < 5 * math.sqrt(0.04 / 4096)
    assert not histogram(process, 0).expected.any(), "a photo is a row of spikes"


# the network


MEAN, STD = 0.1, 0.25


def test_the_cost_of_a_photo_is_its_bound():
    """For pictures N(MEAN, STD^2) and their exact denoiser every term of the bound is known in closed form.

    E |x_0 - x0_hat|^2 = STD^2 / (1 + SNR STD^2), so L_t-1 = (SNR_t-1 - SNR_t) / 2 times that; and L_0 is the decoder's
    Gaussian of variance beta_1 over bins of 2 / 255. The sum is at least the entropy. One draw of noise for 16,384
    values leaves sqrt(2 / 16384) = 1.1 % of luck; four times that is allowed.
    """
    rng = torch.Generator().manual_seed(1)
    x0 = to_images(to_pixels((MEAN + STD * torch.randn(1, 1, 128, 128, generator=rng)).clamp(-1, 1)))
    process = Process.of(x0, SCHEDULES["linear"], 400, 0)
    exact = gaussian_denoiser(torch.tensor(MEAN), torch.tensor(STD))
    network = Network(lambda count: exact, torch.device("cpu"))
    steps = [compare(network, process, t) for t in range(1, 401)]
    snr = [math.exp(process.log_snr(t)) for t in range(1, 401)]
    errors = [STD**2 / (1 + one * STD**2) for one in snr]
    terms = sum((snr[t - 1] - snr[t]) / 2 * errors[t] for t in range(1, 400)) / math.log(2)
    beta = process.beta(1)
    last = math.log2(math.sqrt(2 * math.pi * beta)) + errors[0] / (2 * beta) / math.log(2) + math.log2(255 / 2)
    found = total_bits(steps) + process.prior_bits()
    assert found == pytest.approx(terms + last, rel=0.044)
    assert found > math.log2(STD * math.sqrt(2 * math.pi * math.e)) + math.log2(255 / 2)
    few = [one for one in steps if one.t < 10 or one.t % 4 == 0]
    assert total_bits(few) == pytest.approx(total_bits(steps), rel=0.02), "the terms between are on a line"
    one = steps[100]
    # Where the variances are equal, the divergence is the squared distance of the means over twice the variance.
    assert one.kl_true == pytest.approx(one.mean_gap**2 / (2 * one.true_std**2) / math.log(2), rel=1e-6)
    snr = [math.exp(process.log_snr(t)) for t in (one.t - 1, one.t)]
    assert one.kl_true == pytest.approx((snr[0] - snr[1]) * one.belief_error / 2 / math.log(2), rel=1e-4)
    assert one.kl_wide > 0 and one.wide_std > one.true_std


def test_the_outline_of_a_blurred_belief_comes_before_its_texture():
    picture = to_images(torch.from_numpy(photo_pixels())[None])
    blurs = [parts.blur(picture, width) for width in (4.0, 2.0, 1.2, 0.7)]
    found = parts.appearances([torch.zeros_like(picture), *blurs, picture])
    assert found["outline"].half < found["texture"].half
    assert all(one.shares[0] == 0 and one.shares[-1] == 1 for one in found.values())
    split = parts.split(picture)
    luma = (picture * torch.tensor(parts.LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(split.outline + split.texture, luma, atol=1e-6)
    grey = parts.appearances([torch.zeros(1, 1, 8, 8), torch.rand(1, 1, 8, 8)])
    assert set(grey) == {"outline", "texture"}, "grey has no colour to appear"
    assert parts.stays([0.0, 0.6, 0.4, 0.7, 1.0]) == 3


def test_with_a_run_the_page_goes_on(network_page):
    text = network_page.read_text(encoding="utf-8")
    frames = frames_of(network_page, "back-frames")
    assert [frames[0]["t"], frames[-1]["t"]] == [30, 1]
    start = decoded(frames[0]["images"]["ddim_x"])
    forward = decoded(source_of(network_page, frames_of(network_page)[-1]["images"]["x"]))
    assert np.array_equal(start, forward), "the way back begins in the very noise in which the photo ended"
    assert np.array_equal(start, decoded(frames[0]["images"]["ddpm_x"]))
    assert "it is told the class" in text and "DDPM" in text and "the colour" in text
    assert "on pictures held out of training" in text, "the run has measured some"
    names = {path.name for path in network_page.parent.iterdir()}
    assert names >= {"reverse.png", "beliefs.png", "steps.png", "parts.png", "errors.png", "forward.png", "curves.png"}
    with Image.open(network_page.parent / "reverse.png") as sheet:
        assert sheet.width > 9 * 90 and sheet.height > 4 * 90, "ten columns, four rows"


@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_network_is_told_the_class_that_is_asked_for(photo, run, tmp_path, name):
    page = explain(ExplainOptions(photo, run=run, out=tmp_path / "page", steps=10, class_name=name))
    assert f"it is told the class <em>{name}</em>" in page.read_text(encoding="utf-8")


def test_the_class_that_fits_is_the_one_that_misses_least(run, monkeypatch):
    model, _ = Run.open(run).load_model(make_precision(torch.device("cpu"), "fp32"))
    x0 = to_images(torch.from_numpy(photo_pixels())[None])
    process = Process.of(x0, SCHEDULES["cosine"], 30, 0)
    for known in (0, 1):
        guesses = {known: x0, 1 - known: torch.zeros_like(x0)}
        networks = {label: SimpleNamespace(believe=lambda *_, guess=guess: guess) for label, guess in guesses.items()}
        monkeypatch.setattr(Network, "of", lambda _model, label, networks=networks: networks[label])
        assert fitting_label(model, process, 0) == known


@pytest.mark.parametrize(
    "error, said", [(2.0, "2 times as hard"), (0.5, "2 times as easy"), (0.9, "about as hard"), (None, "")]
)
def test_how_hard_a_photo_is_is_said_where_it_is_known(error, said):
    """Errors of the photo at two levels; of held-out pictures it is 1 at one of them, or at a level far away."""
    steps = [StepBack(t, level, error or 1.0, *[0.1] * 5) for t, level in ((10, 4.0), (500, -2.0))]
    remark = _errors(steps, {4.0: 1.0} if error else {9.0: 1.0})["error_remark"]
    assert said in remark and ("Your photo" in remark) == bool(said)


def test_the_same_again_is_the_same_bytes(photo, run, page, network_page, tmp_path):
    """And replaces an earlier explanation, of whatever it was."""
    shutil.copytree(page.parent, tmp_path / "here")
    again = explain(ExplainOptions(photo, run=run, out=tmp_path / "here", steps=30))
    assert again.read_bytes() == network_page.read_bytes()
    assert sorted(path.name for path in again.parent.iterdir()) == sorted(
        path.name for path in network_page.parent.iterdir()
    )


def test_falling_steps_end_at_the_first():
    assert falling(1000, 5) == [1000, 750, 500, 251, 1]
    assert falling(3, 25) == [3, 2, 1] and falling(1, 25) == [1]


# the page


def test_the_page_asks_for_nothing_and_is_small(page, network_page):
    for one in (page, network_page):
        text = one.read_text(encoding="utf-8")
        assert "http:" not in text and "https:" not in text and "//" not in re.sub(r"base64,[\w+/=]+|// .*", "", text)
        assert "default-src 'none'" in text and "unsafe-eval" not in text and "{{" not in text
        links = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert links and all(link.startswith(("data:image/png", "#")) for link in links)
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids), "charts point into themselves only"
        assert len(text) < 5_000_000


def test_the_default_size_makes_a_page_under_5_megabytes(tmp_path):
    """Noise does not compress, so its size hardly depends on the photo: 46 moments and 26 more pictures."""
    from snowmelt.explaining.forward import BUDGET, _frames

    process = Process.of(torch.zeros(1, 3, 128, 128), SCHEDULES["linear"], 1000, 0)
    assert _frames(process) == 46
    assert (46 + 26) * process.x0.numel() * 4 / 3 < 5_000_000 and BUDGET * 2 < 5_000_000
    large = Process.of(torch.zeros(1, 3, 256, 256), SCHEDULES["linear"], 1000, 0)
    assert _frames(large) == 19


def test_formulas_and_numbers():
    assert mathml(r"x_{t-1}^2") == (
        "<math><msubsup><mi>x</mi><mrow><mi>t</mi><mo>−</mo><mn>1</mn></mrow><mn>2</mn></msubsup></math>"
    )
    assert mathml(r"\sqrt{\bar\alpha_t}").count("<msqrt>") == 1
    assert "<b>5</b>" in fill(r"\( x_0 \) is {{value}}", {"value": "<b>5</b>"})
    with pytest.raises(AssertionError):
        fill("{{missing}}", {})
    assert [number(value) for value in (0.1354, -4.3, 4.04e-5, 0.0, 1.0, 0.0045, 1234.5)] == [
        "0.135", "−4.30", "4.0 · 10⁻⁵", "0", "1", "0.0045", "1,234",
    ]  # fmt: skip


# mistakes


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    photo = str(folder / "photo.png")
    return {
        "no photo": (["notes.txt"], "is no photo that can be used: not an image"),
        "half a photo": (["half.png"], "damaged"),
        "nothing there": (["nowhere.png"], "There is no file nowhere.png"),
        "a folder": (["folder"], "is a folder; name one photo"),
        "unknown schedule": ([photo, "--schedule", "cosin"], "did you mean 'cosine'?"),
        "no steps": ([photo, "--steps", "0"], "--steps is 0; give a number from 10"),
        "size": ([photo, "--size", "5000"], "--size is 5000"),
        "no run": ([photo, "--run", "nowhere"], "There is no run at nowhere"),
        "a folder as run": ([photo, "--run", "folder"], "is not a run"),
        "class without run": ([photo, "--class", "cat"], "name a run with --run"),
        "foreign folder": ([photo, "--out", "folder"], "holds files that are not an explanation's"),
        "a file in the way": ([photo, "--out", "notes.txt", "--size", "8", "--steps", "10"], "is a file"),
        "unknown option": ([photo, "--step", "10"], "did you mean '--steps'?"),
    }


@pytest.mark.parametrize("name", mistakes(Path()))
def test_a_mistake_is_one_sentence_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo_pixels()).save("photo.png")
    Path("notes.txt").write_text("a diary", encoding="utf-8")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save("half.png")
    Path("half.png").write_bytes(Path("half.png").read_bytes()[:5000])
    Path("folder").mkdir()
    Path("folder/mine.txt").write_text("keep me", encoding="utf-8")
    words, said = mistakes(tmp_path)[name]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert cli(["explain", *words]) == 2
    err = capsys.readouterr().err
    assert said in err, err
    assert err.strip().count("\n") == 0 and "Traceback" not in err, err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_mistakes_about_the_run(photo, run, tmp_path, capsys):
    for words, said in (
        (["--class", "drak"], "did you mean 'dark'?"),
        (["--size", "32"], "leave --size away"),
        (["--device", "cuda:9"], "There is no device"),
        (["--schedule", "cosin"], "did you mean 'cosine'?"),
    ):
        assert cli(["explain", str(photo), "--run", str(run), "--out", str(tmp_path / "out"), *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# in a browser


SHOWN = """async id => {
  const image = document.getElementById(id), canvas = document.createElement("canvas");
  await image.decode();
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { colorSpace: "srgb" });
  context.drawImage(image, 0, 0);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
}"""


def pixels_shown(tab, name: str) -> np.ndarray:
    return np.array(tab.evaluate(SHOWN, name), np.uint8).reshape(SIZE, SIZE, 4)[..., :3]


def test_the_slider_moves_in_a_browser(browser, page):
    frames = frames_of(page)
    tab, asked, complaints = open_page(browser, page)
    slider = tab.locator("#forward-slider")
    readout = tab.locator("[data-scrubber=forward-frames] [data-text=t]")
    assert np.array_equal(pixels_shown(tab, "forward-stage"), photo_pixels())
    slider.focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert readout.inner_text() == f"{frames[3]['t']} of {STEPS}"
    assert slider.get_attribute("aria-valuetext") == frames[3]["label"]
    assert np.array_equal(pixels_shown(tab, "forward-stage"), decoded(source_of(page, frames[3]["images"]["x"])))
    for place in (17, len(frames) - 1):
        slider.fill(str(place))
        assert readout.inner_text() == f"{frames[place]['t']} of {STEPS}"
        expected = decoded(source_of(page, frames[place]["images"]["x"]))
        assert np.array_equal(pixels_shown(tab, "forward-stage"), expected)
        assert tab.locator("[data-path=counted]").get_attribute("d") == frames[place]["paths"]["counted"]
    tab.keyboard.press("Home")
    assert readout.inner_text() == f"0 of {STEPS}"
    tab.get_by_role("button", name="Play").first.click()
    while int(slider.input_value()) < 2:  # the suite's time limit ends a slider that stands still
        tab.wait_for_timeout(50)
    tab.get_by_role("button", name="Pause").first.click()
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()], "it asks for nothing but itself"


def test_the_way_back_moves_in_a_browser(browser, network_page):
    frames = frames_of(network_page, "back-frames")
    tab, asked, complaints = open_page(browser, network_page)
    tab.locator("#back-slider").fill(str(len(frames) - 1))
    assert np.array_equal(pixels_shown(tab, "back-stage"), decoded(frames[-1]["images"]["ddim_x"]))
    assert tab.locator("[data-scrubber=back-frames] [data-text=t]").inner_text() == "1 of 30"
    assert complaints == [] and [url for url in asked if not url.startswith("data:")] == [network_page.as_uri()]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(browser, page, network_page, width):
    for one in (page, network_page):
        tab, _, _ = open_page(browser, one, width=width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        # What is wider than the page scrolls in a box of its own.
        outside = tab.evaluate(
            """() => [...document.querySelectorAll("main *, header *, footer *")].filter((one) =>
              !one.closest(".cast, .table, pre, math, svg") && one.getBoundingClientRect().right > innerWidth + 1
            ).map((one) => one.outerHTML.slice(0, 80))"""
        )
        assert outside == []


def test_it_reads_without_javascript(browser, page):
    tab, _, complaints = open_page(browser, page, javascript=False)
    assert tab.locator(".controls").first.is_hidden() and tab.locator(".ten img").count() == 20
    assert "needs JavaScript" in tab.locator("noscript").first.inner_text() and complaints == []
