"""What is counted, the same for every engine; each engine's adapter writes these into its own exporter."""

from __future__ import annotations

from typing import Protocol, get_args

from handlers.service import Outcome, OutcomeKind

REQUESTS = "guard_requests_total"
"""Counter by `outcome`, see `Outcome.kind`: accepted, suspicious, unjudged, rejected, invalid, failed."""

OUTCOMES: tuple[OutcomeKind, ...] = get_args(OutcomeKind)

REJECTIONS = "guard_rejections_total"
"""Counter by `detector`."""

ENTROPY = "guard_entropy_bits"
"""Histogram by `detector` of STRIP's entropy, in bits; a bound for inputs whose verdict was certain early."""

PASSES = "guard_forward_passes_total"
"""Counter of the forward passes that detectors spent."""

OUT_OF_TIME = "guard_out_of_time_total"
"""Counter of requests that the latency budget left undecided; each is counted by its outcome as well."""

SECONDS = "guard_seconds"
"""Histogram of the seconds that decoding and guarding took per request."""

QUARANTINE_FAILURES = "guard_quarantine_failures_total"
"""Counter of suspicious images that could not be stored."""

ENTROPY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics(Protocol):
    """Where outcomes are counted."""

    def observe(self, outcome: Outcome) -> None:
        """Count one request."""
        ...
