"""The tables in the documents, made of the committed results.

python -m benchmarks.documents    # puts what benchmarks/results holds now in the place of every table
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec

from benchmarks import (
    boundaries,
    codefend,
    deep_inspect,
    detectors,
    dhbe,
    fixed,
    gym,
    gym_cost,
    inspection,
    neural_cleanse,
    passes,
    patches,
    red_team,
    repairs,
    scan_cost,
    strip,
)
from benchmarks.entry import enter
from benchmarks.speed import growth, memory, overhead, precision, preprocessing, serving
from benchmarks.speed import strip as speed_strip
from guard.errors import InputError

ROOT = Path(__file__).parent.parent


@final
@dataclass(frozen=True)
class Quoted:
    """A table of a document.

    Attributes:
        document: Its path, below the repository's root.
        table: What it should be.
    """

    document: str
    table: Callable[[], str]


def _of(load: Callable[[], Sequence[msgspec.Struct]], table: Callable[..., str]) -> Callable[[], str]:
    return lambda: table(load())


def _costs() -> str:
    found = gym_cost.load_costs()
    return gym_cost.table(() if found is None else found.costs)


QUOTED = (
    Quoted("README.md", _of(strip.load_reports, strip.short_table)),
    Quoted("docs/victims.md", _of(strip.load_reports, strip.table)),
    Quoted("docs/victims.md", _of(passes.load_reports, passes.table)),
    Quoted("docs/victims.md", _of(boundaries.load_reports, boundaries.table)),
    Quoted("docs/victims.md", _of(fixed.load_reports, fixed.table)),
    Quoted("docs/victims.md", _of(red_team.load_reports, red_team.table)),
    Quoted("docs/speed.md", _of(speed_strip.load_reports, speed_strip.table)),
    Quoted("docs/speed.md", _of(serving.load_reports, serving.table)),
    Quoted("docs/speed.md", _of(serving.load_reports, serving.starts_table)),
    Quoted("docs/speed.md", _of(overhead.load_reports, overhead.table)),
    Quoted("docs/speed.md", _of(precision.load_reports, precision.table)),
    Quoted("docs/speed.md", lambda: preprocessing.table(preprocessing.load_report())),
    Quoted("docs/speed.md", lambda: growth.table(growth.load_report())),
    Quoted("docs/speed.md", lambda: memory.table(memory.load_report())),
    Quoted("docs/repair.md", _of(codefend.load_reports, codefend.table)),
    Quoted("docs/repair.md", _of(gym.load_reports, gym.table)),
    Quoted("docs/repair.md", _of(gym.load_reports, gym.few_table)),
    Quoted("docs/repair.md", _costs),
    Quoted("docs/repair.md", _of(dhbe.load_reports, dhbe.table)),
    Quoted("docs/methods.md", _of(repairs.load_reports, repairs.table)),
    Quoted("docs/methods.md", _of(detectors.load_reports, detectors.table)),
    Quoted("docs/inspection-figures.md", _of(inspection.load_reports, inspection.table)),
    Quoted("docs/inspection-figures.md", _of(patches.load_reports, patches.table)),
    Quoted("docs/inspection-figures.md", _of(neural_cleanse.load_reports, neural_cleanse.table)),
    Quoted("docs/inspection-figures.md", _of(deep_inspect.load_reports, deep_inspect.table)),
    Quoted("docs/inspection-figures.md", _of(scan_cost.load_reports, scan_cost.table)),
)
"""Every table of results that a document holds."""


def replaced(text: str, table: str) -> str:
    """A document with its table of the same header exchanged.

    Raises:
        InputError: It has no such table, or several.
    """
    header, lines = table.split("\n", 1)[0], text.split("\n")
    starts = [number for number, line in enumerate(lines) if line == header]
    if len(starts) != 1:
        raise InputError(f"expected one table with the header {header!r}, got {len(starts)}: write that line where it shall be")
    start = end = starts[0]
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:start], table, *lines[end:]])


def main() -> None:
    """Run from the command line."""
    for quoted in QUOTED:
        path, table = ROOT / quoted.document, quoted.table()
        before = path.read_text(encoding="utf-8")
        try:
            after = replaced(before, table)
        except InputError as error:
            raise InputError(f"{quoted.document}: {error}") from error
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{quoted.document}: {table.splitlines()[0]}")


if __name__ == "__main__":
    enter(main)
