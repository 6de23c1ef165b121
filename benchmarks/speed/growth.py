"""How the cost of all N passes grows with the batch, the image's size, the number of classes and N.

    python -m benchmarks.speed.growth measure    # on an idle machine; writes benchmarks/results/speed_growth.json
    python -m benchmarks.speed.growth table
    python -m benchmarks.speed.growth plot       # docs/speed/growth.png

STRIP over an untrained convolutional network in PyTorch, two threads, with a threshold that no sum of entropies ever passes, so
that every input takes all its passes. Beside it the network alone, on as many blends, ready made, 64 at once: what is over
that is superimposing, entropies and bookkeeping. One thing varies at a time; the others are a batch of 8, 32x32 pixels, 43
classes and N = 100.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.entry import enter
from benchmarks.reports import load_result, markdown, versions, write_result
from benchmarks.speed.timing import in_turn
from calibration.page import png
from guard import InputSpec, Predictor
from guard.detectors import Strip
from guard.predictors import wrap

_RESULT = "speed_growth"
_PICTURE = Path(__file__).parent.parent.parent / "docs" / "speed" / "growth.png"
_USUAL = {"batch": 8, "side": 32, "classes": 43, "N": 100}
_VARIED: Mapping[str, tuple[int, ...]] = {
    "batch": (1, 8, 32, 64),
    "side": (32, 64, 224),
    "classes": (10, 43, 1_000),
    "N": (25, 50, 100, 200),
}
_NEVER = -1e9  # of the score: minus bits
_FULL, _ROUNDS, _THREADS = 64, 5, 2


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One size; medians.

    Attributes:
        varied: What is not as usual.
        size: Of it.
        bare_ms: Of the network alone, an image.
        passes_ms: Of the network alone, the N blends of an input.
        inspected_ms: Of STRIP, an input.
    """

    varied: str
    size: int
    bare_ms: float
    passes_ms: float
    inspected_ms: float

    @property
    def over(self) -> float:
        """What STRIP takes beyond the forward passes, of their time."""
        return self.inspected_ms / self.passes_ms - 1.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, and how they were measured."""

    command: str
    threads: int
    points: list[Point]
    libraries: dict[str, str]


def measure() -> Report:
    """Time every size."""
    torch.set_num_threads(_THREADS)
    torch.manual_seed(0)
    points = [_point(varied, size) for varied, sizes in _VARIED.items() for size in sizes]
    command = "python -m benchmarks.speed.growth measure"
    return Report(command=command, threads=_THREADS, points=points, libraries=versions())


def _point(varied: str, size: int) -> Point:
    of = {**_USUAL, varied: size}
    shape = (3, of["side"], of["side"])
    spec = InputSpec(channels=3, height=of["side"], width=of["side"])
    predictor = Predictor(wrap(_network(of["classes"])), spec, of["classes"], "logits")
    strip = Strip(predictor, torch.rand(of["N"], *shape), "logit", 3.5)
    images, blends = torch.rand(of["batch"], *shape), torch.rand(_FULL, *shape)
    rows = of["batch"] * of["N"]
    seconds = in_turn(
        {
            "bare": partial(predictor, images),
            "passes": lambda: [predictor(blends[: min(_FULL, rows - start)]) for start in range(0, rows, _FULL)],
            "inspected": partial(strip.inspect, images, _NEVER),
        },
        _ROUNDS,
    )
    bare, passes, inspected = (1_000.0 * statistics.median(own) / of["batch"] for own in seconds.values())
    return Point(varied=varied, size=size, bare_ms=bare, passes_ms=passes, inspected_ms=inspected)


def _network(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)).eval()


def load_report() -> Report | None:
    """The committed result."""
    return load_result(_RESULT, Report)


def table(report: Report | None) -> str:
    """Markdown."""
    header = (
        "what varies",
        "size",
        "model alone, ms an image",
        "N passes, ms an input",
        "STRIP, ms an input",
        "beyond the passes",
    )
    rows = [
        [
            point.varied,
            str(point.size),
            f"{point.bare_ms:.2f}",
            f"{point.passes_ms:.1f}",
            f"{point.inspected_ms:.1f}",
            f"{point.over:+.0%}",
        ]
        for point in ([] if report is None else report.points)
    ]
    return markdown(header, rows)


def draw(report: Report) -> bytes:
    """PNG: a panel for each thing that varies."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, varied in zip(figure.subplots(1, len(_VARIED), sharey=True), _VARIED, strict=True):
        points = [point for point in report.points if point.varied == varied]
        sizes = [point.size for point in points]
        axes.loglog(sizes, [point.inspected_ms for point in points], "o-", label="STRIP, all N passes")
        axes.loglog(sizes, [point.bare_ms for point in points], "s--", label="model alone")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel({"side": "pixels a side", "batch": "images at once"}.get(varied, varied))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms an input")
    figure.axes[0].legend(fontsize="small")
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "table", "plot"])
    step = parser.parse_args(arguments).step
    if step == "measure":
        write_result(_RESULT, measure())
    found = load_report()
    if step == "plot" and found is not None:
        _PICTURE.parent.mkdir(exist_ok=True)
        _PICTURE.write_bytes(draw(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    enter(main)
