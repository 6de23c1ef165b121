"""GYM's two parts, medians and stochastic affine transformations, against OpenCV image by image and Kornia, on a CPU.

    python -m benchmarks.speed.preprocessing measure    # on an idle machine; writes benchmarks/results/speed_preprocessing.json
    python -m benchmarks.speed.preprocessing table

Batches of 32 colour images of random pixels, two threads, in turn; medians of the rounds. All of them give the same images, but
for the last bits (OpenCV's affine interpolation is in fixed point).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import cv2
import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.entry import enter
from benchmarks.reports import load_result, markdown, versions, write_result
from benchmarks.speed.timing import in_turn, median_ratio
from guard.preprocessors.affine import draw_affine, warp, warp_kornia
from guard.preprocessors.median import median_filter, median_kornia

_RESULT = "speed_preprocessing"
OURS = "ours"
_BATCH, _THREADS, _ROUNDS = 32, 2, 15
_SIDES = (28, 32, 64, 224)


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One way to do one thing; medians.

    Attributes:
        operation: What is done.
        side: Of the images, in pixels.
        way: Who does it.
        milliseconds: For the batch.
        times: What ours takes, round by round.
    """

    operation: str
    side: int
    way: str
    milliseconds: float
    times: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, and how they were measured."""

    command: str
    batch: int
    threads: int
    costs: list[Cost]
    libraries: dict[str, str]


def measure() -> Report:
    """Time every way."""
    torch.set_num_threads(_THREADS)
    cv2.setNumThreads(_THREADS)
    costs = []
    for side in _SIDES:
        for operation, ways in operations(side).items():
            seconds = in_turn(ways, _ROUNDS)
            for way, own in seconds.items():
                times = median_ratio(own, seconds[OURS])
                milliseconds = 1_000.0 * statistics.median(own)
                costs.append(Cost(operation=operation, side=side, way=way, milliseconds=milliseconds, times=times))
    return Report(
        command="python -m benchmarks.speed.preprocessing measure",
        batch=_BATCH,
        threads=_THREADS,
        costs=costs,
        libraries=versions(),
    )


def operations(side: int) -> Mapping[str, Mapping[str, Callable[[], Tensor]]]:
    """Ways to do each thing to the same images, by name; each gives (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(_BATCH, 3, side, side, generator=generator)
    matrices = draw_affine(_BATCH, side, side, 0.16, 4.0, 0.16, generator)
    found: dict[str, Mapping[str, Callable[[], Tensor]]] = {}
    for kernel in (3, 5):
        found[f"median {kernel}x{kernel}"] = {
            OURS: partial(median_filter, images, kernel),
            "OpenCV": partial(_each, images, [partial(cv2.medianBlur, ksize=kernel)] * _BATCH),
            "Kornia": partial(median_kornia, images, kernel),
        }
    moves = [partial(cv2.warpAffine, M=matrix, dsize=(side, side), flags=cv2.INTER_LINEAR) for matrix in matrices.numpy()]
    found["affine"] = {
        OURS: partial(warp, images, matrices),
        "OpenCV": partial(_each, images, moves),
        "Kornia": partial(warp_kornia, images, matrices),
    }
    return found


def _each(images: Tensor, ways: Sequence[Callable[..., Any]]) -> Tensor:
    """Image by image, as OpenCV takes them: (H, W, C)."""
    rows = images.permute(0, 2, 3, 1).numpy()
    done = np.stack([way(np.ascontiguousarray(one)) for way, one in zip(ways, rows, strict=True)])
    return torch.from_numpy(done).permute(0, 3, 1, 2).contiguous()


def load_report() -> Report | None:
    """The committed result."""
    return load_result(_RESULT, Report)


def table(report: Report | None) -> str:
    """Markdown."""
    rows = []
    costs = [] if report is None else report.costs
    for ours in (cost for cost in costs if cost.way == OURS):
        others = {cost.way: cost for cost in costs if (cost.operation, cost.side) == (ours.operation, ours.side)}
        figures = [f"{others[way].milliseconds:.2f} ({others[way].times:.1f} times)" for way in ("OpenCV", "Kornia")]
        rows.append([ours.operation, str(ours.side), f"{ours.milliseconds:.2f}", *figures])
    return markdown(("operation", "pixels a side", "ours, ms", "OpenCV image by image, ms", "Kornia, ms"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "table"])
    if parser.parse_args(arguments).step == "measure":
        write_result(_RESULT, measure())
    print(table(load_report()))
    return 0


if __name__ == "__main__":
    enter(main)
