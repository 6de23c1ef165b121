"""What commands show."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from cli.display import progress_bars, show_rows


class Terminal(io.StringIO):
    """A narrow one."""

    def isatty(self) -> bool:
        return True


def test_no_figure_is_cut_up_where_the_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", shown := Terminal())
    figures = ("88.7% 80.0-93.6", "100.0% 96.4-100.0", "7.0% 2.9-13.9", "90.0% 82.4-95.1")
    show_rows("title", [("demeaned 1.5, N = 25", *figures)], ("setting", "white square", "checkerboard", "bar", "faint blend"))
    for text in " ".join(figures).split():
        assert text in shown.getvalue()
    assert "checkerboard" in shown.getvalue()


def test_names_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", shown := Terminal())
    show_rows("Scan [/out]", [("[red]stop[/]", "[/b] 3")], ("label", "[bold]L1"))
    for text in ("Scan [/out]", "[red]stop[/]", "[/b] 3", "[bold]L1"):
        assert text in shown.getvalue()


def test_long_work_shows_progress_where_nobody_has_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 29.9, 30.0, 31.0, 59.0, 60.5, 61.0])
    monkeypatch.setattr("cli.display.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bars() as progress:
        for done in range(1, 9):
            progress("scanning", done, 8)
    assert capsys.readouterr().err.splitlines() == [f"scanning {done}/8" for done in (1, 4, 7, 8)]


def test_a_remark_is_no_step_and_no_line_comes_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        progress("going on from there", 1, 1)
        progress("looking", 0, 1)
        for what, total in (("looking", 1), ("looking", 1), ("again", 2), ("again", 2)):
            progress(what, total, total)
    assert capsys.readouterr().err.splitlines() == ["going on from there", "looking 0/1", "looking 1/1", "again 2/2"]
