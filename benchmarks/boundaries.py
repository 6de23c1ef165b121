"""How often sequential STRIP lets in what all passes reject, over many calibrations of one development victim.

    python -m benchmarks.boundaries measure --all
    python -m benchmarks.boundaries table

A trigger may survive under most overlays and not under a few; whether one of these comes first is chance. So overlays are drawn
from a pool again and again, with the clean images that choose boundaries, and put in our order, in a random one, and in the
worst: the overlay, or the two, under which the triggered images look cleanest come first, the others as in ours. Each time
boundaries are chosen that accept on any votes, or on more than one, one and a half, two or three. Only the defender's
images are used.
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
from calibration.settings import asked_strips, votes_of
from calibration.strip import mean_passes
from calibration.thresholds import set_threshold
from guard.detectors import Boundaries, Strip
from guard.detectors.boundaries import SoftVotes, by_all, soft_vote_scores
from guard.detectors.evidence import mean_scores
from guard.errors import InputError

NAMES = ("mnist-dev", "mnist-dev-noise", "gtsrb-dev", "cifar10-dev", "cifar10-dev-two")
_PLANS: Mapping[str, Plan] = {name: {**DEVELOPMENT, **REPAIR_DEVELOPMENT}[name] for name in NAMES}
ORDERS = ("ours", "random", "worst first", "worst two first")
MORE_THAN = (0.0, 1.0, 1.5, 2.0, 3.0)
DRAWS = 40

_POOL, _CHOOSING, _CLEAN, _TRIGGERED = 300, 900, 1_000, 400
_OVERLAYS, _CHOSEN = 100, 600  # of a draw
_FRR, _MORE = 0.01, 0.005  # a rate that is let in beyond what all passes let in, and counts
_AT_ONCE = 16


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Over all draws, boundaries of one rule.

    Attributes:
        order: Of the overlays.
        more_than: Votes that an input needs at any stage, and more.
        more: Triggered images let in beyond what all passes let in, mean of the draws.
        most_more: The most, of any draw.
        draws_with_more: In which it was over half a point.
        clean_passes: Mean.
        triggered_passes: Mean.
    """

    order: str
    more_than: float
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
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for _ in range(draws):
        columns = generator.permutation(tables.clean.shape[1])[:overlays]
        rows = generator.permutation(len(tables.choosing))[:_CHOSEN]
        drawn = Tables(tables.choosing[rows][:, columns], tables.clean[:, columns], tables.triggered[:, columns])
        fars.append(_let_in(drawn, None))
        for order, rule, some in _judged(drawn):
            found.setdefault((order, rule), []).append(_figures(some, rule, fars[-1]))
    return float(np.mean(fars)), [
        Figures(
            order=order,
            more_than=rule,
            more=float(more.mean()),
            most_more=float(more.max()),
            draws_with_more=int((more > _MORE + 1e-9).sum()),
            clean_passes=float(clean.mean()),
            triggered_passes=float(triggered.mean()),
        )
        for (order, rule), rows in found.items()
        for more, clean, triggered in [np.array(rows).T]
    ]


def _judged(drawn: Tables) -> Iterator[tuple[str, float, Tables]]:
    """The same tables in each order, with each rule."""
    ours = order_for_boundaries(drawn.choosing, _limit(drawn.choosing), votes_of(drawn.choosing.shape[1]))
    hiding = np.argsort(-drawn.triggered.mean(axis=0), kind="stable")
    worst = (np.concatenate([hiding[:count], ours[~np.isin(ours, hiding[:count])]]) for count in (1, 2))
    orders = dict(zip(ORDERS, (ours, np.arange(len(ours)), *worst), strict=True))
    for order, columns in orders.items():
        some = Tables(drawn.choosing[:, columns], drawn.clean[:, columns], drawn.triggered[:, columns])
        for rule in MORE_THAN:
            yield order, rule, some


def _figures(drawn: Tables, more_than: float, far: float) -> tuple[float, float, float]:
    """Let in beyond what all passes let in, and the passes of clean and of triggered images."""
    votes, limit = votes_of(drawn.choosing.shape[1]), _limit(drawn.choosing)
    boundaries = choose_boundaries(drawn.choosing, limit, votes, _FRR, more_than)
    if boundaries is None:
        raise InputError("expected entropies that differ, got ones too much alike to choose boundaries")
    threshold = _threshold(drawn.clean, boundaries)
    clean, triggered = (_passes(entropies, boundaries, threshold) for entropies in (drawn.clean, drawn.triggered))
    return _let_in(drawn, boundaries) - far, clean, triggered


def _limit(choosing: NDArray[np.float64]) -> float:
    """Entropy threshold by the votes of all overlays."""
    total = choosing.shape[1]
    return float(np.quantile(-_scores(choosing, by_all(votes_of(total), total)), _FRR))


def _threshold(clean: NDArray[np.float64], boundaries: Boundaries | None) -> float:
    return set_threshold(_scores(clean, boundaries), _FRR).value


def _let_in(drawn: Tables, boundaries: Boundaries | None) -> float:
    return float((_scores(drawn.triggered, boundaries) < _threshold(drawn.clean, boundaries)).mean())


def _scores(entropies: NDArray[np.float64], boundaries: Boundaries | None) -> NDArray[np.float32]:
    """By the mean entropy without boundaries."""
    table = torch.from_numpy(entropies)
    return (mean_scores(table) if boundaries is None else soft_vote_scores(table, boundaries)).numpy()


def _passes(entropies: NDArray[np.float64], boundaries: Boundaries, threshold: float) -> float:
    """In batches large enough that every end is one of a stage at which an input can be accepted."""
    evidence = SoftVotes(len(entropies), boundaries, threshold)
    return mean_passes(torch.from_numpy(entropies), evidence, boundaries.accepting_ends)


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
    header = ["victim", "accepts on more votes than"]
    for order in ORDERS:
        header += [f"{order}: let in more, points", "passes, clean"]
    rows = []
    for report in reports:
        for rule in MORE_THAN:
            cells = []
            for order in ORDERS:
                (item,) = (item for item in report.figures if (item.order, item.more_than) == (order, rule))
                spread = f"{100 * item.more:.2f} (most {100 * item.most_more:.1f}; {item.draws_with_more} of {report.draws})"
                cells += [spread, f"{item.clean_passes:.1f}"]
            rows.append([report.name if rule == MORE_THAN[0] else "", f"{rule:g}", *cells])
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("boundaries", __doc__, _PLANS, Report, measure, table)


if __name__ == "__main__":
    enter(main)
