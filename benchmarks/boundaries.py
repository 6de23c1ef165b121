"""How often sequential STRIP lets in what all passes reject, over many calibrations of one development victim.

    python -m benchmarks.boundaries measure --all
    python -m benchmarks.boundaries table

A trigger may survive under most overlays and not under a few; whether one of these comes first is chance. So overlays are drawn
from a pool again and again, with the clean images that choose boundaries, and put in our order, in a random one, and in the
worst: the overlay under which the triggered images look cleanest comes first, ours follow. Each time boundaries are chosen that
accept from the first, second, third or fourth overlay on. The defender's images alone are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, run, versions
from benchmarks.roster import DEVELOPMENT, REPAIR_DEVELOPMENT
from benchmarks.strip import as_onnx, shuffled
from benchmarks.victims import CACHE, Victim, bars, triggered_images, victim
from calibration import ImageSet, Settings
from calibration.boundaries import choose_boundaries, order_for_boundaries
from calibration.data import Progress
from calibration.discovery import discover
from calibration.settings import asked_strips
from calibration.strip import mean_passes
from calibration.thresholds import set_threshold
from guard.detectors import Boundaries, Strip
from guard.detectors.boundaries import Evidence, final_scores
from guard.errors import InputError

NAMES = ("mnist-dev", "mnist-dev-noise", "gtsrb-dev", "cifar10-dev", "cifar10-dev-two")
_PLANS: Mapping[str, Plan] = {name: {**DEVELOPMENT, **REPAIR_DEVELOPMENT}[name] for name in NAMES}
ORDERS = ("ours", "random", "worst first")
ACCEPTING = (1, 2, 3, 4)
DRAWS = 40

_POOL, _CHOOSING, _CLEAN, _TRIGGERED = 300, 900, 1_000, 400
_OVERLAYS, _CHOSEN = 100, 600  # of a draw
_FRR, _MORE = 0.01, 0.005  # a rate that is let in beyond what all passes let in, and counts
_AT_ONCE = 16


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Over all draws, boundaries that accept from one overlay on.

    Attributes:
        order: Of the overlays.
        accepting_from: Overlays before which nothing is accepted.
        more: Triggered images let in beyond what all passes let in, mean of the draws.
        most_more: The most, of any draw.
        draws_with_more: In which it was over half a point.
        clean_passes: Mean.
        triggered_passes: Mean.
    """

    order: str
    accepting_from: int
    more: float
    most_more: float
    draws_with_more: int
    clean_passes: float
    triggered_passes: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One development victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        draws: How many.
        far: Of all passes, mean of the draws.
        figures: Of each order and rule.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    draws: int
    far: float
    figures: list[Figures]
    libraries: dict[str, str]


@final
@dataclass(frozen=True)
class Tables:
    """Entropies under each overlay of the pool, (n, pool), float64, bits.

    Attributes:
        choosing: Of clean images that choose boundaries.
        clean: Of clean images that set the threshold.
        triggered: Of triggered images on which the attack succeeds.
    """

    choosing: NDArray[np.float64]
    clean: NDArray[np.float64]
    triggered: NDArray[np.float64]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one development victim."""
    plan = _PLANS[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        far, figures = compare(_tables(found, parts, cache, progress))
    return Report(
        name=name,
        command=f"python -m benchmarks.boundaries measure --name {name}",
        plan=plan,
        draws=DRAWS,
        far=far,
        figures=figures,
        libraries=versions(),
    )


def compare(tables: Tables, draws: int = DRAWS, overlays: int = _OVERLAYS) -> tuple[float, list[Figures]]:
    """FAR of all passes, and what every order and rule makes of it."""
    generator = np.random.default_rng(0)
    fars: list[float] = []
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for _ in range(draws):
        columns = generator.permutation(tables.clean.shape[1])[:overlays]
        rows = generator.permutation(len(tables.choosing))[:_CHOSEN]
        drawn = Tables(tables.choosing[rows][:, columns], tables.clean[:, columns], tables.triggered[:, columns])
        limit = _threshold(drawn.clean, None)
        fars.append(_let_in(drawn.triggered, None, limit))
        for order, rule, some in _judged(drawn):
            found.setdefault((order, rule), []).append(_figures(some, rule, fars[-1]))
    return float(np.mean(fars)), [
        Figures(
            order=order,
            accepting_from=rule,
            more=float(more.mean()),
            most_more=float(more.max()),
            draws_with_more=int((more > _MORE + 1e-9).sum()),
            clean_passes=float(clean.mean()),
            triggered_passes=float(triggered.mean()),
        )
        for (order, rule), rows in found.items()
        for more, clean, triggered in [np.array(rows).T]
    ]


def _judged(drawn: Tables) -> Iterator[tuple[str, int, Tables]]:
    """The same tables in each order, with each rule."""
    threshold = float(np.quantile(drawn.choosing.mean(axis=1), _FRR))
    ours = order_for_boundaries(drawn.choosing, threshold)
    worst = int(drawn.triggered.mean(axis=0).argmax())
    orders = dict(zip(ORDERS, (ours, np.arange(len(ours)), np.array([worst, *ours[ours != worst]])), strict=True))
    for order, columns in orders.items():
        some = Tables(drawn.choosing[:, columns], drawn.clean[:, columns], drawn.triggered[:, columns])
        for rule in ACCEPTING:
            yield order, rule, some


def _figures(drawn: Tables, accepting_from: int, far: float) -> tuple[float, float, float]:
    """Let in beyond what all passes let in, and the passes of clean and of triggered images."""
    threshold = float(np.quantile(drawn.choosing.mean(axis=1), _FRR))
    boundaries = choose_boundaries(drawn.choosing, threshold, _FRR, accepting_from)
    limit = _threshold(drawn.clean, boundaries)
    clean, triggered = (_passes(entropies, boundaries, limit) for entropies in (drawn.clean, drawn.triggered))
    return _let_in(drawn.triggered, boundaries, limit) - far, clean, triggered


def _threshold(clean: NDArray[np.float64], boundaries: Boundaries | None) -> float:
    return set_threshold(final_scores(torch.from_numpy(clean), boundaries).numpy(), _FRR).value


def _let_in(triggered: NDArray[np.float64], boundaries: Boundaries | None, threshold: float) -> float:
    return float((final_scores(torch.from_numpy(triggered), boundaries) < threshold).double().mean())


def _passes(entropies: NDArray[np.float64], boundaries: Boundaries | None, threshold: float) -> float:
    """In batches large enough that every end is one of a stage."""
    ends = range(1, entropies.shape[1] + 1) if boundaries is None else boundaries.ends
    evidence = Evidence(len(entropies), entropies.shape[1], boundaries, threshold)
    return mean_passes(torch.from_numpy(entropies), evidence, ends)


def _tables(found: Victim, parts: Parts, cache: Path, progress: Progress) -> Tables:
    if found.attack is None:
        raise InputError("expected a victim, got a clean model")
    images = shuffled(parts.defender, 0)
    sizes = [_POOL, _CHOOSING, _CLEAN, len(images) - _POOL - _CHOOSING - _CLEAN]
    pool, choosing, clean, rest = (images.select(rows) for rows in torch.arange(len(images)).split(sizes))
    predictor = discover(as_onnx(found, parts, cache), choosing)
    ((blend, alpha),) = asked_strips(Settings())
    strip = Strip(predictor, pool.images(slice(None)), blend, alpha)
    wanted = found.attack.targets(rest.images(slice(None)), rest.known_labels)
    rows = torch.nonzero(wanted >= 0).squeeze(1)[-_TRIGGERED:]
    triggered = triggered_images(found.attack, rest.select(rows))
    success = predictor(triggered.images(slice(None))).argmax(dim=1) == wanted[rows]
    triggered = triggered.select(torch.nonzero(success).squeeze(1))
    return Tables(*(_entropies(strip, some, progress).numpy() for some in (choosing, clean, triggered)))


def _entropies(strip: Strip, images: ImageSet, progress: Progress) -> Tensor:
    parts = []
    for rows in torch.arange(len(images)).split(_AT_ONCE):
        parts.append(strip.pass_entropies(images.images(rows)))
        progress("superimposing", int(rows[-1]) + 1, len(images))
    return torch.cat(parts)


def load_reports() -> list[Report]:
    """The committed results, in the order of `NAMES`."""
    return load_results("boundaries", NAMES, Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown: one line for each rule."""
    header = ["victim", "accepts from overlay"]
    for order in ORDERS:
        header += [f"{order}: let in more, points", "passes, clean"]
    rows = []
    for report in reports:
        for rule in ACCEPTING:
            cells = []
            for order in ORDERS:
                (item,) = (item for item in report.figures if (item.order, item.accepting_from) == (order, rule))
                spread = f"{100 * item.more:.2f} (most {100 * item.most_more:.1f}; {item.draws_with_more} of {report.draws})"
                cells += [spread, f"{item.clean_passes:.1f}"]
            rows.append([report.name if rule == ACCEPTING[0] else "", str(rule), *cells])
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("boundaries", __doc__, _PLANS, Report, measure, table)


if __name__ == "__main__":
    enter(main)
