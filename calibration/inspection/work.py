"""An inspection as a piece of work that can be interrupted and gone on with, and its folder."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.inspection.deep_scan import DeepScan, DeepScanSettings, deep_scan
from calibration.inspection.record import JSON, KIND, REPORT, SCHEMA, TRIGGERS, ScanFigures, ScanRecord
from calibration.inspection.report import deep_scan_report, scan_report
from calibration.inspection.rounds import scan_rounds
from calibration.inspection.scan import Scan, ScanSettings
from calibration.inspection.triggers import Triggers
from calibration.versions import versions
from guard import Predictor

_MOST_BYTES = 1 << 28  # of triggers that are written: where there are more, the candidates' alone


def scan_into(
    out: Path,
    predictor: Predictor,
    clean: ImageSet,
    settings: ScanSettings,
    engine: Engine,
    progress: Progress = no_progress,
    model: str = "",
) -> ScanRecord:
    """Inspect a model and write the folder.

    Args:
        out: The folder.
        predictor: The model.
        clean: See `scan`.
        settings: See `scan_rounds`.
        engine: Where.
        progress: Told how far it is.
        model: What the report calls it; under another name, checkpoints are not gone on from.

    Returns:
        What `scan.json` holds.

    Raises:
        InspectionError: See `scan`, or the folder can't be written.
        ModelError: The model has no gradients.
    """
    seen = [clean.pixels, *([] if clean.labels is None else [clean.labels])]
    hashes = [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in seen]
    checkpoints = _checkpoints(out, [*_key(predictor, settings, model), *hashes], progress)
    found = scan_rounds(predictor, clean, settings, engine=engine, checkpoints=checkpoints, progress=progress)
    return _write(out, predictor, found.figures, settings, _arrays(found), scan_report(found, model), checkpoints)


def deep_scan_into(
    out: Path,
    predictor: Predictor,
    settings: DeepScanSettings,
    engine: Engine,
    progress: Progress = no_progress,
    model: str = "",
) -> ScanRecord:
    """Inspect a model without any data, and write the folder.

    Args:
        out: The folder.
        predictor: The model.
        settings: See `deep_scan`.
        engine: Where.
        progress: Told how far it is.
        model: What the report calls it.

    Returns:
        What `scan.json` holds.

    Raises:
        InspectionError: See `deep_scan`, or the folder can't be written.
        CalibrationError: See `deep_scan`.
        ModelError: The model has no gradients.
    """
    checkpoints = _checkpoints(out, [*_key(predictor, settings, model), "deep-inspect"], progress)
    found = deep_scan(predictor, settings, engine=engine, checkpoints=checkpoints, progress=progress)
    return _write(out, predictor, found.figures, settings, _deltas(found), deep_scan_report(found, model), checkpoints)


def _checkpoints(out: Path, key: list[object], progress: Progress) -> Checkpoints:
    """Beside the folder, which must be one that can be written; says so where there are some of this work."""
    KIND.check_target(out)
    place = out.absolute()
    checkpoints = Checkpoints(place.parent / f".{place.name}.checkpoint", key)
    checkpoints.tell(progress)
    return checkpoints


def _write(
    out: Path,
    predictor: Predictor,
    figures: ScanFigures,
    settings: ScanSettings | DeepScanSettings,
    arrays: dict[str, Tensor],
    report: bytes,
    checkpoints: Checkpoints,
) -> ScanRecord:
    """The folder; the checkpoints go once it is there."""
    record = ScanRecord(
        **msgspec.structs.asdict(figures),
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model_sha256=predictor.backend.fingerprint(),
        input=predictor.spec,
        settings=msgspec.to_builtins(settings),
        libraries=versions(),
        infected_labels=tuple(sorted({item.label_index for item in figures.all_infected if item.source_index is None})),
    )
    with KIND.writing(out) as draft:
        (draft / JSON).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        (draft / TRIGGERS).write_bytes(save(arrays))  # save_file makes it private
        (draft / REPORT).write_bytes(report)
    checkpoints.remove()
    return record


def _arrays(found: Scan) -> dict[str, Tensor]:
    """Masks, patterns, labels and sources: of labels, of pairs, behind silent units, of patches, and of later rounds."""
    arrays: dict[str, Tensor] = {}
    figures = found.figures
    for kind, triggers, needed in (
        ("labels", found.triggers, [item.candidate for item in figures.labels]),
        ("pairs", found.pair_triggers, [item.candidate for item in figures.pairs]),
        ("silent", found.silent_triggers, [item.candidate for item in figures.silent_units]),
        ("patches", found.patch_triggers, [item.infected for item in figures.patches]),
        ("further", found.further_triggers, [item.candidate for item in figures.further]),
    ):
        if triggers is None:
            continue
        kept = triggers
        if triggers.masks.nbytes + triggers.patterns.nbytes > _MOST_BYTES:
            kept = triggers.select([row for row, is_so in enumerate(needed) if is_so])
        arrays |= {f"{kind}.{name}": getattr(kept, name).contiguous() for name in Triggers.__dataclass_fields__}
    return arrays


def _deltas(found: DeepScan) -> dict[str, Tensor]:
    """What is added to images for each label, the labels, and how often it works."""
    triggers, rows = found.found.triggers, list(range(len(found.found.triggers)))
    if triggers.nbytes > _MOST_BYTES:
        rows = [row for row, item in enumerate(found.figures.labels) if item.candidate]
    return {
        "labels.deltas": triggers[rows].contiguous(),
        "labels.labels": torch.tensor(rows, dtype=torch.int64),
        "labels.success": found.found.success[rows].contiguous(),
    }


def _key(predictor: Predictor, settings: ScanSettings | DeepScanSettings, model: str) -> list[object]:
    """What a scan depends on; a factory's model is not its weights alone, so its name counts, too."""
    return [
        model,
        predictor.backend.fingerprint(),
        msgspec.to_builtins(predictor.spec),
        predictor.output,
        predictor.num_classes,
        msgspec.to_builtins(settings),
    ]
