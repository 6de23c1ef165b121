"""From the bodies of a batch of requests to their answers: what every engine does between receiving and sending."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from guard import Guard, GuardError, Limits, Verdict, decode_image
from guard.errors import one_line
from handlers.answers import Answer, error_answer, verdict_answer

logger = logging.getLogger("guard.requests")

OutcomeKind = Literal["accepted", "suspicious", "unjudged", "rejected", "invalid", "failed"]


@dataclass(frozen=True)
class Outcome:
    """One request's end.

    Attributes:
        request_id: Made here, or the engine's own; never the client's text.
        answer: What the client gets.
        verdict: What the guard said; None when the image was never judged.
        seconds: Time that decoding and guarding took for the batch, shared equally among its requests.
        quarantine_failed: The image should have been quarantined, and could not be.
    """

    request_id: str
    answer: Answer
    verdict: Verdict | None
    seconds: float
    quarantine_failed: bool = False

    @property
    def kind(self) -> OutcomeKind:
        """In one word, for logs and metrics.

        Two kinds were answered all the same, because the policy says so: `suspicious`, which monitor mode let through, and
        `unjudged`, for which the guard failed.
        """
        if self.answer.status == 200 and self.verdict is not None:
            return "suspicious" if self.verdict.suspicious else "unjudged" if self.verdict.failed else "accepted"
        if self.answer.status == 422:
            return "rejected"
        return "failed" if self.answer.status == 503 else "invalid"

    @property
    def entropy(self) -> float | None:
        """STRIP's entropy in bits, where it ran and answered; a bound where it stopped early.

        Of several, that of the first that fired; where none did, of the first.
        """
        finding = None if self.verdict is None else self.verdict.decisive("strip")
        return None if finding is None else self.entropies.get(finding.detector)

    @property
    def entropies(self) -> dict[str, float]:
        """The same of each STRIP that answered, by the detector's name."""
        findings = () if self.verdict is None else self.verdict.findings_of("strip")
        return {finding.detector: -finding.score for finding in findings if math.isfinite(finding.score)}

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the other detectors that answered, by name."""
        findings = () if self.verdict is None else self.verdict.findings
        found = {finding.detector: finding.score for finding in findings if math.isfinite(finding.score)}
        return {name: score for name, score in found.items() if name not in self.entropies}


@final
class ImageService:
    """Decodes, guards, answers and logs batches of encoded images.

    Args:
        guard: Judges and answers.
        model_name: For the log.
        limits: Byte and pixel limits of one image.
        expose_scores: Put detector scores into answers.
    """

    def __init__(self, guard: Guard, model_name: str, limits: Limits | None = None, expose_scores: bool = False) -> None:
        self.guard = guard
        self.model_name = model_name
        self.limits = limits or Limits()
        self.expose_scores = expose_scores

    def __call__(self, bodies: Sequence[bytes | bytearray | GuardError], request_ids: Sequence[str] = ()) -> list[Outcome]:
        """Answer a batch; whatever an image or the model does becomes an answer.

        Args:
            bodies: Encoded images, or the error that reading one has already met.
            request_ids: One per body; made here when empty.

        Returns:
            One outcome per body, in order, each already logged.
        """
        outcomes = self.judge(bodies, request_ids)
        for outcome in outcomes:
            self.log(outcome)
        return outcomes

    def judge(self, bodies: Sequence[bytes | bytearray | GuardError], request_ids: Sequence[str] = ()) -> list[Outcome]:
        """The same without a word in the log, for those who may yet change how requests end."""
        started = time.perf_counter()
        ids = list(request_ids) or [new_request_id() for _ in bodies]
        decoded = [self._decode(body) for body in bodies]
        images = [item for item in decoded if isinstance(item, Tensor)]
        judged: Sequence[Verdict | GuardError] = self._judge(images) if images else []
        remaining = iter(judged)
        results = [next(remaining) if isinstance(item, Tensor) else item for item in decoded]
        seconds = (time.perf_counter() - started) / max(1, len(bodies))
        return [self._outcome(result, request_id, seconds) for result, request_id in zip(results, ids, strict=True)]

    def log(self, outcome: Outcome) -> None:
        """One JSON object a line. Nothing of the client's own text is in it."""
        verdict = outcome.verdict
        strip = None if verdict is None else verdict.decisive("strip")
        record = {
            "event": "request",
            "model": self.model_name,
            "request_id": outcome.request_id,
            "status": outcome.answer.status,
            "outcome": outcome.kind,
            "reason": outcome.answer.body.get("reason") or (None if verdict is None else verdict.reason),
            "detector": None if verdict is None else verdict.rejected_by,
            "label_index": None if verdict is None else verdict.label_index,
            "entropy": outcome.entropy,
            "entropy_exact": None if strip is None or outcome.entropy is None else strip.exact,
            "entropies": outcome.entropies,
            "scores": outcome.scores,
            "threshold": None if strip is None or not math.isfinite(strip.threshold) else -strip.threshold,
            "passes": None if verdict is None else verdict.passes,
            "quarantined": None if verdict is None else verdict.quarantined,
            "seconds": round(outcome.seconds, 6),
        }
        logger.info(json.dumps(record, allow_nan=False))

    def _decode(self, body: bytes | bytearray | GuardError) -> Tensor | GuardError:
        if isinstance(body, GuardError):
            return body
        try:
            return decode_image(body, self.guard.predictor.spec, self.limits)
        except GuardError as error:
            return error
        except Exception as error:  # fail closed: a decoder is foreign code
            logger.exception("decoding failed: %s", one_line(error))
            return GuardError(one_line(error))

    def _judge(self, images: list[Tensor]) -> Sequence[Verdict | GuardError]:
        try:
            return self.guard(torch.stack(images))
        except Exception as error:  # fail closed, and answer every request of the batch
            logger.exception("the guard failed: %s", one_line(error))
            return [GuardError(one_line(error))] * len(images)

    def _outcome(self, result: Verdict | GuardError, request_id: str, seconds: float) -> Outcome:
        if isinstance(result, GuardError):
            return Outcome(request_id, error_answer(result, request_id), None, seconds)
        lost = self.guard.quarantine is not None and result.suspicious and result.quarantined is None
        return Outcome(request_id, verdict_answer(result, request_id, self.expose_scores), result, seconds, lost)


def new_request_id() -> str:
    """Random, so that it tells a client nothing."""
    return uuid.uuid4().hex
