"""The HTTP answers, the same for every engine.

    accepted (or suspicious, in monitor mode)   200   verdict, label, label_index, probability, request_id
    rejected (enforce)                          422   verdict, reason "backdoor-suspected", request_id
    not an image, wrong size or channels        400   verdict, reason, message, request_id
    too many bytes or pixels                    413   verdict, reason, message, request_id
    the guard or the model failed               503   verdict, reason, request_id

Scores stay hidden unless the operator exposes them: they would help an attacker tune a trigger.
"""

from __future__ import annotations

from dataclasses import dataclass

from guard.errors import GuardError, InputError, TooLargeError
from guard.verdict import Verdict

PHRASES = {
    200: "OK",
    207: "Multi-Status",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    422: "Unprocessable Content",
    503: "Service Unavailable",
}
"""ASCII reason phrases: TorchServe's worker dies of any other."""


@dataclass(frozen=True)
class Answer:
    """What a client gets for one image.

    Attributes:
        status: HTTP status.
        body: The JSON object.
    """

    status: int
    body: dict[str, object]

    @property
    def phrase(self) -> str:
        """The status's reason phrase, ASCII."""
        return PHRASES[self.status]


def verdict_answer(verdict: Verdict, request_id: str, expose_scores: bool = False) -> Answer:
    """The answer for an image that was judged."""
    body: dict[str, object]
    if verdict.accepted:
        body = {
            "verdict": "accepted",
            "label": verdict.label,
            "label_index": verdict.label_index,
            "probability": verdict.probability,
            "request_id": request_id,
        }
    else:
        body = {"verdict": "rejected", "reason": verdict.reason, "request_id": request_id}
    if expose_scores:
        body["scores"] = {finding.detector: _finite(finding.score) for finding in verdict.findings}
    status = 200 if verdict.accepted else 503 if verdict.failed else 422
    return Answer(status, body)


def error_answer(error: GuardError, request_id: str) -> Answer:
    """The answer for an input that could not be judged, or for a guard that could not judge.

    Only errors about the client's own input tell what was wrong; the others would describe the server.
    """
    body: dict[str, object] = {"verdict": "rejected", "reason": error.code, "request_id": request_id}
    if not isinstance(error, InputError):
        return Answer(503, {**body, "reason": "guard-failed"})
    return Answer(413 if isinstance(error, TooLargeError) else 400, {**body, "message": str(error)})


def _finite(score: float) -> float | None:
    """NaN and infinity are not JSON."""
    return score if score - score == 0.0 else None
