"""Repair on its own: what is chosen, what is verified, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration import ImageSet
from calibration.checkpoints import Checkpoints
from calibration.data import digests
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection import block
from calibration.inspection.scan import Scan, ScanSettings
from calibration.inspection.search import Search
from calibration.inspection.triggers import Triggers
from calibration.repair import auto, verification
from calibration.repair.auto import choices, repair_automatically
from calibration.repair.cases import Part, Parts, clean_parts
from calibration.repair.figures import is_reliable
from calibration.repair.record import Method, RepairFigures, Verification
from calibration.repair.recovered import successes_on
from calibration.repair.repair import Repaired
from calibration.repair.settings import RepairSettings
from calibration.repair.verification import Candidate, pasted, red_team, verify
from cli.demonstration.digits import Digits
from guard import Predictor
from guard.errors import CalibrationError, CheckpointError, GuardError, InspectionError, ModelError, RepairError
from guard.predictors import wrap
from tests.calibration.repair.test_figures import GOOD
from tests.nets import SMALL

QUICK = Search(steps=208, draws=0)


@pytest.fixture(scope="module")
def original(digits: Digits, small_trigger: nn.Module) -> Predictor:
    return discover(wrap(small_trigger), digits.clean)


@pytest.fixture(scope="module")
def cut(digits: Digits, original: Predictor) -> Parts:
    return clean_parts(digits.clean, original, 0)


@pytest.fixture(scope="module")
def recovered() -> Triggers:
    """The true trigger, as a scan would give it."""
    grey = torch.full((1, 1, 8, 8), 0.5)
    mask = (SMALL.trigger(grey) != grey)[0].float()
    return Triggers(
        torch.tensor([3]), torch.tensor([-1]), mask, SMALL.trigger(grey), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    )


def attack_success(predictor: Predictor, digits: Digits) -> float:
    others = digits.test.select(torch.nonzero(digits.test.known_labels != 3).squeeze(1))
    return float((predictor(SMALL.trigger(others.images(slice(None)))).argmax(dim=1) == 3).double().mean())


@pytest.mark.parametrize(
    ("infected", "quarantined", "methods"),
    [
        (["3"], False, ["unlearn", "gdm", "prune", "gym"]),
        (["3"], True, ["unlearn", "gdm", "prune", "codefend", "gym"]),
        ([], True, ["codefend", "gym"]),
        ([], False, ["gym"]),
    ],
)
def test_the_order(infected: list[str], quarantined: bool, methods: list[str]) -> None:
    found = choices(infected, quarantined)
    assert [item.method for item in found] == methods
    assert ("label 3 infected" in found[0].why) == bool(infected)
    assert ("no label infected" in found[0].why) == (not infected)


SHORT = RepairSettings(method="gym", rounds=1, epochs=4, search=QUICK)


@pytest.mark.usefixtures("known_reference")
def test_a_backdoor_is_found_removed_and_verified(digits: Digits, original: Predictor) -> None:
    made = repair_automatically(original, digits.clean, SHORT)
    assert made.settings.method == "unlearn"
    assert attack_success(original, digits) >= 0.95
    assert attack_success(made.predictor, digits) <= 0.1
    assert "a scan finds label 3 infected" in made.figures.said[0]
    found = made.figures.verification
    assert found is not None
    assert found.rescan_infected == ()
    assert found.recovered_success is not None
    assert found.recovered_success[0] <= 0.1
    assert found.planted
    assert found.planted_success_before is not None
    assert found.planted_success_before >= 0.8
    assert found.planted_success_after is not None
    warned = f"A {found.planted} that was planted in a copy" in made.figures.said[-2]
    assert warned == (found.planted_success_after > 0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("known_reference")
def test_what_was_searched_is_not_searched_again(
    digits: Digits, original: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = repair_automatically(original, digits.clean, SHORT, checkpoints=Checkpoints(tmp_path / "c", "auto"))

    def searched(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(block.Block, "_window", searched)
    again = repair_automatically(original, digits.clean, SHORT, checkpoints=Checkpoints(tmp_path / "c", "auto"))
    assert again.figures.verification == made.figures.verification


@pytest.mark.slow
def test_what_did_not_do_is_said_and_the_next_is_tried(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def passes(candidate: Candidate, *_: object) -> Verification:
        asked.append("gym" if candidate.preprocessor is not None else "bare")
        return Verification(rescan_infected=(3,) if len(asked) == 1 else (), recovered_success=(0.0, 0.0, 0.0))

    monkeypatch.setattr(auto, "verify", passes)
    monkeypatch.setattr(auto, "_with_red_team", lambda found, *_: (found, []))
    settings = RepairSettings(method="gym", rounds=1, epochs=4, search=QUICK, max_accuracy_drop=100.0)
    made = repair_automatically(original, digits.clean, settings, triggers=recovered)
    assert made.settings.method == "gdm"
    assert "Before, unlearn did not do: a scan of the copy finds infected 3." in made.figures.said

    def never(*_: object) -> Verification:
        return Verification(rescan_infected=None, recovered_success=(0.5, 0.6, 0.7))

    monkeypatch.setattr(auto, "verify", never)
    with pytest.raises(
        RepairError,
        match="no method that was tried repairs this model: unlearn did not do: a recovered trigger still works on 50%",
    ):
        repair_automatically(original, digits.clean, settings, triggers=recovered)


@pytest.mark.usefixtures("known_reference")
def test_verification_sees_what_is_left(original: Predictor, cut: Parts, recovered: Triggers) -> None:
    found = verify(Candidate(original, None), recovered, cut, ScanSettings(search=QUICK), Engine(), lambda *_: None)
    assert found.rescan_infected == (3,)
    assert found.recovered_success is not None
    assert found.recovered_success[0] >= 0.95
    assert len(found.recovered_success) == 3


def _first(part: Part) -> Part:
    return Part(part.images[:20], part.labels[:20], part.answers[:20])


def test_the_rescan_sees_what_the_repair_did_not_learn_from(
    original: Predictor, cut: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_decided(_: Predictor, clean: ImageSet, *__: object, **___: object) -> Scan:
        seen.append(clean)
        raise InspectionError("nothing can be said")

    seen: list[ImageSet] = []
    monkeypatch.setattr(verification, "scan", nothing_decided)
    few = replace(cut, held_out=_first(cut.held_out), stopping=_first(cut.stopping))
    for parts in (cut, few):
        with pytest.raises(InspectionError):
            verify(Candidate(original, None), None, parts, ScanSettings(), Engine(), lambda *_: None)
    learnt = frozenset(digests(cut.tuning.images))
    assert len(seen[0]) == len(cut.held_out) + len(cut.stopping)
    assert not learnt & set(digests(seen[0].pixels))
    assert len(seen[1]) == 40 + len(cut.tuning)


def test_a_repair_whose_rescan_decides_nothing_did_not_do(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(*_: object) -> Verification:
        raise InspectionError("nothing can be said of the model")

    def unchanged(predictor: Predictor, clean: ImageSet, settings: RepairSettings, *_: object, **__: object) -> Repaired:
        return Repaired(predictor, None, GOOD, settings)

    monkeypatch.setattr(auto, "verify", undecided)
    monkeypatch.setattr(auto, "repair", unchanged)
    with pytest.raises(
        RepairError, match=r"unlearn can't be verified: nothing can be said of the model; gdm can't be verified"
    ):
        repair_automatically(original, digits.clean, RepairSettings(method="gym"), triggers=recovered)


def test_the_red_team_plants_and_measures(original: Predictor, cut: Parts) -> None:
    def nothing(planted: Predictor, caught: Tensor, labels: Tensor) -> Candidate:
        assert len(caught) == len(labels) > 0
        return Candidate(planted, None)

    name, before, after = red_team(original, cut, nothing, 0, lambda *_: None)
    assert name in ("white square", "checkerboard", "white bar")
    assert before >= 0.8
    assert after == before

    def away(planted: Predictor, *_: Tensor) -> Candidate:
        return Candidate(original, None)

    assert red_team(original, cut, away, 0, lambda *_: None)[2] <= 0.5


def test_copies_of_a_trigger_by_hand() -> None:
    masks, patterns = torch.zeros(1, 4, 4), torch.zeros(1, 2, 4, 4)
    masks[0, 0, 0], patterns[0, :, 0, 0] = 0.5, torch.tensor([1.0, 0.25])
    one = Triggers(torch.tensor([3]), torch.tensor([-1]), masks, patterns, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    four = pasted(one, 2)
    assert torch.nonzero(four.masks[0]).tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert four.masks.sum() == 2.0
    assert four.patterns[0][:, four.masks[0] > 0].tolist() == [[1.0] * 4, [0.25] * 4]
    once = pasted(one, 1)
    assert torch.equal(once.masks, masks)
    assert torch.equal(once.patterns, patterns)


def test_a_pairs_trigger_counts_images_of_its_source_alone() -> None:
    ones = Triggers(
        torch.tensor([3]),
        torch.tensor([5]),
        torch.ones(1, 1, 1),
        torch.ones(1, 1, 1, 1),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int64),
    )
    own = torch.tensor([5, 5, 1, 1, 3])

    def says(images: Tensor) -> Tensor:
        assert len(images) == 2
        return nn.functional.one_hot(torch.tensor([3, 0]), 4)

    assert successes_on(says, ones, torch.zeros(5, 1, 1, 1), own) == (0.5,)


def test_without_images_there_is_dhbe_alone(original: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    suspects = torch.rand(3, *original.spec.shape)

    def stop(_predictor: Predictor, clean: ImageSet | None, settings: RepairSettings, quarantined: Tensor, **_: object) -> None:
        assert clean is None
        assert quarantined is suspects
        asked.append(settings.method)
        raise RepairError("enough")

    monkeypatch.setattr(auto, "repair", stop)
    with pytest.raises(RepairError, match="enough"):
        repair_automatically(original, None, RepairSettings(method="gym"), suspects)
    assert asked == ["dhbe"]


def test_a_repair_that_forgets_a_label_did_not_do(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def came_to(method: Method) -> RepairFigures:
        return msgspec.structs.replace(GOOD, forgotten_labels=(3,) if method in ("unlearn", "gdm") else ())

    all_is_well_with(monkeypatch, came_to)
    found = repair_automatically(original, digits.clean, RepairSettings(method="gym"), triggers=recovered)
    assert found.settings.method == "prune"
    assert any(line.startswith("Before, unlearn did not do: The copy hardly gives label 3") for line in found.figures.said)


def all_is_well_with(monkeypatch: pytest.MonkeyPatch, came_to: Callable[[Method], RepairFigures]) -> None:
    """Repairs come to this at once, and verification finds nothing."""

    def made(predictor: Predictor, clean: ImageSet, settings: RepairSettings, *_: object, **__: object) -> Repaired:
        return Repaired(predictor, None, came_to(settings.method), settings)

    monkeypatch.setattr(auto, "repair", made)
    monkeypatch.setattr(auto, "verify", lambda *_: Verification(rescan_infected=(), recovered_success=(0.0, 0.0, 0.0)))
    monkeypatch.setattr(auto, "_with_red_team", lambda found, *_: (found, []))


@pytest.mark.parametrize("good", ["codefend", "none"])
def test_one_that_its_own_figures_speak_against_is_given_out_only_for_want_of_a_better_one(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch, good: str
) -> None:
    """It was taken, and no other tried, though the quarantined images kept their answers."""

    def came_to(method: Method) -> RepairFigures:
        return GOOD if method == good else msgspec.structs.replace(GOOD, attack_success_seen_after=1.0)

    all_is_well_with(monkeypatch, came_to)
    caught = torch.rand(60, *original.spec.shape)
    found = repair_automatically(original, digits.clean, RepairSettings(method="gym"), caught, triggers=recovered)
    said = " ".join(found.figures.said)
    if good == "codefend":
        assert found.settings.method == good
        assert is_reliable(found.figures)
        assert "Before, unlearn did not do: Too many of the held-out quarantined images keep their old answer" in said
        assert "Held-out images chose among methods" in said
        assert "Don't rely" not in said
    else:
        assert found.settings.method == "unlearn"
        assert not is_reliable(found.figures)
        assert said.startswith("Chosen automatically, for want of a better one. Of those tried, unlearn did not do")
        assert found.figures.verification is None


@pytest.mark.parametrize("failure", [InspectionError, ModelError, CalibrationError])
def test_a_method_that_fails_keeps_no_other_from_its_turn(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch, failure: type[GuardError]
) -> None:
    def came_to(method: Method) -> RepairFigures:
        if method in ("unlearn", "prune"):
            raise failure("nothing can be said")
        return msgspec.structs.replace(GOOD, clean_accuracy_after=0.5 if method == "gdm" else 0.97)

    all_is_well_with(monkeypatch, came_to)
    found = repair_automatically(original, digits.clean, RepairSettings(method="gym"), triggers=recovered)
    assert found.settings.method == "gym"
    assert "Before, prune gave up: nothing can be said." in found.figures.said


def test_a_full_disk_is_no_fault_of_a_method(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one was chosen, and the work of the first could not be gone on with."""

    def came_to(_: Method) -> RepairFigures:
        raise CheckpointError("expected room for checkpoints")

    all_is_well_with(monkeypatch, came_to)
    with pytest.raises(CheckpointError, match="room for checkpoints"):
        repair_automatically(original, digits.clean, RepairSettings(method="gym"), triggers=recovered)


def test_where_a_scan_can_not_tell_the_methods_that_need_none_have_their_turn(
    digits: Digits, original: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(*_: object) -> None:
        raise InspectionError("a label stands out, but whether that is natural can't be told")

    all_is_well_with(monkeypatch, lambda _: GOOD)
    monkeypatch.setattr(auto, "infected_by_scan", undecided)
    found = repair_automatically(original, digits.clean, RepairSettings(method="gym"))
    assert found.settings.method == "gym"
    assert found.figures.said[0] == (
        "Chosen automatically: gym needs to know no trigger: the copy is tuned for a preprocessor that breaks most of them."
    )
    assert found.figures.said[1].startswith("Before, a scan can't tell: a label stands out")


def test_too_few_images_to_scan_are_told_with_the_number_that_will_do(digits: Digits, original: Predictor) -> None:
    few = digits.clean.select(torch.arange(60))
    with pytest.raises(RepairError, match=r"at least 7\d different clean images for auto, .* got 60: add images, or name"):
        repair_automatically(original, few, RepairSettings(method="gym", allow_missing_classes=True))


def test_a_trigger_that_no_held_out_image_can_tell_of_is_asked_of_the_others(
    original: Predictor, cut: Parts, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as gone."""
    nothing = SimpleNamespace(figures=SimpleNamespace(labels=()))
    monkeypatch.setattr(verification, "scan", lambda *_, **__: nothing)
    pair = replace(recovered, sources=torch.tensor([5]))
    rows = cut.held_out.answers.argmax(dim=1) != 5
    held_out = Part(*(getattr(cut.held_out, name)[rows] for name in ("images", "labels", "answers")))
    asked = Candidate(original, None)
    through = partial(verify, settings=ScanSettings(), engine=Engine(), progress=lambda *_: None)
    found = through(asked, pair, replace(cut, held_out=held_out)).recovered_success
    assert found is not None
    assert found[0] >= 0.5
    missing = replace(recovered, labels=torch.tensor([3]), sources=torch.tensor([10]))
    assert through(asked, missing, cut).recovered_success is None
    assert "no image can tell" in auto._wrong(through(asked, missing, cut), True, ())


@pytest.mark.parametrize(("before", "says"), [(0.1, "could not plant a trigger: a white square worked on 10%"), (0.9, "")])
def test_a_red_team_whose_trigger_never_worked_says_nothing_for_a_repair(
    original: Predictor, digits: Digits, cut: Parts, monkeypatch: pytest.MonkeyPatch, before: float, says: str
) -> None:
    monkeypatch.setattr(auto, "red_team", lambda *_: ("white square", before, 0.05))
    nothing = Verification(rescan_infected=(), recovered_success=None)
    settings = RepairSettings(method="gym")
    found, said = auto._with_red_team(nothing, original, digits.clean, cut, settings, Engine(), None, lambda *_: None)
    assert (found.planted_success_after is None) == bool(says)
    assert says in " ".join(said)
    assert bool(said) == bool(says)


@pytest.mark.parametrize("lost", [{"clean_accuracy_after": 0.5}, {"forgotten_labels": (3,)}])
def test_a_copy_that_answers_nothing_rightly_any_more_is_no_success_of_the_repair(
    original: Predictor, digits: Digits, cut: Parts, monkeypatch: pytest.MonkeyPatch, lost: dict[str, Any]
) -> None:
    def made(predictor: Predictor, clean: ImageSet, settings: RepairSettings, *_: object, **__: object) -> Repaired:
        return Repaired(replace(predictor), None, msgspec.structs.replace(GOOD, **lost), settings)

    def team(planted: Predictor, _: Parts, again: verification.Repair, *__: object) -> tuple[str, float, float]:
        none = torch.empty(0)
        return "white square", 1.0, float(again(planted, none, none).predictor is planted)

    monkeypatch.setattr(auto, "repair", made)
    monkeypatch.setattr(auto, "red_team", team)
    nothing, settings = Verification(rescan_infected=(), recovered_success=None), RepairSettings(method="gym")
    found, said = auto._with_red_team(nothing, original, digits.clean, cut, settings, Engine(), None, lambda *_: None)
    assert found.planted_success_after is None
    assert "the same repair of a copy with a planted trigger did not do: " in said[0]
