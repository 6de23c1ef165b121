"""Committed results: one JSON file per victim, the tables made of them, and the command line that all benchmarks share."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks.datasets import DEFAULT_FOLDER, Parts, load_parts
from benchmarks.plans import Plan
from benchmarks.victims import CACHE
from calibration.statistics import Estimate

_RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "numpy", "onnxruntime", "scipy", "scikit-learn")
_Report = TypeVar("_Report", bound=msgspec.Struct)


def load_results(benchmark: str, names: Sequence[str], kind: type[_Report]) -> list[_Report]:
    """The committed results of a benchmark, in the order of the names; those that are not there are left out."""
    files = [_RESULTS / benchmark / f"{name}.json" for name in names]
    return [msgspec.json.decode(file.read_bytes(), type=kind) for file in files if file.is_file()]


def load_result(name: str, kind: type[_Report]) -> _Report | None:
    """The committed result of a benchmark that has one."""
    file = _RESULTS / f"{name}.json"
    return msgspec.json.decode(file.read_bytes(), type=kind) if file.is_file() else None


def write_result(name: str, report: msgspec.Struct) -> None:
    """Into `results/NAME.json`."""
    path = _RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def percent(estimate: Estimate | None) -> str:
    """With its 95% interval."""
    if estimate is None:
        return ""
    return f"{estimate.value:.2%} [{estimate.low * 100:.2f}, {estimate.high * 100:.2f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"expected {len(header)} cells a row, as the header has")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(
    benchmark: str,
    description: str | None,
    plans: Mapping[str, Plan],
    kind: type[_Report],
    measure: Callable[[str, Parts, Path], _Report],
    table: Callable[[Sequence[_Report]], str],
) -> int:
    """`python -m benchmarks.BENCHMARK measure --name NAME | measure --all | table`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "table"])
    parser.add_argument("--name", choices=list(plans))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the image sets")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of trained victims")
    arguments = parser.parse_args()
    if arguments.step == "table":
        print(table(load_results(benchmark, list(plans), kind)))
        return 0
    if not arguments.all and not arguments.name:
        parser.error("expected --name NAME or --all")
    for name in plans if arguments.all else [arguments.name]:
        report = measure(name, load_parts(plans[name].images, arguments.data), arguments.cache)
        write_result(f"{benchmark}/{name}", report)
        print(table([report]), flush=True)
    return 0
