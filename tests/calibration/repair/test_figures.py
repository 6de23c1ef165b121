"""What is said with a repair's figures."""

from __future__ import annotations

import msgspec
import pytest
import torch

from calibration.repair.figures import figure_rows, is_reliable, next_steps, preprocessor_words, remarks
from calibration.repair.measuring import forgotten
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


def test_one_that_forgot_a_label_is_not() -> None:
    lost = msgspec.structs.replace(GOOD, forgotten_labels=(3, 7))
    assert not is_reliable(lost)
    assert ("labels that the copy hardly gives any more", "3, 7") in figure_rows(lost)
    assert "The copy hardly gives label 3, 7 any more" in " ".join(remarks(lost, None))


def test_one_by_drawings_that_say_little_is_not() -> None:
    free = msgspec.structs.replace(
        GOOD, attack_success_seen_after=None, generated_triggers_work=None, rounds=0, held_out_clean=0, generated_foremost=0.39
    )
    assert is_reliable(free)
    assert ("generated samples with the original's foremost label", "39.00%") in figure_rows(free)
    assert not is_reliable(msgspec.structs.replace(free, generated_foremost=0.4))


def test_what_was_not_measured_is_no_reason_to_doubt() -> None:
    assert is_reliable(msgspec.structs.replace(GOOD, attack_success_seen_after=None, generated_triggers_work=None, rounds=0))


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, "guard calibrate DIR --tripwire ORIGINAL"),
        ({"attack_success_seen_after": 0.8}, "keep the original behind its guard"),
        (
            {"attack_success_seen_after": None, "generated_triggers_work": None, "rounds": 0, "held_out_clean": 0},
            "guard scan DIR",
        ),
    ],
)
def test_what_comes_next_hangs_on_them(changes: dict[str, float | None], step: str) -> None:
    steps = " ".join(next_steps(msgspec.structs.replace(GOOD, **changes)))
    assert step in steps
    assert ("--tripwire" in steps) == (not changes)


def test_accuracies_are_left_out_where_there_are_none() -> None:
    names = [row[0] for row in figure_rows(msgspec.structs.replace(GOOD, clean_accuracy_before=None))]
    assert "agreement with the original" in names
    assert "clean accuracy after" not in names


def test_what_few_images_leave_open_is_shown_where_it_is_known() -> None:
    assert ("clean accuracy after", "97.00%") in figure_rows(GOOD)
    known = msgspec.structs.replace(GOOD, clean_accuracy_interval=(0.9148, 0.9938))
    assert ("clean accuracy after", "97.00% (91.5 to 99.4)") in figure_rows(known)


def test_preprocessors_in_words() -> None:
    assert preprocessor_words(None) == "none"
    assert preprocessor_words(Flip()) == "flip"
    assert preprocessor_words(Gym(kernel=1, views=4)) == "gym, no median, 4 views"
    assert preprocessor_words(Gym()) == "gym, medians 5x5"


@pytest.mark.parametrize(
    ("wrong", "lost"),
    [
        ({3: 8}, (3,)),  # all of a label
        ({3: 5}, (3,)),
        ({3: 3}, ()),  # more than half are left
        (dict.fromkeys(range(10), 5), ()),  # a copy that is bad at everything has forgotten nothing
        ({}, ()),
    ],
)
def test_a_label_is_forgotten_where_the_copy_hardly_gives_it(wrong: dict[int, int], lost: tuple[int, ...]) -> None:
    labels = torch.arange(10).repeat_interleave(8)
    after = labels.clone()
    for label, count in wrong.items():
        after[8 * label : 8 * label + count] = (label + 1) % 10
    assert forgotten(labels, labels, [after, after]) == lost
    before = torch.where(labels == 3, 5, labels)  # the original does not give it either
    assert 3 not in forgotten(labels, before, [after])


def test_two_images_tell_nothing_of_a_label() -> None:
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 2)
    after = torch.where((labels == 2) | (torch.arange(82) % 7 == 0), 0, labels)
    assert forgotten(labels, labels, [after]) == ()
