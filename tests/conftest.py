"""One thread and no spinning, before torch starts: on a shared machine waiting threads cost more than they help; and
what several files need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a test trains here or in a process of its own would take as many as there are cores, beside another worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


LONGEST = (
    "test_train",
    "test_resume",
    "test_compare",
    "test_convergence",
    "test_exchange",
    "test_loss",
    "test_vae",
    "test_tune",
    "test_sample",
    "test_readme",
    "test_explain",
    "test_quality",
    "test_newcomer",
)
"""Files that take longest. Of two workers neither should be left alone with one of them at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Without this, workers would sort files by how many tests they hold."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers begin with the longest files; alone, pytest keeps its own order."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def few_steps_for_pictures() -> Iterator[None]:
    """What a training draws for people to see is drawn in few steps: hardly any test looks at it, and all wait."""
    from snowmelt.models.base import Drawing
    from snowmelt.training import previews

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(previews, "DRAWING", Drawing(steps=5))
        yield


@pytest.fixture(autouse=True)
def the_same_chance() -> None:
    """What a test draws from torch's own generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for --config: a network that trains and draws fast."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.toml"
    file.write_text("[network]\nchannels = [8, 16]\nattention = [false, true]\nhead_channels = 8\n")
    return file


class Answer(nn.Module):
    """A backbone that always gives `answer`, and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        self.x, self.time, self.cond = x, time, cond
        return self.answer


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with noise on all weights, so that the parts that begin at zero take part too."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=rng))
    return network.eval()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; a test that wants it is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(
    browser: Any, page: Path, *, width: int = 1280, javascript: bool = True
) -> tuple[Any, list[str], list[str]]:
    """The page as a person opens it, without a network; what it asked for, and what it complained of, as it goes on."""
    viewport = {"width": width, "height": 900}
    tab = browser.new_context(viewport=viewport, java_script_enabled=javascript, offline=True).new_page()
    asked: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.as_uri())
    return tab, asked, complaints
