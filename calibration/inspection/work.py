"""An inspection as a piece of work that can be interrupted and gone on with, and its folder."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.inspection.neural_cleanse import Triggers
from calibration.inspection.record import JSON, KIND, REPORT, SCHEMA, TRIGGERS, ScanRecord, read_scan
from calibration.inspection.report import scan_report
from calibration.inspection.scan import Scan, ScanSettings, scan
from calibration.versions import versions
from guard import Predictor
from guard.errors import InspectionError

_MOST_BYTES = 1 << 28  # of triggers that are written: where there are more, the candidates' alone


def scan_into(
    out: Path,
    predictor: Predictor,
    clean: ImageSet,
    settings: ScanSettings,
    engine: Engine,
    progress: Progress = no_progress,
) -> ScanRecord:
    """Inspect a model and write the folder.

    Args:
        out: The folder.
        predictor: The model.
        clean: See `scan`.
        settings: See `scan`.
        engine: Where.
        progress: Told how far it is.

    Returns:
        What `scan.json` holds.

    Raises:
        InspectionError: See `scan`, or the folder can't be written.
        ModelError: The model has no gradients.
    """
    KIND.check_target(out)
    place = out.absolute()
    checkpoints = Checkpoints(place.parent / f".{place.name}.checkpoint", _key(predictor, clean, settings))
    if checkpoints.found():
        progress(f"going on from {checkpoints.folder.name}", 1, 1)
    found = scan(predictor, clean, settings, engine=engine, checkpoints=checkpoints, progress=progress)
    record = ScanRecord(
        **msgspec.structs.asdict(found.figures),
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method="neural-cleanse",
        model_sha256=predictor.backend.fingerprint(),
        input=predictor.spec,
        settings=msgspec.to_builtins(settings),
        libraries=versions(),
    )
    with KIND.writing(out) as draft:
        (draft / JSON).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        save_file(_arrays(found), draft / TRIGGERS)
        (draft / REPORT).write_bytes(scan_report(found))
    checkpoints.remove()
    return record


def infected_triggers(folder: Path, predictor: Predictor) -> Triggers:
    """The triggers of the labels, and pairs, that a scan of a model found infected.

    Args:
        folder: That `scan_into` wrote.
        predictor: The model.

    Raises:
        InspectionError: The scan is damaged, of another model, or found nothing.
    """
    record = read_scan(folder)
    if record.model_sha256 != predictor.backend.fingerprint() or record.input.shape != predictor.spec.shape:
        raise InspectionError(f"expected a scan of this model, got one of another, {folder}: scan this one")
    try:
        arrays = load_file(folder / TRIGGERS)
        parts = [
            Triggers(*(arrays[f"{kind}.{name}"] for name in Triggers.__dataclass_fields__))
            for kind in ("labels", "pairs")
            if f"{kind}.labels" in arrays
        ]
        found = Triggers.together(parts)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise InspectionError(f"{folder / TRIGGERS} is damaged: scan again") from error
    wanted = {(item.label_index, item.source_index) for item in (*record.labels, *record.pairs) if item.infected}
    goals = zip(found.labels.tolist(), found.sources.tolist(), strict=True)
    rows = [row for row, (label, source) in enumerate(goals) if (label, None if source < 0 else source) in wanted]
    if not rows:
        raise InspectionError(f"expected a scan that found an infected label, got none in {folder}: there is no trigger in it")
    return found.select(rows)


def _arrays(found: Scan) -> dict[str, Tensor]:
    """Masks, patterns, labels and sources of the labels' triggers and of the pairs'."""
    arrays: dict[str, Tensor] = {}
    for kind, triggers, findings in (
        ("labels", found.triggers, found.figures.labels),
        ("pairs", found.pair_triggers, found.figures.pairs),
    ):
        if triggers is None:
            continue
        kept = triggers
        if triggers.masks.nbytes + triggers.patterns.nbytes > _MOST_BYTES:
            kept = triggers.select([row for row, item in enumerate(findings) if item.candidate])
        arrays |= {f"{kind}.{name}": getattr(kept, name).contiguous() for name in Triggers.__dataclass_fields__}
    return arrays


def _key(predictor: Predictor, clean: ImageSet, settings: ScanSettings) -> list[object]:
    return [
        predictor.backend.fingerprint(),
        msgspec.to_builtins(predictor.spec),
        predictor.output,
        predictor.num_classes,
        msgspec.to_builtins(settings),
        hashlib.sha256(clean.pixels.contiguous().numpy().tobytes()).hexdigest(),
    ]
