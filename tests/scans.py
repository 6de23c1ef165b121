"""A folder as `guard scan` writes it, with triggers that are known rather than found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.inspection.record import JSON, SCHEMA, TRIGGERS, LabelFinding, ScanRecord
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


def write_scan(
    folder: Path, backend: Backend, infected: Mapping[int, Trigger], infected_pair: bool = False, classes: int = 10
) -> Path:
    """Labels without a trigger have one that does nothing, and are not infected."""
    folder.mkdir(parents=True)
    nothing = torch.zeros(SPEC.height, SPEC.width), torch.zeros(SPEC.channels, SPEC.height, SPEC.width)
    triggers = [infected.get(label, nothing) for label in range(classes)]
    save_file(
        {
            "labels.masks": torch.stack([mask for mask, _ in triggers]),
            "labels.patterns": torch.stack([pattern for _, pattern in triggers]),
            "labels.labels": torch.arange(classes),
        },
        folder / TRIGGERS,
    )
    record = ScanRecord(
        infected=bool(infected) or infected_pair,
        labels=tuple(_finding(label, None, label in infected) for label in range(classes)),
        pairs=(_finding(1, 0, True),) if infected_pair else (),
        median_l1=20.0,
        reference_agreement=None,
        clean_images=100,
        held_out=50,
        passes=1,
        seconds=1.0,
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
