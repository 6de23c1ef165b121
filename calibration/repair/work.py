"""A repair as a piece of work that can be interrupted, or refused, and gone on with: checkpoints stay until it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.inspection.triggers import Triggers
from calibration.repair.auto import repair_automatically
from calibration.repair.folder import save_repaired
from calibration.repair.record import RepairRecord
from calibration.repair.repair import repair
from calibration.repair.report import repair_report
from calibration.repair.settings import DATA_FREE, RepairSettings
from calibration.sources import ModelSource
from guard import Predictor

_COMPARED = 16


def repair_into(
    out: Path,
    source: ModelSource,
    predictor: Predictor,
    clean: ImageSet | None,
    settings: RepairSettings,
    quarantined: Tensor | None,
    engine: Engine,
    progress: Progress = no_progress,
    work: Path | None = None,
    triggers: Triggers | None = None,
    automatic: bool = False,
) -> RepairRecord | None:
    """Repair a model, refuse a repair that costs too much, and write the folder.

    Args:
        out: The folder.
        source: Where the model comes from.
        predictor: The model.
        clean: See `repair`.
        settings: See `repair`.
        quarantined: See `repair`.
        engine: Where.
        progress: Told how far it is.
        work: Folder of the checkpoints, which stays; None for one beside `out` that goes once `out` is written.
        triggers: See `repair`.
        automatic: Choose the method, and verify what comes of it, see `repair_automatically`.

    Returns:
        What the folder says of it; None in the processes that don't lead.

    Raises:
        RepairError: Too few images, too high a price, or a folder that can't be written.
        ModelError: The model can't be trained.
    """
    source.check_not_repaired()
    key = [*_key(source, predictor, clean, settings, quarantined, triggers), *(["automatic"] if automatic else [])]
    checkpoints = Checkpoints(work or checkpoints_beside(out), key, writes=engine.leads)
    checkpoints.tell(progress)
    work_on = repair_automatically if automatic else repair
    repaired = work_on(
        predictor,
        clean,
        settings,
        quarantined,
        triggers=triggers,
        engine=engine,
        checkpoints=checkpoints,
        progress=progress,
    )
    if not engine.leads:
        return None
    repaired.check()
    shape, generator = predictor.spec.shape, torch.Generator().manual_seed(settings.seed)
    images = torch.rand(_COMPARED, *shape, generator=generator) if clean is None else clean.images(slice(0, _COMPARED))
    record = save_repaired(repaired, source, out, images, repair_report(repaired))
    if work is None:
        checkpoints.remove()
    return record


def checkpoints_beside(out: Path) -> Path:
    """Where the checkpoints of a folder that is being made lie."""
    out = out.absolute()
    return out.parent / f".{out.name}.checkpoint"


def _key(
    source: ModelSource,
    predictor: Predictor,
    clean: ImageSet | None,
    settings: RepairSettings,
    quarantined: Tensor | None,
    triggers: Triggers | None,
) -> list[object]:
    """What the work depends on, so that its checkpoints are no other's."""
    if settings.method in DATA_FREE:  # images only measure it: one that was refused for want of them can go on with some
        clean = quarantined = None
    return [
        source.backend.fingerprint(),
        source.record.factory,  # whose model is not its weights alone
        msgspec.to_builtins(msgspec.structs.replace(predictor.spec, class_names=())),
        predictor.output,
        predictor.num_classes,
        msgspec.to_builtins(msgspec.structs.replace(settings, max_accuracy_drop=None, views=1)),
        None if clean is None else _digest(clean.pixels),
        None if clean is None or clean.labels is None else _digest(clean.labels),
        None if quarantined is None else _digest(quarantined),
        None
        if triggers is None
        else [_digest(part) for part in (triggers.labels, triggers.sources, triggers.masks, triggers.patterns)],
    ]


def _digest(array: Tensor) -> str:
    return hashlib.sha256(array.contiguous().numpy().tobytes()).hexdigest()
