"""What both TorchServe handlers share: load a guard inside a worker, judge a batch, never raise."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, final

import msgspec
import torch

from guard import Guard, Limits, Quarantine, load_profile
from guard.errors import ServingError, one_line
from guard.predictors.predictor import DEFAULT_MEMORY_LIMIT
from handlers.answers import Answer
from handlers.service import ImageService, Outcome, OutcomeKind
from handlers.torchserve_metrics import TorchServeMetrics
from handlers.torchserve_request import Context, Row, failed_outcome, image_body, request_ids

logger = logging.getLogger("guard.torchserve")

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds until a guard that did not load is loaded anew; doubled each time
_SHUT_SECONDS = 0.2  # that a shut gate takes to answer
_EXPONENT = re.compile(r"[+-]?[0-9]+[eE][+-]?[0-9]+")
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `guard:` of a model archive's model-config.

    Args:
        quarantine: Absolute path of the folder for suspicious images; None keeps none.
        quarantine_max_items: Items kept there.
        quarantine_max_bytes: Bytes kept there.
        mode: Replaces the profile's.
        on_error: Replaces the profile's.
        latency_budget: Seconds; replaces the profile's.
        memory_limit: Bytes that a forward pass may take, as far as can be told before.
        max_bytes: Size of one encoded image.
        max_pixels: Width times height.
        expose_scores: Put detector scores into answers.
    """

    quarantine: str | None = None
    quarantine_max_items: _Positive = 10_000
    quarantine_max_bytes: _Positive = 1024**3
    mode: Literal["enforce", "monitor"] | None = None
    on_error: Literal["reject", "accept"] | None = None
    latency_budget: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    memory_limit: _Positive = DEFAULT_MEMORY_LIMIT
    max_bytes: _Positive = Limits().max_bytes
    max_pixels: _Positive = Limits().max_pixels
    expose_scores: bool = False

    @classmethod
    def read(cls, model_config: object) -> Options:
        """Read the section from a whole model-config.

        Raises:
            ServingError: An unknown key, or a value that is none.
        """
        section = model_config.get("guard") if isinstance(model_config, Mapping) else None
        try:
            options = msgspec.convert(_with_numbers({} if section is None else section), type=cls)
        except msgspec.ValidationError as error:
            raise ServingError(f"expected valid options under `guard:` in the model-config, got: {error}") from error
        if options.quarantine is not None and not Path(options.quarantine).is_absolute():
            raise ServingError(
                f"expected an absolute path for quarantine in the model-config, got {options.quarantine!r}: "
                "a worker's own folder is temporary"
            )
        return options


def _with_numbers(section: object) -> object:
    """YAML 1.1 reads a number that has an exponent and no point, such as 5e-05, as text."""
    if not isinstance(section, Mapping):
        return section
    found = dict(section)
    for key, value in section.items():
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            number = float(value)
            found[key] = int(number) if number.is_integer() else number
    return found


def load_service(context: Context, *, with_preprocessor: bool = True) -> ImageService:
    """Build the service of a model archive from the profile in it.

    Args:
        context: TorchServe's.
        with_preprocessor: False refuses profiles that preprocess.

    Raises:
        GuardError: The profile can't be used, or the options are wrong.
    """
    options = Options.read(context.model_yaml_config)
    folder = Path(context.system_properties["model_dir"])
    profile, _ = load_profile(folder)
    if profile.preprocessor is not None and not with_preprocessor:
        raise ServingError(
            "expected a profile without a preprocessor for a handler that preprocesses by itself, got one with GYM's: "
            "calibrate without one, or serve it with GuardHandler"
        )
    replaced = {name: value for name in ("mode", "on_error", "latency_budget") if (value := getattr(options, name)) is not None}
    quarantine = None
    if options.quarantine is not None:
        quarantine = Quarantine(options.quarantine, options.quarantine_max_items, options.quarantine_max_bytes)
    guard = Guard.load(
        folder,
        policy=msgspec.structs.replace(profile.policy, **replaced),
        quarantine=quarantine,
        device=_device(context),
        memory_limit=options.memory_limit,
    )
    limits = Limits(max_bytes=options.max_bytes, max_pixels=options.max_pixels)
    return ImageService(guard, context.model_name, limits, options.expose_scores)


@final
class Gate:
    """Judges batches inside a worker.

    Args:
        context: TorchServe's, at initialisation.
        load: Makes the service. While it raises, the gate is shut: every request is answered 503. (If a handler's
            `initialize` raises, TorchServe restarts the worker over and over, and clients hang.) It is called again with
            a request that comes 1, 2, 4 ... 60 seconds later. Workers take requests from one queue, so a shut gate
            does not answer at once: it would take them all away from those that can judge.
    """

    def __init__(self, context: Context, load: Callable[[], ImageService]) -> None:
        log_to(sys.stdout)
        self._model_name = context.model_name
        self._make = load
        self._service: ImageService | None = None
        self._due, self._wait = 0.0, _FIRST_WAIT
        self._load(context)

    def judge(self, data: Sequence[Row], context: Context) -> list[Outcome]:
        """One outcome per request, in order; never raises. Whoever has answered them calls `finish`."""
        ids = request_ids(context, len(data))
        if self._service is None and time.monotonic() >= self._due:
            self._load(context)
        if self._service is None:
            time.sleep(_SHUT_SECONDS)
        else:
            try:
                return self._service.judge([image_body(row) for row in data], ids)
            except Exception as error:  # not by contract; TorchServe would answer the whole batch in its own words
                logger.exception("judging failed: %s", one_line(error))
        return [failed_outcome(request_id) for request_id in ids]

    def lets_through(self, outcome: Outcome) -> bool:
        """Whether a handler behind the guard may see this request.

        In monitor mode, which never blocks, it sees every image. What could not be read as one it never sees: a handler that
        stumbles over a row takes the whole batch down.
        """
        if self._service is None or outcome.verdict is None:
            return False
        return outcome.verdict.accepted or self._service.guard.policy.mode == "monitor"

    def finish(self, outcomes: Sequence[Outcome], context: Context) -> None:
        """Log and count how requests ended; a failure there costs no request."""
        for outcome in outcomes:
            self._log(outcome)
            self._count(context, functools.partial(TorchServeMetrics.observe, outcome=outcome))

    def _load(self, context: Context) -> None:
        try:
            self._service = self._make()
        except Exception as error:  # fail closed, see above
            text = "the guard did not load, every request is answered 503, next attempt after %g s: %s"
            logger.exception(text, self._wait, one_line(error))
            self._due = time.monotonic() + self._wait
            self._wait = min(2.0 * self._wait, _LONGEST_WAIT)
        detectors = [] if self._service is None else [item.detector.name for item in self._service.guard.detectors]
        self._count(context, lambda metrics: metrics.prepare(detectors))

    def _log(self, outcome: Outcome) -> None:
        try:
            if self._service is not None:
                self._service.log(outcome)
                return
        except Exception as error:
            logger.exception("logging failed: %s", one_line(error))
        status, reason = outcome.answer.status, outcome.answer.body.get("reason")
        record = {"event": "request", "model": self._model_name, "request_id": outcome.request_id, "status": status}
        logger.error(json.dumps({**record, "outcome": outcome.kind, "reason": reason}, default=str))

    def _count(self, context: Context, add: Callable[[TorchServeMetrics], None]) -> None:
        try:
            add(TorchServeMetrics(context.metrics, self._model_name))
        except Exception as error:  # TorchServe's own code
            logger.exception("metrics failed: %s", one_line(error))


@final
@dataclass(frozen=True)
class Answered(Outcome):
    """A request that a handler behind the guard answered, with whatever status it chose."""

    @classmethod
    def with_status(cls, outcome: Outcome, status: int) -> Answered:
        """What the guard said, and what the client got."""
        fields = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
        return cls(**{**fields, "answer": Answer(status, {})})

    @property
    def kind(self) -> OutcomeKind:
        """What the guard said of it."""
        if self.verdict is None or self.verdict.failed:
            return "unjudged"
        return "suspicious" if self.verdict.suspicious else "accepted"


class OneLine(logging.Formatter):
    """A record is one printable ASCII line, tracebacks included.

    TorchServe takes any line of a worker that starts with `[METRICS]` for a measurement; an error message that quotes a
    client could forge one after a line break.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        text = super().format(record).encode("ascii", "backslashreplace").decode()
        return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def log_to(stream: TextIO) -> None:
    """Send the loggers `guard.*` to a stream, and only there; a second call changes nothing."""
    ours = logging.getLogger("guard")
    if any(isinstance(handler.formatter, OneLine) for handler in ours.handlers):
        return
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _device(context: Context) -> str:
    gpu: Any = context.system_properties.get("gpu_id")
    return f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
