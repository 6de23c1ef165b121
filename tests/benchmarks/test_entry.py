"""How a benchmark's command ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent.parent

_BENCHMARK = """
import contextlib, pathlib, sys, time
from benchmarks.entry import enter

@contextlib.contextmanager
def server():
    try:
        yield
    finally:
        pathlib.Path(sys.argv[1]).touch()

def main():
    with server():
        print("serving", flush=True)
        time.sleep(60)

enter(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_benchmark_has_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """A TorchServe is no part of its process group, and outlived it."""
    with subprocess.Popen(
        [sys.executable, "-c", _BENCHMARK, str(tmp_path / "ended")],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell may ignore it
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert (tmp_path / "ended").exists()
    assert told == "interrupted: the same command goes on after the last finished epoch or victim\n"
    assert process.returncode == 128 + number
