"""What the guard says of one image, and the policy behind it."""

from __future__ import annotations

import sys
from typing import Literal

import msgspec

from guard.choices import check_choice
from guard.errors import InputError

Mode = Literal["enforce", "monitor"]
OnError = Literal["reject", "accept"]
Reason = Literal["backdoor-suspected", "guard-failed", "out-of-time", "model-failed"]

FAILURES: tuple[Reason, ...] = ("guard-failed", "out-of-time", "model-failed")
"""Nothing was found, and nothing ruled out."""

_METHODS = ("strip", "feature-squeezing", "activation-filter")


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What follows from a finding.

    Args:
        mode: `enforce` rejects suspicious inputs; `monitor` never blocks and records what it would have done.
        on_error: What happens to an input that the guard could not judge: `reject` (fail closed) or `accept`.
        latency_budget: Seconds from when the guard gets a batch, after which detectors begin nothing more; an input that is
            undecided then could not be judged. None for no bound.

    Raises:
        InputError: A mode, or what happens on an error, that there is not; a budget that is no time.
    """

    mode: Mode = "enforce"
    on_error: OnError = "reject"
    latency_budget: float | None = None

    def __post_init__(self) -> None:
        """Refuse what would judge nothing: a misspelt mode enforces nothing."""
        check_choice("mode", self.mode, Mode)
        check_choice("on_error", self.on_error, OnError)
        budget = self.latency_budget
        if budget is not None and not (isinstance(budget, int | float) and 0.0 < budget <= sys.float_info.max):
            got = f"{budget:g}" if isinstance(budget, float) else repr(budget)
            raise InputError(f"expected a latency budget of more than 0 seconds, got {got}: leave it out for none")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One detector's result for one image.

    Attributes:
        detector: Its name.
        score: Higher is more suspicious; NaN when the detector failed.
        threshold: A score at or over it is suspicious.
        exact: False where the detector stopped early: the score is a bound, on the side of the threshold where it lies.
        suspicious: The score reached the threshold.
        passes: Forward passes of the detector's model spent on this image.
        late: The score is NaN because time was up.
    """

    detector: str
    score: float
    threshold: float
    exact: bool
    suspicious: bool
    passes: int
    late: bool = False


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard says of one image.

    Attributes:
        accepted: Whether the answer may be given out.
        suspicious: A detector fired, whether or not the policy blocks.
        reason: Why it was rejected, or failed under a policy that accepts; None otherwise.
        label_index: The model's answer; None when it gave none.
        label: The answer's class name, or its index as text.
        probability: Of that answer; None for models that return only labels.
        probabilities: All classes; empty for models that return only labels, or on failure.
        findings: One per detector that ran, in order.
        quarantined: Id of the stored copy, if one was stored.
    """

    accepted: bool
    suspicious: bool
    reason: Reason | None
    label_index: int | None
    label: str | None
    probability: float | None
    probabilities: tuple[float, ...]
    findings: tuple[Finding, ...]
    quarantined: str | None = None

    @property
    def verdict(self) -> Literal["accepted", "rejected"]:
        """The outcome in one word."""
        return "accepted" if self.accepted else "rejected"

    @property
    def failed(self) -> bool:
        """True when the guard or the model failed, or had no time, rather than finding something."""
        return self.reason in FAILURES

    @property
    def rejected_by(self) -> str | None:
        """The first detector that fired."""
        return next((finding.detector for finding in self.findings if finding.suspicious), None)

    @property
    def passes(self) -> int:
        """Forward passes that the detectors spent; the answer itself takes one more."""
        return sum(finding.passes for finding in self.findings)

    def finding(self, detector: str) -> Finding | None:
        """The result of one detector, by name."""
        return next((finding for finding in self.findings if finding.detector == detector), None)

    def findings_of(self, method: str) -> tuple[Finding, ...]:
        """The results of a method, `strip` say: its detectors are called that or, where there are several, `strip-logit` ..."""
        return tuple(finding for finding in self.findings if method_of(finding.detector) == method)

    def decisive(self, method: str) -> Finding | None:
        """Of those the first that fired, and where none did the first."""
        found = self.findings_of(method)
        return next((finding for finding in found if finding.suspicious), found[0] if found else None)


def method_of(detector: str) -> str:
    """The method that a detector's name begins with: `strip` of `strip-logit`; of a name that is not ours all of it."""
    return next((method for method in _METHODS if f"{detector}-".startswith(f"{method}-")), detector)
