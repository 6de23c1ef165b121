"""The guard: predictor, detectors, preprocessor and policy in one."""

from __future__ import annotations

import functools
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast, final

import msgspec
import torch
from torch import Tensor

from guard.detectors.detector import Detector, Inspection
from guard.detectors.strip import Strip
from guard.errors import CalibrationError, InputError, RejectedError, one_line
from guard.images import Array
from guard.predictors.predictor import DEFAULT_MEMORY_LIMIT, Predictor
from guard.preprocessors import Preprocessor, answer_views, views_of
from guard.quarantine import Quarantine
from guard.verdict import Finding, Policy, Reason, Verdict
from guard.wrapping import abstain, answers_later, by_reason, combined, first_parameter, like

logger = logging.getLogger("guard")
_P = ParamSpec("_P")
_R = TypeVar("_R")
_B = TypeVar("_B", bound=Array)


@final
@dataclass(frozen=True)
class CalibratedDetector:
    """A detector with the threshold that calibration set for it.

    Args:
        detector: The test.
        threshold: On its score.

    Raises:
        CalibrationError: The threshold is not finite in float32.
    """

    detector: Detector
    threshold: float

    def __post_init__(self) -> None:
        """Refuse what would accept or reject everything."""
        if not abs(self.threshold) <= torch.finfo(torch.float32).max:  # scores are float32
            raise CalibrationError(f"expected a finite threshold, got {self.threshold}")


@final
class Guard:
    """Decides for each image whether the model's answer may be given out. Safe to call from several threads.

    Args:
        predictor: The model that answers.
        detectors: Online tests; each holds the model it looks at. They see the raw image.
        preprocessor: Applied before the model answers; None for none.
        policy: What follows from a finding.
        quarantine: Where suspicious images are kept; None to keep none.
        seed: Of the preprocessor's draws; None (serving) seeds from the operating system, so that they can't be replayed.
        device: Where images are blended and preprocessed, before the model gets them.
    """

    def __init__(
        self,
        predictor: Predictor,
        detectors: Sequence[CalibratedDetector],
        *,
        preprocessor: Preprocessor | None = None,
        policy: Policy | None = None,
        quarantine: Quarantine | None = None,
        seed: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.predictor = predictor
        self.device = device
        self.detectors = tuple(detectors)
        self.preprocessor = preprocessor
        self.policy = policy or Policy()
        self.quarantine = quarantine
        self._generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self._unseeded_in = os.getpid() if seed is None else None
        self._generator_lock = threading.Lock()
        self._rider = self._with_room_for_the_answer()

    @classmethod
    def load(
        cls,
        profile: str | Path,
        model: object | None = None,
        *,
        policy: Policy | None = None,
        quarantine: Quarantine | None = None,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ) -> Guard:
        """Build a guard from a profile folder.

        Args:
            profile: The folder that `guard calibrate` wrote.
            model: The model in memory, for profiles of models without a file; otherwise read from the folder.
            policy: Replaces the profile's.
            quarantine: Where suspicious images are kept.
            device: Where PyTorch models run, `cpu` or `cuda`.
            seed: Of the preprocessor's draws; leave None for serving.
            memory_limit: Bytes that a forward pass may take, beside the model's own weights, as far as can be told before: it
                then holds fewer images. See `Predictor`.

        Raises:
            InputError: A limit that no image fits.
            ProfileError: The profile is damaged, newer, or belongs to another model.
            ModelError: The model can't be loaded.
        """
        from guard.loading import load_guard

        return load_guard(
            Path(profile),
            model,
            policy=policy,
            quarantine=quarantine,
            device=device,
            seed=seed,
            memory_limit=memory_limit,
        )

    def __call__(self, images: Tensor) -> tuple[Verdict, ...]:
        """Judge and answer a batch.

        Args:
            images: (B, C, H, W), float32, RGB, in [0, 1].

        Returns:
            B verdicts, in order. A failure of the guard or of the model becomes a verdict, not an exception.

        Raises:
            InputError: The batch is not what the model takes.
        """
        self.predictor.spec.check(images)
        images = images.to(self.device)
        deadline = None if self.policy.latency_budget is None else time.monotonic() + self.policy.latency_budget
        with self._own_precision():
            verdicts = self._judge(images, deadline)
            if len(images) > 1:  # one bad image must not take its neighbours down
                verdicts = [self._second_look(images[row : row + 1], item, deadline) for row, item in enumerate(verdicts)]
        return tuple(self._store(image, verdict) for image, verdict in zip(images, verdicts, strict=True))

    def answer(self, images: Tensor) -> Tensor:
        """The model's own answer through the preprocessor, with the detectors off.

        Args:
            images: (B, C, H, W), in [0, 1].

        Returns:
            (B, M), float32 probabilities.
        """
        with self._own_precision():
            return answer_views(self.predictor, self._views(images.to(self.device)))

    def wrap(
        self, predict: Callable[Concatenate[_B, _P], _R], on_reject: Literal["raise", "abstain"] = "raise"
    ) -> Callable[Concatenate[_B, _P], _R]:
        """Put the guard in front of a predict function; the result has its signature.

        Args:
            predict: Takes a batch in the layout and type of the profile's input spec, returns one row per image.
            on_reject: `raise` a `RejectedError` that names the rows, or `abstain`: a rejected row becomes NaN, or -1
                where the function returns whole numbers. Answers of which no row can become that are a `ModelError`.

        Returns:
            The guarded function. It calls `predict` once per batch, preprocessed if the profile says so, or once per view
            where GYM has several: then it answers their mean, or the most frequent of whole numbers. Further arguments are
            passed on.

        Raises:
            InputError: The function is async or a generator, and its answers would have to be changed.
        """
        if on_reject not in ("raise", "abstain"):
            raise InputError(f"expected on_reject 'raise' or 'abstain', got {on_reject!r}")

        if (on_reject == "abstain" or self.preprocessor is not None) and answers_later(predict):
            raise InputError(
                "expected a function that returns its answers, got an async function or a generator: wrap what it calls"
            )
        name, call = first_parameter(predict), cast(Callable[..., _R], predict)

        def guarded(*args: Any, **kwargs: Any) -> _R:
            if not args and name in kwargs:
                args = (kwargs.pop(name),)
            if not args:
                raise InputError("expected a batch of images as the first argument, got none: pass it by position")
            batch, *rest = args
            spec = self.predictor.spec
            images = spec.from_model(batch)
            reasons = {row: str(verdict.reason) for row, verdict in enumerate(self(images)) if not verdict.accepted}
            if self.policy.mode == "monitor":  # `predict` answers by itself, even what the guard could not judge
                reasons = {}
            refused = list(reasons)
            if refused and on_reject == "raise":
                raise RejectedError(f"{len(refused)} of {len(images)} inputs rejected: {by_reason(reasons)}", reasons)
            if self.preprocessor is None:
                answers = call(batch, *rest, **kwargs)
            else:
                views = [like(batch, spec.to_model(view)) for view in self._views(images.to(self.device))]
                answers = combined([call(view, *rest, **kwargs) for view in views])
            return answers if on_reject == "raise" or self.policy.mode == "monitor" else abstain(answers, refused, len(images))

        return functools.update_wrapper(guarded, predict)

    def _views(self, images: Tensor) -> list[Tensor]:
        with self._generator_lock:
            if self._unseeded_in not in (None, os.getpid()):  # a forked worker would draw what its siblings do
                self._generator, self._unseeded_in = torch.Generator().manual_seed(secrets.randbits(63)), os.getpid()
            with self._own_precision():
                return views_of(self.preprocessor, images, self._generator)

    def _own_precision(self) -> torch.autocast:
        """Without the caller's autocast, with which thresholds were not set."""
        return torch.autocast(torch.device(self.device).type, enabled=False)

    def _with_room_for_the_answer(self) -> CalibratedDetector | None:
        """A STRIP over the very model that answers, without a preprocessor: its first batch may answer as well."""
        if self.preprocessor is not None:
            return None
        found = (
            item for item in self.detectors if isinstance(item.detector, Strip) and item.detector.predictor is self.predictor
        )
        return next(found, None)

    def _second_look(self, image: Tensor, first: Verdict, deadline: float | None) -> Verdict:
        """At an image whose batch failed, alone; what was found first stays where time does not allow for all of it again."""
        if not first.failed or first.reason == "out-of-time" or (deadline is not None and time.monotonic() >= deadline):
            return first
        second = self._judge(image, deadline)[0]
        return first if any(finding.late for finding in second.findings) else second

    def _judge(self, images: Tensor, deadline: float | None) -> list[Verdict]:
        inspections = [_inspect(calibrated, images, deadline, calibrated is self._rider) for calibrated in self.detectors]
        try:
            probabilities = next((found.answers for found in inspections if found.answers is not None), None)
            if probabilities is None:
                probabilities = self.answer(images).cpu()
        except Exception as error:  # fail closed: whatever went wrong, there is no answer to give out
            logger.exception("the model failed: %s", one_line(error))
            probabilities = torch.full((len(images), self.predictor.num_classes), torch.nan)
        return [
            self._verdict(
                probabilities[row],
                tuple(_finding(calibrated, found, row) for calibrated, found in zip(self.detectors, inspections, strict=True)),
            )
            for row in range(len(images))
        ]

    def _verdict(self, probabilities: Tensor, findings: tuple[Finding, ...]) -> Verdict:
        answered = bool(torch.isfinite(probabilities).all())
        label = int(probabilities.argmax()) if answered else None
        suspicious = any(finding.suspicious for finding in findings)
        undecided = [finding for finding in findings if not math.isfinite(finding.score)]
        late = bool(undecided) and all(finding.late for finding in undecided)
        accepted, reason = self._decide(answered, suspicious, bool(undecided), "out-of-time" if late else "guard-failed")
        with_probabilities = answered and not self.predictor.labels_only
        return Verdict(
            accepted=accepted,
            suspicious=suspicious,
            reason=reason,
            label_index=label,
            label=None if label is None else self.predictor.spec.label_name(label),
            probability=float(probabilities[label]) if label is not None and with_probabilities else None,
            probabilities=tuple(probabilities.tolist()) if with_probabilities else (),
            findings=findings,
        )

    def _decide(self, answered: bool, suspicious: bool, undecided: bool, why: Reason) -> tuple[bool, Reason | None]:
        if not answered:
            return False, "model-failed"
        if suspicious and self.policy.mode == "enforce":
            return False, "backdoor-suspected"
        if undecided:
            return self.policy.mode == "monitor" or self.policy.on_error == "accept", why
        return True, None

    def _store(self, image: Tensor, verdict: Verdict) -> Verdict:
        fired = next((finding for finding in verdict.findings if finding.suspicious), None)
        if self.quarantine is None or fired is None:
            return verdict
        stored = self.quarantine.add(
            image,
            detector=fired.detector,
            score=fired.score,
            threshold=fired.threshold,
            label_index=verdict.label_index,
            label=verdict.label,
        )
        return verdict if stored is None else msgspec.structs.replace(verdict, quarantined=stored)


def _inspect(calibrated: CalibratedDetector, images: Tensor, deadline: float | None, answering: bool) -> Inspection:
    """A detector that raises has found nothing: every score is NaN, and the policy decides."""
    detector, threshold = calibrated.detector, calibrated.threshold
    try:
        if answering and isinstance(detector, Strip):
            found = detector.inspect_and_answer(images, threshold, math.inf if deadline is None else deadline)
        elif deadline is None:
            found = detector.inspect(images, threshold)
        else:
            found = detector.inspect_by(images, threshold, deadline)
        if any(len(part) != len(images) for part in (found.exceeds, found.scores, found.exact, found.passes)):
            raise ValueError(f"expected {len(images)} results, got {len(found.scores)}")
        return found
    except Exception as error:  # fail closed, see above
        logger.exception("detector %s failed: %s", calibrated.detector.name, one_line(error))
        unknown = torch.full((len(images),), torch.nan)
        zeros = torch.zeros(len(images), dtype=torch.int64)
        return Inspection(torch.ones_like(zeros, dtype=torch.bool), unknown, torch.zeros_like(zeros, dtype=torch.bool), zeros)


def _finding(calibrated: CalibratedDetector, found: Inspection, row: int) -> Finding:
    score = float(found.scores[row])
    return Finding(
        detector=calibrated.detector.name,
        score=score,
        threshold=calibrated.threshold,
        exact=bool(found.exact[row]),
        suspicious=bool(found.exceeds[row]) and math.isfinite(score),
        passes=int(found.passes[row]),
        late=found.late is not None and bool(found.late[row]),
    )
