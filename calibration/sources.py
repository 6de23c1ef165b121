"""Where a model comes from, so that a profile can carry it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors.torch import save_file

from guard.predictors import Backend, load_backend
from guard.predictors.module import ModuleBackend
from guard.profile import ModelRecord


@final
@dataclass(frozen=True)
class ModelSource:
    """A loaded model and what a profile needs to load it again.

    Attributes:
        backend: Runs the model.
        record: For the profile; `calibrate` fills in what the model returns.
        file: To be copied into the profile; None for a predict function, which is imported again.
    """

    backend: Backend
    record: ModelRecord
    file: Path | None


def open_model(name: str, weights: Path | None, scratch: Path) -> ModelSource:
    """Load what a user names as MODEL.

    Args:
        name: A file, or `package.module:factory`.
        weights: `.safetensors` for the module that a factory makes.
        scratch: An existing folder, where the weights of a factory's module are written to be copied from.

    Raises:
        ModelError: It can't be found or loaded.
    """
    backend = load_backend(name, weights)
    if backend.kind not in ("module", "callable"):
        path = Path(name)
        return ModelSource(backend, _record(backend, f"model{path.suffix.lower()}", None), path)
    if not isinstance(backend, ModuleBackend):
        return ModelSource(backend, _record(backend, None, name), None)
    file = scratch / "weights.safetensors"
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in backend.module.state_dict().items()}, file)
    return ModelSource(backend, _record(backend, file.name, name), file)


def _record(backend: Backend, file: str | None, factory: str | None) -> ModelRecord:
    return ModelRecord(
        kind=backend.kind, output="logits", num_classes=2, file=file, factory=factory, sha256=backend.fingerprint()
    )
