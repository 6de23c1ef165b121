"""The house's arrows run one way: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "guard": set(),
    "calibration": {"guard"},
    "export": {"guard"},
    "handlers": {"guard"},
    "benchmarks": {"calibration", "export", "guard", "handlers"},
    "cli": {"calibration", "export", "guard", "handlers"},
}
"""Besides itself, a top-level package imports only these of ours."""

HEAVY = {"scipy", "sklearn", "matplotlib", "onnx", "onnxruntime", "kornia", "starlette", "uvicorn", "ts", "jinja2"}
"""What `import guard` must not pull in: extras, and what is imported where it is needed."""


def imported(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names.add("a relative import")
    return names


def module_level(file: Path) -> set[str]:
    """Top-level names that a file imports as soon as it is imported itself."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    ours = {*ALLOWED, "tests", "a relative import"}
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / package).rglob("*.py")
        for name in imported(file) & ours - ALLOWED[package] - {package}
    }
    assert not wrong


def test_every_top_level_package_has_its_arrows() -> None:
    packages = {item.parent.name for item in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(ALLOWED)


def test_the_wheel_ships_what_the_command_needs() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = set(config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert shipped == set(ALLOWED) - {"benchmarks"}


def test_inference_stays_light() -> None:
    wrong = {
        f"{file.relative_to(ROOT)}: {name}" for file in (ROOT / "guard").rglob("*.py") for name in module_level(file) & HEAVY
    }
    assert not wrong


def test_importing_the_guard_adds_little_to_pytorch() -> None:
    code = "import sys, time, torch; started = time.perf_counter(); import guard; spent = time.perf_counter() - started"
    code += "; print(spent, *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, *names = done.stdout.split()
    assert not HEAVY & set(names)
    assert float(spent) < 1.0


def test_nothing_is_pickled() -> None:
    product = [file for package in ALLOWED for file in (ROOT / package).rglob("*.py")]
    assert not [
        str(file) for file in product if imported(file) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    ]
