"""Every error that the product raises, as one tree.

    GuardError
    |-- InputError            what the caller sent can't be inspected   (HTTP 400)
    |   |-- ImageError        bytes that are no image we decode         (HTTP 400)
    |   |   `-- WrongSizeError  an image of another size than the model's (HTTP 400)
    |   `-- TooLargeError     over the byte or the pixel limit          (HTTP 413)
    |-- RejectedError         a wrapped predict function refused rows
    |-- ModelError            a model can't be loaded, or its answers can't be used   (HTTP 503)
    |-- ProfileError          a profile is missing, damaged, newer, or for another model
    |-- CalibrationError      no threshold can be set from this clean set
    |   `-- TooFewImagesError it says how many images would do
    |-- InspectionError       a model can't be inspected, or an inspection's folder is damaged
    |-- RepairError           a model can't be repaired, or the repair costs too much accuracy
    |-- ExportError           an export failed, or differs from the original
    |-- QuarantineError       a quarantine folder or item can't be used
    |-- ServingError          a server can't be started or configured
    |   `-- EdgeError         an edge server, or a client of one, refuses or can't go on  (HTTP: its own status)
    `-- MissingExtraError     an optional dependency is not installed

Each message is one line and says what was expected, what arrived, and what to do. ``code`` is the stable, machine
readable reason that HTTP answers and logs carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding JSON of somebody else's raises: other fields, bytes that are no text, more brackets than there is stack."""


class GuardError(Exception):
    """Root of the tree: catch it to catch everything that this product raises on purpose."""

    code = "guard-failed"


class InputError(GuardError):
    """What the caller sent can't be inspected."""

    code = "bad-input"


class ImageError(InputError):
    """The bytes are not an image that can be decoded and brought to the model's channels and size."""

    code = "not-an-image"


class WrongSizeError(ImageError):
    """The image is of another size than the model's."""

    code = "wrong-size"


class TooLargeError(InputError):
    """The input is over the byte or the pixel limit."""

    code = "too-large"


class RejectedError(GuardError):
    """A wrapped predict function refused rows of its batch.

    Its code is `backdoor-suspected` if that is any row's reason, and else the reason of the first.

    Args:
        message: What happened.
        reasons: Why, by index of the refused row.

    Attributes:
        rows: Indices of the refused rows.
        reasons: By row.
    """

    code = "backdoor-suspected"

    def __init__(self, message: str, reasons: Mapping[int, str]) -> None:
        super().__init__(message)
        self.rows, self.reasons = tuple(reasons), dict(reasons)
        if self.code not in self.reasons.values():
            self.code = next(iter(self.reasons.values()), self.code)


class ModelError(GuardError):
    """A model can't be loaded, or its answers can't be used."""

    code = "model-failed"


class ProfileError(GuardError):
    """A profile is missing, damaged, of a newer schema, or belongs to another model."""

    code = "bad-profile"


class CalibrationError(GuardError):
    """No threshold can be set from this clean set."""

    code = "calibration-failed"


class CheckpointError(GuardError):
    """Checkpoints can't be written or read, for a full disk or another process: it says nothing of the work itself."""


class TooFewImagesError(CalibrationError):
    """The clean set is too small for the false rejection rate that was asked for.

    Attributes:
        needed: How many images would do.
        available: How many there were.
    """

    def __init__(self, message: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class InspectionError(GuardError):
    """A model can't be inspected, or the folder of an inspection can't be used."""

    code = "inspection-failed"


class RepairError(GuardError):
    """A model can't be repaired, or the repair costs too much accuracy."""

    code = "repair-failed"


class ExportError(GuardError):
    """An export failed, or its outputs differ from the original's."""

    code = "export-failed"


class QuarantineError(GuardError):
    """A quarantine folder or one of its items can't be used."""

    code = "quarantine-failed"


class ServingError(GuardError):
    """A server can't be started or configured."""

    code = "serving-failed"


class EdgeError(ServingError):
    """An edge server, or a client of one, refuses or can't go on.

    Attributes:
        status: The HTTP status that goes with it.
        code: The reason, where there is one of its own.
    """

    code = "edge-failed"

    def __init__(self, message: str, status: int = 503, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or self.code


class MissingExtraError(GuardError):
    """An optional dependency is not installed."""

    code = "missing-extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}, which is not installed: pip install 'backdoor-guard[{extra}]'")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's own words on one printable line: our errors as they are, foreign ones with their type."""
    text = str(error) if isinstance(error, GuardError) else f"{type(error).__name__}: {error}"
    return "".join(character for character in " ".join(text.split()) if character.isprintable())[:limit]
