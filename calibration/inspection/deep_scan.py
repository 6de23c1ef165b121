"""Inspection without any data: is a model backdoored, for which labels, and with which triggers?

DeepInspect finds a small trigger for each label, on images that it recovers from the model. A label is infected if its
deviation factor is over 2, and (ours) its trigger less than 0.45 times as large as the median, or less than 0.3 times, whatever
the factor: see `DeepInspected.outliers`. There is no second opinion, because no clean reference can be trained without images.

Blind to what `scan` is blind to, and to whatever recovered images don't show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import final

import msgspec
import torch

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.frozen import frozen
from calibration.inspection.anomaly import check_reached
from calibration.inspection.deep_inspect import CUTOFF, DeepInspected, DeepInspectSettings, deep_inspect
from calibration.inspection.passes import Sound
from calibration.inspection.record import LabelFinding, ScanFigures
from guard import Predictor
from guard.errors import InspectionError
from guard.images import InputSpec

_FEWEST = 5  # labels: with four, the deviation factor can't be over 1.35


class DeepScanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to inspect.

    Attributes:
        search: For triggers, and for images.
        seed: Of every draw.
    """

    search: DeepInspectSettings = DeepInspectSettings()
    seed: int = 0


@final
@dataclass(frozen=True)
class DeepScan:
    """An inspection, not yet on disk.

    Attributes:
        figures: What was found.
        found: Triggers and images, in the order of `figures.labels`.
        settings: How.
    """

    figures: ScanFigures
    found: DeepInspected
    settings: DeepScanSettings


def deep_scan(
    predictor: Predictor,
    settings: DeepScanSettings,
    *,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> DeepScan:
    """Inspect a model.

    Args:
        predictor: The model.
        settings: How.
        engine: Where; this machine's first device by default.
        checkpoints: Written while it works, gone on from, and removed by nobody here.
        progress: Told how far it is.

    Raises:
        InspectionError: The model has fewer than five labels, does not answer all images, or most labels have no trigger.
        CalibrationError: It gives all recovered images one label.
        ModelError: It has no gradients.
    """
    started = time.monotonic()
    classes, spec = predictor.num_classes, predictor.spec
    answers = Sound(frozen(predictor, torch.rand(2, *spec.shape, generator=torch.Generator().manual_seed(0))))
    if classes < _FEWEST:
        raise InspectionError(
            f"expected a model with at least {_FEWEST} labels, whose triggers are compared, got {classes}: scan it with clean "
            "images, by neural-cleanse"
        )
    engine = engine or Engine()
    found = deep_inspect(
        engine.place(answers), spec.shape, classes, settings.search, settings.seed, engine, checkpoints, progress
    )
    labels = _findings(found, spec, settings.search)
    figures = ScanFigures(
        method="deep-inspect",
        infected=any(item.infected for item in labels),
        labels=labels,
        pairs=(),
        median_l1=float(found.sizes.double().quantile(0.5)),
        reference_agreement=None,
        clean_images=0,
        held_out=0,
        passes=sum(item.passes for item in labels),
        seconds=time.monotonic() - started if checkpoints is None else checkpoints.seconds,
        recovered_images=found.images.shape[0] * found.images.shape[1],
        recovered_agreement=found.agreement,
        said=_said(found, spec),
    )
    return DeepScan(figures, found, settings)


def _findings(found: DeepInspected, spec: InputSpec, search: DeepInspectSettings) -> tuple[LabelFinding, ...]:
    """A verdict for each label."""
    passes = found.images.shape[1] * search.inversion.steps + search.steps // search.window * search.window * search.batch
    outliers, names = set(found.outliers), spec.class_names
    return tuple(
        LabelFinding(
            label_index=label,
            label=names[label] if label < len(names) else None,
            source_index=None,
            anomaly_index=factor,
            mask_l1=float(found.sizes[label]),
            success=float(found.success[label]),
            passes=passes,
            infected_by_index=factor > CUTOFF,
            candidate=factor > CUTOFF or label in outliers,
            second_opinion=None,
            infected=label in outliers,
        )
        for label, factor in enumerate(found.factors.tolist())
    )


def _said(found: DeepInspected, spec: InputSpec) -> tuple[str, ...]:
    """What can't be known without images, and what was not found."""
    said = []
    if spec.dtype == "float32" and not spec.mean and not spec.std:
        said.append(
            "No mean and std were given: the model is believed to normalise for itself. If it does not, scan again with them."
        )
    reached = found.sizes < float(found.triggers[0].numel())
    unreached = check_reached(reached, "give --steps a larger number, or --mean and --std, or scan with clean images")
    return tuple(filter(None, [*said, unreached]))
