"""One copy of a model with a planted trigger, and how STRIP's settings fare on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.evaluation import joint_scores
from calibration.planting import Plant, Say
from calibration.settings import BlendChoice, PassesChoice, named, strips, votes_of
from calibration.statistics import Estimate, auroc, proportion
from calibration.thresholds import rank
from guard.detectors import Strip
from guard.detectors.boundaries import by_all, soft_vote_scores
from guard.errors import CalibrationError
from guard.predictors import Predictor

_BATCH = 64
_MOST_TRIGGERED = 100
_TOOK = 0.8  # a trigger that works less often says little about a detector


class Setting(msgspec.Struct, frozen=True):
    """One way to run STRIP.

    Attributes:
        blend: How overlays are superimposed.
        alpha: Their weight; None for a pair of blends, which have weights of their own.
        overlays: N.
    """

    blend: BlendChoice
    alpha: float | None
    overlays: int

    def __str__(self) -> str:
        """For people."""
        return f"{named(self.blend, self.alpha)}, N = {self.overlays}"


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One setting against one planted trigger.

    Attributes:
        setting: The setting.
        far: Triggered inputs accepted, among those on which the planted attack succeeds.
        auroc: Of the scores, clean against those.
    """

    setting: Setting
    far: Estimate
    auroc: Estimate


class Planted(msgspec.Struct, frozen=True, kw_only=True):
    """One planted trigger.

    Attributes:
        name: Of the attack.
        say: In the choice of a setting.
        target_label: What it aims at; None for all-to-all.
        clean_accuracy: Of the copy, on the choosing images.
        attack_success: Of the planted trigger, there.
        figures: One per setting; empty when the trigger did not take.
    """

    name: str
    say: Say
    target_label: int | None
    clean_accuracy: float
    attack_success: Estimate
    figures: tuple[Figures, ...]


@final
@dataclass(frozen=True)
class Trial:
    """A copy with a planted trigger, and what STRIP has been asked about it so far."""

    plant: Plant
    predictor: Predictor
    overlays: Tensor
    clean: Tensor
    triggered: Tensor
    clean_accuracy: float
    attack_success: Estimate
    passes: PassesChoice
    bits: dict[tuple[BlendChoice, float | None, int], tuple[NDArray[np.float64], NDArray[np.float64]]]
    figures: dict[Setting, Figures]

    @classmethod
    def of(
        cls, copied: Predictor, plant: Plant, overlays: Tensor, images: Tensor, labels: Tensor, passes: PassesChoice = "exact"
    ) -> Self:
        """Ask a copy about clean images and triggered ones, before any detector.

        Args:
            copied: The copy.
            plant: What was planted in it.
            overlays: (N, C, H, W), in [0, 1].
            images: (B, C, H, W), in [0, 1], clean.
            labels: (B,), int64.
            passes: By what STRIP judges: the mean entropy, votes or, of sequential ones, soft votes.
        """
        wanted = plant.attack.targets(images, labels)
        triggered = (plant.attack.trigger(images) * 255.0).round() / 255.0
        success = (copied(triggered).argmax(dim=1).cpu() == wanted) & (wanted >= 0)
        rate = proportion(int(success.sum()), int((wanted >= 0).sum()))
        return cls(
            plant=plant,
            predictor=copied,
            overlays=overlays,
            clean=images,
            triggered=triggered[success][: _MOST_TRIGGERED if rate.value >= _TOOK else 0],
            clean_accuracy=float((copied(images).argmax(dim=1).cpu() == labels).double().mean()),
            attack_success=rate,
            passes=passes,
            bits={},
            figures={},
        )

    def compare(self, choice: BlendChoice, alpha: float | None, counts: Sequence[int], frr: float) -> None:
        """Fill in the figures of a candidate for each number of overlays."""
        if not len(self.triggered):
            return
        parts = len(strips(choice, alpha))
        for number, (blend, weight) in enumerate(strips(choice, alpha)):
            nothing = np.empty((len(self.clean), 0)), np.empty((len(self.triggered), 0))
            clean, triggered = self.bits.get((choice, alpha, number), nothing)
            more = self.overlays[number::parts][clean.shape[1] : max(counts) // parts]
            if len(more):
                strip = Strip(self.predictor, more, blend, weight)
                both = (
                    np.hstack([clean, _entropies(strip, self.clean)]),
                    np.hstack([triggered, _entropies(strip, self.triggered)]),
                )
                self.bits[choice, alpha, number] = both
        found = [self.bits[choice, alpha, number] for number in range(parts)]
        for count in counts:
            used = [(clean[:, : count // parts], triggered[:, : count // parts]) for clean, triggered in found]
            setting = Setting(choice, alpha, count)
            self.figures[setting] = _figures(setting, used, frr, self.passes)

    def planted(self) -> Planted:
        """What was found, for people and files."""
        return Planted(
            name=self.plant.name,
            say=self.plant.say,
            target_label=self.plant.target_label,
            clean_accuracy=self.clean_accuracy,
            attack_success=self.attack_success,
            figures=tuple(self.figures.values()),
        )


def _entropies(strip: Strip, images: Tensor) -> NDArray[np.float64]:
    return np.concatenate([strip.pass_entropies(part).numpy() for part in images.split(_BATCH)])


def _figures(
    setting: Setting, bits: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], frr: float, passes: PassesChoice
) -> Figures:
    """Each detector's entropies of clean and of triggered images, (n, N) and (m, N), to rates of them together."""
    if not all(np.isfinite(part).all() for both in bits for part in both):
        raise CalibrationError(f"the copy gives NaN or Inf on images superimposed by {setting.blend}: it can't be red-teamed")
    scores = [-np.stack([_judged(part, passes) for part in side]) for side in zip(*bits, strict=True)]
    thresholds = np.sort(scores[0], axis=1)[:, ::-1][:, rank(scores[0].shape[1], frr / len(bits)) - 1]
    clean, triggered = (joint_scores(side.astype(np.float32), thresholds.tolist()) for side in scores)
    accepted = int((scores[1] <= thresholds[:, None]).all(axis=0).sum())
    return Figures(setting=setting, far=proportion(accepted, len(triggered)), auroc=auroc(clean, triggered))


def _judged(bits: NDArray[np.float64], passes: PassesChoice) -> NDArray[np.float64]:
    """(n,): what is compared with a threshold, of each overlay's entropies, (n, N)."""
    needed, found = votes_of(bits.shape[1]), np.empty(len(bits))
    match passes:
        case "exact":
            found = bits.mean(axis=1)
        case "votes":
            found = np.partition(bits, -needed, axis=1)[:, -needed]
        case "sequential":  # after all passes, for want of images that choose boundaries
            found = -soft_vote_scores(torch.from_numpy(bits), by_all(needed, bits.shape[1])).double().numpy()
    return found
