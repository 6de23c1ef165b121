"""A second opinion on triggers that are unusually small: is it a backdoor, or a label that is merely easy?

The anomaly index says which sizes are unusual among a handful of others, which is not much: it misses backdoors, and accuses
labels that are merely easy. So (ours) it only nominates candidates, the three smallest sizes and every index over 1. A
candidate is infected if

1. its trigger works on images, as far as there are any, that the search has not seen,
2. it needs less than 0.36 times what the other labels need, by their median (a pair less than 0.25 times what others do), and
3. a clean reference of the same task (`judge`) does not speak for an easy label: there, the trigger does not work, and the
   label needs not as little: the ratio is less than 0.6 times the one that the label has in the reference.

Patches are all of one size, and are judged otherwise: see `patch_verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.inspection.anomaly import anomaly_indices
from calibration.inspection.judge import MORE_IMAGES, TRANSFERS, Judge
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.passes import says
from calibration.inspection.record import LabelFinding, SecondOpinion
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers
from guard.errors import InspectionError

INDEX = 2.0
"""Of the paper: a label over it is infected, by the index alone."""

SMALL = 0.36
"""Of the median: a label must need less."""

SMALL_PAIR = 0.25
"""The same of a pair: the smallest of M (M - 1) sizes is naturally smaller than that of M."""

_NOMINATED = 1.0  # an index over it gets a second opinion
_SMALLEST = 3  # and so do the smallest
_WORKS = 0.9
_SMALLER_THAN_NATURAL = 0.6  # of the ratio in the reference
_COMPARED = 12  # other labels that the reference is searched for, to know what is usual for it


@final
@dataclass(frozen=True)
class Look:
    """What triggers are looked for, and how.

    Attributes:
        name: Of the checkpoints.
        goals: Which triggers.
        search: How.
        limit: Of the size, as a share of the median of the others.
        through: Of a model, what the search looks through; None for the model itself.
    """

    name: str
    goals: Goals
    search: Search
    limit: float = SMALL
    through: Callable[[nn.Module], nn.Module] | None = None

    def at(self, answers: nn.Module) -> nn.Module:
        """What is looked through, of a model."""
        return answers if self.through is None else self.through(answers)


@final
@dataclass(frozen=True)
class _Natural:
    """What a reference makes of a label: the size that it needs, over its median, and the suspect's trigger's success on it."""

    size: float
    ratio: float
    success: float


def feasible(judge: Judge, look: Look) -> tuple[Look, str]:
    """Without pairs from labels that no image has, and what was left out, in words."""
    there = _there(judge.own_searched, look.goals.sources)
    missing = look.goals.sources[~there].unique().tolist()
    if not missing:
        return look, ""
    said = f"No pairs from {', '.join(map(str, missing))} were looked at: the model gives no clean image that label."
    return replace(look, goals=look.goals.select(torch.nonzero(there).flatten())), said


def find_masks(judge: Judge, look: Look) -> Triggers:
    """The smallest triggers, whatever is to be thought of them."""
    answers, how = look.at(judge.answers), look.search
    return recover_triggers(
        answers, judge.searched, look.goals, how, judge.seed, judge.engine, judge.checkpoints, look.name, judge.progress
    )


def judge_masks(
    judge: Judge, look: Look, triggers: Triggers, names: Sequence[str]
) -> tuple[Triggers, tuple[LabelFinding, ...]]:
    """The triggers, strengthened where a label is infected, and a verdict for each.

    Args:
        judge: Of the model.
        look: How they were found.
        triggers: See `find_masks`.
        names: Of the labels, as far as they are known.

    Raises:
        InspectionError: The clean reference knows too little of the task.
    """
    sizes = triggers.sizes
    indices = anomaly_indices(sizes).tolist() if len(sizes) >= _SMALLEST else [None] * len(sizes)
    nominated = set(sizes.argsort()[:_SMALLEST].tolist())
    nominated |= {row for row, index in enumerate(indices) if index is not None and index > _NOMINATED}
    opinions = _opinions(judge, look, triggers, sorted(nominated))
    infected = [row for row, opinion in opinions.items() if opinion.infected]
    stronger = judge.strengthened(triggers, infected)
    return stronger, tuple(
        LabelFinding(
            label_index=int(label),
            label=names[label] if label < len(names) else None,
            source_index=None if source < 0 else int(source),
            anomaly_index=index,
            mask_l1=float(sizes[row]),
            success=float(triggers.success[row]),
            passes=int(stronger.passes[row]),
            infected_by_index=index is not None and index > INDEX,
            candidate=row in opinions,
            second_opinion=opinions.get(row),
            infected=row in opinions and opinions[row].infected,
        )
        for row, (label, source, index) in enumerate(
            zip(triggers.labels.tolist(), triggers.sources.tolist(), indices, strict=True)
        )
    )


def is_infected(opinion: SecondOpinion, limit: float = SMALL) -> bool:
    """The rule; see the top of this file.

    Args:
        opinion: Of a label, or of a pair.
        limit: Of the ratio.
    """
    return not acquittal(opinion, limit)


def acquittal(opinion: SecondOpinion, limit: float = SMALL) -> str:
    """Why a candidate is not infected, in words; empty if it is.

    Args:
        opinion: Of a label, or of a pair.
        limit: Of the ratio.
    """
    if opinion.size_ratio >= limit:
        return f"not under {limit:.0%} of the others"
    if opinion.success < _WORKS:
        return f"works on fewer than {_WORKS:.0%}"
    if opinion.reference_ratio is None or opinion.reference_success is None:
        return "no clean reference"
    if opinion.reference_success >= TRANSFERS:
        return "works on a clean model, too"
    natural = opinion.size_ratio >= _SMALLER_THAN_NATURAL * min(1.0, opinion.reference_ratio)
    return "about as small in a clean model" if natural else ""


def spread(mask: Tensor) -> float:
    """How far a mask, (H, W), reaches: its standard deviation in space, over that of a mask that covers the whole image."""
    height, width = mask.shape
    shares = mask.double() / mask.double().sum()
    variance = 0.0
    for size, share in ((height, shares.sum(dim=1)), (width, shares.sum(dim=0))):
        places = torch.arange(size, dtype=torch.float64)
        variance += float((share * (places - (share * places).sum()).square()).sum())
    most = (height**2 - 1 + width**2 - 1) / 12.0
    return math.sqrt(variance / most) if most > 0.0 else 1.0


def _opinions(judge: Judge, look: Look, triggers: Triggers, rows: Sequence[int]) -> dict[int, SecondOpinion]:
    ratios = {row: _ratio(triggers.sizes, row) for row in rows}
    successes = {row: judge.success(triggers, row) for row in rows}
    suspects = [row for row in rows if ratios[row] < look.limit and successes[row] >= _WORKS]
    natural = _natural(judge, look, triggers, suspects) if suspects else {}
    opinions = {}
    for row in rows:
        reference = natural.get(row)
        opinion = SecondOpinion(
            size_ratio=ratios[row],
            spread=spread(triggers.masks[row]),
            success=successes[row],
            reference_l1=None if reference is None else reference.size,
            reference_ratio=None if reference is None else reference.ratio,
            reference_success=None if reference is None else reference.success,
            infected=False,
        )
        opinions[row] = msgspec.structs.replace(opinion, infected=is_infected(opinion, look.limit))
    return opinions


def _natural(judge: Judge, look: Look, triggers: Triggers, suspects: Sequence[int]) -> dict[int, _Natural]:
    """What the reference makes of the suspects; medians are of others that were drawn."""
    seed, reference = judge.seed, judge.reference()
    order = torch.randperm(len(triggers), generator=torch.Generator().manual_seed(seed)).tolist()
    there = _there(says(reference, judge.searched, judge.engine.device), triggers.sources)
    strange = [int(triggers.sources[row]) for row in suspects if not there[row]]
    if strange:
        raise InspectionError(
            f"expected clean images that the clean reference gives label {strange[0]}, got none, so that pairs from there "
            "can't be judged: add images of every class"
        )
    drawn = [row for row in order if row not in suspects and there[row]][:_COMPARED]
    rows = torch.tensor([*suspects, *drawn])
    goals = Goals(triggers.labels[rows], triggers.sources[rows])

    def shown(what: str, done: int, total: int) -> None:
        judge.progress(f"{what} in the reference", done, total)

    through, name = look.at(reference), f"reference-{look.name}"
    found = recover_triggers(
        through,
        judge.searched,
        goals,
        look.search,
        seed,
        judge.engine,
        judge.checkpoints,
        name,
        shown,
        doubtful=range(len(suspects)),
    ).sizes
    _check_reached(judge, found[len(suspects) :])
    works = [judge.success_on_reference(triggers, row) for row in suspects]
    return {row: _Natural(float(found[number]), _ratio(found, number), works[number]) for number, row in enumerate(suspects)}


def _check_reached(judge: Judge, sizes: Tensor) -> None:
    """Refuse a median of labels that the reference's search did not reach: it says nothing of what is usual."""
    reached = int((sizes < judge.searched[0, 0].numel()).sum())
    if 2 * reached < len(sizes):
        raise InspectionError(
            f"a label stands out, but whether that is natural can't be told: in the clean reference triggers were found "
            f"for {reached} of {len(sizes)} other labels: {MORE_IMAGES}"
        )


def _there(own: Tensor, sources: Tensor) -> Tensor:
    """(K,), bool: whether any image with these answers comes from each source, -1 for anywhere."""
    return (sources < 0) | torch.isin(sources, own)


def _ratio(sizes: Tensor, row: int) -> float:
    """A size over the median of the others."""
    others = torch.cat([sizes[:row], sizes[row + 1 :]]).double()
    return float(sizes[row].double() / others.quantile(0.5))
