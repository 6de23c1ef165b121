"""From a profile folder to a running guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from guard.detectors import ActivationFilter, Detector, FeatureSqueezing, Strip
from guard.detectors.strip import STAGE_ROWS
from guard.errors import CalibrationError, InputError, ModelError, ProfileError
from guard.folders import read_settled
from guard.guard import CalibratedDetector, Guard
from guard.images import InputSpec
from guard.predictors import Backend, Predictor, wrap
from guard.predictors.loading import load_backend
from guard.predictors.predictor import DEFAULT_MEMORY_LIMIT, bytes_per_image
from guard.predictors.screening import file_sha256
from guard.profile import ModelRecord, Profile, array_to_overlays, read_profile
from guard.quarantine import Quarantine
from guard.records import OVERLAYS, ActivationFilterRecord, DetectorRecord, FeatureSqueezingRecord, StripRecord
from guard.verdict import Policy

PROBES = 8
"""Clean images whose answers a profile remembers, to recognise its model by behaviour."""

PROBE_IMAGES = "probe.images"
"""Array of these images; profiles from before there was one have their first overlays for it."""

PROBE, TRIPWIRE_PROBE = "probe.probabilities", "probe.tripwire"
"""Arrays of the answers of the model, and of the tripwire."""

_PROBE_TOLERANCE = 0.02
_HIGHEST = {StripRecord: 0.0, FeatureSqueezingRecord: 2.0}  # scores: no entropy at all, and all probability elsewhere


def load_guard(
    folder: Path,
    model: object | None = None,
    *,
    policy: Policy | None = None,
    quarantine: Quarantine | None = None,
    device: str | torch.device = "cpu",
    seed: int | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> Guard:
    """Build a guard from a profile folder; see `Guard.load`."""
    device = "cpu" if str(device).partition(":")[0] == "cpu" else str(device)
    if not isinstance(memory_limit, int) or memory_limit < 1:
        raise InputError(f"expected a memory limit of at least 1 byte, got {memory_limit!r}: leave it out for 1 GiB")
    if device.partition(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        where = "" if torch.cuda.is_available() else " on a machine without CUDA"
        raise ModelError(f"expected the device cpu or cuda, got {device}{where}: use one that is there")
    return read_settled(folder, lambda: _load(folder, model, policy, quarantine, device, seed, memory_limit))


def _load(
    folder: Path,
    model: object | None,
    policy: Policy | None,
    quarantine: Quarantine | None,
    device: str,
    seed: int | None,
    memory_limit: int,
) -> Guard:
    profile, arrays = read_profile(folder)
    _refuse_blind(profile, policy or profile.policy, folder)
    check_memory_limit(memory_limit, profile.input)
    watched = replace(load_predictor(folder, profile.model, profile.input, model, device), memory_limit=memory_limit)
    predictor = watched.in_full_precision()
    images = probe_images(profile, arrays)
    _check_probe(predictor, images, arrays, PROBE, folder)
    if profile.tripwire is not None:
        watched = load_predictor(folder, profile.tripwire.model, profile.tripwire.input, device=device)
        watched = replace(watched, memory_limit=memory_limit)
        _check_probe(watched.in_full_precision(), images, arrays, TRIPWIRE_PROBE, folder)
    try:
        detectors = [
            CalibratedDetector(_detector(item, watched, profile, arrays), item.threshold.value) for item in profile.detectors
        ]
    except CalibrationError as error:
        raise ProfileError(f"the profile in {folder} holds a detector that can't be ({error}): calibrate again") from error
    _check_filters(detectors, images, folder)
    return Guard(
        predictor,
        detectors,
        preprocessor=profile.preprocessor,
        policy=policy or profile.policy,
        quarantine=quarantine,
        seed=seed,
        device=device,
    )


def _refuse_blind(profile: Profile, policy: Policy, folder: Path) -> None:
    """A guard that can reject nothing guards nothing; only one that says so, by its mode, may have no detectors."""
    if not profile.detectors and policy.mode == "enforce":
        raise ProfileError(f"expected detectors, got none in {folder}, which would reject nothing: calibrate again, or monitor")
    for record in profile.detectors:
        highest = _HIGHEST.get(type(record), math.inf)
        if record.threshold.value > highest:
            raise ProfileError(
                f"expected a threshold of at most {highest:g} for {record.title} in {folder}, got {record.threshold.value:g}, "
                "at which it rejects nothing: calibrate again"
            )


def check_memory_limit(limit: int, spec: InputSpec) -> None:
    """Refuse a limit, in bytes, that not even one image keeps to, by the estimate that limits go by.

    Raises:
        InputError: It says how many bytes would do.
    """
    if limit < (needed := bytes_per_image(spec)):
        enough = f"{needed} bytes ({math.ceil(needed / 1024**2)} MiB)"
        raise InputError(f"expected a memory limit of at least {enough}, what one image takes by the estimate, got {limit}")


def load_predictor(
    folder: Path, record: ModelRecord, spec: InputSpec, model: object | None = None, device: str = "cpu"
) -> Predictor:
    """A profile's model, ready to answer; see `load_profile_backend`."""
    backend = load_profile_backend(folder, record, model, device)
    return Predictor(backend, spec, record.num_classes, record.output, execution=record.execution)


def load_profile_backend(folder: Path, record: ModelRecord, model: object | None = None, device: str = "cpu") -> Backend:
    """Load the model that a profile belongs to, and make sure that it is that one.

    Raises:
        ProfileError: It is missing, or another one.
        ModelError: It can't be loaded.
    """
    if model is not None:
        backend = wrap(model)
        if record.kind == backend.kind and record.sha256 not in (None, backend.fingerprint()):
            raise ProfileError(f"the profile in {folder} belongs to another model (SHA-256 differs): calibrate for this one")
        return backend
    if record.file is None and record.factory is None:
        raise ProfileError(f"the profile in {folder} is for a model in memory: pass it in Python, Guard.load(profile, model)")
    path = None if record.file is None else folder / record.file
    if path is not None and not path.is_file():
        raise ProfileError(f"expected the model {record.file} in {folder}, got none: copy the whole profile folder")
    if path is not None and record.kind != "module" and file_sha256(path) != record.sha256:
        raise ProfileError(f"the profile in {folder} belongs to another model ({record.file} differs): calibrate for this one")
    backend = (
        load_backend(record.factory, path, device) if record.factory is not None else load_backend(path or "", device=device)
    )
    if backend.kind != record.kind or backend.fingerprint() != record.sha256:
        raise ProfileError(f"the profile in {folder} belongs to another model (weights or kind differ): calibrate for this one")
    return backend


def probe_images(profile: Profile, arrays: dict[str, Tensor]) -> Tensor:
    """Clean images, (N, C, H, W), whose first `PROBES` the profile remembers answers to.

    Raises:
        ProfileError: There are none, or not of such images.
    """
    return _images(profile, arrays, PROBE_IMAGES if PROBE_IMAGES in arrays else OVERLAYS)


def profile_overlays(profile: Profile, arrays: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The overlays of each STRIP in the profile, (N, C, H, W).

    Raises:
        ProfileError: An array is missing, or not of such images.
    """
    return tuple(_images(profile, arrays, item.array) for item in profile.detectors if isinstance(item, StripRecord))


def _detector(record: DetectorRecord, watched: Predictor, profile: Profile, arrays: dict[str, Tensor]) -> Detector:
    match record:
        case StripRecord():
            overlays = _images(profile, arrays, record.array)
            return Strip(
                watched,
                overlays,
                record.blend,
                record.alpha,
                name=record.title,
                boundaries=record.boundaries,
                votes=None if isinstance(record.votes, msgspec.UnsetType) else record.votes,
                stage_rows=STAGE_ROWS if isinstance(record.stage_rows, msgspec.UnsetType) else record.stage_rows,
            )
        case FeatureSqueezingRecord():
            return FeatureSqueezing(watched, record.squeezers, record.bits, record.title)
        case ActivationFilterRecord():
            return ActivationFilter(watched, torch.tensor(record.neurons), record.title)


def _images(profile: Profile, arrays: dict[str, Tensor], name: str) -> Tensor:
    try:
        images = array_to_overlays(arrays[name])
        profile.input.check(images)
    except (KeyError, ValueError) as error:
        raise ProfileError(f"expected the array {name} in the profile, got none: calibrate again") from error
    return images


def _check_probe(predictor: Predictor, images: Tensor, arrays: dict[str, Tensor], name: str, folder: Path) -> None:
    """The model must answer as it did at calibration: catches another model, other weights, other preprocessing."""
    expected = arrays.get(name)
    if expected is None or expected.dtype != torch.float32 or expected.ndim != 2 or len(expected) == 0:
        raise ProfileError(f"expected the array {name} in {folder}, got none: calibrate again")
    try:
        answers = predictor(images[: len(expected)]).cpu()
    except ModelError as error:
        raise ProfileError(f"the profile in {folder} does not fit this model ({error}): calibrate for this one") from error
    difference = float((answers - expected).abs().max()) if answers.shape == expected.shape else torch.inf
    if not difference <= _PROBE_TOLERANCE:
        raise ProfileError(
            f"the model answers differently than at calibration (by {difference:.3g} in probability): "
            f"the profile in {folder} belongs to another model; calibrate for this one"
        )


def _check_filters(detectors: Sequence[CalibratedDetector], images: Tensor, folder: Path) -> None:
    """Neurons can't be seen in every kind of model: better known now than with each input."""
    for detector in (item.detector for item in detectors):
        if isinstance(detector, ActivationFilter):
            try:
                detector.score(images[:1])
            except ModelError as error:
                raise ProfileError(
                    f"the {detector.name} of the profile in {folder} does not fit this model: {error}"
                ) from error
