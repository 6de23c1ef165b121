"""The guard's metrics on TorchServe's Prometheus endpoint.

A worker writes each observation as a line that TorchServe's frontend parses and adds up; the frontend knows only metrics
that its `metrics_config` names, hence the packaged file. Every metric also has the dimension `model`, because one
TorchServe serves several.

TorchServe can't set the buckets of a histogram: its fixed ones run from 5 ms to 10 s, or .005 to 10 bits, which does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from handlers.metrics import ENTROPY, OUT_OF_TIME, OUTCOMES, PASSES, QUARANTINE_FAILURES, REJECTIONS, REQUESTS, SECONDS
from handlers.service import Outcome


def metrics_config_path() -> Path:
    """The file for TorchServe's option `metrics_config`; it also needs `metrics_mode=prometheus`."""
    return Path(__file__).with_name("torchserve_metrics.yaml")


@final
class TorchServeMetrics:
    """Counts outcomes through a TorchServe context.

    Args:
        cache: `context.metrics`.
        model_name: The value of the dimension `model`.
    """

    def __init__(self, cache: Any, model_name: str) -> None:
        from ts.metrics.metric_type_enum import MetricTypes

        self._cache = cache
        self._model_name = model_name
        self._counter = MetricTypes.COUNTER
        self._histogram = MetricTypes.HISTOGRAM

    def prepare(self, detectors: Iterable[str]) -> None:
        """Start the counters at zero, so that the first rejection shows as an increase."""
        for outcome in OUTCOMES:
            self._add(REQUESTS, self._counter, "count", 0, outcome=outcome)
        for detector in detectors:
            self._add(REJECTIONS, self._counter, "count", 0, detector=detector)
        self._add(PASSES, self._counter, "count", 0)
        self._add(OUT_OF_TIME, self._counter, "count", 0)
        self._add(QUARANTINE_FAILURES, self._counter, "count", 0)

    def observe(self, outcome: Outcome) -> None:
        """Count one request."""
        self._add(REQUESTS, self._counter, "count", 1, outcome=outcome.kind)
        self._add(SECONDS, self._histogram, "s", outcome.seconds)
        if outcome.verdict is not None:
            self._add(PASSES, self._counter, "count", outcome.verdict.passes)
            if outcome.verdict.reason == "out-of-time":
                self._add(OUT_OF_TIME, self._counter, "count", 1)
            if outcome.kind == "rejected" and outcome.verdict.rejected_by is not None:
                self._add(REJECTIONS, self._counter, "count", 1, detector=outcome.verdict.rejected_by)
        for detector, entropy in outcome.entropies.items():
            self._add(ENTROPY, self._histogram, "bits", max(0.0, entropy), detector=detector)
        if outcome.quarantine_failed:
            self._add(QUARANTINE_FAILURES, self._counter, "count", 1)

    def _add(self, name: str, kind: object, unit: str, value: float, **labels: str) -> None:
        known = self._cache.cache.get(kind, {})
        names = [*labels, "model"]
        metric = known.get(name) or self._cache.add_metric_to_cache(name, unit, names, kind)  # another metrics_config
        metric.add_or_update(round(value, 6), [*labels.values(), self._model_name])
