"""Signals that end a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from handlers.stopping import stopped_by_sigterm


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A runner of tests may be started with nohup, too."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_in_order(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        signal.raise_signal(number)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_second_hangup_does_not_interrupt_the_end() -> None:
    """A closed terminal sends several."""
    removed: list[bool] = []

    def hung_up() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            removed.append(True)

    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        hung_up()
    assert removed


def test_a_hangup_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopped_by_sigterm():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
