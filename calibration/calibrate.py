"""Calibration: from a model and clean images to a profile.

Where there are several detectors (a pair of blends is two), the same images set each threshold, and the rate is shared. Which
images these are: see `division`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

import msgspec
import torch
from torch import Tensor

from calibration.accuracy import accuracies, answers, check_drop, least_sure, near_chance
from calibration.data import ImageSet, Progress, no_progress
from calibration.detectors import DetectorCalibration, calibrate_detector, compose, recorded, refuse_blind
from calibration.discovery import Hints, discover
from calibration.division import divide, divide_rest, without
from calibration.execution import TIMED, TOLERANCE, fastest, refuse_turned, turned_verdicts, why_not_reduced
from calibration.filters import FoundTrigger
from calibration.settings import Settings, check_settings
from calibration.strip import calibrate_strip
from calibration.versions import versions
from guard import CalibratedDetector, Guard, Policy, Predictor
from guard.detectors import Detector, Strip
from guard.errors import CalibrationError
from guard.loading import PROBE, PROBE_IMAGES, PROBES, TRIPWIRE_PROBE
from guard.predictors import Backend, Execution, wrap
from guard.predictors.execution import ORDINARY
from guard.preprocessors import AnyPreprocessor, Flip, Gym, GymIntensive, ShrinkPad
from guard.profile import SCHEMA, ModelRecord, Profile, TripwireRecord, overlays_to_array, save_profile
from guard.records import ThresholdRecord

_COMPARED = 500  # images, on which a tripwire must be like the model


@final
@dataclass(frozen=True)
class Calibration:
    """A profile that is not yet on disk, and what was measured on the way.

    Attributes:
        profile: The profile.
        arrays: Its arrays.
        predictor: The model as found.
        parts: Each detector's, in the order in which they run.
        measured: Images that measured accuracy.
        learnt: Images that a repair had learnt from, and that were not used for what they would have flattered.
        turned: Share of the verdicts on clean images that are not float32's; None where detectors run in that.
        left: Why `auto` left detectors in float32, for people.
    """

    profile: Profile
    arrays: dict[str, Tensor]
    predictor: Predictor
    parts: tuple[DetectorCalibration, ...]
    measured: int = 0
    learnt: int = 0
    turned: float | None = None
    left: str = ""

    @property
    def strips(self) -> tuple[Strip, ...]:
        """The detectors that are STRIP."""
        return tuple(part.detector for part in self.parts if isinstance(part.detector, Strip))

    @property
    def thresholds(self) -> tuple[ThresholdRecord, ...]:
        """Each detector's, on its score."""
        return tuple(part.threshold for part in self.parts)

    @property
    def execution(self) -> Execution:
        """How PyTorch runs the model that the detectors look at."""
        tripwire = self.profile.tripwire
        return (self.profile.model if tripwire is None else tripwire.model).execution

    @property
    def runs(self) -> str:
        """The same for people; empty where nothing is out of the ordinary, and nothing else was asked for."""
        if self.turned is not None:
            return f"{self.execution}; {self.turned:.2%} of the verdicts are not float32's"
        if self.left:
            return f"{self.execution}; {self.left}"
        return "" if self.execution == ORDINARY else str(self.execution)

    @property
    def mean_passes(self) -> float:
        """Of all detectors, for a clean image on its own."""
        return sum(part.mean_passes for part in self.parts)

    @property
    def most_passes(self) -> int:
        """Of all detectors, for an input, at most."""
        return sum(part.most_passes for part in self.parts)

    def guard(self, policy: Policy | None = None, seed: int | None = None) -> Guard:
        """A guard from this calibration, without going through a file."""
        detectors = [CalibratedDetector(part.detector, part.threshold.value) for part in self.parts]
        return Guard(
            self.predictor,
            detectors,
            preprocessor=self.profile.preprocessor,
            policy=policy or self.profile.policy,
            seed=seed,
        )

    def save(
        self,
        folder: str | Path,
        model_file: Path | None = None,
        extra: dict[str, bytes] | None = None,
        tripwire_file: Path | None = None,
    ) -> Profile:
        """Write the profile folder, with copies of the models' files where they have any; see `save_profile`."""
        return save_profile(self.profile, self.arrays, Path(folder), model_file, extra, tripwire_file)


@final
@dataclass(frozen=True)
class Tripwire:
    """The original of a repaired model, which goes on detecting.

    Attributes:
        backend: Runs it.
        record: Where it comes from.
        hints: What is known of its conventions.
    """

    backend: Backend
    record: ModelRecord
    hints: Hints


def calibrate(
    model: object,
    clean: ImageSet,
    settings: Settings | None = None,
    *,
    hints: Hints | None = None,
    record: ModelRecord | None = None,
    preprocessor: AnyPreprocessor | None = None,
    tripwire: Tripwire | None = None,
    learnt: Collection[str] = (),
    triggers: Sequence[FoundTrigger] = (),
    progress: Progress = no_progress,
) -> Calibration:
    """Calibrate a guard for a model from clean images alone.

    Args:
        model: An `nn.Module` in eval mode, a predict function, or a loaded backend.
        clean: Clean images, of which equal ones count once; labels are optional, and allow accuracy to be checked.
        settings: What to calibrate; the defaults when None.
        hints: What is known of the model's conventions.
        record: Where the model comes from, for profiles that carry it; its `output` and `num_classes` are filled in.
        preprocessor: That the model was tuned for, whatever it costs; it takes the place of the settings'.
        tripwire: The original of a repaired model: detectors look at it, the repaired model answers.
        learnt: `digests` of images that a repair has learnt from. They measure no accuracy, and set no threshold unless the
            detectors look at a tripwire, which has learnt nothing from them.
        triggers: That a scan found in the model, or in the tripwire: each gets an activation filter. See `infected_triggers`.
        progress: Told how far it is.

    Returns:
        The calibration; `save` writes it.

    Raises:
        CalibrationError: No threshold can be set, a trigger does not work, or the preprocessor costs too much accuracy.
        TooFewImagesError: It says how many images are needed.
        ModelError: The model's answers can't be used, its activations not be looked at, or it does not run in bfloat16.
    """
    settings = msgspec.structs.replace(settings or Settings(), triggers=len(triggers))
    clean = clean.distinct()
    given = len(clean)
    clean = clean if tripwire is not None else without(clean, learnt, settings)
    check_settings(settings, len(clean))
    backend = wrap(model)
    progress("looking at the model", 0, 1)
    predictor = discover(backend, clean, hints)
    progress("looking at the model", 1, 1)
    watched = predictor if tripwire is None else discover(tripwire.backend, clean, tripwire.hints)
    if watched.num_classes != predictor.num_classes:
        raise CalibrationError(
            f"expected a tripwire of {predictor.num_classes} classes, got {watched.num_classes}: pass the model's original"
        )
    if tripwire is not None:
        _check_tripwire(predictor, watched, clean)
    timed = clean.images(slice(0, TIMED))
    watched = fastest(watched, timed, settings.precision)
    predictor = watched.in_full_precision() if tripwire is None else fastest(predictor, timed)
    before = preprocessor or chosen_preprocessor(settings)
    seen = clean.among(learnt)
    aside, rest = divide(clean, watched, settings, seen)
    detectors = compose(watched, clean.images(aside), settings, triggers)
    measuring = rest[~seen[rest]]
    accuracy, raw_accuracy = accuracies(predictor, clean.select(measuring), settings.seed, progress, before)
    if preprocessor is None and before is not None:
        if len(measuring) == 0:
            raise CalibrationError(
                "expected clean images that the repair has not learnt from, to measure what the preprocessor costs: add some"
            )
        check_drop(accuracy, raw_accuracy, settings.max_accuracy_drop)
    choosing, setting = (clean.select(rows) for rows in divide_rest(rest, settings))
    parts: tuple[DetectorCalibration, ...] = ()
    turned, left = None, why_not_reduced(watched) if settings.precision == "auto" else ""
    if watched.execution.precision != "float32":
        parts, turned, left = _in_bfloat16(detectors, setting, choosing, settings, progress)
        if left:
            watched = predictor if tripwire is None else watched.in_full_precision()
            detectors = compose(watched, clean.images(aside), settings, triggers)
    parts = parts or _calibrated(detectors, setting, choosing, settings, progress)
    refuse_blind(parts)
    records, arrays = recorded(parts)
    profile = Profile(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        input=predictor.spec,
        model=_record(record, backend, watched if tripwire is None else predictor),
        detectors=records,
        preprocessor=before,
        policy=Policy(),
        clean_accuracy=accuracy,
        clean_accuracy_raw=raw_accuracy,
        seed=settings.seed,
        libraries=versions(),
        tripwire=None if tripwire is None else _tripwire(tripwire, watched),
    )
    probes = clean.images(least_sure(predictor, clean, PROBES))
    arrays |= {PROBE_IMAGES: overlays_to_array(probes), PROBE: predictor(probes).cpu()}
    if tripwire is not None:
        arrays[TRIPWIRE_PROBE] = watched.in_full_precision()(probes).cpu()
    return Calibration(profile, arrays, predictor, parts, len(measuring), given - len(clean) + int(seen.sum()), turned, left)


def _check_tripwire(predictor: Predictor, watched: Predictor, clean: ImageSet) -> None:
    some = clean.select(torch.arange(min(len(clean), _COMPARED)))
    alike = float((answers(predictor, some) == answers(watched, some)).double().mean())
    if near_chance(alike, predictor.num_classes):
        raise CalibrationError(
            f"expected a tripwire that answers clean images mostly as the model does, got one that does for {alike:.0%}: is it "
            "another model, or does it take other images (--mean, --std, --dtype, --layout)?"
        )


def _calibrated(
    detectors: Sequence[Detector], clean: ImageSet, choosing: ImageSet, settings: Settings, progress: Progress
) -> tuple[DetectorCalibration, ...]:
    return tuple(
        calibrate_strip(item, clean, choosing, settings, len(detectors), progress)
        if isinstance(item, Strip)
        else calibrate_detector(item, clean, settings, len(detectors), progress)
        for item in detectors
    )


def _in_bfloat16(
    detectors: Sequence[Detector], clean: ImageSet, choosing: ImageSet, settings: Settings, progress: Progress
) -> tuple[tuple[DetectorCalibration, ...], float | None, str]:
    """What they come to, and the share of turned verdicts; with `auto`, nothing and why not where float32 is better.

    Raises:
        CalibrationError: bfloat16 was asked for by name, and won't do.
    """
    try:
        parts = _calibrated(detectors, clean, choosing, settings, progress)
    except CalibrationError as error:
        if settings.precision == "bfloat16":
            raise CalibrationError(f"{error}; or leave --precision at float32, if that gives answers") from error
        return (), None, "bfloat16 gives answers that can't be used"
    turned = turned_verdicts(parts, clean, settings, progress)
    if turned <= TOLERANCE:
        return parts, turned, ""
    refuse_turned(turned, settings.precision)
    return (), None, f"bfloat16 would turn {turned:.2%} of the verdicts"


def chosen_preprocessor(settings: Settings) -> AnyPreprocessor | None:
    """What the settings name."""
    named: dict[str, AnyPreprocessor] = {
        "gym": Gym(),
        "gym-intensive": GymIntensive(),
        "shrink-pad": ShrinkPad(),
        "flip": Flip(),
    }
    return named.get(settings.preprocess)


def _record(record: ModelRecord | None, backend: Backend, predictor: Predictor) -> ModelRecord:
    source = record or ModelRecord(kind=backend.kind, output=predictor.output, num_classes=predictor.num_classes)
    return msgspec.structs.replace(
        source,
        output=predictor.output,
        num_classes=predictor.num_classes,
        sha256=backend.fingerprint(),
        execution=predictor.execution,
    )


def _tripwire(tripwire: Tripwire, watched: Predictor) -> TripwireRecord:
    return TripwireRecord(model=_record(tripwire.record, tripwire.backend, watched), input=watched.spec)
