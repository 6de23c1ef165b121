"""A scan tells a backdoored model from its clean twin, and what is found is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration import ImageSet
from calibration.checkpoints import Checkpoints
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection import judge, mask_verdicts, rounds, work
from calibration.inspection.figures import remarks, verdict
from calibration.inspection.judge import Judge
from calibration.inspection.mask_verdicts import Look
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.record import LabelFinding, read_scan
from calibration.inspection.report import scan_report
from calibration.inspection.scan import Scan, ScanSettings, scan
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers
from calibration.inspection.work import scan_into
from cli.demonstration.digits import Digits
from guard import Predictor
from guard.errors import InspectionError
from guard.predictors import wrap
from tests.calibration.inspection.conftest import QUICK, SHORT
from tests.nets import SMALL

TARGET = SMALL.target_label


@pytest.fixture(scope="module")
def before(small_trigger: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in small_trigger.state_dict().items()}


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(digits: Digits, suspect: Predictor, before: dict[str, Tensor], told: list[str], reference: nn.Module) -> Scan:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judge, "train_reference", lambda *_: reference)
        return scan(suspect, digits.clean, QUICK, progress=lambda what, *_: told.append(what))


def test_the_backdoored_label_alone_is_infected(found: Scan) -> None:
    assert [item.label_index for item in found.figures.labels if item.infected] == [TARGET]
    assert found.figures.infected
    opinion = found.figures.labels[TARGET].second_opinion
    assert opinion is not None
    assert opinion.success >= 0.95
    assert opinion.reference_ratio is not None
    assert opinion.size_ratio < min(0.36, 0.6 * opinion.reference_ratio)
    assert str(TARGET) in verdict(found.figures)


@pytest.mark.usefixtures("found")
def test_why_it_takes_longer_is_told_before_it_does(told: list[str]) -> None:
    announced = told.index("a label stands out: a clean model of the task is searched, too")
    assert told.index("looking for triggers") < announced < told.index("looking for triggers in the reference")


def test_the_clean_twin_is_clean(digits: Digits, clean_twin: nn.Module) -> None:
    clean = scan(discover(wrap(clean_twin), digits.clean), digits.clean, QUICK)
    assert not clean.figures.infected
    assert sum(item.candidate for item in clean.figures.labels) >= 3  # each got its second opinion
    assert "no proof" in " ".join(remarks(clean.figures))


def test_the_model_does_not_change(small_trigger: nn.Module, before: dict[str, Tensor], found: Scan) -> None:
    assert all(value.requires_grad for value in small_trigger.parameters())
    assert not small_trigger.training
    for name, value in small_trigger.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_seed_says_it_all(digits: Digits, suspect: Predictor) -> None:
    one, same, other = (scan(suspect, digits.clean, msgspec.structs.replace(SHORT, seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(one.triggers.masks, same.triggers.masks)
    assert one.figures.labels == same.figures.labels
    assert not torch.equal(one.triggers.masks, other.triggers.masks)


def test_its_page_has_the_triggers_and_the_sizes(found: Scan) -> None:
    assert scan_report(found).count(b"data:image/png") == 2


def test_the_folder(tmp_path: Path, digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "scan_rounds", lambda *_, **__: found)
    record = scan_into(tmp_path / "scan", suspect, digits.clean, QUICK, Engine(), model="model.pt2")
    assert read_scan(tmp_path / "scan") == record
    assert record.labels == found.figures.labels
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "report.html",
        "scan.json",
        "triggers.safetensors",
    ]
    plain = msgspec.json.decode((tmp_path / "scan" / "scan.json").read_bytes())
    assert plain["infected"] is True
    assert {"label_index", "anomaly_index", "mask_l1", "infected"} <= plain["labels"][0].keys()
    page = (tmp_path / "scan" / "report.html").read_bytes()
    assert b"The model is backdoored: label 3" in page
    assert b"model.pt2" in page
    (tmp_path / "scan" / "notes.txt").write_text("mine")
    with pytest.raises(InspectionError, match=r"holds something else \(notes.txt\)"):
        scan_into(tmp_path / "scan", suspect, digits.clean, QUICK, Engine())


def test_a_pair_infects_no_label_of_its_own(
    tmp_path: Path, digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair of label 3 is not asked for by what leads from one class alone to it."""
    labels = tuple(msgspec.structs.replace(item, infected=False) for item in found.figures.labels)
    pairs = tuple(
        msgspec.structs.replace(item, source_index=(item.label_index + 1) % 10, infected=item.label_index == 3)
        for item in labels
    )
    figures = msgspec.structs.replace(found.figures, labels=labels, pairs=pairs)
    monkeypatch.setattr(
        work,
        "scan_rounds",
        lambda *_, **__: replace(found, figures=figures, pair_triggers=found.triggers.select(list(range(10)))),
    )
    record = scan_into(tmp_path / "scan", suspect, digits.clean, QUICK, Engine())
    assert record.infected
    assert [item.label_index for item in record.pairs if item.infected] == [3]
    assert record.infected_labels == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "make one with guard scan"), (b'{"schema": 2}', "of schema 1, got 2"), (b'{"schema": 1}', "is damaged")],
)
def test_folders_that_are_none(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "scan.json").write_bytes(content)
    with pytest.raises(InspectionError, match=problem):
        read_scan(tmp_path)


@pytest.mark.usefixtures("known_reference")
@pytest.mark.parametrize(("ratio", "suspected"), [(0.3, False), (0.2, True)])
def test_pairs_must_be_smaller_still_than_labels(
    digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch, ratio: float, suspected: bool
) -> None:
    one = found.triggers.select([TARGET])
    large = torch.full_like(one.masks, float(one.sizes[0]) / ratio / one.masks[0].numel())
    four = replace(Triggers.together([one, *[replace(one, masks=large)] * 3]), sources=torch.tensor([0, 1, 2, 4]))
    search = recover_triggers

    def known(answers: nn.Module, images: Tensor, goals: Goals, how: Search, *rest: Any, **named: Any) -> Triggers:
        if len(goals) == 90:
            return four
        if int(goals.sources.max()) < 0:  # of the labels: as they were found, and in the reference in no time
            return found.triggers if len(goals) == 10 else search(answers, images, goals, Search(steps=16, draws=0), *rest)
        return search(answers, images, goals, how, *rest, **named)

    monkeypatch.setattr(mask_verdicts, "recover_triggers", known)
    pairs = scan(suspect, digits.clean, ScanSettings(pairs=True, search=Search(steps=96))).figures.pairs
    assert [(item.source_index, item.label_index) for item in pairs] == [(source, TARGET) for source in (0, 1, 2, 4)]
    opinion = pairs[0].second_opinion
    assert opinion is not None
    assert opinion.size_ratio == pytest.approx(ratio, rel=0.01)
    assert opinion.success >= 0.9
    assert (opinion.reference_ratio is not None) is suspected
    assert not any(item.infected for item in pairs[1:])


def pair_search(found: Scan) -> Callable[..., Triggers]:
    """One pair to the target has its trigger, others large masks; labels are as they were found."""
    search, one = recover_triggers, found.triggers.select([TARGET])

    def known(answers: nn.Module, images: Tensor, goals: Goals, how: Search, *rest: Any, **named: Any) -> Triggers:
        if len(goals) == 10:
            return found.triggers
        if len(goals) < 10:
            return search(answers, images, goals, Search(steps=16, draws=0), *rest)
        pairs = one.select([0] * len(goals))
        small = torch.arange(len(goals)) == int(torch.nonzero(goals.labels == TARGET)[0])
        masks = torch.where(small.view(-1, 1, 1), pairs.masks, torch.full_like(pairs.masks, 0.9))
        return replace(pairs, labels=goals.labels, sources=goals.sources, masks=masks)

    return known


@pytest.mark.usefixtures("known_reference")
def test_pairs_from_a_label_that_no_image_has_are_left_out(
    digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_verdicts, "recover_triggers", pair_search(found))
    known = digits.clean.select(torch.nonzero(suspect(digits.clean.images(slice(None))).argmax(dim=1) != 3).flatten())
    figures = scan(suspect, known, ScanSettings(pairs=True)).figures
    assert len(figures.pairs) == 81
    assert 3 not in {item.source_index for item in figures.pairs}
    assert any(line.startswith("No pairs from 3 were looked at") for line in figures.said)


@pytest.mark.usefixtures("known_reference")
def test_a_reference_that_gives_no_image_a_source_loses_no_verdict_on_labels(
    digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def there(own: Tensor, sources: Tensor) -> Tensor:
        asked.extend([sources] if int(sources.max()) >= 0 else [])
        return (sources < 0) | (len(asked) == 1)  # by the model itself there were some

    monkeypatch.setattr(mask_verdicts, "recover_triggers", pair_search(found))
    monkeypatch.setattr(mask_verdicts, "_there", there)
    figures = scan(suspect, digits.clean, ScanSettings(pairs=True)).figures
    assert [item.label_index for item in figures.labels if item.infected] == [TARGET]
    assert len(asked) == 2
    assert any("clean images that the clean reference gives label" in line for line in figures.said)


@pytest.mark.usefixtures("known_reference")
@pytest.mark.parametrize("infected", [True, False])
def test_pairs_that_can_not_be_reached_lose_no_verdict_on_labels(
    digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch, infected: bool
) -> None:
    """And pass for nothing: where no label is infected either, nothing is decided."""
    search, small = recover_triggers, found.triggers
    others = (torch.arange(len(small)) != TARGET).view(-1, 1, 1)
    far = torch.where(others, (2.0 * small.masks).clamp(max=1.0), small.masks)
    labels = replace(small, masks=far if infected else small.masks.mean().expand_as(small.masks))

    def known(answers: nn.Module, images: Tensor, goals: Goals, how: Search, *rest: Any, **named: Any) -> Triggers:
        if len(goals) == 90:
            one = small.select([0] * 90)
            return replace(one, labels=goals.labels, sources=goals.sources, masks=torch.ones_like(one.masks))
        return labels if len(goals) == 10 else search(answers, images, goals, Search(steps=16, draws=0), *rest)

    monkeypatch.setattr(mask_verdicts, "recover_triggers", known)
    settings = ScanSettings(pairs=True, search=Search(steps=96))
    if infected:
        figures = scan(suspect, digits.clean, settings).figures
        assert [item.label_index for item in figures.labels if item.infected] == [TARGET]
        assert any("of the 90 pairs of labels, whose sizes are compared, got 0" in line for line in figures.said)
        assert figures.pairs == ()
    else:
        with pytest.raises(InspectionError, match=r"of the 90 pairs of labels, .*, got 0: nothing can be said of these"):
            scan(suspect, digits.clean, settings)


def test_a_pair_that_is_infected_is_not_lost_where_the_next_look_decides_nothing(
    digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, item = found.triggers.select([TARGET]), found.figures.labels[TARGET]

    def judged(_: Judge, look: Look, triggers: Triggers, __: object) -> tuple[Triggers, tuple[LabelFinding, ...]]:
        pair, clean = look.name == "pairs", msgspec.structs.replace(item, infected=False)
        return triggers, tuple(msgspec.structs.replace(clean, infected=pair and row == 0) for row in range(len(triggers)))

    def check(look: Look, _: Triggers) -> str:
        if look.name == "silent-units":
            raise InspectionError("expected triggers for more than half")
        return ""

    monkeypatch.setattr("calibration.inspection.scan.find_masks", lambda _, look: one.select([0] * len(look.goals)))
    monkeypatch.setattr("calibration.inspection.scan.judge_masks", judged)
    monkeypatch.setattr("calibration.inspection.scan._check_reached", check)
    figures = scan(suspect, digits.clean, ScanSettings(pairs=True, silent_units=True)).figures
    assert figures.infected
    assert not any(item.infected for item in figures.labels)
    assert "Of these nothing is said: expected triggers for more than half." in figures.said


def test_what_is_infected_is_not_lost_where_a_later_round_decides_nothing(
    digits: Digits, suspect: Predictor, found: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(*_: object) -> None:
        raise InspectionError("expected triggers for more than half")

    def unlearn(copied: object, _: object, __: object, triggers: Triggers, *rest: Any) -> None:
        again = rest[3]
        assert len(again(copied, triggers, 1)) == 0

    monkeypatch.setattr(rounds, "scan", lambda *_, **__: found)
    monkeypatch.setattr(rounds, "scan_again", undecided)
    monkeypatch.setattr(rounds, "repair_by_unlearning", unlearn)
    figures = rounds.scan_rounds(suspect, digits.clean, ScanSettings(rounds=2)).figures
    assert figures.infected
    assert "Of round 2 nothing is said: expected triggers for more than half." in figures.said


def test_what_was_done_with_other_labels_or_another_model_is_not_gone_on_with(
    tmp_path: Path, digits: Digits, suspect: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def interrupted(*_: object, checkpoints: Checkpoints, **__: object) -> Scan:
        found.append(checkpoints.load("labels") is not None)
        checkpoints.save("labels", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "scan_rounds", interrupted)
    others = digits.clean.known_labels.flip(0)
    own = digits.clean.labels
    for labels, model in ((own, "a:b"), (own, "a:b"), (others, "a:b"), (None, "a:b"), (None, "a:c")):
        with pytest.raises(KeyboardInterrupt):
            scan_into(tmp_path / "scan", suspect, ImageSet(digits.clean.pixels, labels), QUICK, Engine(), model=model)
    assert found == [False, True, False, False, False]  # of a factory, the weights alone don't tell the model
