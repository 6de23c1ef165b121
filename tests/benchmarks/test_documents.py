"""The documents quote the committed results."""

from __future__ import annotations

import pytest

from benchmarks.documents import QUOTED, ROOT, Quoted, replaced
from guard.errors import InputError


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: f"{quoted.document}: {quoted.table()[:40]}")
def test_a_table_is_that_of_the_committed_results(quoted: Quoted) -> None:
    text = (ROOT / quoted.document).read_text(encoding="utf-8")
    assert replaced(text, quoted.table()) == text, "make them anew: python -m benchmarks.documents"


def test_a_table_takes_the_place_of_its_predecessor_and_nothing_else() -> None:
    text = "# Figures\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n\nWords.\n\n| a |\n| --- |\n"
    new = "| a | b |\n| --- | --- |\n| 5 | 6 |"
    assert replaced(text, new) == "# Figures\n\n| a | b |\n| --- | --- |\n| 5 | 6 |\n\nWords.\n\n| a |\n| --- |\n"
    with pytest.raises(InputError, match=r"expected one table with the header '\| c \|', got 0"):
        replaced(text, "| c |\n| --- |")
