"""`repair.json`: what a repaired model's folder says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from guard import InputSpec
from guard.errors import UNREADABLE, GuardError, RepairError
from guard.folders import FolderKind
from guard.preprocessors import AnyPreprocessor
from guard.profile import ModelRecord

SCHEMA = 1
JSON = "repair.json"
REPORT = "report.html"
LEARNT = "learnt.json"
"""Digests of the images that the repair has seen, so that none of them measures the repaired model."""
PROFILE = "profile"
"""Sub-folder of a profile for the repaired model, where an edge server made one."""

Method = Literal["gym", "codefend", "unlearn", "prune", "fine-prune", "fine-tune", "nad", "mcr", "gdm", "dhbe"]


def _ours(name: str) -> bool:
    return name in (REPORT, LEARNT, PROFILE, "model.pt", "model.pt2", "model.safetensors")


KIND = FolderKind("repaired model's", JSON, _ours, RepairError)


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a repaired model afterwards, see `calibration.repair.verification`.

    Attributes:
        rescan_infected: Labels that a scan finds infected in it; None where it was not scanned.
        recovered_success: The most that a trigger that was recovered from the original still sends to its label, once, pasted
            four times, and nine times; None without such triggers.
        planted: The trigger that the red team planted in a copy of the original; empty where it planted none.
        planted_success_before: How often it worked in that copy.
        planted_success_after: How often after the same repair.
    """

    rescan_infected: tuple[int, ...] | None
    recovered_success: tuple[float, float, float] | None
    planted: str = ""
    planted_success_before: float | None = None
    planted_success_after: float | None = None


class RepairFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a repair came to, on images that it did not see; shares.

    Attributes:
        clean_accuracy_before: Of the original; None without labels.
        clean_accuracy_after: Of the repaired model, through its preprocessor; None without labels.
        clean_accuracy_interval: Of that after, 95%: what so few held-out images leave open; None without labels, or images.
        agreement: Held-out clean images that the repaired model answers as the original does; where there were no clean images,
            `generated_agreement`.
        forgotten_labels: That the copy hardly gives any more: of the held-out clean images that the original answers rightly
            with one, it does so with fewer than half, and chance doesn't explain it. That a trigger to it fails proves nothing.
        attack_success_seen_before: Held-out quarantined images that get the original's answer from the original: 1, to be
            compared with; None without a quarantine.
        attack_success_seen_after: Of these, how many still get that answer. False alarms among them should.
        generated_triggers_work: Held-out clean images on which the trigger that codefend learnt, or gdm modelled, works on the
            original; of several rounds, or labels, the least.
        rounds: Of codefend: one a trigger, where it saw that one was left.
        clean_images: All of them.
        quarantined_images: All of them.
        held_out_clean: Of which so many measured.
        held_out_quarantined: Likewise.
        seconds: That it took, with the time before an interruption.
        recovered_triggers: That a scan recovered and that were repaired by; those that only measured the repair don't count.
        recovered_success_before: Held-out images that the best of these sends to its label in the original, of those that get
            another without; None without such triggers.
        recovered_success_after: The same in the repaired model.
        generated_samples: That dhbe drew afresh to compare the repaired model with the original.
        generated_agreement: Of these, how many both answer alike; None where none were drawn.
        generated_steadiness: Of these, how many keep the repaired model's answer under a patch that dhbe drew.
        generated_labels: Different labels that the repaired model gives these.
        generated_foremost: Of these, how many get the label that the original gives most often. From two fifths on they hardly
            resemble its images, and the repair is not to be relied on; None for dhbe as published, whose samples are learnt.
        verification: What was asked of the repaired model afterwards; None where nothing was.
        said: What else must be told of the method's work.
    """

    clean_accuracy_before: float | None
    clean_accuracy_after: float | None
    agreement: float
    attack_success_seen_before: float | None
    attack_success_seen_after: float | None
    generated_triggers_work: float | None
    rounds: int
    clean_images: int
    quarantined_images: int
    held_out_clean: int
    held_out_quarantined: int
    seconds: float
    recovered_triggers: int = 0
    recovered_success_before: float | None = None
    recovered_success_after: float | None = None
    generated_samples: int = 0
    generated_agreement: float | None = None
    generated_steadiness: float | None = None
    generated_labels: int = 0
    generated_foremost: float | None = None
    forgotten_labels: tuple[int, ...] = ()
    clean_accuracy_interval: tuple[float, float] | None = None
    verification: Verification | None = None
    said: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether held-out clean images measured the repair; else `drop` is of generated samples, and no measure."""
        return self.held_out_clean > 0

    @property
    def drop(self) -> float:
        """Points of clean accuracy that were lost; without labels, of agreement with the original."""
        if self.clean_accuracy_before is None or self.clean_accuracy_after is None:
            return (1.0 - self.agreement) * 100.0
        return (self.clean_accuracy_before - self.clean_accuracy_after) * 100.0


class RepairRecord(RepairFigures, frozen=True, kw_only=True):
    """What `repair.json` holds, besides the figures.

    Attributes:
        schema: Version of this layout.
        created: ISO 8601, UTC.
        method: That repaired it.
        model: The repaired model, in the same folder.
        original_sha256: Of the model that was repaired, as profiles know it.
        input: Of the model.
        preprocessor: That it was tuned for, and needs; None for none.
        settings: How it was made.
        max_accuracy_drop: Points that it was allowed to cost.
        libraries: Versions that made it.
    """

    schema: int
    created: str
    method: Method
    model: ModelRecord
    original_sha256: str | None
    input: InputSpec
    preprocessor: AnyPreprocessor | None
    settings: dict[str, object]
    max_accuracy_drop: float
    libraries: dict[str, str]


def is_repaired(folder: Path) -> bool:
    """Whether a folder looks like a repaired model's."""
    return (folder / JSON).is_file()


def read_record(folder: Path) -> RepairRecord:
    """Read `repair.json`.

    Raises:
        RepairError: There is none, a damaged one, or one of a newer schema.
    """
    path = folder / JSON
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RepairError(
            f"expected a repaired model's folder with {JSON}, got {folder}: make one with guard repair"
        ) from error
    try:
        schema = msgspec.json.decode(data, type=dict[str, object]).get("schema")
        if schema != SCHEMA:
            raise RepairError(f"expected {JSON} of schema {SCHEMA}, got {schema} in {folder}: repair again with this version")
        return msgspec.json.decode(data, type=RepairRecord)
    except RepairError:
        raise
    except (*UNREADABLE, GuardError) as error:
        raise RepairError(f"{path} is damaged ({error}): repair again") from error


def read_learnt(folder: Path) -> frozenset[str]:
    """The digests in `learnt.json`; none where the folder was written without.

    Raises:
        RepairError: They are damaged.
    """
    path = folder / LEARNT
    try:
        return msgspec.json.decode(path.read_bytes(), type=frozenset[str])
    except FileNotFoundError:
        return frozenset()
    except (OSError, *UNREADABLE) as error:
        raise RepairError(f"{path} is damaged ({error}): repair again") from error
