from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from guard import Policy, Quarantine
from handlers import metrics as names
from handlers.metrics import Metrics
from handlers.prometheus import PrometheusMetrics
from handlers.service import OutcomeKind
from tests.handlers.toy_service import clean, toy_guard, toy_pair, toy_service, triggered


def value(metrics: PrometheusMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model": "default", **labels})


def test_outcomes_are_counted_by_kind_and_detector() -> None:
    metrics = PrometheusMetrics()
    counted: Metrics = metrics
    for outcome in toy_service()([clean(0), clean(1), triggered(), b"junk"]):
        counted.observe(outcome)
    assert value(metrics, names.REQUESTS, outcome="accepted") == 2
    assert value(metrics, names.REQUESTS, outcome="rejected") == 1
    assert value(metrics, names.REQUESTS, outcome="invalid") == 1
    assert value(metrics, names.REJECTIONS, detector="strip") == 1
    assert value(metrics, names.ENTROPY + "_count", detector="strip") == 3
    assert value(metrics, names.ENTROPY + "_bucket", detector="strip", le="0.05") == 1
    assert value(metrics, names.SECONDS + "_count") == 4


def test_two_strips_are_counted_apart() -> None:
    metrics = PrometheusMetrics()
    service = toy_service(toy_pair())
    metrics.prepare("default", service)
    for outcome in service([clean(0), triggered()]):
        metrics.observe(outcome)
    assert value(metrics, names.REJECTIONS, detector="strip-logit") == 1
    assert value(metrics, names.REJECTIONS, detector="strip-demeaned") == 0
    for detector, low in (("strip-logit", 1), ("strip-demeaned", 0)):
        assert value(metrics, names.ENTROPY + "_count", detector=detector) == 2
        assert value(metrics, names.ENTROPY + "_bucket", detector=detector, le="0.05") == low


def test_passes_are_summed() -> None:
    metrics = PrometheusMetrics()
    outcomes = toy_service()([clean(0), triggered()])
    for outcome in outcomes:
        metrics.observe(outcome)
    assert value(metrics, names.PASSES) == sum(outcome.verdict.passes for outcome in outcomes if outcome.verdict)
    assert sum(outcome.verdict.passes for outcome in outcomes if outcome.verdict) > 40


def test_what_monitor_mode_lets_through_is_suspicious_and_no_rejection() -> None:
    metrics = PrometheusMetrics()
    metrics.observe(toy_service(toy_guard(Policy(mode="monitor")))([triggered()])[0])
    assert value(metrics, names.REQUESTS, outcome="suspicious") == 1
    assert value(metrics, names.REJECTIONS, detector="strip") is None


@pytest.mark.parametrize(("on_error", "status", "kind"), [("reject", 503, "failed"), ("accept", 200, "unjudged")])
def test_a_request_that_time_was_too_short_for_is_counted(
    on_error: Literal["reject", "accept"], status: int, kind: OutcomeKind
) -> None:
    metrics, service = PrometheusMetrics(), toy_service(toy_guard(Policy(on_error=on_error, latency_budget=1e-9)))
    metrics.prepare("default", service)
    assert value(metrics, names.OUT_OF_TIME) == 0
    for outcome in service([clean(0), triggered()]):
        metrics.observe(outcome)
        assert (outcome.answer.status, outcome.kind) == (status, kind)
        assert outcome.answer.body.get("reason") == ("out-of-time" if status == 503 else None)
    assert value(metrics, names.OUT_OF_TIME) == value(metrics, names.REQUESTS, outcome=kind) == 2


def test_a_lost_quarantine_image_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    metrics = PrometheusMetrics()
    metrics.observe(toy_service(toy_guard(quarantine=Quarantine(tmp_path / "file" / "below")))([triggered()])[0])
    assert value(metrics, names.QUARANTINE_FAILURES) == 1


def test_prepared_series_start_at_zero() -> None:
    metrics = PrometheusMetrics()
    metrics.prepare("toy", toy_service())
    zeros = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }
    assert set(zeros.values()) == {0.0}
    assert ("guard_rejections_total", (("detector", "strip"), ("model", "toy"))) in zeros
    assert all(("model", "toy") in labels for _, labels in zeros)


def test_the_text_parses_and_has_every_name_and_bucket() -> None:
    metrics = PrometheusMetrics()
    metrics.observe(toy_service()([clean()])[0], "toy")
    text, content_type = metrics.render()
    samples = [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]
    found = {sample.name for sample in samples}
    expected = {names.REQUESTS, names.PASSES, names.ENTROPY + "_bucket", names.SECONDS + "_bucket"}
    assert expected <= found
    assert content_type.startswith("text/plain")
    bounds = {float(sample.labels["le"]) for sample in samples if sample.name == names.SECONDS + "_bucket"}
    assert bounds == {*names.SECONDS_BUCKETS, float("inf")}


def test_registries_are_apart_from_each_other_and_the_global_one() -> None:
    first, second = PrometheusMetrics(), PrometheusMetrics()
    first.observe(toy_service()([clean()])[0])
    assert value(second, names.REQUESTS, outcome="accepted") is None
    assert REGISTRY.get_sample_value(names.REQUESTS, {"model": "default", "outcome": "accepted"}) is None


@pytest.mark.parametrize("model", ['a"b', "a\nb"])
def test_label_values_are_escaped(model: str) -> None:
    metrics = PrometheusMetrics()
    metrics.observe(toy_service()([clean()])[0], model)
    samples = [sample for family in text_string_to_metric_families(metrics.render()[0].decode()) for sample in family.samples]
    assert {sample.labels["model"] for sample in samples} == {model}
