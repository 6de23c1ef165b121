"""What a scan found infected, read back: the triggers that repairs and filters work by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calibration.inspection.record import TRIGGERS, LabelFinding, PatchFinding, ScanRecord, read_scan
from calibration.inspection.triggers import Triggers
from guard.errors import InspectionError
from guard.images import InputSpec
from guard.predictors import Backend

_TYPES = (torch.int64, torch.int64, torch.float32, torch.float32, torch.float32, torch.int64)  # of the fields of `Triggers`


def read_infected(folder: str | Path, backend: Backend, *, pairs: bool = False, spec: InputSpec | None = None) -> Triggers:
    """The triggers of the labels that a scan of a model calls infected; after them, those that further rounds found.

    Args:
        folder: That `guard scan` wrote.
        backend: The model that it must have looked at.
        pairs: Those of the infected pairs of labels, too, after them.
        spec: The model's input where they are to be used; None for that of the scan.

    Raises:
        InspectionError: It is by a method whose triggers are no masks and patterns, of another model or with other
            images, found nothing, or is damaged.
    """
    folder = Path(folder)
    record = read_scan(folder)
    if record.method != "neural-cleanse":
        raise InspectionError(
            f"expected a scan by neural-cleanse, whose triggers can be worked by, got one by {record.method}, {folder}: "
            "scan with --method neural-cleanse and --data"
        )
    if backend.kind == "onnx":
        raise InspectionError(
            "expected a model whose neurons can be looked into, as filters and repairs by a scan do, got an ONNX file: take "
            "the .pt2 file or package.module:factory that was scanned"
        )
    if record.model_sha256 is None or record.model_sha256 != backend.fingerprint():
        raise InspectionError(
            f"the scan in {folder} is of another model (SHA-256 differs): scan the one that detects, or is to be repaired"
        )
    if spec is not None and record.input.shape != spec.shape:
        raise InspectionError(
            f"expected a scan with images of shape {spec.shape}, got one with {record.input.shape}: scan again"
        )
    if spec is not None and (record.input.mean, record.input.std) != (spec.mean, spec.std):
        raise InspectionError(
            f"expected a scan with the mean {spec.mean} and std {spec.std}, got one with {record.input.mean} and "
            f"{record.input.std}, whose triggers mean something else here: give both the same --mean and --std"
        )
    labels = [item for item in record.labels if item.infected]
    silent = [item for item in record.silent_units if item.infected]
    patches = [item for item in record.patches if item.infected]
    both = [item for item in record.pairs if item.infected]
    if not labels and not silent and not patches and not (both and pairs):
        only = ", only pairs of labels" if both else ""
        raise InspectionError(
            f"the scan in {folder} found no infected label{only}, so there is no trigger to filter or to repair by: go on "
            "without it"
        )
    try:
        arrays = load_file(folder / TRIGGERS)
        parts: list[tuple[str, Sequence[LabelFinding | PatchFinding]]] = [
            ("labels", labels),
            ("silent", silent),
            ("patches", patches),
            ("pairs", both if pairs else []),
        ]
        known = [_rows(arrays, kind, items) for kind, items in parts if items]
        found = Triggers.together([*known, *([_all(arrays, "further")] if record.further else [])])
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise InspectionError(f"expected {TRIGGERS} in {folder} with a trigger for each infected label: scan again") from error
    _check(found, record, folder)
    return found


def _all(arrays: dict[str, Tensor], kind: str) -> Triggers:
    parts = [arrays[f"{kind}.{name}"] for name in Triggers.__dataclass_fields__]
    if tuple(part.dtype for part in parts) != _TYPES:
        raise TypeError(f"expected {_TYPES}, got {', '.join(str(part.dtype) for part in parts)}")
    return Triggers(*parts)


def _rows(arrays: dict[str, Tensor], kind: str, wanted: Sequence[LabelFinding | PatchFinding]) -> Triggers:
    """Of the labels, or pairs, those that are wanted, in that order."""
    triggers = _all(arrays, kind)
    goals = list(zip(triggers.labels.tolist(), triggers.sources.tolist(), strict=True))
    return triggers.select(
        [goals.index((item.label_index, -1 if item.source_index is None else item.source_index)) for item in wanted]
    )


def _check(found: Triggers, record: ScanRecord, folder: Path) -> None:
    count, classes = found.labels.numel(), len(record.labels)
    shapes = [(found.masks, (count, *record.input.shape[1:])), (found.patterns, (count, *record.input.shape))]
    shapes += [(part, (count,)) for part in (found.labels, found.sources, found.success, found.passes)]
    pixels = all(bool(((value >= 0.0) & (value <= 1.0)).all()) for value in (found.masks, found.patterns))
    known = all(bool(((part >= lowest) & (part < classes)).all()) for part, lowest in ((found.labels, 0), (found.sources, -1)))
    fits = pixels and known and all(tuple(part.shape) == shape for part, shape in shapes)
    if not fits or not bool((found.masks.flatten(1) > 0.0).any(dim=1).all()):
        raise InspectionError(
            f"expected masks (H, W) that are not empty and patterns (C, H, W), float32 in [0, 1], and labels of the model in "
            f"{folder / TRIGGERS}: scan again"
        )
