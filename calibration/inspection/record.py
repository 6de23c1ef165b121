"""`scan.json`: what an inspection says of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from guard import InputSpec
from guard.errors import UNREADABLE, GuardError, InspectionError
from guard.folders import FolderKind

SCHEMA = 1
JSON = "scan.json"
REPORT = "report.html"
TRIGGERS = "triggers.safetensors"

Method = Literal["neural-cleanse", "deep-inspect"]

KIND = FolderKind("scan's", JSON, lambda name: name in (REPORT, TRIGGERS), InspectionError)


class SecondOpinion(msgspec.Struct, frozen=True, kw_only=True):
    """What decides on a label that might be infected.

    Attributes:
        size_ratio: Size of its trigger over the median of the other labels'.
        spread: Of its mask in space: near 0 in one place, 1 if it covers the image evenly.
        success: Share of images that the search did not see and that its trigger sends to the label.
        reference_l1: Size of the trigger that a clean reference of the same task needs for that label; None where the others
            speak against a backdoor already.
        reference_ratio: That size over the median of the reference's other labels.
        reference_success: Share of those images that the model's own trigger sends to the label in the reference.
        infected: What follows.
    """

    size_ratio: float
    spread: float
    success: float
    reference_l1: float | None
    reference_ratio: float | None
    reference_success: float | None
    infected: bool


class LabelFinding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of a label, or of a pair of labels.

    Attributes:
        label_index: To which its trigger sends images.
        label: Its name, where known.
        source_index: From which; None for all.
        anomaly_index: How far its size lies below the median, in robust standard deviations; negative above; None of fewer
            than three labels. Of DeepInspect the deviation factor.
        mask_l1: Size of the smallest trigger that was found, in pixels: L1 norm of the mask, or of what is added to an image.
            Of an infected label a scan stores a stronger one, see `strengthening`.
        success: Share of images that the smallest trigger sends to the label, while it was found.
        passes: Images that went through the model for it.
        infected_by_index: What the index alone would say: over 2.
        candidate: Whether it got a second opinion; of DeepInspect, whether it stands out, so that its size decides.
        second_opinion: That opinion; DeepInspect has none.
        infected: The verdict.
    """

    label_index: int
    label: str | None
    source_index: int | None
    anomaly_index: float | None
    mask_l1: float
    success: float
    passes: int
    infected_by_index: bool
    candidate: bool
    second_opinion: SecondOpinion | None
    infected: bool


class PatchFinding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of a label by the search for patches; see `patches`.

    Attributes:
        label_index: To which the patch sends images.
        label: Its name, where known.
        side: Of the patch, in pixels; as large for every label.
        top: Its first row, from 0.
        left: Its first column.
        success: Share of images that the search did not see and that the patch sends to the label.
        others: The median of the same of the other labels' patches.
        reference_success: Share of those images that it sends there in a clean reference; None where that need not be asked.
        passes: Images that went through the model for it.
        infected: The verdict.
    """

    label_index: int
    label: str | None
    side: int
    top: int
    left: int
    success: float
    others: float
    reference_success: float | None
    passes: int
    infected: bool

    @property
    def source_index(self) -> None:
        """Patches are for images of all labels."""


class ScanFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What an inspection came to.

    Attributes:
        method: Of the inspection.
        infected: Whether any label, or pair, is.
        labels: One for each label.
        pairs: One for each pair of source and target, where they were asked for.
        median_l1: Of the labels' sizes.
        reference_agreement: Share of held-out clean images that the reference answers as the model does; None where none was
            needed.
        clean_images: That the search saw; 0 where it needs none.
        held_out: Clean images that it did not see.
        passes: Images that went through the model, for all that was looked for.
        seconds: That it took, with the time before an interruption.
        recovered_images: That were recovered from the model, to stand in for clean ones.
        recovered_agreement: Share of these that the model gives the label they were recovered for; None without any.
        silent_units: Where that was asked for, one for each label that is not infected by then, of a search whose gradients
            pass silent units.
        patches: Where that was asked for, one for each label that is not infected by then; none of fewer than three.
        further: Of infected labels, triggers that a later round found, after those before were unlearnt in a copy.
        said: What else must be told.
    """

    method: Method = "neural-cleanse"
    infected: bool
    labels: tuple[LabelFinding, ...]
    pairs: tuple[LabelFinding, ...]
    median_l1: float
    reference_agreement: float | None
    clean_images: int
    held_out: int
    passes: int
    seconds: float
    recovered_images: int = 0
    recovered_agreement: float | None = None
    silent_units: tuple[LabelFinding, ...] = ()
    patches: tuple[PatchFinding, ...] = ()
    further: tuple[LabelFinding, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def everything(self) -> tuple[LabelFinding, ...]:
        """Of labels, behind silent units and of pairs; not of patches, nor of further rounds."""
        return (*self.labels, *self.silent_units, *self.pairs)

    @property
    def all_infected(self) -> tuple[LabelFinding | PatchFinding, ...]:
        """Wherever they were found; not of further rounds."""
        found: tuple[LabelFinding | PatchFinding, ...] = (*self.labels, *self.silent_units, *self.patches, *self.pairs)
        return tuple(item for item in found if item.infected)


class ScanRecord(ScanFigures, frozen=True, kw_only=True):
    """What `scan.json` holds, besides the figures.

    Attributes:
        schema: Version of this layout.
        created: ISO 8601, UTC.
        model_sha256: Of the model, as profiles know it.
        input: Of the model.
        settings: How it was inspected.
        libraries: Versions that did it.
        infected_labels: Indices, whatever found them: masks, what lies behind silent units, or patches; not of pairs, which are
            infected from a source only. None in a file of before there was this.
    """

    schema: int
    created: str
    model_sha256: str | None
    input: InputSpec
    settings: dict[str, object]
    libraries: dict[str, str]
    infected_labels: tuple[int, ...] | None = None


def read_scan(folder: Path) -> ScanRecord:
    """Read `scan.json`.

    Raises:
        InspectionError: There is none, a damaged one, or one of a newer schema.
    """
    path = folder / JSON
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InspectionError(f"expected a scan's folder with {JSON}, got {folder}: make one with guard scan") from error
    try:
        schema = msgspec.json.decode(data, type=dict[str, object]).get("schema")
        if schema != SCHEMA:
            raise InspectionError(f"expected {JSON} of schema {SCHEMA}, got {schema} in {folder}: scan again with this version")
        return msgspec.json.decode(data, type=ScanRecord)
    except InspectionError:
        raise
    except (*UNREADABLE, GuardError) as error:
        raise InspectionError(f"{path} is damaged ({error}): scan again") from error
