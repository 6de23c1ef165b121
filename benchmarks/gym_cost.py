"""What GYM's lightweight function costs beside the model's own forward pass, at batch 32, on two threads.

    python -m benchmarks.gym_cost measure    # on an idle machine; writes benchmarks/results/gym_cost.json
    python -m benchmarks.gym_cost table

The two are timed in turn, many times over; figures are medians. The GTSRB victims run as they were trained, in PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import DEFAULT_FOLDER, load_parts
from benchmarks.entry import enter
from benchmarks.reports import load_result, markdown, versions, write_result
from benchmarks.roster import REPORTED
from benchmarks.victims import CACHE, victim
from guard.preprocessors import Gym

_RESULT = "gym_cost"
_VICTIMS = ("gtsrb-b", "gtsrb-lenet8")
_BATCH = 32
_ROUNDS = 400
_THREADS = 2


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One victim, one kernel.

    Attributes:
        victim: Its name.
        kernel: Of the medians; 1 is none.
        forward_ms: The model's own forward pass, median.
        gym_ms: The preprocessor, median.
    """

    victim: str
    kernel: int
    forward_ms: float
    gym_ms: float

    @property
    def share(self) -> float:
        """Of the forward pass."""
        return self.gym_ms / self.forward_ms


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, and how they were measured."""

    command: str
    batch: int
    threads: int
    costs: list[Cost]
    libraries: dict[str, str]


def measure(data: Path, cache: Path) -> Costs:
    """Time both, in turn."""
    torch.set_num_threads(_THREADS)
    parts = load_parts("gtsrb", data)
    images = parts.evaluation.images(torch.arange(_BATCH))
    generator = torch.Generator().manual_seed(0)
    costs = []
    for name in _VICTIMS:
        model = victim(REPORTED[name], parts, cache).model
        for kernel in (1, 3, 5):
            gym = Gym(kernel=kernel)
            with torch.inference_mode():
                forward, preprocess = _in_turn(partial(model, images), partial(gym, images, generator))
            costs.append(Cost(victim=name, kernel=kernel, forward_ms=forward, gym_ms=preprocess))
    return Costs(
        command="python -m benchmarks.gym_cost measure", batch=_BATCH, threads=_THREADS, costs=costs, libraries=versions()
    )


def _in_turn(*functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each."""
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(_ROUNDS):
        for found, function in zip(seconds, functions, strict=True):
            started = time.perf_counter()
            function()
            if number >= _ROUNDS // 10:  # the first ones warm up
                found.append(time.perf_counter() - started)
    return [1_000.0 * statistics.median(found) for found in seconds]


def load_costs() -> Costs | None:
    """The committed result."""
    return load_result(_RESULT, Costs)


def table(costs: Sequence[Cost]) -> str:
    """Markdown."""
    rows = [
        [cost.victim, str(cost.kernel), f"{cost.forward_ms:.2f}", f"{cost.gym_ms:.2f}", f"{cost.share:.1%}"] for cost in costs
    ]
    return markdown(["victim", "kernel", "forward pass, ms", "GYM lightweight, ms", "share"], rows)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "table"])
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the image sets")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of trained victims")
    arguments = parser.parse_args()
    if arguments.step == "measure":
        write_result(_RESULT, measure(arguments.data, arguments.cache))
    found = load_costs()
    print("" if found is None else table(found.costs))
    return 0


if __name__ == "__main__":
    enter(main)
