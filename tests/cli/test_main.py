"""The command as a whole: the tour, and how it fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main
from guard import __version__
from tests.cli.conftest import Command, Files
from tests.toy import save_toy_profile

COMMANDS = (
    "demo", "calibrate", "red-team", "repair", "check", "evaluate", "export", "serve", "roll-out", "edge", "quarantine",
)  # fmt: skip


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


def test_files_in_the_current_folder_do_not_pass_for_our_code(tmp_path: Path) -> None:
    """Working in a downloaded model's folder must not run the Python files that came with it."""
    for name in ("calibration", "scipy", "export", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    command = [str(Path(sys.executable).parent / "guard"), "calibrate", "model.onnx", "--data", "clean.npz", "--out", "p"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_factory_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\n\ndef build():\n    return torch.nn.Flatten()\n")
    command = [str(Path(sys.executable).parent / "guard"), "calibrate", "mine:build", "--data", "none.npz", "--out", "p"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "got none.npz: no such file or folder" in done.stderr


def test_guard_alone_shows_the_tour_and_no_error(guard: Command) -> None:
    run = guard()
    assert "Start here" in run.out + run.err
    assert "guard: " not in run.err


def test_other_trouble_is_one_line_too(guard: Command, profile: Path, files: Files, tmp_path: Path) -> None:
    assert guard("calibrate", "m" * 300 + ".onnx", "--data", files.clean, "--out", tmp_path / "p").problem
    assert guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--seed", 2**64).problem
    assert "letters, digits" in guard("export", profile, "--format", "onnx", "--out", tmp_path, "--name", "../x").problem
    assert guard("evaluate", profile, "--data", files.test, "--report", tmp_path).problem  # a folder: figures come first


def test_a_mistake_of_ours_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def app(**_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit) as ended:
        main._main()
    assert ended.value.code == 2
    assert "ZeroDivisionError: ours" in capsys.readouterr().err


def test_an_end_that_is_not_ours_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def app(**_: object) -> None:
        sys.exit(0)

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit) as ended:
        main._main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "guard: expected a model that leaves the process alone, got one that tries to end it: don't use it\n"
    )


def test_a_reader_that_leaves_is_no_verdict() -> None:
    """`guard scan ... | head -1` must not end as if the model were infected."""
    command = [sys.executable, "-m", "cli.main", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        problem = running.stderr.read()
    assert running.returncode == 128 + signal.SIGPIPE
    assert problem == ""


def test_a_server_without_any_time_is_not_started(tmp_path: Path, guard: Command) -> None:
    run = guard("serve", save_toy_profile(tmp_path / "toy"), "--latency-budget", 0)
    assert run.problem == "guard: expected a latency budget of more than 0 seconds, got 0: leave it out for none"


@pytest.mark.parametrize(
    ("given", "named"), [(["--workers", 4], "--workers"), (["--batch-size", 8, "--updates"], "--batch-size and --updates")]
)
def test_options_of_torchserve_are_refused_without_it(tmp_path: Path, guard: Command, given: list[object], named: str) -> None:
    problem = guard("serve", save_toy_profile(tmp_path / "toy"), *given).problem
    assert f"expected {named} with --engine torchserve, got it without" in problem


def test_metrics_of_torchserve_stay_on_this_machine(tmp_path: Path, guard: Command) -> None:
    problem = guard("serve", save_toy_profile(tmp_path / "toy"), "--engine", "torchserve", "--public-metrics").problem
    assert "expected --public-metrics with --engine asgi, got torchserve" in problem
