"""Writes a repaired model: a folder with the model in the kind that it came in, `repair.json` and a report.

The folder is accepted wherever a model is (`calibration.sources`), and brings along the model's input and the preprocessor that
it was tuned for.
"""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.fine_tuning import trainable
from calibration.repair.record import JSON, KIND, LEARNT, REPORT, SCHEMA, RepairRecord
from calibration.repair.repair import Repaired
from calibration.sources import ModelSource
from calibration.versions import versions
from guard import Predictor
from guard.errors import GuardError, RepairError, one_line
from guard.predictors import Backend, load_backend
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend
from guard.predictors.screening import screen_exported
from guard.predictors.torchscript import TorchScriptBackend

_TOLERANCE = 1e-3  # in probability, between the model in memory and the one read back
_COMPARED = 16


def save_repaired(repaired: Repaired, source: ModelSource, folder: Path, images: Tensor, report: bytes = b"") -> RepairRecord:
    """Write the folder, all of it or nothing, once what was written has been read back and answers alike.

    Args:
        repaired: The model.
        source: Where the original came from.
        folder: Its target; a repaired model's folder there is replaced, one with anything else in it refused.
        images: (N, C, H, W), in [0, 1], to compare answers on.
        report: The page to look at.

    Returns:
        What `repair.json` holds.

    Raises:
        RepairError: The folder can't be written, or the model not be saved.
    """
    with KIND.writing(folder) as draft:
        file = _save_model(repaired.predictor.backend, source, draft)
        backend = load_backend(source.record.factory or file, file if source.record.factory is not None else None)
        _compare(backend, repaired.predictor, images[:_COMPARED])
        record = RepairRecord(
            **msgspec.structs.asdict(repaired.figures),
            schema=SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            method=repaired.settings.method,
            model=msgspec.structs.replace(
                source.record,
                file=file.name,
                sha256=backend.fingerprint(),
                output=repaired.predictor.output,
                num_classes=repaired.predictor.num_classes,
            ),
            original_sha256=source.backend.fingerprint(),
            input=repaired.predictor.spec,
            preprocessor=repaired.preprocessor,
            settings=msgspec.to_builtins(repaired.settings),
            max_accuracy_drop=repaired.settings.allowed_drop,
            libraries=versions(),
        )
        (draft / JSON).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        (draft / LEARNT).write_bytes(msgspec.json.encode(sorted(repaired.images)) + b"\n")
        if report:
            (draft / REPORT).write_bytes(report)
    return record


def _save_model(backend: Backend, source: ModelSource, draft: Path) -> Path:
    try:
        if isinstance(backend, ModuleBackend):
            file = draft / "model.safetensors"
            save_file(
                {key: value.detach().cpu().clone().contiguous() for key, value in backend.module.state_dict().items()}, file
            )
        elif isinstance(backend, TorchScriptBackend):
            file = draft / "model.pt"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.jit.save(backend.module, str(file))
        elif isinstance(backend, ExportedBackend) and source.file is not None:
            file = draft / "model.pt2"
            _save_exported(source.file, trainable(backend).state_dict(), file)
        else:
            raise RepairError(f"expected a model that can be saved, got one of kind {backend.kind}: pass a file or a factory")
    except GuardError:
        raise
    except Exception as error:  # PyTorch raises whatever its serialisers met
        raise RepairError(f"the repaired model can't be saved: {one_line(error)}") from error
    return file


def _save_exported(original: Path, state: dict[str, Tensor], file: Path) -> None:
    """The original's program with other weights."""
    program = torch.export.load(screen_exported(original))
    with torch.no_grad():
        for name, value in program.state_dict.items():
            value.copy_(state[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.export.save(program, file)


def _compare(backend: Backend, predictor: Predictor, images: Tensor) -> None:
    again = Predictor(backend, predictor.spec, predictor.num_classes, predictor.output)
    difference = float((again(images) - predictor(images)).abs().max())
    if not difference <= _TOLERANCE:
        raise RepairError(
            f"the repaired model answers differently once saved (by {difference:.3g} in probability): nothing written"
        )
