"""Every Python block of the README and the docs runs as it stands, in an empty directory; examples in the code hold."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the blocks use the digits that come with scikit-learn")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[tuple[str, str]]:
    found = [(page, re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)) for page in PAGES]
    return [(f"{page.name}-{index}", code) for page, codes in found for index, code in enumerate(codes)]


@pytest.mark.parametrize("name, code", blocks(), ids=[name for name, _ in blocks()])
def test_a_block_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})  # noqa: S102


SOURCE = ROOT / "src"
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]
EXAMPLES = [path.relative_to(SOURCE) for path in MODULES]


@pytest.mark.parametrize("path", EXAMPLES, ids=map(str, EXAMPLES))
def test_examples_hold(path):
    failed, tried = doctest.testmod(import_module(".".join(path.with_suffix("").parts)))
    assert tried and not failed


def test_there_are_blocks():
    assert {"README.md-0", "own-loop.md-0"} <= {name for name, _ in blocks()}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_readme_names_every_verb():
    from snowmelt.cli import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`snowmelt {verb} " in text for verb in VERBS)


def test_the_public_names_are_there():
    import snowmelt

    assert all(getattr(snowmelt, name) is not None for name in snowmelt.__all__)
