"""The layer rule: imports point down, and nothing that is read is ever run as code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "snowmelt"
LAYERS = (
    {
        "errors",
        "shapes",
        "seeds",
        "files",
        "late",
        "terminal",
        "tables",
        "config",
        "networks",
        "diffusion",
        "data",
        "device",
        "recording",
    },
    {"ema", "checkpoint", "models", "evaluation", "run", "pictures", "presets", "foreign", "pages"},
    {"training", "tuning", "explaining", "edits", "reporting", "evaluating", "comparing"},
    {"prepare", "train", "sample", "tune", "edit", "evaluate", "explain", "exchange", "report", "compare"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY = {
    "networks": {"networks", "config", "shapes"},
    "diffusion": {"diffusion", "errors", "shapes"},
    "data": {"data", "errors", "shapes", "seeds", "files", "terminal"},
}
"""Folders of the lowest layer, and all they may know."""

MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Full names of everything imported anywhere in a module: late, and for types only, too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    """Those of our modules among imported names; `snowmelt.__version__` is nobody's."""
    found: set[str] = set()
    for name in names - {"snowmelt.__version__"}:
        package, _, rest = name.partition(".")
        if package == "snowmelt":
            module = rest if rest in MODULES else rest.rpartition(".")[0]
            assert module in MODULES, f"{name} comes from no module: name its home, not the package"
            found.add(module)
    return found


GRAPH = {name: own(imported(tree_of(path))) for name, path in MODULES.items()}


def part(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_its_layer():
    assert {part(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    upward = {name for name in GRAPH[module] if LEVEL[part(name)] > LEVEL[part(module)]}
    assert upward == set()


@pytest.mark.parametrize("folder", ONLY)
def test_the_lowest_folders_know_little(folder):
    known = {part(name) for module in MODULES if part(module) == folder for name in GRAPH[module]}
    assert known <= ONLY[folder]


def test_verbs_do_not_import_each_other_but_to_prepare():
    """Training, importing and comparing prepare where they must; apart from that each verb stands alone."""
    for verb in LAYERS[3]:
        assert {name for name in GRAPH[verb] if name in LAYERS[3]} <= (
            {"prepare"} if verb in ("train", "exchange", "compare") else set()
        )


def test_no_imports_go_round_in_circles():
    """Late ones included: modules can be put in an order in which each needs only earlier ones."""
    left = {module: names - {module} for module, names in GRAPH.items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert left == {}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_read_is_run(module):
    """No pickle of any kind, no eval, no exec; and no torchvision, which is not built everywhere."""
    tree = tree_of(MODULES[module])
    packages = {name.split(".")[0] for name in imported(tree)}
    assert not packages & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torchvision"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load"}
            allowed = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
            assert not any(ast.unparse(value) != "False" for value in allowed)


def test_help_does_not_wait_for_torch():
    """What the command line imports at once, and all that imports at once, is light: torch alone takes seconds."""

    def at_once(module: str) -> set[str]:
        body = tree_of(MODULES[module]).body
        return imported(ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], []))

    reached, waiting = set[str](), {"cli", *LAYERS[3]}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        names = at_once(module)
        assert not {name.split(".")[0] for name in names} & {"torch", "matplotlib", "safetensors"}, module
        waiting |= own(names) - reached
