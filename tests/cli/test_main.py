"""The command as a whole: the tour, and how it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from guard import __version__
from tests.cli.conftest import Command

COMMANDS = ("demo", "calibrate", "check", "evaluate", "export", "serve", "quarantine")


def test_help_is_a_tour(guard: Command) -> None:
    run = guard("--help")
    assert run.code == 0
    for name in COMMANDS:
        assert name in run.out
    assert run.out.index("Start here") < run.out.index("Before serving") < run.out.index("Serving")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(guard: Command, name: str) -> None:
    run = guard(name, "--help")
    assert run.code == 0
    assert len(run.out) > 200


def test_version(guard: Command) -> None:
    assert guard("--version").out.strip() == f"guard {__version__}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["check"], ["calibrate", "m.onnx"], ["serve", "p", "--port", "many"]])
def test_usage_errors_are_one_line_and_code_two(guard: Command, arguments: list[str]) -> None:
    run = guard(*arguments)
    assert run.problem
    assert len(run.err.strip().splitlines()) == 1


def test_a_thin_installation_checks_without_the_calibration_extra() -> None:
    """The command must not import what only calibration needs."""
    code = (
        "import sys\n"
        "for name in ('scipy', 'sklearn', 'matplotlib', 'kornia', 'starlette', 'uvicorn', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "import cli.main\n"
        "sys.argv = ['guard', 'calibrate', 'm', '--data', 'd', '--out', 'o']\n"
        "cli.main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install 'backdoor-guard[calibration]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
