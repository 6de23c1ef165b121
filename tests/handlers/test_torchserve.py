from __future__ import annotations

import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from PIL import Image
from torch import Tensor

from guard import Guard, Policy, Quarantine, load_profile
from guard.detectors import Blend
from guard.errors import GuardError
from guard.predictors.predictor import ACTIVATIONS_PER_INPUT, DEFAULT_MEMORY_LIMIT
from guard.predictors.screening import file_sha256
from guard.preprocessors import Gym
from guard.profile import save_profile
from handlers import service
from handlers.torchserve import GuardedHandler, GuardHandler, guarded
from handlers.torchserve_gate import Options, load_service, log_to
from tests.handlers.torchserve_worker import Reply, ask, started, worker_context
from tests.handlers.toy_service import black, bomb, clean, nan_when_dark, toy_guard, triggered
from tests.toy import save_toy_profile, toy_images, toy_trigger

FORGERY = "x\n[METRICS]guard_requests_total.count:9|#outcome:accepted,model:toy|#type:COUNTER|#hostname:h,1"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_profile(tmp_path_factory.mktemp("torchserve") / "profile")


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """A worker's logging is for the whole process: put it back."""
    ours = logging.getLogger("guard")
    before = (list(ours.handlers), ours.level, ours.propagate)
    yield
    ours.handlers[:], ours.level, ours.propagate = before


def statuses(replies: list[Reply]) -> list[int]:
    return [reply.status for reply in replies]


def test_every_item_of_a_batch_gets_its_own_answer(profile: Path) -> None:
    handler = GuardHandler()
    context = started(handler, profile, {"max_pixels": 1000})
    replies = ask(handler, context, clean(1), triggered(1), b"junk", bomb(), {"body": {"a": 1}}, {}, clean(2))
    assert statuses(replies) == [200, 422, 400, 413, 400, 400, 200]
    assert [reply.body.get("label") for reply in replies] == ["north-east", None, None, None, None, None, "south-west"]
    assert replies[1].body == {"verdict": "rejected", "reason": "backdoor-suspected", "request_id": replies[1].request_id}
    for reply in replies:
        assert reply.phrase.isascii()
        assert reply.content_type == "application/json"
        assert reply.body["request_id"] == reply.request_id


@pytest.mark.parametrize("blend", get_args(Blend))
def test_every_blend_is_served(tmp_path: Path, blend: Blend) -> None:
    folder = save_toy_profile(tmp_path / "profile", blend=blend, alpha=0.5)
    handler = GuardHandler()
    replies = ask(handler, started(handler, folder), clean(1), triggered(1))
    verdicts = Guard.load(folder)(torch.stack([toy_images(8, seed=2)[0][1], toy_trigger(toy_images(8, seed=2)[0])[1]]))
    assert statuses(replies) == [200 if verdict.accepted else 422 for verdict in verdicts]
    assert statuses(replies)[1] == 422 or blend in ("mix", "demeaned")  # which wear a white corner down


@pytest.mark.parametrize("field", ["body", "data", "picture"])
def test_the_image_is_the_only_field_whatever_its_name(profile: Path, field: str) -> None:
    handler = GuardHandler()
    context = started(handler, profile)
    assert statuses(ask(handler, context, {field: bytearray(clean())}, {field: triggered()})) == [200, 422]


@pytest.mark.parametrize(
    "row",
    [{}, {"body": {}}, {"body": []}, {"body": "text"}, {"body": None}, {"body": 3.0}, {"body": b""}, {"a": b"1", "b": b"2"}],
)
def test_what_is_no_image_is_400(profile: Path, row: dict[str, object]) -> None:
    handler = GuardHandler()
    assert statuses(ask(handler, started(handler, profile), row, clean())) == [400, 200]


def test_an_id_that_torchserve_did_not_make_is_replaced(profile: Path) -> None:
    handler = GuardHandler()
    context = started(handler, profile)
    (reply,) = ask(handler, context, clean(), ids=[FORGERY])
    assert re.fullmatch("[0-9a-f]{32}", reply.body["request_id"])


@pytest.mark.parametrize(
    "options", [{"mod": "monitor"}, {"mode": "off"}, {"max_pixels": 0}, {"max_bytes": "1"}, {"quarantine": "relative"}]
)
def test_wrong_options_fail_closed(profile: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    handler = GuardHandler()
    context = started(handler, profile, options)
    assert statuses(ask(handler, context, clean(), b"junk")) == [503, 503]
    assert "model-config" in capsys.readouterr().out


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(Exception, match="`mod`"):
        Options.read({"guard": {"mod": "monitor"}})
    assert Options.read({"guard": None, "batchSize": 8}) == Options.read(None) == Options()


def test_a_missing_profile_fails_closed(tmp_path: Path) -> None:
    handler = GuardHandler()
    (reply,) = ask(handler, started(handler, tmp_path), clean())
    assert (reply.status, reply.body["reason"]) == (503, "guard-failed")
    assert str(tmp_path) not in json.dumps(reply.body)


def test_monitor_mode_and_scores_are_the_operators_choice(profile: Path) -> None:
    handler = GuardHandler()
    context = started(handler, profile, {"mode": "monitor", "on_error": "accept", "expose_scores": True})
    (reply,) = ask(handler, context, triggered())
    assert (reply.status, list(reply.body["scores"])) == (200, ["strip"])


def test_a_latency_budget_is_the_operators_choice(profile: Path) -> None:
    handler = GuardHandler()
    (reply,) = ask(handler, started(handler, profile, {"latency_budget": 1e-9}), clean())
    assert (reply.status, reply.body["reason"]) == (503, "out-of-time")
    with pytest.raises(GuardError, match="latency_budget"):
        Options.read({"guard": {"latency_budget": 0}})
    assert Options.read({"guard": {"latency_budget": "5e-05"}}).latency_budget == 5e-5  # YAML 1.1 makes it text
    assert Options.read({"guard": {"memory_limit": "1e9"}}).memory_limit == 10**9
    with pytest.raises(GuardError, match="latency_budget"):
        Options.read({"guard": {"latency_budget": "soon"}})


def test_the_memory_of_a_forward_pass_is_the_operators_choice(profile: Path) -> None:
    contexts = (worker_context(profile, options) for options in (None, {"memory_limit": 3 * 8 * 8 * 4 * ACTIVATIONS_PER_INPUT}))
    usual, bounded = (load_service(context).guard.predictor.max_rows for context in contexts)
    assert (usual, bounded) == (DEFAULT_MEMORY_LIMIT // (8 * 8 * 4 * ACTIVATIONS_PER_INPUT), 3)
    with pytest.raises(GuardError, match="memory_limit"):
        Options.read({"guard": {"memory_limit": 0}})


def test_suspicious_images_are_kept(profile: Path, tmp_path: Path) -> None:
    handler = GuardHandler()
    context = started(handler, profile, {"quarantine": str(tmp_path / "kept"), "quarantine_max_items": 2})
    ask(handler, context, clean(), triggered(0), triggered(1), triggered(2))
    assert len(Quarantine(tmp_path / "kept").items()) == 2


def test_nan_is_never_sent(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = GuardHandler()
    context = started(handler, profile)
    monkeypatch.setattr(handler._gate._service, "guard", toy_guard(answers=nan_when_dark))
    replies = ask(handler, context, black(), clean())
    assert statuses(replies) == [503, 200]
    json.dumps([reply.body for reply in replies], allow_nan=False)


def test_a_service_that_raises_costs_503_not_the_worker(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(FORGERY)

    handler = GuardHandler()
    context = started(handler, profile)
    monkeypatch.setattr(handler._gate, "_service", broken)
    monkeypatch.setattr(context, "metrics", None)  # and counting fails as well
    assert statuses(ask(handler, context, clean(), clean())) == [503, 503]


def test_the_log_has_one_line_per_request_and_no_client_text(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = GuardHandler()
    context = started(handler, profile)
    forged = FORGERY.encode()
    log_to(sys.stdout)  # a second time changes nothing
    ask(handler, context, clean(), triggered(), forged, {FORGERY: clean()}, {FORGERY: forged, "b": forged})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in lines] == [200, 422, 400, 200, 400]
    assert "METRICS" not in json.dumps(lines)


def test_an_error_that_quotes_a_client_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    log_to(sys.stdout)
    try:
        raise ValueError(FORGERY + "\r\u2028\x1bé")
    except ValueError:
        logging.getLogger("guard.requests").exception("decoding failed")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isascii()
    assert line.startswith("decoding failed")


def test_the_metrics_are_lines_that_torchserve_adds_up(profile: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    handler = GuardHandler()
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        context = started(handler, profile, {"quarantine": str(tmp_path / "file" / "folder")})
        ask(handler, context, clean(), triggered(), b"junk")
    found = [re.match(r"\[METRICS\](\w+)\.\w+:([0-9\-,.e]+)\|#([^|]*)\|#type:(\w+)", line) for line in caplog.messages]
    totals: dict[tuple[str, ...], float] = {}
    for match in filter(None, found):
        name, value, labels, kind = match.groups()
        totals[(name, labels, kind)] = totals.get((name, labels, kind), 0.0) + float(value)
    for outcome, count in {"accepted": 1, "rejected": 1, "invalid": 1, "failed": 0, "suspicious": 0, "unjudged": 0}.items():
        assert totals[("guard_requests_total", f"outcome:{outcome},model:toy", "COUNTER")] == count
    assert totals[("guard_rejections_total", "detector:strip,model:toy", "COUNTER")] == 1
    assert totals[("guard_quarantine_failures_total", "model:toy", "COUNTER")] == 1
    assert totals[("guard_forward_passes_total", "model:toy", "COUNTER")] > 40
    assert ("guard_entropy_bits", "detector:strip,model:toy", "HISTOGRAM") in totals
    assert totals[("guard_seconds", "model:toy", "HISTOGRAM")] > 0


class Plain:
    """A user's handler, which remembers what it was given."""

    def initialize(self, context: Any) -> None:
        self.seen: list[list[bytes]] = []

    def handle(self, data: Any, context: Any) -> Any:
        self.seen.append([bytes(row["body"]) for row in data])
        for index in range(len(data)):
            context.set_response_status(201, "Created", index)
            context.set_response_header(index, "x-user", context.get_request_id(index))
        return [{"row": index} for index in range(len(data))]


class Decodes(Plain):
    """Stumbles over a row that is no image, and with it the whole batch."""

    def handle(self, data: Any, context: Any) -> Any:
        for row in data:
            Image.open(io.BytesIO(row["body"])).load()
        return super().handle(data, context)


def logged(capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str]]:
    """Status and outcome of each request's line."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"event": "request"')]
    return [(line["status"], line["outcome"]) for line in lines]


def inner(handler: GuardedHandler) -> Any:
    return handler._inner


def test_a_users_handler_gets_the_accepted_rows_only(profile: Path) -> None:
    handler = guarded(Plain)()
    context = started(handler, profile)
    replies = ask(handler, context, triggered(), clean(1), b"junk", clean(2))
    assert statuses(replies) == [422, 201, 400, 201]
    assert [reply.body.get("row") for reply in replies] == [None, 0, None, 1]
    assert inner(handler).seen == [[clean(1), clean(2)]]
    for row in (1, 3):
        assert context.get_response_headers(row)["x-user"] == replies[row].request_id
    assert statuses(ask(handler, context, triggered())) == [422]
    assert len(inner(handler).seen) == 1


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_what_is_no_image_never_reaches_a_users_handler(profile: Path, mode: str) -> None:
    handler = guarded(Decodes)()
    context = started(handler, profile, {"mode": mode, "max_pixels": 1000})
    replies = ask(handler, context, clean(1), b"junk", bomb(), {"body": {"a": 1}}, clean()[:50], clean(2))
    assert statuses(replies) == [201, 400, 413, 400, 400, 201]
    assert inner(handler).seen == [[clean(1), clean(2)]]


def test_what_breaks_our_decoder_never_reaches_a_users_handler(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumbles(body: bytes, *_: object) -> Tensor:
        if body == b"junk":
            raise RuntimeError
        return toy_images(8, seed=2)[0][1]

    monkeypatch.setattr(service, "decode_image", stumbles)
    handler = guarded(Plain)()
    assert statuses(ask(handler, started(handler, profile, {"mode": "monitor"}), clean(1), b"junk")) == [201, 503]
    assert inner(handler).seen == [[clean(1)]]


def test_monitor_mode_passes_on_every_image(
    profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = guarded(Plain)()
    context = started(handler, profile, {"mode": "monitor"})
    guard = toy_guard(Policy(mode="monitor"), answers=nan_when_dark)
    monkeypatch.setattr(handler._gate._service, "guard", guard)
    assert statuses(ask(handler, context, clean(1), triggered(), black())) == [201, 201, 201]
    assert inner(handler).seen == [[clean(1), triggered(), black()]]
    assert logged(capsys) == [(201, "accepted"), (201, "suspicious"), (201, "unjudged")]


def test_a_second_field_never_reaches_a_users_handler(profile: Path) -> None:
    handler = guarded(Plain)()
    context = started(handler, profile)
    assert (
        statuses(ask(handler, context, {"body": triggered(), "data": clean()}, {"data": clean(), "body": triggered()}))
        == [400] * 2
    )
    assert inner(handler).seen == []


def test_a_users_handler_that_raises_costs_503_for_accepted_rows(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Raises(Plain):
        def handle(self, data: Any, context: Any) -> Any:
            super().handle(data, context)
            raise RuntimeError(FORGERY)

    handler = guarded(Raises)()
    replies = ask(handler, started(handler, profile), clean(), triggered(), b"junk", clean())
    assert statuses(replies) == [503, 422, 400, 503]
    assert [reply.body["reason"] for reply in replies] == ["guard-failed", "backdoor-suspected", "not-an-image", "guard-failed"]
    assert not [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("[METRICS]guard_requests_total.count:9")
    ]


def test_a_row_that_a_users_handler_stumbles_over_costs_its_neighbours_nothing(profile: Path) -> None:
    """An image under a field that the handler does not look at."""
    handler = guarded(Decodes)()
    context = started(handler, profile)
    replies = ask(handler, context, clean(1), {"other": bytearray(clean(2))}, clean(3))
    assert statuses(replies) == [201, 503, 201]
    assert inner(handler).seen == [[clean(1)], [clean(3)]]
    assert [context.get_response_headers(row)["x-user"] for row in (0, 2)] == [replies[row].request_id for row in (0, 2)]


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_the_log_and_the_metrics_tell_what_clients_got(
    profile: Path, mode: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Chooses(Plain):
        def handle(self, data: Any, context: Any) -> Any:
            context.set_response_status(409, "Conflict", 0)
            return [{}, {"p": float("nan")}]

    class Raises(Plain):
        def handle(self, data: Any, context: Any) -> Any:
            raise RuntimeError

    for kind, expected in ((Chooses, (409, "accepted")), (Raises, (503, "failed"))):
        handler = guarded(kind)()
        with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
            replies = ask(handler, started(handler, profile, {"mode": mode}), clean(1), b"junk", clean(2))
        assert statuses(replies) == [expected[0], 400, 503]
        assert logged(capsys) == [expected, (400, "invalid"), (503, "failed")]
        counted = [line for line in caplog.messages if re.match(r"\[METRICS\]guard_requests_total\.\w+:1", line)]
        assert [f"outcome:{outcome}" in line for line, outcome in zip(counted, (expected[1], "invalid", "failed"), strict=True)]
        caplog.clear()


@pytest.mark.parametrize("result", [None, [], "text", [{}, {}, {}]])
def test_a_users_handler_must_return_one_result_per_row(profile: Path, result: object) -> None:
    class Returns(Plain):
        def handle(self, data: Any, context: Any) -> Any:
            return result

    handler = guarded(Returns)()
    assert statuses(ask(handler, started(handler, profile), clean(), clean(), triggered())) == [503, 503, 422]


@pytest.mark.parametrize("bad", [{"p": float("nan")}, [float("inf")], {"p": object()}])
def test_a_users_result_that_is_not_json_costs_only_its_own_row(profile: Path, bad: object) -> None:
    class Returns(Plain):
        def handle(self, data: Any, context: Any) -> Any:
            return [bad, None]

    handler = guarded(Returns)()
    replies = ask(handler, started(handler, profile), clean(), triggered(), clean())
    assert statuses(replies) == [503, 422, 200]
    assert replies[2].body is None


def test_a_users_handler_that_does_not_load_fails_closed(profile: Path) -> None:
    class Refuses(Plain):
        def initialize(self, context: Any) -> None:
            raise OSError("no weights")

    handler = guarded(Refuses)()
    assert statuses(ask(handler, started(handler, profile), clean(), triggered())) == [503, 503]


@dataclass
class Clock:
    """Seconds that pass only where they are slept or added."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_guard_that_did_not_load_is_loaded_anew(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hiccup of the network, say; in between it must not answer faster than the workers that can judge."""
    clock = Clock()
    monkeypatch.setattr("handlers.torchserve_gate.time", clock)
    attempts: list[float] = []

    class Recovers(Plain):
        def initialize(self, context: Any) -> None:
            attempts.append(clock.now)
            if len(attempts) < 4:
                raise ConnectionError("no weights")
            super().initialize(context)

    handler = guarded(Recovers)()
    context = started(handler, profile)
    while len(attempts) < 4:
        before = clock.now
        answered = statuses(ask(handler, context, clean(), triggered()))
        if len(attempts) < 4:
            assert answered == [503, 503]
            assert clock.now - before >= 0.1
    assert answered == [201, 422]
    assert [round(later - earlier) for earlier, later in itertools.pairwise(attempts)] == [1, 2, 4]
    before = clock.now
    assert statuses(ask(handler, context, clean())) == [201]
    assert (len(attempts), clock.now) == (4, before)


def test_a_guard_that_never_loads_is_tried_once_a_minute(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("handlers.torchserve_gate.time", clock)
    attempts: list[float] = []

    class Refuses(Plain):
        def initialize(self, context: Any) -> None:
            attempts.append(clock.now)
            raise OSError("no weights")

    handler = guarded(Refuses)()
    context = started(handler, profile)
    while clock.now < 600.0:
        assert statuses(ask(handler, context, clean())) == [503]
        clock.now += 5.0
    waits = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert max(waits) < 66.0
    assert min(waits[-5:]) >= 60.0


def test_a_preprocessing_profile_is_refused_behind_a_users_handler(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, arrays = load_profile(profile)
    assert saved.model.sha256 == file_sha256(profile / "model.pt2")
    save_profile(msgspec.structs.replace(saved, preprocessor=Gym()), arrays, tmp_path / "gym", profile / "model.pt2")
    handler = guarded(Plain)()
    context = started(handler, tmp_path / "gym")
    assert "without a preprocessor" in capsys.readouterr().out
    assert statuses(ask(handler, context, clean())) == [503]
    alone = GuardHandler()
    assert statuses(ask(alone, started(alone, tmp_path / "gym"), clean())) == [200]


def test_a_guarded_class_is_named_as_the_users() -> None:
    decorated = guarded(Plain)
    assert (decorated.__name__, decorated.__module__) == ("Plain", Plain.__module__)
