"""Imports run one way, from the networks down at the bottom to the commands on top."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    *("mirror_unet", "losses", "baselines", "files", "checks", "studies"),
    *("phantom", "preprocess", "cache", "organs", "splits", "data", "config", "certainty"),
    *("devices", "runs", "tables", "eval", "plots", "console", "train", "tune", "bench"),
]
WITHOUT_TORCH = {
    *("files", "checks", "studies", "phantom", "preprocess", "cache", "organs", "splits")
}
WHERE_NEEDED = {"ray", "tensorboardX"}  # may be imported inside functions


def imports(tree):
    """(top-level name, whether inside a function) of every import."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module.split(".")[0], id(node) in inside


def faults(name, source):
    """What is wrong with the imports of a module, in words."""
    below = set(FLOORS[: FLOORS.index(name)])
    found = list(imports(ast.parse(source)))
    wrong = [f"{name} imports {m}" for m, _ in found if m in FLOORS and m not in below]
    wrong += [f"{name}: {m} in a function" for m, deep in found if deep and m not in WHERE_NEEDED]
    if name in WITHOUT_TORCH:
        with_torch = {"torch", *below} - WITHOUT_TORCH
        wrong += [f"{name} imports {m}, and with it torch" for m, _ in found if m in with_torch]
    return wrong


def test_imports_run_one_way():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOORS)
    sources = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FLOORS}
    assert [fault for name, source in sources.items() for fault in faults(name, source)] == []


def test_the_rule_finds_what_it_forbids():
    assert faults("eval", "import plots") == ["eval imports plots"]
    assert faults("train", "from train import main") == ["train imports train"]
    assert faults("tune", "def f():\n    import runs, ray") == ["tune: runs in a function"]
    assert faults("cache", "import torch") == ["cache imports torch, and with it torch"]
    assert faults("cache", "from data import x\nimport losses") == [
        "cache imports data",
        "cache imports losses, and with it torch",
    ]
