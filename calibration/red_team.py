"""Red team: plant known triggers in copies of the model, and see which of STRIP's settings finds them.

How many triggered inputs slip through (FAR) can't be measured from clean images. So a few known triggers are planted in
copies of the model by brief fine-tuning, and each candidate setting (blend, alpha, N) is calibrated on every copy at the
same false rejection rate: the FAR on the planted triggers picks the setting. It is an estimate for the planted attacks,
not a guarantee for others.

The images that fine-tune, those that choose, and those that later set the threshold are disjoint: `split` sees to it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from calibration.accuracy import NEAR_CHANCE, answers, near_chance
from calibration.data import ImageSet, Progress, no_progress
from calibration.division import check_labels
from calibration.overlays import choose_overlays
from calibration.planting import draw_plants, plant_trigger
from calibration.settings import BlendChoice, PassesChoice, fewest_overlays, strips
from calibration.statistics import Estimate
from calibration.thresholds import check_rate, needed_images, rank
from calibration.trials import Planted, Setting, Trial
from guard.errors import CalibrationError, TooFewImagesError
from guard.predictors import Predictor

_MOST = {"tuning": 1_200, "choosing": 400}
_FEWEST = {"tuning": 100, "choosing": 100}
_FEWEST_OVERLAYS = 4  # as calibration asks for, for a pair of blends
_FINALISTS = 2
_SAME_FAR = 0.05  # a threshold from a few hundred images is uncertain, and FAR moves by more with it
_SAME_AUROC = 0.001


CANDIDATES: tuple[tuple[BlendChoice, float | None], ...] = (
    ("logit", 3.5),
    ("logit+demeaned", None),
    ("demeaned", 1.5),
    ("max", 1.0),
    ("add", 1.0),
    ("mix", 0.5),
)
"""Among equals, the earlier is chosen."""

BLIND = 0.5
"""A setting that accepts this share of a planted trigger is called blind to it."""


class RedTeam(msgspec.Struct, frozen=True, kw_only=True):
    """What the red team found.

    Attributes:
        chosen: The setting that it recommends.
        frr: At which every setting was compared.
        planted: The triggers.
        tuning_images: That planted them.
        choosing_images: That compared settings.
        seconds: That it took.
        left_out: Candidates that can't be calibrated from so few choosing images.
    """

    chosen: Setting
    frr: float
    planted: tuple[Planted, ...]
    tuning_images: int
    choosing_images: int
    seconds: float
    left_out: tuple[tuple[BlendChoice, float | None], ...] = ()


def split(clean: ImageSet, seed: int, frr: float = 0.01, overlays: int = 100) -> tuple[ImageSet, ImageSet]:
    """Cut clean images at random: one part for the red team, the other for overlays and threshold; equal images count once.

    The red team gets half, and no more than it has use for at this rate with so many overlays.
    """
    clean = clean.distinct()
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed ^ 0x5ED))
    useful = overlays + _MOST["tuning"] + max(_MOST["choosing"], _fewest_choosing(frr))
    count = min(len(clean) // 2, useful)
    return clean.select(order[:count]), clean.select(order[count:])


def red_team(
    predictor: Predictor,
    clean: ImageSet,
    frr: float = 0.01,
    overlays: int = 100,
    seed: int = 0,
    candidates: Sequence[tuple[BlendChoice, float | None]] = CANDIDATES,
    passes: PassesChoice = "exact",
    progress: Progress = no_progress,
) -> RedTeam:
    """Plant triggers in copies of a model and compare STRIP's settings on them.

    Args:
        predictor: The model; it is never changed.
        clean: Clean images, of which none may set the threshold later, and equal ones count once; unlabelled ones get the
            model's own answers.
        frr: False rejection rate at which settings are compared.
        overlays: N, at most.
        seed: Of triggers, targets and the split.
        candidates: Blends and weights; one that can't be calibrated from so few images is left out.
        passes: By what STRIP judges: the mean entropy, votes or, of sequential ones, soft votes.
        progress: Told how far it is.

    Raises:
        TooFewImagesError: It says how many are needed.
        ModelError: The model can't be fine-tuned.
        CalibrationError: No planted trigger took, labels that are not the model's or all the same, or images too small.
    """
    clean = clean.distinct()
    check_images(len(clean), frr, overlays)
    check_labels(clean, predictor)
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    answered = answers(predictor, clean)
    labels = answered if clean.labels is None else clean.labels
    right = float((answered == labels).double().mean())
    if near_chance(right, predictor.num_classes):
        raise CalibrationError(f"the model answers {right:.0%} of the clean images as labelled, near chance: {NEAR_CHANCE}")
    superimposed, tuning, choosing = _parts(labels, frr, overlays, generator)
    if min(len(labels[part].unique()) for part in (tuning, choosing)) < 2:
        raise CalibrationError("red-teaming needs several clean images of several classes, got one class: add images of others")
    trials = []
    plants = draw_plants(predictor.spec.shape, predictor.num_classes, generator)
    for number, plant in enumerate(plants):
        progress("planting triggers", number, len(plants))
        copied = plant_trigger(predictor, plant.attack, clean.images(tuning), labels[tuning], generator)
        aside, compared = clean.images(superimposed), clean.images(choosing)
        trials.append(Trial.of(copied, plant, aside, compared, labels[choosing], passes))
    progress("planting triggers", len(plants), len(plants))
    able = [item for item in candidates if rank(len(choosing), frr / len(strips(*item))) >= 1]
    counts = overlay_counts(overlays, able, passes)
    chosen = _settle([trial for trial in trials if trial.plant.say != "none"], able, counts, frr, progress)
    others = [trial for trial in trials if trial.plant.say == "none"]
    _compare(others, [(chosen.blend, chosen.alpha)], [chosen.overlays], frr, progress, "looking for blind spots")
    return RedTeam(
        chosen=chosen,
        frr=frr,
        planted=tuple(trial.planted() for trial in trials),
        tuning_images=len(tuning),
        choosing_images=len(choosing),
        seconds=time.monotonic() - started,
        left_out=tuple(item for item in candidates if item not in able),
    )


def overlay_counts(overlays: int, candidates: Sequence[tuple[BlendChoice, float | None]], passes: PassesChoice) -> list[int]:
    """How many overlays settings are compared with, of so many at most: as many as each can be calibrated with, at least."""
    fewest = max([_FEWEST_OVERLAYS, *(fewest_overlays(passes, len(strips(*item))) for item in candidates)])
    return sorted({min(overlays, max(fewest, overlays // part)) for part in (4, 2, 1)})


def _settle(
    trials: Sequence[Trial],
    candidates: Sequence[tuple[BlendChoice, float | None]],
    counts: Sequence[int],
    frr: float,
    progress: Progress,
) -> Setting:
    """All candidates with the fewest overlays, then the best of them with more."""
    _compare(trials, candidates, counts[:1], frr, progress, "comparing all settings")
    best = list(dict.fromkeys((item.blend, item.alpha) for item in _ranked([trial.planted() for trial in trials])))
    _compare(trials, best[:_FINALISTS], counts, frr, progress, "comparing the best further")
    return choose([trial.planted() for trial in trials])


class _Score(NamedTuple):
    """How a setting fares: means over the planted triggers that decide, and whether it misses one that breaks ties."""

    far: float
    misses: bool
    auroc: float


def choose(planted: Sequence[Planted]) -> Setting:
    """Pick a setting.

    With the most overlays, the blend with the lowest mean FAR over the planted triggers that decide; but one within five
    points of it that sees those that break ties comes before one that is blind to them. Among equals, the higher mean
    AUROC. Then the fewest overlays that do as well.

    Raises:
        CalibrationError: None of those that decide took.
    """
    best = _ranked(planted)[0]
    scores = _scores(planted)
    lowest = scores[best]
    same = [
        setting
        for setting, score in scores.items()
        if (setting.blend, setting.alpha) == (best.blend, best.alpha)
        and score.far <= lowest.far
        and score.misses <= lowest.misses
        and score.auroc >= lowest.auroc - _SAME_AUROC
    ]
    return min(same, key=lambda setting: setting.overlays)


def _ranked(planted: Sequence[Planted]) -> list[Setting]:
    """Settings with the most overlays that were tried, best first."""
    scores = _scores(planted)
    most = max(setting.overlays for setting in scores)
    tried = [setting for setting in scores if setting.overlays == most]
    limit = min(scores[setting].far for setting in tried) + _SAME_FAR

    def order(setting: Setting) -> tuple[bool, bool, float, float]:
        score = scores[setting]
        tied = score.far <= limit
        return not tied, tied and score.misses, score.far, -score.auroc

    return sorted(tried, key=order)


def _scores(planted: Sequence[Planted]) -> dict[Setting, _Score]:
    deciding = [plant.figures for plant in planted if plant.say == "decides" and plant.figures]
    if not deciding:
        rates = ", ".join(f"{plant.name} {plant.attack_success.value:.0%}" for plant in planted)
        raise CalibrationError(f"expected a planted patch to work on the copies, got {rates}: give more clean images")
    ties = [plant.figures for plant in planted if plant.say == "breaks ties" and plant.figures]
    missed = {item.setting for figures in ties for item in figures if item.far.value >= BLIND}
    return {
        row[0].setting: _Score(_mean([item.far for item in row]), row[0].setting in missed, _mean([item.auroc for item in row]))
        for row in zip(*deciding, strict=True)
    }


def _mean(rates: Sequence[Estimate]) -> float:
    return float(np.mean([rate.value for rate in rates]))


def check_images(count: int, frr: float, overlays: int) -> None:
    """Refuse, before any work, what can't be red-teamed with so many images; see `red_team`."""
    if overlays < _FEWEST_OVERLAYS:
        raise CalibrationError(f"expected at least {_FEWEST_OVERLAYS} overlays, got {overlays}: the paper uses 100")
    check_rate(frr)
    needed = needed_for(frr, overlays)
    if count < needed:
        raise TooFewImagesError(
            f"red-teaming with {overlays} overlays at a false rejection rate of {frr:g} needs at least {needed} clean images, "
            f"got {count}: add images, use fewer overlays, or allow a higher rate",
            needed=needed,
            available=count,
        )


def needed_for(frr: float, overlays: int) -> int:
    """The fewest clean images that can be red-teamed with."""
    return overlays + _FEWEST["tuning"] + _fewest_choosing(frr)


def _fewest_choosing(frr: float) -> int:
    return max(_FEWEST["choosing"], needed_images(frr))


def _parts(labels: Tensor, frr: float, overlays: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    superimposed = choose_overlays(labels, overlays, generator)
    free = torch.ones(len(labels), dtype=torch.bool)
    free[superimposed] = False
    rest = torch.nonzero(free).squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=generator)]
    choosing = max(_fewest_choosing(frr), min(_MOST["choosing"], len(rest) * 2 // 5))
    return superimposed, rest[choosing : choosing + _MOST["tuning"]], rest[:choosing]


def _compare(
    trials: Sequence[Trial],
    candidates: Sequence[tuple[BlendChoice, float | None]],
    counts: Sequence[int],
    frr: float,
    progress: Progress,
    what: str,
) -> None:
    total = len(trials) * len(candidates)
    for number, (trial, (blend, alpha)) in enumerate(itertools.product(trials, candidates)):
        progress(what, number, total)
        trial.compare(blend, alpha, counts, frr)
    progress(what, total, total)
