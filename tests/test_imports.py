"""Imports run one way, from the networks at the bottom to the commands on top."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    "common",
    "mirror_unet",
    "losses",
    "baselines",
    "checks",
    "grids",
    "studies",
    "phantom",
    "preprocess",
    "cache",
    "organs",
    "splits",
    "data",
    "config",
    "devices",
    "runs",
    "certainty",
    "metrics",
    "eval",
    "tables",
    "claims",
    "plots",
    "train",
    "tune",
    "bench",
]
WITHOUT_TORCH = set(
    ["common", "checks", "grids", "studies", "phantom", "preprocess", "cache", "organs", "splits"]
)


def imports(source):
    """(top-level name, whether inside a function) of every import."""
    tree = ast.parse(source)
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(id(child) for child in ast.walk(node))

    modules = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            modules.append((name.split(".")[0], id(node) in inside))
    return modules


def faults(name, source):
    """What is wrong with the imports of a module, in words."""
    below = FLOORS[: FLOORS.index(name)]
    messages = []
    for module, in_function in imports(source):
        if module in FLOORS and module not in below:
            messages.append(f"{name} imports {module}")
        if in_function and module != "ray":  # only a search needs it
            messages.append(f"{name}: {module} in a function")
        brings_torch = module == "torch" or (module in below and module not in WITHOUT_TORCH)
        if name in WITHOUT_TORCH and brings_torch:
            messages.append(f"{name} imports {module}, and with it torch")
    return messages


def test_imports_run_one_way():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOORS)
    for name in FLOORS:
        assert faults(name, (ROOT / f"{name}.py").read_text(encoding="utf-8")) == []


def test_the_rule_finds_what_it_forbids():
    assert faults("eval", "import plots") == ["eval imports plots"]
    assert faults("train", "from train import State") == ["train imports train"]
    assert faults("tune", "def f():\n    import runs, ray") == ["tune: runs in a function"]
    assert faults("cache", "import torch") == ["cache imports torch, and with it torch"]
    assert faults("cache", "from data import x\nimport losses") == [
        "cache imports data",
        "cache imports losses, and with it torch",
    ]
