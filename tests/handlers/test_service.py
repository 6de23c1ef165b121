from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guard import CalibratedDetector, Guard, GuardError, InputError, Limits, Policy, Quarantine
from guard.detectors import FeatureSqueezing
from guard.errors import TooLargeError
from handlers.answers import PHRASES, error_answer
from handlers.service import ImageService, Outcome
from tests.guard.models import predictor
from tests.handlers.toy_service import black, bomb, clean, nan_when_dark, toy_guard, toy_service, triggered
from tests.toy import NAMES


def statuses(outcomes: list[Outcome]) -> list[int]:
    return [outcome.answer.status for outcome in outcomes]


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "guard.requests"]


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="guard.requests")


def test_clean_images_are_answered_with_their_classes() -> None:
    outcomes = toy_service()([clean(row) for row in range(4)])
    assert [outcome.answer.body["label"] for outcome in outcomes] == list(NAMES)
    assert [outcome.answer.body["label_index"] for outcome in outcomes] == [0, 1, 2, 3]
    assert {outcome.kind for outcome in outcomes} == {"accepted"}


def test_a_triggered_image_is_rejected_without_its_label() -> None:
    (outcome,) = toy_service()([triggered()])
    assert outcome.kind == "rejected"
    assert outcome.answer.status == 422
    assert outcome.answer.body == {"verdict": "rejected", "reason": "backdoor-suspected", "request_id": outcome.request_id}


def test_a_mixed_batch_is_answered_in_order() -> None:
    bodies: list[bytes | bytearray | GuardError] = [
        clean(1),
        triggered(),
        b"junk",
        b"",
        bomb(),
        clean(2)[:40],
        InputError("told"),
        clean(2),
    ]
    outcomes = toy_service()(bodies, [str(row) for row in range(8)])
    assert statuses(outcomes) == [200, 422, 400, 400, 413, 400, 400, 200]
    assert [outcome.answer.body["request_id"] for outcome in outcomes] == [str(row) for row in range(8)]
    assert outcomes[0].answer.body["label_index"] == 1
    assert outcomes[-1].answer.body["label_index"] == 2


def test_an_image_without_an_answer_fails_alone() -> None:
    outcomes = toy_service(toy_guard(answers=nan_when_dark))([clean(0), black(), clean(1)])
    assert statuses(outcomes) == [200, 503, 200]
    assert outcomes[1].kind == "failed"
    assert "label" not in outcomes[1].answer.body


def test_an_image_that_strip_can_not_judge_is_not_given_out() -> None:
    def detects(images: Tensor) -> Tensor:
        return torch.full((len(images), 4), torch.nan)

    assert statuses(toy_service(toy_guard(detects=detects))([clean()])) == [503]
    accepting = toy_guard(Policy(on_error="accept"), detects=detects)
    assert statuses(toy_service(accepting)([clean()])) == [200]


def test_a_model_that_raises_answers_503_without_saying_why() -> None:
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("secret path")

    (outcome,) = toy_service(toy_guard(answers=broken))([clean()])
    assert outcome.answer.status == 503
    assert "secret" not in json.dumps(outcome.answer.body)


def test_a_guard_that_raises_answers_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Guard, images: Tensor) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr(Guard, "__call__", broken)
    outcomes = toy_service()([clean(0), b"junk", clean(1)])
    assert statuses(outcomes) == [503, 400, 503]
    assert all("secret" not in json.dumps(outcome.answer.body) for outcome in outcomes)


def test_monitor_mode_answers_and_logs_what_it_would_have_rejected(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = toy_service(toy_guard(Policy(mode="monitor")))([triggered(), clean(1)])
    assert statuses(outcomes) == [200, 200]
    assert outcomes[0].answer.body["verdict"] == "accepted"
    assert [line["outcome"] for line in log_lines(caplog)] == ["suspicious", "accepted"]
    assert log_lines(caplog)[0]["detector"] == "strip"


def test_scores_are_hidden_unless_exposed() -> None:
    for body in (clean(), triggered()):
        assert "scores" not in toy_service()([body])[0].answer.body
    for body, suspicious in ((clean(), False), (triggered(), True)):
        scores = toy_service(expose_scores=True)([body])[0].answer.body["scores"]
        assert isinstance(scores, dict)
        assert [name for name, score in scores.items() if (score >= -0.05) == suspicious] == ["strip"]


def test_limits_are_the_operators() -> None:
    assert statuses(toy_service(limits=Limits(max_bytes=10))([clean()])) == [413]
    assert statuses(toy_service(limits=Limits(max_pixels=63))([clean()])) == [413]
    assert statuses(toy_service(limits=Limits(max_pixels=64))([clean()])) == [200]


@pytest.mark.parametrize("body", [b'x"\n[METRICS]guard_requests_total.Count:9|#\r\n{"status":200}', b"\xff\xfe\x00{}", b"%s%d"])
def test_nothing_of_the_clients_text_reaches_log_or_answer(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (outcome,) = toy_service()([body])
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line
    assert "METRICS" not in line + json.dumps(outcome.answer.body)
    assert json.loads(line)["outcome"] == "invalid"


def test_the_log_says_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = toy_service()([clean(1), triggered()])
    first, second = log_lines(caplog)
    assert [first["request_id"], second["request_id"]] == [outcome.request_id for outcome in outcomes]
    assert first["model"] == "toy"
    assert first["label_index"] == 1
    assert [second["outcome"], second["reason"], second["detector"]] == ["rejected", "backdoor-suspected", "strip"]
    assert second["threshold"] == pytest.approx(0.05)
    assert isinstance(second["entropy"], float)
    assert second["entropy"] < 0.05
    assert [first["entropy_exact"], second["entropy_exact"]] == [False, True]  # what is clean was certain early


def test_the_log_tells_the_scores_of_other_detectors(caplog: pytest.LogCaptureFixture) -> None:
    squeezing = CalibratedDetector(FeatureSqueezing(predictor()), 3.0)
    toy = toy_guard()
    (outcome,) = toy_service(Guard(toy.predictor, [*toy.detectors, squeezing]))([clean(1)])
    (line,) = log_lines(caplog)
    assert outcome.verdict is not None
    assert line["scores"] == {"feature-squeezing": outcome.verdict.findings[1].score}
    assert line["entropies"] == {"strip": outcome.entropy}
    (alone,) = toy_service(Guard(toy.predictor, [squeezing]))([clean(1)])
    assert (alone.entropy, alone.entropies, set(alone.scores)) == (None, {}, {"feature-squeezing"})
    assert [log_lines(caplog)[1][name] for name in ("threshold", "entropy_exact")] == [None, None]


def test_a_rejected_image_is_quarantined_and_a_full_disk_is_counted(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "kept")
    stored, passed = toy_service(toy_guard(quarantine=quarantine))([triggered(), clean()])
    assert not stored.quarantine_failed
    assert not passed.quarantine_failed
    assert stored.verdict is not None
    assert [item.id for item in quarantine.items()] == [stored.verdict.quarantined]
    (tmp_path / "file").write_bytes(b"")
    (lost,) = toy_service(toy_guard(quarantine=Quarantine(tmp_path / "file" / "below")))([triggered()])
    assert lost.quarantine_failed
    assert lost.answer.status == 422


def test_request_ids_are_ours_and_unique() -> None:
    ids = [outcome.request_id for outcome in toy_service()([clean()] * 3)]
    assert len(set(ids)) == 3
    assert all(len(request_id) == 32 and request_id.isalnum() for request_id in ids)


def test_an_empty_batch_is_answered_by_nothing() -> None:
    service: ImageService = toy_service()
    assert service([]) == []


def test_only_errors_of_the_client_are_told() -> None:
    assert error_answer(TooLargeError("over"), "1").status == 413
    assert error_answer(InputError("why"), "1").body["message"] == "why"
    failed = error_answer(GuardError("inside"), "1")
    assert failed.status == 503
    assert "inside" not in json.dumps(failed.body)


def test_every_status_has_an_ascii_phrase() -> None:
    outcomes = toy_service()([clean(), triggered(), b"", bomb(), GuardError("x")])
    assert [outcome.answer.phrase for outcome in outcomes] == [PHRASES[code] for code in (200, 422, 400, 413, 503)]
    assert all(phrase.isascii() for phrase in PHRASES.values())


def test_an_outcome_without_a_finite_score_has_no_entropy() -> None:
    (outcome,) = toy_service()([clean()])
    assert outcome.verdict is not None
    assert outcome.entropy is not None
    assert replace(outcome, verdict=None).entropy is None
