"""What is said with a repair's figures."""

from __future__ import annotations

import msgspec
import pytest

from calibration.repair.figures import figure_rows, is_reliable, preprocessor_words, remarks
from calibration.repair.record import RepairFigures
from guard.preprocessors import Flip, Gym

GOOD = RepairFigures(
    clean_accuracy_before=0.98,
    clean_accuracy_after=0.97,
    agreement=0.97,
    attack_success_seen_before=1.0,
    attack_success_seen_after=0.02,
    generated_triggers_work=0.99,
    rounds=1,
    clean_images=500,
    quarantined_images=400,
    held_out_clean=100,
    held_out_quarantined=80,
    seconds=3.0,
)


def said(**changes: float | None) -> str:
    return " ".join(remarks(msgspec.structs.replace(GOOD, **changes), None))


def test_a_good_repair_is_relied_on() -> None:
    assert is_reliable(GOOD)
    assert "Don't rely" not in said()
    assert "False alarms among the quarantined images keep their old answer, and should." in said()
    assert "False alarms" not in said(attack_success_seen_after=0.0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"generated_triggers_work": 0.1}, "hardly works on the original"), ({"attack_success_seen_after": 0.8}, "Too many")],
)
def test_one_that_left_the_attack_is_not(changes: dict[str, float], why: str) -> None:
    assert not is_reliable(msgspec.structs.replace(GOOD, **changes))
    assert why in said(**changes)
    assert "Don't rely on this repair" in said(**changes)
    assert "and should" not in said(attack_success_seen_after=0.8)


def test_one_by_drawings_that_say_little_is_not() -> None:
    free = msgspec.structs.replace(
        GOOD, attack_success_seen_after=None, generated_triggers_work=None, rounds=0, held_out_clean=0, generated_foremost=0.39
    )
    assert is_reliable(free)
    assert ("generated samples with the original's foremost label", "39.00%") in figure_rows(free)
    assert not is_reliable(msgspec.structs.replace(free, generated_foremost=0.4))


def test_what_was_not_measured_is_no_reason_to_doubt() -> None:
    assert is_reliable(msgspec.structs.replace(GOOD, attack_success_seen_after=None, generated_triggers_work=None, rounds=0))


def test_accuracies_are_left_out_where_there_are_none() -> None:
    names = [row[0] for row in figure_rows(msgspec.structs.replace(GOOD, clean_accuracy_before=None))]
    assert "agreement with the original" in names
    assert "clean accuracy after" not in names


def test_preprocessors_in_words() -> None:
    assert preprocessor_words(None) == "none"
    assert preprocessor_words(Flip()) == "flip"
    assert preprocessor_words(Gym(kernel=1, views=4)) == "gym, no median, 4 views"
    assert preprocessor_words(Gym()) == "gym, medians 5x5"
