"""Activation filters for the triggers that a scan found.

Each trigger gets a filter of its own: a mean over the neurons of several triggers dilutes what one of them excites. (Of
digits with two triggers, at 1% false rejections, one filter lets 27% and 38% through, two that share the rate 6% and 32%.) And
so the verdict says which trigger it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from calibration.inspection.triggers import blend
from calibration.inspection.triggers_file import read_infected
from guard import Predictor
from guard.detectors import ActivationFilter, excited_neurons
from guard.errors import CalibrationError
from guard.predictors import wrap
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
        number: Among the triggers of this label, from 1.
    """

    label: int
    mask: Tensor
    pattern: Tensor
    number: int = 1

    @property
    def name(self) -> str:
        """`3`, and of a second trigger for this label `3-2`."""
        return str(self.label) if self.number == 1 else f"{self.label}-{self.number}"

    def put_on(self, images: Tensor) -> Tensor:
        """The trigger on images, (B, C, H, W) in [0, 1]."""
        return blend(images, self.mask, self.pattern)


def infected_triggers(folder: str | Path, model: object) -> tuple[FoundTrigger, ...]:
    """The triggers of the labels that a scan calls infected, each for a filter.

    Args:
        folder: That `guard scan` wrote.
        model: That it must have looked at: an `nn.Module`, or what `load_backend` returned.

    Raises:
        InspectionError: See `read_infected`.
    """
    found = read_infected(folder, wrap(model))
    labels = found.labels.tolist()
    numbers = [labels[: place + 1].count(label) for place, label in enumerate(labels)]
    rows = zip(labels, found.masks.float(), found.patterns.float(), numbers, strict=True)
    return tuple(FoundTrigger(*row) for row in rows)


def activation_filter(predictor: Predictor, images: Tensor, trigger: FoundTrigger) -> ActivationFilter:
    """A filter for the neurons that a trigger excites; its name ends in the label, and in a number where there are several.

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
    return ActivationFilter(predictor, neurons, f"activation-filter-{trigger.name}")
