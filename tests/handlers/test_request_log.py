from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from handlers.request_log import configure_logging
from tests.handlers.toy_service import clean, toy_service


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(), logging.getLogger("guard.requests")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


def test_requests_are_json_lines_and_others_are_as_usual(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    toy_service()([clean(), b'x"\n[METRICS]'])
    logging.getLogger("guard").warning("something else")
    output = capsys.readouterr()
    assert output.out == ""
    *requests, other = output.err.splitlines()
    assert [json.loads(line)["outcome"] for line in requests] == ["accepted", "invalid"]
    assert other.endswith("WARNING guard: something else")


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging(logging.ERROR)
    toy_service()([clean()])
    logging.getLogger("guard").warning("quiet")
    assert len(capsys.readouterr().err.splitlines()) == 1
