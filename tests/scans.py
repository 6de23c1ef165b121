"""A folder as `guard scan` writes it, with triggers that are known rather than found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.inspection.record import JSON, SCHEMA, TRIGGERS, LabelFinding, PatchFinding, ScanRecord
from calibration.inspection.triggers import Triggers
from guard import InputSpec
from guard.predictors import Backend
from tests.toy import SPEC

Trigger = tuple[Tensor, Tensor]
"""Mask (H, W) and pattern (C, H, W)."""


def corner(side: int = 3, spec: InputSpec = SPEC) -> Trigger:
    """The true trigger of the digits: a white square in the bottom right corner."""
    mask = torch.zeros(spec.height, spec.width)
    mask[-side:, -side:] = 1.0
    return mask, torch.ones(spec.channels, spec.height, spec.width)


def patch_finding(success: float = 0.1, others: float = 0.1, infected: bool = False) -> PatchFinding:
    """Of a label whose best patch works so often, and the others' by their median."""
    return PatchFinding(
        label_index=0,
        label=None,
        side=4,
        top=0,
        left=0,
        success=success,
        others=others,
        reference_success=None,
        passes=1,
        infected=infected,
    )


def write_scan(
    folder: Path,
    backend: Backend,
    infected: Mapping[int, Trigger],
    infected_pair: bool = False,
    classes: int = 10,
    further: Sequence[tuple[int, Trigger]] = (),
) -> Path:
    """Labels without a trigger have one that does nothing, and are not infected."""
    folder.mkdir(parents=True)
    nothing = torch.zeros(SPEC.height, SPEC.width), torch.zeros(SPEC.channels, SPEC.height, SPEC.width)
    triggers = [infected.get(label, nothing) for label in range(classes)]
    arrays = _arrays("labels", triggers, torch.arange(classes), torch.full((classes,), -1))
    if infected_pair:
        arrays |= _arrays("pairs", [nothing, corner()], torch.tensor([0, 1]), torch.tensor([1, 0]))
    if further:
        labels = torch.tensor([label for label, _ in further])
        arrays |= _arrays("further", [trigger for _, trigger in further], labels, torch.full_like(labels, -1))
    save_file(arrays, folder / TRIGGERS)
    record = ScanRecord(
        infected=bool(infected) or infected_pair,
        labels=tuple(_finding(label, None, label in infected) for label in range(classes)),
        pairs=(_finding(0, 1, False), _finding(1, 0, True)) if infected_pair else (),
        median_l1=20.0,
        reference_agreement=None,
        clean_images=100,
        held_out=50,
        passes=1,
        seconds=1.0,
        further=tuple(_finding(label, None, True) for label, _ in further),
        schema=SCHEMA,
        created="2026-01-01T00:00:00Z",
        method="neural-cleanse",
        model_sha256=backend.fingerprint(),
        input=SPEC,
        settings={},
        libraries={},
    )
    (folder / JSON).write_bytes(msgspec.json.encode(record))
    return folder


def _arrays(kind: str, triggers: Sequence[Trigger], labels: Tensor, sources: Tensor) -> dict[str, Tensor]:
    masks, patterns = (torch.stack(values) for values in zip(*triggers, strict=True))
    found = Triggers(labels, sources, masks, patterns, torch.ones(len(labels)), torch.ones_like(labels))
    return {f"{kind}.{name}": getattr(found, name) for name in Triggers.__dataclass_fields__}


def _finding(label: int, source: int | None, infected: bool) -> LabelFinding:
    return LabelFinding(
        label_index=label,
        label=None,
        source_index=source,
        anomaly_index=None,
        mask_l1=9.0,
        success=1.0,
        passes=1,
        infected_by_index=infected,
        candidate=infected,
        second_opinion=None,
        infected=infected,
    )
