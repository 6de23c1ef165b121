"""Calibration: from a model and clean images to a profile.

The clean set is cut in two by a seed: STRIP's overlays, and the images that set the threshold and measure accuracy.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeGuard, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.data import ImageSet, Progress, no_progress
from calibration.discovery import Hints, discover
from calibration.overlays import choose_overlays, order_overlays
from calibration.thresholds import Method, check_rates, set_threshold
from guard import CalibratedDetector, Guard, Policy, Predictor
from guard.detectors import Blend, Strip
from guard.detectors.strip import stage_ends
from guard.errors import CalibrationError, ModelError
from guard.loading import PROBES
from guard.predictors import Backend, wrap
from guard.preprocessors import Gym
from guard.profile import SCHEMA, ModelRecord, Profile, StripRecord, ThresholdRecord, overlays_to_array, save_profile

_LIBRARIES = ("backdoor-guard", "torch", "numpy", "opencv-python-headless", "onnxruntime", "kornia", "scipy")
_MIN_OVERLAYS = 2


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What to calibrate.

    Attributes:
        frr: False rejection rate asked for.
        overlays: N.
        blend: How overlays are superimposed.
        alpha: Their weight; None for the blend's own default (1, and 0.5 for `mix`).
        preprocess: What happens to an image before the model answers it.
        max_accuracy_drop: Points of clean accuracy that the preprocessor may cost.
        method: Of setting the threshold.
        confidence: With which the rate must hold; None bounds its mean.
        allow_missing_classes: Go on when the clean set holds no image of a class.
        seed: Of the split and the preprocessor's draws.
    """

    frr: float = 0.01
    overlays: int = 100
    blend: Blend = "add"
    alpha: float | None = None
    preprocess: Literal["none", "gym"] = "none"
    max_accuracy_drop: float = 3.0
    method: Method = "conformal"
    confidence: float | None = None
    allow_missing_classes: bool = False
    seed: int = 0


@final
@dataclass(frozen=True)
class Calibration:
    """A profile that is not yet on disk, and what was measured on the way.

    Attributes:
        profile: The profile.
        arrays: Its arrays.
        predictor: The model as found.
        strip: The detector.
        clean_entropies: (n,), float32, bits, of the threshold-setting images, all N passes.
    """

    profile: Profile
    arrays: dict[str, Tensor]
    predictor: Predictor
    strip: Strip
    clean_entropies: NDArray[np.float32]

    @property
    def threshold(self) -> ThresholdRecord:
        """STRIP's threshold, on minus the entropy."""
        return self.profile.detectors[0].threshold

    def guard(self, policy: Policy | None = None, seed: int | None = None) -> Guard:
        """A guard from this calibration, without going through a file."""
        detectors = [CalibratedDetector(self.strip, self.threshold.value)]
        return Guard(
            self.predictor,
            detectors,
            preprocessor=self.profile.preprocessor,
            policy=policy or self.profile.policy,
            seed=seed,
        )

    def save(self, folder: str | Path, model_file: Path | None = None, extra: dict[str, bytes] | None = None) -> Profile:
        """Write the profile folder, with a copy of the model's file where it has one; see `save_profile`."""
        return save_profile(self.profile, self.arrays, Path(folder), model_file, extra)


def calibrate(
    model: object,
    clean: ImageSet,
    settings: Settings | None = None,
    *,
    hints: Hints | None = None,
    record: ModelRecord | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """Calibrate a guard for a model from clean images alone.

    Args:
        model: An `nn.Module` in eval mode, a predict function, or a loaded backend.
        clean: Clean images; labels are optional, and allow accuracy to be checked.
        settings: What to calibrate; the defaults when None.
        hints: What is known of the model's conventions.
        record: Where the model comes from, for profiles that carry it; its `output` and `num_classes` are filled in.
        progress: Told how far it is.

    Returns:
        The calibration; `save` writes it.

    Raises:
        CalibrationError: No threshold can be set, or the preprocessor costs too much accuracy.
        TooFewImagesError: It says how many images are needed.
        ModelError: The model's answers can't be used.
    """
    settings = settings or Settings()
    check_settings(settings, len(clean))
    backend: Backend = model if _is_backend(model) else wrap(model)
    progress("looking at the model", 0, 1)
    predictor = discover(backend, clean, hints)
    progress("looking at the model", 1, 1)
    _check_classes(clean, predictor, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    overlay_rows, rest = _split(clean, predictor, settings, generator)
    _check_classes(clean.select(rest), predictor, settings)  # the overlays may have taken the last image of one
    overlays = clean.images(overlay_rows)
    alpha = settings.alpha if settings.alpha is not None else 0.5 if settings.blend == "mix" else 1.0
    strip = Strip(predictor, overlays, settings.blend, alpha)
    accuracy, raw_accuracy = _accuracies(predictor, clean.select(rest), settings, progress)
    strip, scores, passes = _measure(strip, clean.select(rest), settings, progress)
    threshold = set_threshold(scores, settings.frr, settings.method, settings.confidence)
    _refuse_blind(threshold)
    profile = Profile(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        input=predictor.spec,
        model=_record(record, backend, predictor),
        detectors=(StripRecord(threshold=threshold, blend=settings.blend, alpha=alpha, mean_passes=passes),),
        preprocessor=Gym() if settings.preprocess == "gym" else None,
        policy=Policy(),
        clean_accuracy=accuracy,
        clean_accuracy_raw=raw_accuracy,
        seed=settings.seed,
        libraries=_versions(),
    )
    arrays = {
        "strip.overlays": overlays_to_array(strip.overlays),
        "probe.probabilities": predictor(strip.overlays[:PROBES]).cpu(),
    }
    return Calibration(profile, arrays, predictor, strip, -scores)


def check_settings(settings: Settings, images: int) -> None:
    """Refuse, before any work, what can't be calibrated from so many images; see `calibrate`."""
    if settings.overlays < _MIN_OVERLAYS:
        raise CalibrationError(f"expected at least {_MIN_OVERLAYS} overlays, got {settings.overlays}: the paper uses 100")
    if images <= settings.overlays:
        raise CalibrationError(
            f"expected more clean images than the {settings.overlays} overlays, got {images}: "
            "add images or use fewer --overlays"
        )
    check_rates(images - settings.overlays, settings.frr, settings.method, settings.confidence)


def _is_backend(model: object) -> TypeGuard[Backend]:
    return hasattr(model, "kind") and hasattr(model, "fingerprint")


def _record(record: ModelRecord | None, backend: Backend, predictor: Predictor) -> ModelRecord:
    source = record or ModelRecord(kind=backend.kind, output=predictor.output, num_classes=predictor.num_classes)
    return msgspec.structs.replace(
        source, output=predictor.output, num_classes=predictor.num_classes, sha256=backend.fingerprint()
    )


def _check_classes(clean: ImageSet, predictor: Predictor, settings: Settings) -> None:
    if clean.labels is None:
        return
    classes = predictor.num_classes
    if clean.class_names and len(clean.class_names) != classes:
        raise CalibrationError(
            f"expected {classes} class folders, one per output of the model, got {len(clean.class_names)}: "
            "label order is the folders' sorted order, so add an (empty) folder for each missing class"
        )
    largest = int(clean.labels.max())
    if largest >= classes:
        raise ModelError(
            f"expected a model with more than {largest} outputs for these labels, got {classes}: is it another model?"
        )
    missing = sorted(set(range(classes)) - set(clean.labels.tolist()))
    if missing and not settings.allow_missing_classes:
        shown = ", ".join(predictor.spec.label_name(label) for label in missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise CalibrationError(
            f"expected clean images of all {classes} classes, got none of {len(missing)} ({shown}): "
            "add some, or pass --allow-missing-classes; inputs of those classes may be rejected more often"
        )


def _split(clean: ImageSet, predictor: Predictor, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the overlays and of the rest."""
    labels = clean.labels if clean.labels is not None else _answers(predictor, clean)
    chosen = choose_overlays(labels, settings.overlays, generator)
    rest = torch.ones(len(clean), dtype=torch.bool)
    rest[chosen] = False
    return chosen, torch.nonzero(rest).squeeze(1)


def _answers(predictor: Predictor, clean: ImageSet) -> Tensor:
    rows = torch.arange(len(clean)).split(256)
    return torch.cat([predictor(clean.images(part)).argmax(dim=1).cpu() for part in rows])


def _accuracies(
    predictor: Predictor, clean: ImageSet, settings: Settings, progress: Progress
) -> tuple[float | None, float | None]:
    """Clean accuracy through the preprocessor, and without it."""
    if clean.labels is None:
        if settings.preprocess != "none":
            raise CalibrationError("expected labels with the clean images, to measure what the preprocessor costs: add y")
        return None, None
    right = through = 0
    gym = Gym() if settings.preprocess == "gym" else None
    generator = torch.Generator().manual_seed(settings.seed)
    for part in torch.arange(len(clean)).split(256):
        images, labels = clean.images(part), clean.labels[part]
        right += int((predictor(images).argmax(dim=1).cpu() == labels).sum())
        if gym is not None:
            through += int((predictor(gym(images, generator)).argmax(dim=1).cpu() == labels).sum())
        progress("measuring clean accuracy", int(part[-1]) + 1, len(clean))
    raw = right / len(clean)
    after = through / len(clean) if gym is not None else raw
    drop = (raw - after) * 100.0
    if not drop <= settings.max_accuracy_drop:  # NaN allows nothing
        raise CalibrationError(
            f"the preprocessor costs {drop:.1f} points of clean accuracy ({raw:.3f} to {after:.3f}), more than "
            f"--max-accuracy-drop {settings.max_accuracy_drop:g}: tune the model for it first, or allow the drop"
        )
    return after, raw


def _measure(
    strip: Strip, clean: ImageSet, settings: Settings, progress: Progress
) -> tuple[Strip, NDArray[np.float32], float | None]:
    """Score the threshold-setting images with all N passes, and put the overlays in their best order."""
    entropies, scores = [], []
    for part in torch.arange(len(clean)).split(64):
        images = clean.images(part)
        if strip.predictor.labels_only:
            scores.append(strip.score(images))
        else:
            entropies.append(strip.pass_entropies(images))
        progress("superimposing clean images", int(part[-1]) + 1, len(clean))
    if strip.predictor.labels_only:
        return strip, torch.cat(scores).numpy(), float(len(strip.overlays))
    table = torch.cat(entropies)
    if not bool(torch.isfinite(table).all()):
        raise CalibrationError("the model gives NaN or Inf on superimposed images: check --mean and --std")
    provisional = set_threshold(strip.score_passes(table).numpy(), settings.frr, settings.method, settings.confidence)
    order = torch.from_numpy(order_overlays(table.numpy(), -provisional.value * table.shape[1]))
    ordered = Strip(strip.predictor, strip.overlays[order], strip.blend, strip.alpha)
    table = table[:, order]
    return ordered, ordered.score_passes(table).numpy(), _mean_passes(table.numpy(), provisional.value)


def _mean_passes(table: NDArray[np.float64], threshold: float) -> float:
    """Passes that a clean image takes on its own, given its entropy under each overlay."""
    total = table.shape[1]
    ends = np.array(stage_ends(total))
    over = np.cumsum(table, axis=1)[:, ends - 1] / total > -threshold
    return float(ends[np.where(over.any(axis=1), over.argmax(axis=1), len(ends) - 1)].mean())


def _refuse_blind(threshold: ThresholdRecord) -> None:
    if threshold.value > 0.0:
        raise CalibrationError(
            "no input could ever be rejected: too many clean images have entropy 0 under these overlays; "
            "try another --blend or a larger --alpha, or allow a higher --frr"
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
