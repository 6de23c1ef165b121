"""The calibrated artefact: a folder with `guard.json`, `arrays.safetensors` and, for models in files, the model.

Nothing is pickled. Every file is recognised by its SHA-256, and `guard.json` carries a checksum of itself, so that a
truncated or hand-edited profile, a newer schema or another model is refused with one clear line.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from guard.errors import UNREADABLE, GuardError, ProfileError
from guard.folders import FolderKind, left_behind, read_settled
from guard.images import InputSpec
from guard.predictors.execution import ORDINARY, Execution
from guard.predictors.outputs import OutputKind
from guard.predictors.predictor import BackendKind
from guard.predictors.screening import file_sha256
from guard.preprocessors import AnyPreprocessor
from guard.records import DetectorRecord
from guard.verdict import Policy

SCHEMA = 1
_JSON = "guard.json"
_ARRAYS = "arrays.safetensors"
_OURS = (_ARRAYS, "report.html", "red_team.json", "repair.json", "repair.html")
_KIND = FolderKind(
    "profile", _JSON, lambda name: name in _OURS or name.startswith(("model.", "weights.", "tripwire.")), ProfileError
)


def is_profile(folder: Path) -> bool:
    """Whether a folder looks like a profile."""
    return (folder / _JSON).is_file()


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model a profile belongs to.

    Attributes:
        kind: What runs it.
        output: What it returns.
        num_classes: M.
        file: Model or weights file, relative to the profile's folder; None for a model in the caller's memory.
        factory: `package.module:factory`, where that makes the model.
        sha256: Of the file, or of a module's state; None for a callable.
        execution: How PyTorch runs it on a CPU; detectors' passes alone in its precision.
    """

    kind: BackendKind
    output: OutputKind
    num_classes: Annotated[int, msgspec.Meta(ge=2)]
    file: str | None = None
    factory: str | None = None
    sha256: str | None = None
    execution: Execution = ORDINARY

    def __post_init__(self) -> None:
        """A profile never reaches outside its own folder."""
        if self.file is not None and (self.file in ("", ".", "..") or Path(self.file).name != self.file):
            raise ProfileError(f"expected the model's file inside the profile's folder, got {self.file!r}")


class TripwireRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The original, suspicious model of a repaired one: it goes on detecting, because its backdoor shows what a trigger does.

    Attributes:
        model: The model; its file's name starts with `tripwire.`.
        input: Its input; of the same images.
    """

    model: ModelRecord
    input: InputSpec


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `guard.json` holds.

    Attributes:
        schema: Version of this layout.
        created: ISO 8601, UTC.
        input: The model's input.
        model: The model.
        detectors: In the order in which they run.
        preprocessor: Before the model answers; detectors see the raw image.
        policy: What follows from a finding.
        clean_accuracy: Of the model through the preprocessor, on the threshold-setting images; None without labels.
        clean_accuracy_raw: The same without the preprocessor.
        seed: Of every draw that calibration made.
        libraries: Versions that calibrated it.
        arrays_sha256: Of `arrays.safetensors`.
        tripwire: The model that the detectors look at, where that is not the one that answers.
    """

    schema: int
    created: str
    input: InputSpec
    model: ModelRecord
    detectors: tuple[DetectorRecord, ...]
    preprocessor: AnyPreprocessor | None
    policy: Policy
    clean_accuracy: float | None
    clean_accuracy_raw: float | None
    seed: int
    libraries: dict[str, str]
    arrays_sha256: str = ""
    tripwire: TripwireRecord | None = None

    def __post_init__(self) -> None:
        """Verdicts and metrics tell detectors apart by name."""
        if self.tripwire is not None and self.tripwire.input.shape != self.input.shape:
            raise ProfileError(f"expected a tripwire for images of shape {self.input.shape}, got {self.tripwire.input.shape}")
        names = [record.title for record in self.detectors]
        if len(set(names)) < len(names):
            raise ProfileError(f"expected detectors of distinct names, got {', '.join(names)}")


def save_profile(
    profile: Profile,
    arrays: dict[str, Tensor],
    folder: Path,
    model_file: Path | None = None,
    extra: dict[str, bytes] | None = None,
    tripwire_file: Path | None = None,
) -> Profile:
    """Write a profile folder, all of it or nothing.

    Args:
        profile: What to write; `arrays_sha256` is filled in.
        arrays: What the detectors' records name (`strip.overlays` ...), `probe.images`, `probe.probabilities` ...
        folder: Its target; an existing profile there is replaced, a folder with anything else in it refused.
        model_file: Copied in under `profile.model.file`.
        extra: Further files, by name (a report, its pictures).
        tripwire_file: Copied in under `profile.tripwire.model.file`.

    Returns:
        The profile as written.

    Raises:
        ProfileError: The target holds something else, or can't be written.
    """
    with _KIND.writing(folder) as draft:
        (draft / _ARRAYS).write_bytes(save({name: array.contiguous() for name, array in arrays.items()}))
        if model_file is not None and profile.model.file is not None:
            shutil.copyfile(model_file, draft / profile.model.file)
        if tripwire_file is not None and profile.tripwire is not None and profile.tripwire.model.file is not None:
            shutil.copyfile(tripwire_file, draft / profile.tripwire.model.file)
        for name, data in (extra or {}).items():
            (draft / name).write_bytes(data)
        sealed = msgspec.structs.replace(profile, arrays_sha256=file_sha256(draft / _ARRAYS))
        (draft / _JSON).write_bytes(_encode(sealed))
    return sealed


def check_target(folder: Path) -> None:
    """Refuse, before any work, a folder that `save_profile` would refuse.

    Raises:
        ProfileError: It holds something else, or can't be written.
    """
    _KIND.check_target(folder)


def load_profile(folder: str | Path) -> tuple[Profile, dict[str, Tensor]]:
    """Read and verify a profile folder, also one that is replaced meanwhile; the model's file is verified where it is loaded.

    Returns:
        The profile and its arrays.

    Raises:
        ProfileError: Missing, damaged, edited, or of a newer schema.
    """
    place = Path(folder)
    return read_settled(place, lambda: read_profile(place))


def read_profile(folder: Path) -> tuple[Profile, dict[str, Tensor]]:
    """The same once, for those who read more of a folder than that, and anew where it was replaced meanwhile."""
    path, arrays_path = folder / _JSON, folder / _ARRAYS
    try:
        data = path.read_bytes()
    except OSError as error:
        old = left_behind(folder)
        todo = "make one with guard calibrate" if old is None else f"its replacement was cut short, move {old} there"
        raise ProfileError(f"expected a profile folder with {_JSON}, got {folder}: {todo}") from error
    profile = _decode(data, path)
    try:
        arrays = arrays_path.read_bytes()
        if hashlib.sha256(arrays).hexdigest() != profile.arrays_sha256:
            raise ProfileError(f"{arrays_path} is damaged or belongs to another profile (SHA-256 differs): calibrate again")
        return profile, load(arrays)
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"expected {_ARRAYS} in {folder}, got none that can be read: calibrate again") from error


def overlays_to_array(overlays: Tensor) -> Tensor:
    """A copy of overlays, or of other images, as uint8 where that is exact, to keep profiles small."""
    pixels = overlays.mul(255.0).round()
    return pixels.to(torch.uint8) if bool(((pixels / 255.0) - overlays).abs().max() < 1e-6) else overlays.clone()


def array_to_overlays(array: Tensor) -> Tensor:
    """The inverse of `overlays_to_array`."""
    return array.to(torch.float32) / 255.0 if array.dtype == torch.uint8 else array


def _encode(profile: Profile) -> bytes:
    body = msgspec.to_builtins(profile)
    return msgspec.json.format(msgspec.json.encode({**body, "checksum": _checksum(body)}), indent=2) + b"\n"


def _checksum(body: object) -> str:
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()


def _decode(data: bytes, path: Path) -> Profile:
    try:
        body = msgspec.json.decode(data, type=dict[str, object])
    except UNREADABLE as error:
        raise ProfileError(f"{path} is truncated or not JSON ({error}): copy the folder again or calibrate again") from error
    schema = body.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ProfileError(f"expected a profile in {path}, got JSON without a schema version: calibrate again")
    if schema != SCHEMA:
        todo = "upgrade backdoor-guard" if schema > SCHEMA else "calibrate again"
        raise ProfileError(f"expected profile schema {SCHEMA}, got {schema} in {path}: {todo}")
    checksum = body.pop("checksum", None)
    try:
        profile = msgspec.convert(body, type=Profile)
    except (msgspec.ValidationError, GuardError) as error:
        raise ProfileError(f"{path} is not a valid profile ({error}): calibrate again") from error
    if checksum != _checksum(body):  # as it was written: fields that are newer than the file have no part in it
        raise ProfileError(
            f"{path} was changed after calibration (checksum differs): calibrate again; "
            "the policy is set by options (--mode, --on-error), not in the file"
        )
    return profile
