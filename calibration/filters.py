"""Activation filters for the triggers that a scan found.

Each infected label gets a filter of its own: a mean over the neurons of several triggers dilutes what one of them excites. (Of
digits with two triggers, at 1% false rejections, one filter lets 27% and 38% through, two that share the rate 6% and 32%.) And
so the verdict says which trigger it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calibration.inspection.neural_cleanse import blend
from calibration.inspection.record import TRIGGERS, read_scan
from guard import Predictor
from guard.detectors import ActivationFilter, excited_neurons
from guard.errors import CalibrationError, InspectionError
from guard.predictors import Backend
from guard.predictors.activations import activations

_SHARE = 0.01  # of the neurons, as in the paper
_FEWEST = 10  # ours: of 128 neurons one hundredth is one, which lets 36% of the triggers through, and ten let hardly any
_WORKS = 0.5


@final
@dataclass(frozen=True)
class FoundTrigger:
    """A trigger that a scan found: x becomes (1 - m) x + m d, and the answer the label.

    Attributes:
        label: To which it sends images.
        mask: m, (H, W), in [0, 1].
        pattern: d, (C, H, W), in [0, 1].
    """

    label: int
    mask: Tensor
    pattern: Tensor

    def put_on(self, images: Tensor) -> Tensor:
        """The trigger on images, (B, C, H, W) in [0, 1]."""
        return blend(images, self.mask, self.pattern)


def infected_triggers(folder: Path, backend: Backend) -> tuple[FoundTrigger, ...]:
    """The triggers of the labels that a scan calls infected.

    Args:
        folder: That `guard scan` wrote.
        backend: The model that it must have looked at.

    Raises:
        InspectionError: It is of another model, found no infected label, or is damaged.
    """
    record = read_scan(folder)
    if record.model_sha256 is None or record.model_sha256 != backend.fingerprint():
        raise InspectionError(f"the scan in {folder} is of another model (SHA-256 differs): scan the one that detects")
    infected = [item.label_index for item in record.labels if item.infected]
    if not infected:
        pairs = ", only pairs of labels" if any(item.infected for item in record.pairs) else ""
        raise InspectionError(
            f"the scan in {folder} found no infected label{pairs}, so there is no trigger to filter: calibrate without it"
        )
    try:
        arrays = load_file(folder / TRIGGERS)
        masks, patterns, labels = (arrays[f"labels.{name}"] for name in ("masks", "patterns", "labels"))
        rows = [labels.tolist().index(label) for label in infected]
        found = tuple(FoundTrigger(int(labels[row]), masks[row].float(), patterns[row].float()) for row in rows)
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise InspectionError(f"expected {TRIGGERS} in {folder} with a trigger for each infected label: scan again") from error
    if any(item.mask.shape != item.pattern.shape[1:] or not _within(item.mask, item.pattern) for item in found):
        raise InspectionError(f"expected masks (H, W) and patterns (C, H, W) in [0, 1] in {folder}/{TRIGGERS}: scan again")
    return found


def activation_filter(predictor: Predictor, images: Tensor, trigger: FoundTrigger) -> ActivationFilter:
    """A filter for the neurons that a trigger excites; its name ends in the label.

    Args:
        predictor: The model.
        images: (N, C, H, W), in [0, 1], clean, other than those that set the threshold.
        trigger: That a scan found.

    Raises:
        CalibrationError: The trigger does not work on these images.
        ModelError: The model can't be looked into.
    """
    if trigger.pattern.shape != images.shape[1:]:
        got = tuple(trigger.pattern.shape)
        raise CalibrationError(f"expected triggers of shape {predictor.spec.shape}, got {got}: scan images of this size")
    triggered = trigger.put_on(images)
    success = float((predictor(triggered).argmax(dim=1) == trigger.label).double().mean())
    if success < _WORKS:
        raise CalibrationError(
            f"expected a trigger that sends clean images to label {trigger.label}, got one that sends {success:.0%}: "
            "calibrate with the options that the scan had, --mean and --std above all"
        )
    clean, excited = (activations(predictor, batch, "penultimate") for batch in (images, triggered))
    neurons = excited_neurons(clean, excited, min(1.0, max(_SHARE, _FEWEST / clean.shape[1])))
    return ActivationFilter(predictor, neurons, f"activation-filter-{trigger.label}")


def _within(*values: Tensor) -> bool:
    return all(bool(((item >= 0.0) & (item <= 1.0)).all()) for item in values)
