"""Where a model comes from, so that a profile can carry it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec
from safetensors.torch import save_file

from calibration.discovery import Hints, declared_shape
from calibration.repair.record import RepairRecord, is_repaired, read_learnt, read_record
from guard.errors import ModelError, ProfileError, RepairError
from guard.loading import load_profile_backend
from guard.predictors import Backend, load_backend
from guard.predictors.module import ModuleBackend
from guard.preprocessors import AnyPreprocessor
from guard.profile import ModelRecord, is_profile

if TYPE_CHECKING:
    from calibration.calibrate import Tripwire


@final
@dataclass(frozen=True)
class ModelSource:
    """A loaded model and what a profile needs to load it again.

    Attributes:
        backend: Runs the model.
        record: For the profile; `calibrate` fills in what the model returns.
        file: To be copied into the profile; None for a predict function, which is imported again.
        repair: What is known of it where it is a repaired model.
        learnt: Digests of the images that such a repair learnt from.
    """

    backend: Backend
    record: ModelRecord
    file: Path | None
    repair: RepairRecord | None = None
    learnt: frozenset[str] = frozenset()

    @property
    def preprocessor(self) -> AnyPreprocessor | None:
        """That the model was tuned for."""
        return None if self.repair is None else self.repair.preprocessor

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images, where the file declares it or a repaired model's folder knows."""
        return declared_shape(self.backend) if self.repair is None else self.repair.input.shape

    def check_not_repaired(self) -> None:
        """Refuse to repair a repaired model: a further repair starts from the original.

        Raises:
            RepairError: It says so.
        """
        if self.repair is not None:
            raise RepairError(
                "expected a model that was not repaired yet, got one that was: repair its original, with all that was "
                "quarantined"
            )

    def hints(self, given: Hints) -> Hints:
        """What the user says and, for what he leaves open, what a repaired model's folder knows of its input."""
        if self.repair is None:
            return given
        spec = self.repair.input
        return Hints(
            mean=given.mean or spec.mean,
            std=given.std or spec.std,
            output=given.output or self.repair.model.output,
            layout=given.layout or spec.layout,
            dtype=given.dtype or spec.dtype,
            container=given.container or spec.container,
            class_names=given.class_names or spec.class_names,
            resize=given.resize or spec.resize,
        )


def open_model(name: str, weights: Path | None, scratch: Path) -> ModelSource:
    """Load what a user names as MODEL.

    Args:
        name: A file, a folder that `guard repair` wrote, or `package.module:factory`.
        weights: `.safetensors` for the module that a factory makes.
        scratch: An existing folder, where the weights of a factory's module are written to be copied from.

    Raises:
        ModelError: It can't be found or loaded.
        RepairError: A repaired model's folder is damaged.
    """
    folder = Path(name)
    if folder.is_dir():
        return _open_repaired(folder, weights)
    backend = load_backend(name, weights)
    if backend.kind not in ("module", "callable"):
        path = Path(name)
        return ModelSource(backend, _record(backend, f"model{path.suffix.lower()}", None), path)
    if not isinstance(backend, ModuleBackend):
        return ModelSource(backend, _record(backend, None, name), None)
    file = scratch / "weights.safetensors"
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in backend.module.state_dict().items()}, file)
    return ModelSource(backend, _record(backend, file.name, name), file)


def _open_repaired(folder: Path, weights: Path | None) -> ModelSource:
    if not is_repaired(folder):
        raise ModelError(f"expected a model file, a folder that guard repair wrote, or package.module:factory, got {folder}")
    if is_profile(folder):
        raise ModelError(f"expected a model, got a profile, {folder}: repair with guard repair to get a folder for further use")
    if weights is not None:
        raise ModelError(f"expected package.module:factory for --weights, got {folder}, which has its own")
    record = read_record(folder)
    try:
        backend = load_profile_backend(folder, record.model)
    except ProfileError as error:
        raise RepairError(f"{folder}: {str(error).replace('the profile in ', '')}: repair again") from error
    return ModelSource(backend, record.model, folder / (record.model.file or ""), record, read_learnt(folder))


def _record(backend: Backend, file: str | None, factory: str | None) -> ModelRecord:
    return ModelRecord(
        kind=backend.kind, output="logits", num_classes=2, file=file, factory=factory, sha256=backend.fingerprint()
    )


def open_tripwire(
    name: str, weights: Path | None, scratch: Path, hints: Hints, repaired: ModelSource | None = None
) -> tuple[Tripwire, Path | None]:
    """Load the original of a repaired model, for a profile that goes on detecting with it.

    Args:
        name: As MODEL.
        weights: As there.
        scratch: As there.
        hints: What is known of the repaired model's input: the original's own, unless one of the two is an ONNX file.
        repaired: The model that answers; where it is a repaired one, its original is known and nothing else is taken.

    Returns:
        The tripwire, and its file to be copied into the profile.

    Raises:
        ModelError: It can't be found or loaded, or is not the original.
    """
    from calibration.calibrate import Tripwire  # needs an extra, which opening a model does not

    folder = scratch / "tripwire"
    folder.mkdir(exist_ok=True)
    source = open_model(name, weights, folder)
    kinds = {source.backend.kind} if repaired is None else {source.backend.kind, repaired.backend.kind}
    known = hints
    if "onnx" in kinds and len(kinds) > 1:  # of PyTorch's, all take the same
        known = Hints(mean=hints.mean, std=hints.std, class_names=hints.class_names, resize=hints.resize)
    if source.file is None:
        raise ModelError(f"expected a model in a file or a factory of a module for a tripwire, got {name}: save it first")
    if source.repair is not None:
        swapped = repaired is not None and source.repair.original_sha256 == repaired.backend.fingerprint()
        advice = "swap the two: MODEL is the repaired one" if swapped else "pass the model that it was made from"
        raise ModelError(f"expected the original of a repaired model as the tripwire, got a repaired one, {name}: {advice}")
    if repaired is not None and repaired.repair is not None:
        if source.backend.fingerprint() != repaired.repair.original_sha256:
            raise ModelError(f"expected the model that was repaired as the tripwire, got another, {name}: pass the original")
    elif repaired is not None and source.backend.fingerprint() == repaired.backend.fingerprint():
        raise ModelError(f"expected a repaired model and its original as the tripwire, got the same model twice, {name}")
    record = msgspec.structs.replace(source.record, file=f"tripwire{source.file.suffix.lower()}")
    return Tripwire(source.backend, record, source.hints(known)), source.file
