"""What a guard is worth: accuracy, attack success, false rejections and acceptances, each with a 95% interval.

Rates follow the STRIP paper's usage: FRR, clean inputs rejected; FAR, triggered inputs accepted. A rejected input counts
as not correct, and as a failure of the attack. Triggered inputs whose true label is the target are left out throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.data import ImageSet, Progress, no_progress
from calibration.speed import Speed
from calibration.statistics import Estimate, auroc, proportion
from guard import Guard
from guard.detectors.detector import at_or_over
from guard.errors import InputError

_NO_OTHERS = "expected triggered images of classes other than the target, got none"
_BATCH = 64


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Numerators and denominators."""

    clean: int
    clean_rejected: int
    clean_correct: int | None
    clean_correct_guarded: int | None
    triggered: int | None = None
    triggered_successful: int | None = None
    triggered_successful_guarded: int | None = None
    triggered_accepted: int | None = None
    successful_accepted: int | None = None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The figures; None where the data to measure one is missing.

    Attributes:
        clean_accuracy: Of the model through the preprocessor, detectors off.
        guarded_clean_accuracy: With them on.
        attack_success_rate: Triggered inputs answered with the target, detectors off.
        guarded_attack_success_rate: With them on.
        frr: Clean inputs rejected.
        far: Triggered inputs accepted.
        far_successful: Accepted among those on which the attack succeeds with the detectors off.
        auroc: Of full-N scores, clean against those; of several detectors', see `joint_scores`.
        counts: Behind the rates.
        speed: What the guard costs, where that was measured.
    """

    clean_accuracy: Estimate | None
    guarded_clean_accuracy: Estimate | None
    attack_success_rate: Estimate | None
    guarded_attack_success_rate: Estimate | None
    frr: Estimate
    far: Estimate | None
    far_successful: Estimate | None
    auroc: Estimate | None
    counts: Counts
    speed: tuple[Speed, ...] = ()


@final
@dataclass(frozen=True)
class Judged:
    """A set of images as a guard sees it.

    Attributes:
        answers: (n,), int64, labels with the detectors off; -1 where the model gave none.
        rejected: (n,), bool.
        scores: (n,), float64, all passes: of a lone detector its own, of several what `joint_scores` makes of them.
        by_detector: (D, n), float32, each detector's own, all passes.
    """

    answers: Tensor
    rejected: Tensor
    scores: NDArray[np.float64]
    by_detector: NDArray[np.float32]


def judge(guard: Guard, images: ImageSet, what: str, progress: Progress = no_progress) -> Judged:
    """Answer and score a set in full, without curtailing; the verdicts are the same.

    Args:
        guard: The guard; its mode is ignored, as if it enforced.
        images: What to judge.
        what: For the progress display.
        progress: Told how far it is.
    """
    answers, rejected = [], []
    scores: list[list[Tensor]] = [[] for _ in guard.detectors]
    for part in torch.arange(len(images)).split(_BATCH):
        batch = images.images(part)
        probabilities = guard.answer(batch).cpu()
        missing = torch.isnan(probabilities).any(dim=1)
        answers.append(torch.where(missing, -1, probabilities.argmax(dim=1)))
        fired = missing.clone()
        for item, own in zip(guard.detectors, scores, strict=True):
            own.append(item.detector.score(batch).cpu())
            fired |= at_or_over(own[-1], item.threshold)
        rejected.append(fired)
        progress(what, int(part[-1]) + 1, len(images))
    by_detector = torch.stack([torch.cat(own) for own in scores]).numpy() if scores else np.zeros((0, len(images)), np.float32)
    joint = joint_scores(by_detector, [item.threshold for item in guard.detectors])
    return Judged(torch.cat(answers), torch.cat(rejected), joint, by_detector)


def joint_scores(by_detector: NDArray[np.float32], thresholds: Sequence[float]) -> NDArray[np.float64]:
    """One score for a guard that rejects what any of its detectors finds, so that an AUROC can be taken of it.

    For several detectors the largest of their (s - t) / |t|: how far the score s lies over its threshold t, as a share of it;
    of STRIP, how far the entropy lies under its own. It is >= 0 exactly where one of them fires. (Where t is 0, s alone.)

    Args:
        by_detector: (D, n), scores.
        thresholds: D, on them.

    Returns:
        (n,): of a lone detector its own scores; empty without detectors. NaN where a detector gave none.
    """
    scores = by_detector.astype(np.float64)
    if len(scores) < 2:
        return scores[0] if len(scores) else np.zeros(0)
    limits = np.array(thresholds)[:, None]
    joint: NDArray[np.float64] = ((scores - limits) / np.where(limits == 0.0, 1.0, np.abs(limits))).max(axis=0)
    return joint


def evaluate(
    guard: Guard,
    clean: ImageSet,
    triggered: ImageSet | None = None,
    target_label: int | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure a guard.

    Args:
        guard: The guard; seed it for a preprocessor that draws.
        clean: Clean images, with labels for the accuracies.
        triggered: Images with the trigger, and their true labels.
        target_label: What the attack wants them answered with.
        progress: Told how far it is.

    Raises:
        InputError: Triggered images without target or true labels, or of another shape.
    """
    clean, triggered = align_sets(guard, clean, triggered, target_label)
    return summarise(
        judge(guard, clean, "clean images", progress),
        clean.labels,
        None if triggered is None else judge(guard, triggered, "triggered images", progress),
        None if triggered is None else triggered.labels,
        target_label,
    )


def summarise(
    clean: Judged,
    clean_labels: Tensor | None,
    triggered: Judged | None,
    true_labels: Tensor | None,
    targets: Tensor | int | None,
) -> Evaluation:
    """The figures that follow from judged sets; see `evaluate`.

    Args:
        clean: Of clean images.
        clean_labels: (n,), int64; None when unknown.
        triggered: Of triggered images.
        true_labels: (m,), int64, theirs.
        targets: What the attack wants: one label, or (m,), int64, one per image, -1 for images that it wants nothing of.
    """
    total = len(clean.answers)
    refused = int(clean.rejected.sum())
    right = None if clean_labels is None else clean.answers == clean_labels
    correct = None if right is None else int(right.sum())
    guarded = None if right is None else int((right & ~clean.rejected).sum())
    counts = Counts(clean=total, clean_rejected=refused, clean_correct=correct, clean_correct_guarded=guarded)
    result = Evaluation(
        clean_accuracy=None if correct is None else proportion(correct, total),
        guarded_clean_accuracy=None if guarded is None else proportion(guarded, total),
        attack_success_rate=None,
        guarded_attack_success_rate=None,
        frr=proportion(refused, total),
        far=None,
        far_successful=None,
        auroc=None,
        counts=counts,
    )
    if triggered is None or true_labels is None or targets is None:
        return result
    wanted = torch.where(true_labels == targets, -1, targets) if isinstance(targets, int) else targets
    return _with_attack(result, clean, triggered, wanted)


def _with_attack(result: Evaluation, clean: Judged, triggered: Judged, wanted: Tensor) -> Evaluation:
    counted = wanted >= 0
    total = int(counted.sum())
    if total == 0:
        raise InputError(_NO_OTHERS)
    accepted = counted & ~triggered.rejected
    success = counted & (triggered.answers == wanted)
    successes, passed, both = int(success.sum()), int(accepted.sum()), int((success & accepted).sum())
    scored = success.numpy() & np.isfinite(triggered.scores) if len(triggered.scores) else np.zeros(0, dtype=bool)
    return msgspec.structs.replace(
        result,
        attack_success_rate=proportion(successes, total),
        guarded_attack_success_rate=proportion(both, total),
        far=proportion(passed, total),
        far_successful=proportion(both, successes) if successes else None,
        auroc=auroc(clean.scores[np.isfinite(clean.scores)], triggered.scores[scored]) if scored.any() else None,
        counts=msgspec.structs.replace(
            result.counts,
            triggered=total,
            triggered_successful=successes,
            triggered_successful_guarded=both,
            triggered_accepted=passed,
            successful_accepted=both,
        ),
    )


def align_sets(
    guard: Guard, clean: ImageSet, triggered: ImageSet | None, target_label: int | None
) -> tuple[ImageSet, ImageSet | None]:
    """Bring both sets' labels to the model's order, and refuse sets that don't fit.

    Labels of a folder are positions of its sub-folders; where the profile knows other class names, they are matched by name.

    Returns:
        The sets, labels in the model's order; triggered images of the target's own class, which no figure counts, are left out.

    Raises:
        InputError: See `evaluate`.
    """
    aligned = _align(guard, clean)
    if triggered is None:
        return aligned, None
    classes = guard.predictor.num_classes
    if target_label is None or not 0 <= target_label < classes:
        raise InputError(
            f"expected --target, the attack's label from 0 to {classes - 1}, with triggered images, got {target_label}"
        )
    if triggered.labels is None:
        raise InputError("expected the true labels y of the triggered images: rates leave out those of the target class")
    attacked = _align(guard, triggered)
    others = torch.nonzero(attacked.known_labels != target_label).squeeze(1)
    if not len(others):
        raise InputError(_NO_OTHERS)
    return aligned, attacked.select(others)


def _align(guard: Guard, images: ImageSet) -> ImageSet:
    spec, classes = guard.predictor.spec, guard.predictor.num_classes
    if images.shape != spec.shape:
        raise InputError(f"expected images of shape {spec.shape}, got {images.shape}: resize them first")
    if images.labels is None:
        return images
    labels = images.labels
    if images.class_names and spec.class_names:
        if images.class_names != spec.class_names:
            labels = torch.tensor(_positions(images.class_names, spec.class_names))[labels]
    elif images.class_names and len(images.class_names) != classes:
        raise InputError(
            f"expected {classes} class folders, one per output of the model, got {len(images.class_names)}: "
            "add an (empty) folder for each missing class, or use an .npz"
        )
    if int(labels.max()) >= classes:
        raise InputError(f"expected labels from 0 to {classes - 1}, got {int(labels.max())}: is it another data set?")
    return ImageSet(images.pixels, labels, spec.class_names, images.names)


def _positions(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Where the profile has each class of a set.

    Raises:
        InputError: It does not have one, or one of that name is not the only one.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"expected class folders that the profile knows, got {unknown[0]!r}: name them as at calibration")
    several = [name for name in names if max(names.count(name), known.count(name)) > 1]
    if several:
        raise InputError(
            f"expected class names that differ, or the profile's own in the same order, got {several[0]!r} of several classes: "
            "use an .npz without class_names, whose y are the model's outputs"
        )
    return [known.index(name) for name in names]
