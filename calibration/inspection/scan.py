"""Inspection: is a model backdoored, for which labels, and with which triggers?

Neural Cleanse finds the smallest trigger for each label. Its anomaly index says which sizes are unusual among a handful of
others, which is not much: it misses backdoors, and accuses labels that are merely easy. So (ours) the index only nominates
candidates, the three smallest sizes and every index over 1, and a second opinion decides. A candidate is infected if

1. its trigger works on images, as far as there are any, that the search has not seen,
2. it needs less than 0.4 times what the other labels need, by their median (a pair less than 0.25 times what others do), and
3. a clean reference of the same task (`reference`) does not speak for an easy label: there, the trigger does not work, and the
   label needs not as little: the ratio is less than 0.6 times the one that the label has in the reference.

Blind to: triggers that cover the image or change with it, backdoors for which an attack succeeds only from certain classes
(unless pairs are searched), and all-to-all ones, where no label is an outlier.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.accuracy import NEAR_CHANCE, answers, near_chance
from calibration.calibrate import check_labels, missing_classes
from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.frozen import frozen
from calibration.inspection.anomaly import anomaly_indices, check_reached
from calibration.inspection.neural_cleanse import Search, recover_triggers
from calibration.inspection.passes import says
from calibration.inspection.record import LabelFinding, ScanFigures, SecondOpinion
from calibration.inspection.reference import train_reference
from calibration.inspection.strengthening import strengthen
from calibration.inspection.triggers import Goals, Triggers
from guard import Predictor
from guard.errors import InspectionError

FEWEST_IMAGES = 50
INDEX = 2.0
"""Of the paper: a label over it is infected, by the index alone."""

_NOMINATED = 1.0  # an index over it gets a second opinion
_SMALLEST = 3  # and so do the smallest
_WORKS = 0.9
_SMALL = 0.4  # of the median
_SMALL_PAIR = 0.25  # likewise, of a pair: the smallest of M (M - 1) sizes is naturally smaller than that of M
_SMALLER_THAN_NATURAL = 0.6  # of the ratio in the reference
_FEWEST_JUDGED = 10  # images
_TRANSFERS = 0.3  # success on the reference
_COMPARED = 12  # other labels that the reference is searched for, to know what is usual for it
_MOST_SEARCHED, _MOST_HELD_OUT = 1000, 500
_HELD_OUT = 1.0 / 3.0


class ScanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to inspect.

    Attributes:
        search: For triggers.
        pairs: Look for triggers from each label to each other one, too.
        rounds: Of searches for further triggers of an infected label, see `rounds`; 1 for none.
        seed: Of the cut and of every draw.
    """

    search: Search = Search()
    pairs: bool = False
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.rounds < 1:
            raise InspectionError(f"expected at least one round, got {self.rounds}")


@final
@dataclass(frozen=True)
class Scan:
    """An inspection, not yet on disk.

    Attributes:
        figures: What was found.
        triggers: Of the labels, in the order of `figures.labels`.
        pair_triggers: Of the pairs, likewise; None where they were not asked for.
        settings: How.
        clean: (K, C, H, W), a few held-out images, to show triggers on.
        further_triggers: In the order of `figures.further`; None where no further rounds were asked for, or needed.
    """

    figures: ScanFigures
    triggers: Triggers
    pair_triggers: Triggers | None
    settings: ScanSettings
    clean: Tensor
    further_triggers: Triggers | None = None

    @property
    def infected(self) -> Triggers:
        """The triggers of the infected labels."""
        return self.triggers.select([row for row, item in enumerate(self.figures.labels) if item.infected])


def scan(
    predictor: Predictor,
    clean: ImageSet,
    settings: ScanSettings,
    *,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Scan:
    """Inspect a model.

    Args:
        predictor: The model.
        clean: Clean images, of which equal ones count once; labels are optional, and allow the model's accuracy to be checked.
        settings: How.
        engine: Where; this machine's first device by default.
        checkpoints: Written while it works, gone on from, and removed by nobody here.
        progress: Told how far it is.

    Raises:
        InspectionError: Too few different images, answers near chance, or no trigger was found for most labels.
        ModelError: The model has no gradients.
    """
    started = time.monotonic()
    check_labels(clean, predictor)
    clean = _distinct(clean)
    engine = engine or Engine()
    to_search, held_out = _cut(clean, settings.seed)
    searched = to_search.images(slice(None))
    model = _Model.of(predictor, searched, engine)
    _refuse_chance(predictor, held_out)
    classes = predictor.num_classes

    def search(goals: Goals, name: str) -> Triggers:
        how, seed = settings.search, settings.seed
        return recover_triggers(model.answers, searched, goals, how, seed, engine, checkpoints, name, progress)

    judge = _Judge(model, searched, to_search.labels, held_out.images(slice(None)), settings, engine, checkpoints, progress)
    found = search(Goals.all_labels(classes), "labels")
    reached = found.sizes < found.masks[0].numel()
    unreached = check_reached(reached, f"give --steps more than {settings.search.steps}, or more varied images")
    triggers, labels = judge.findings(found, clean.class_names)
    pair_triggers: Triggers | None = None
    pairs: tuple[LabelFinding, ...] = ()
    if settings.pairs:
        pair_triggers, pairs = judge.findings(search(Goals.pairs(classes), "pairs"), clean.class_names)
    everything = (*labels, *pairs)
    return Scan(
        ScanFigures(
            infected=any(item.infected for item in everything),
            labels=labels,
            pairs=pairs,
            median_l1=statistics.median(item.mask_l1 for item in labels),
            reference_agreement=judge.agreement,
            clean_images=len(searched),
            held_out=len(held_out),
            passes=sum(item.passes for item in everything),
            seconds=time.monotonic() - started if checkpoints is None else checkpoints.seconds,
            said=tuple(filter(None, [_missing(predictor, torch.cat([judge.known, judge.own])), unreached, judge.thinly()])),
        ),
        triggers,
        pair_triggers,
        settings,
        held_out.images(slice(0, 8)),
    )


@final
@dataclass(frozen=True)
class _Model:
    """A copy of the suspect, whose weights get no gradients.

    Attributes:
        answers: Images in [0, 1] to logits, on the engine's device.
        classes: M.
    """

    answers: nn.Module
    classes: int

    @classmethod
    def of(cls, predictor: Predictor, images: Tensor, engine: Engine) -> _Model:
        return cls(engine.place(frozen(predictor, images[:2])), predictor.num_classes)


@final
@dataclass(frozen=True)
class _Natural:
    """What a reference makes of a label: the size that it needs, over its median, and the suspect's trigger's success on it."""

    size: float
    ratio: float
    success: float


@final
class _Judge:
    """Gives second opinions; trains a reference when the first one is needed."""

    def __init__(
        self,
        model: _Model,
        searched: Tensor,
        labels: Tensor | None,
        held_out: Tensor,
        settings: ScanSettings,
        engine: Engine,
        checkpoints: Checkpoints | None,
        progress: Progress,
    ) -> None:
        self.model, self.searched, self.held_out = model, searched, held_out
        self.settings, self.engine, self.checkpoints, self.progress = settings, engine, checkpoints, progress
        self.own, self.own_searched = (says(model.answers, images, engine.device) for images in (held_out, searched))
        self.known = self.own_searched if labels is None else labels
        self.few: list[str] = []
        self.reference: nn.Module | None = None
        self.agreement: float | None = None

    def findings(self, triggers: Triggers, names: Sequence[str]) -> tuple[Triggers, tuple[LabelFinding, ...]]:
        """A verdict for each trigger, and the triggers, of which those of infected labels are strengthened."""
        sizes = triggers.sizes
        indices = anomaly_indices(sizes).tolist() if len(sizes) >= _SMALLEST else [None] * len(sizes)
        nominated = set(sizes.argsort()[:_SMALLEST].tolist())
        nominated |= {row for row, index in enumerate(indices) if index is not None and index > _NOMINATED}
        opinions = self._opinions(triggers, sorted(nominated))
        infected = [row for row, opinion in opinions.items() if opinion.infected]
        chosen, seed = triggers.select(infected), self.settings.seed
        stronger = triggers.replace(
            infected, strengthen(self.model.answers, self.searched, chosen, seed, self.engine, self.progress)
        )
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

    def _opinions(self, triggers: Triggers, rows: Sequence[int]) -> dict[int, SecondOpinion]:
        ratios = {row: _ratio(triggers.sizes, row) for row in rows}
        successes = {row: self._success(triggers, row) for row in rows}
        limits = {row: _SMALL if int(triggers.sources[row]) < 0 else _SMALL_PAIR for row in rows}
        suspects = [row for row in rows if ratios[row] < limits[row] and successes[row] >= _WORKS]
        natural = self._natural(triggers, suspects) if suspects else {}
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
            opinions[row] = msgspec.structs.replace(opinion, infected=is_infected(opinion, limits[row]))
        return opinions

    def _success(self, triggers: Triggers, row: int) -> float:
        """On images that it wants to send to the label."""
        return self._share(self.model.answers, triggers, row, self._others(triggers, row))

    def _others(self, triggers: Triggers, row: int) -> Tensor:
        """Images that the search has not seen; where these are too few to judge by, those that it has seen, too."""
        label, source = int(triggers.labels[row]), int(triggers.sources[row])

        def wanted(own: Tensor) -> Tensor:
            return (own != label) & ((own == source) if source >= 0 else (own >= 0))

        found = self.held_out[wanted(self.own)]
        if len(found) >= _FEWEST_JUDGED:
            return found
        self.few.append(str(label) if source < 0 else f"{source} to {label}")
        return torch.cat([found, self.searched[wanted(self.own_searched)]])

    def thinly(self) -> str:
        """What was judged by few images, in words."""
        if not self.few:
            return ""
        return (
            f"Fewer than {_FEWEST_JUDGED} images that the search had not seen could tell whether the triggers of "
            f"{', '.join(dict.fromkeys(self.few))} work, so that those it had seen were asked, too: add images of every class."
        )

    def _share(self, answers: nn.Module, triggers: Triggers, row: int, images: Tensor) -> float:
        found = says(answers, triggers.put_on(row, images), self.engine.device)
        return float((found == triggers.labels[row]).double().mean())

    def _natural(self, triggers: Triggers, suspects: Sequence[int]) -> dict[int, _Natural]:
        """What the reference makes of the suspects; medians are of others that were drawn."""
        seed = self.settings.seed
        if self.reference is None:
            self.reference = train_reference(self.searched, self.known, self.model.classes, seed, self.engine, self.progress)
            answers = says(self.reference, self.held_out, self.engine.device)
            self.agreement = float((answers == self.own).double().mean())
        order = torch.randperm(len(triggers), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = [row for row in order if row not in suspects][:_COMPARED]
        rows = torch.tensor([*suspects, *drawn])
        goals = Goals(triggers.labels[rows], triggers.sources[rows])

        def shown(what: str, done: int, total: int) -> None:
            self.progress(f"{what} in the reference", done, total)

        name = "reference-pairs" if int(triggers.sources.max()) >= 0 else "reference"
        search = self.settings.search
        found = recover_triggers(
            self.reference, self.searched, goals, search, seed, self.engine, self.checkpoints, name, shown
        ).sizes
        works = [self._share(self.reference, triggers, row, self._others(triggers, row)) for row in suspects]
        return {
            row: _Natural(float(found[number]), _ratio(found, number), works[number]) for number, row in enumerate(suspects)
        }


def is_infected(opinion: SecondOpinion, limit: float = _SMALL) -> bool:
    """The rule; see the top of this file.

    Args:
        opinion: Of a label, or of a pair.
        limit: Of the ratio.
    """
    if opinion.reference_ratio is None or opinion.reference_success is None:
        return False
    natural = opinion.size_ratio >= _SMALLER_THAN_NATURAL * min(1.0, opinion.reference_ratio)
    return opinion.success >= _WORKS and opinion.size_ratio < limit and not natural and opinion.reference_success < _TRANSFERS


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


def _missing(predictor: Predictor, labels: Tensor) -> str:
    """What the images can't tell, in words."""
    missing = missing_classes(labels, predictor)
    if not missing:
        return ""
    return (
        f"The clean images hold none of {missing}: the clean reference can't tell whether these labels are easy to reach in "
        "any model. Add images of every class."
    )


def _ratio(sizes: Tensor, row: int) -> float:
    """A size over the median of the others."""
    others = torch.cat([sizes[:row], sizes[row + 1 :]]).double()
    return float(sizes[row].double() / others.quantile(0.5))


def _distinct(clean: ImageSet) -> ImageSet:
    """Of equal images one: those that judge must not have been searched with."""
    found = clean.distinct()
    if len(found) < FEWEST_IMAGES:
        same = "" if len(found) == len(clean) else f" different ones among {len(clean)}"
        raise InspectionError(
            f"expected at least {FEWEST_IMAGES} clean images to scan with, got {len(found)}{same}: add images"
        )
    return found


def _cut(clean: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images for the search, and others."""
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed ^ 0x5CA))
    held_out = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(clean))))
    return clean.select(order[held_out : held_out + _MOST_SEARCHED]), clean.select(order[:held_out])


def _refuse_chance(predictor: Predictor, held_out: ImageSet) -> None:
    if held_out.labels is None:
        return
    right = float((answers(predictor, held_out) == held_out.known_labels).double().mean())
    if near_chance(right, predictor.num_classes):
        raise InspectionError(f"the model's answers to the clean images are near chance ({right:.1%} right): {NEAR_CHANCE}")
