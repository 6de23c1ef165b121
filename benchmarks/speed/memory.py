"""What inspecting 32 images of 224x224 pixels takes, at N = 100, under the limit that a user sets.

    python -m benchmarks.speed.memory measure    # writes benchmarks/results/speed_memory.json
    python -m benchmarks.speed.memory table

Over VGG-16's first two layers, whose activations are the largest among the usual models', with random weights; each in a
process of its own: the highest resident memory, less that of the process with model and overlays in memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn

from benchmarks.entry import enter
from benchmarks.reports import load_result, markdown, versions, write_result
from guard import InputSpec, Predictor
from guard.detectors import Strip
from guard.predictors import Execution, wrap

_RESULT = "speed_memory"
_SIDE, _BATCH, _OVERLAYS, _CLASSES = 224, 32, 100, 10
_LIMITS = (256, 512, 1_024)
_EXECUTIONS = (Execution(), Execution(memory_format="channels-last"))
_ACCEPTED = -1e-4  # of the score: random weights give high entropies
_MIB = 1024.0**2


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """One limit.

    Attributes:
        limit: MiB.
        execution: How PyTorch ran it.
        rows: Images that fit a forward pass.
        taken: MiB, at the highest.
    """

    limit: int
    execution: Execution
    rows: int
    taken: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, and how they were measured."""

    command: str
    peaks: list[Peak]
    libraries: dict[str, str]


def peak(limit: int, execution: Execution) -> Peak:
    """Measure one, in a process of its own; a limit in MiB."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", "probe", "--limit", str(limit)]
    command += ["--memory-format", execution.memory_format]
    done = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parent.parent.parent)
    return msgspec.json.decode(done.stdout, type=Peak)


def _probe(limit: int, execution: Execution) -> Peak:
    torch.set_num_threads(1)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, _CLASSES)).eval()
    spec = InputSpec(channels=3, height=_SIDE, width=_SIDE)
    predictor = Predictor(wrap(model), spec, _CLASSES, "logits", memory_limit=int(limit * _MIB), execution=execution)
    strip = Strip(predictor, torch.rand(_OVERLAYS, 3, _SIDE, _SIDE), "logit", 3.5)
    images = torch.rand(_BATCH, 3, _SIDE, _SIDE)
    predictor(images[:1] * strip.layers[:1].clamp(0.0, 1.0))  # what stays: buffers, layers
    Path("/proc/self/clear_refs").write_text("5")  # what importing took at its highest counts no more
    before = _highest()
    strip.inspect(images, _ACCEPTED)
    return Peak(limit=limit, execution=execution, rows=predictor.max_rows, taken=_highest() - before)


def _highest() -> float:
    """Resident memory at its highest, MiB; of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1_024.0


def load_report() -> Report | None:
    """The committed result."""
    return load_result(_RESULT, Report)


def table(report: Report | None) -> str:
    """Markdown."""
    rows = [
        [str(item.limit), str(item.execution), str(item.rows), f"{item.taken:.0f}"]
        for item in ([] if report is None else report.peaks)
    ]
    return markdown(("--memory-limit, MiB", "PyTorch runs it", "images that fit", "taken, MiB"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "table", "probe"])
    parser.add_argument("--limit", type=int, default=1_024, help="MiB, of a probe")
    parser.add_argument("--memory-format", choices=["contiguous", "channels-last"], default="contiguous", help="of a probe")
    options = parser.parse_args(arguments)
    if options.step == "probe":
        print(msgspec.json.encode(_probe(options.limit, Execution(memory_format=options.memory_format))).decode())
        return 0
    if options.step == "measure":
        peaks = [peak(limit, execution) for limit in _LIMITS for execution in _EXECUTIONS]
        found = Report(command="python -m benchmarks.speed.memory measure", peaks=peaks, libraries=versions())
        write_result(_RESULT, found)
    print(table(load_report()))
    return 0


if __name__ == "__main__":
    enter(main)
