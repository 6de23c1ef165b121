"""Counts outcomes for Prometheus, in a registry of its own."""

from __future__ import annotations

from typing import final

from guard.errors import MissingExtraError
from guard.verdict import method_of
from handlers import metrics as names
from handlers.service import ImageService, Outcome

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
except ImportError as error:
    raise MissingExtraError("prometheus-client", "asgi") from error


@final
class PrometheusMetrics:
    """Implements `handlers.metrics.Metrics`; every series carries the label `model`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model",)
        self._requests = Counter(
            names.REQUESTS,
            "Requests by outcome; suspicious and unjudged ones were answered, as the policy says.",
            (*model, "outcome"),
            registry=self.registry,
        )
        self._rejections = Counter(
            names.REJECTIONS, "Requests rejected, by the detector that fired.", (*model, "detector"), registry=self.registry
        )
        self._entropy = Histogram(
            names.ENTROPY,
            "STRIP's entropy in bits, by detector; a bound for inputs whose verdict was certain early.",
            (*model, "detector"),
            buckets=names.ENTROPY_BUCKETS,
            registry=self.registry,
        )
        self._passes = Counter(names.PASSES, "Forward passes that detectors spent.", model, registry=self.registry)
        self._seconds = Histogram(
            names.SECONDS,
            "Seconds of decoding and guarding per request.",
            model,
            buckets=names.SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._late = Counter(
            names.OUT_OF_TIME, "Requests that the latency budget left undecided.", model, registry=self.registry
        )
        self._lost = Counter(
            names.QUARANTINE_FAILURES, "Suspicious images that could not be stored.", model, registry=self.registry
        )

    def prepare(self, model: str, service: ImageService) -> None:
        """Start a model's series at zero, so that the first rejection shows as an increase."""
        for outcome in names.OUTCOMES:
            self._requests.labels(model, outcome)
        for calibrated in service.guard.detectors:
            self._rejections.labels(model, calibrated.detector.name)
            if method_of(calibrated.detector.name) == "strip":
                self._entropy.labels(model, calibrated.detector.name)
        for metric in (self._passes, self._seconds, self._late, self._lost):
            metric.labels(model)

    def observe(self, outcome: Outcome, model: str = "default") -> None:
        """Count one request.

        Args:
            outcome: Its end.
            model: The operator's name of the model; never the client's text.
        """
        self._requests.labels(model, outcome.kind).inc()
        self._seconds.labels(model).observe(outcome.seconds)
        if outcome.quarantine_failed:
            self._lost.labels(model).inc()
        for detector, entropy in outcome.entropies.items():
            self._entropy.labels(model, detector).observe(entropy)
        if outcome.verdict is not None:
            self._passes.labels(model).inc(outcome.verdict.passes)
            self._late.labels(model).inc(outcome.verdict.reason == "out-of-time")
            if outcome.kind == "rejected" and outcome.verdict.rejected_by is not None:
                self._rejections.labels(model, outcome.verdict.rejected_by).inc()

    def render(self) -> tuple[bytes, str]:
        """The exposition: its text, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
