"""How long a long step will take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cli.time_left import duration, telling_time


def told(seconds: list[float], reports: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    passed: list[tuple[str, int, int]] = []
    clock: Iterator[float] = iter(seconds)
    report = telling_time(lambda *what: passed.append(what), "erasing", "do less", lambda: next(clock))
    for item in reports:
        report(*item)
    assert passed == reports
    return capsys.readouterr().err.splitlines()


def test_the_first_step_tells_once_what_the_others_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [("reading", 1, 9), ("erasing", 0, 300), ("reading", 2, 9), ("erasing", 1, 300), ("erasing", 2, 300)]
    assert told([5.0, 173.0, 999.0], reports, capsys) == ["erasing will take about 14 hours more, by its first step: do less"]


def test_after_an_interruption_only_what_is_left_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert told([0.0, 60.0], [("erasing", 290, 300), ("erasing", 291, 300)], capsys) == [
        "erasing will take about 9 minutes more, by its first step: do less"
    ]


def test_what_is_soon_over_is_not_worth_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert told([0.0, 1.0], [("erasing", 0, 50), ("erasing", 1, 50)], capsys) == []
    assert told([0.0], [("erasing", 300, 300)], capsys) == []


def test_durations() -> None:
    assert [duration(value) for value in (20.0, 61.0, 5000.0, 5401.0, 86400.0)] == [
        "about 1 minute",
        "about 1 minute",
        "about 83 minutes",
        "about 2 hours",
        "about 24 hours",
    ]
