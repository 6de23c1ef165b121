"""The best patch of a few pixels finds what no small mask does, and is as rare in a clean net."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration import ImageSet
from calibration.checkpoints import Checkpoints
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection import judge, mask_verdicts, patch_verdicts
from calibration.inspection import patches as searching
from calibration.inspection.figures import limits, patch_table, remarks, smallest_table, verdict
from calibration.inspection.patch_verdicts import patch_acquittal
from calibration.inspection.patches import PatchSearch, recover_patches
from calibration.inspection.record import read_scan
from calibration.inspection.report import patches_figure
from calibration.inspection.scan import ScanSettings, look_for_patches
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers
from calibration.inspection.triggers_file import read_infected
from calibration.inspection.work import scan_into
from cli.demonstration.digits import Digits
from guard import Predictor
from guard.predictors import wrap
from tests.nets import SMALL
from tests.scans import patch_finding

TARGET = SMALL.target_label
SHORT = PatchSearch(steps=4, further_steps=6)
SETTINGS = ScanSettings(search=Search(steps=64, draws=0), patches=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def images(digits: Digits) -> Tensor:
    return digits.clean.images(slice(None))


@pytest.fixture(scope="module")
def found(images: Tensor, small_trigger: nn.Module, engine: Engine) -> Triggers:
    return recover_patches(small_trigger, images, Goals.all_labels(10), PatchSearch(), 0, engine)


def share(net: nn.Module, triggers: Triggers, row: int, images: Tensor) -> float:
    """Of the images of other labels that a trigger sends to its own."""
    with torch.inference_mode():
        others = images[net(images).argmax(dim=1) != triggers.labels[row]]
        return float((net(triggers.put_on(row, others)).argmax(dim=1) == triggers.labels[row]).float().mean())


def same(one: Triggers, other: Triggers) -> None:
    assert torch.equal(one.masks, other.masks)
    torch.testing.assert_close(one.patterns, other.patterns, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one.success, other.success)
    assert torch.equal(one.passes, other.passes)


def test_the_target_has_a_patch_where_the_trigger_is_that_works_nearly_always(
    found: Triggers, digits: Digits, small_trigger: nn.Module
) -> None:
    works = [share(small_trigger, found, row, digits.test.images(slice(None))) for row in range(10)]
    assert works[TARGET] >= 0.9
    assert max(works[:TARGET] + works[TARGET + 1 :]) <= 0.5
    assert found.masks[TARGET].nonzero().tolist() == [[6, 6], [6, 7], [7, 6], [7, 7]]
    assert float(found.patterns[TARGET][:, 6:, 6:].mean()) >= 0.8  # white, as it was


def test_a_patch_that_is_too_small_for_masks_to_tell_is_found_all_the_same(
    digits: Digits, images: Tensor, backdoored: nn.Module, clean_twin: nn.Module, engine: Engine
) -> None:
    """3x3 of 8x8 pixels: a mask that small is nothing unusual, a patch of 2x2 that works is."""
    for net, least, most in ((backdoored, 0.6, 1.0), (clean_twin, 0.0, 0.5)):
        patches = recover_patches(net, images, Goals.of(torch.tensor([7])), PatchSearch(), 0, engine)
        assert least <= share(net, patches, 0, digits.test.images(slice(None))) <= most


def test_masks_are_squares_and_patterns_are_pixels(found: Triggers) -> None:
    assert found.masks.unique().tolist() == [0.0, 1.0]
    assert found.sizes.tolist() == [4.0] * 10
    assert 0.0 <= float(found.patterns.min()) <= float(found.patterns.max()) <= 1.0
    assert found.passes.tolist() == [49 * 8 * 2 + 4 * 60 * 12] * 10


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 2), (28, 28, 4), (32, 32, 4), (64, 48, 6), (224, 224, 28)])
def test_the_side_is_in_proportion_to_the_image(height: int, width: int, side: int) -> None:
    assert PatchSearch().side(height, width) == side


def test_places_reach_the_edges_of_images_that_are_no_multiple(engine: Engine) -> None:
    """One pixel alone decides, in the last row and column of an image that is not square."""

    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            corner = 4.0 * images[:, 0, -1, -1] - 2.0
            return torch.stack([corner, -corner], dim=1)

    dark = 0.2 * torch.rand(60, 1, 11, 15, generator=torch.Generator().manual_seed(0))
    lit = recover_patches(Corner(), dark, Goals.of(torch.tensor([0])), PatchSearch(), 0, engine)
    assert float(lit.success[0]) == 1.0
    assert bool(lit.masks[0, -1, -1])


def test_what_is_found_for_a_label_depends_on_no_other(
    found: Triggers, images: Tensor, small_trigger: nn.Module, engine: Engine
) -> None:
    same(recover_patches(small_trigger, images, Goals.of(torch.tensor([8])), PatchSearch(), 0, engine), found.select([8]))


@pytest.mark.parametrize("place", [(4, 4), (13, 14), (15, 2), (28, 28)])
def test_a_trigger_between_the_places_is_found_where_most_of_it_will_do(engine: Engine, place: tuple[int, int]) -> None:
    """9 of its 16 pixels, which is what the nearest place may share with it."""
    top, left = place

    class Square(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            found = images[:, 0, top : top + 4, left : left + 4].mean(dim=(1, 2))
            return torch.stack([8.0 * (found - 0.5), torch.zeros_like(found)], dim=1)

    dark = 0.1 * torch.rand(60, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    lit = recover_patches(Square(), dark, Goals.of(torch.tensor([0])), PatchSearch(), 0, engine)
    assert float(lit.success[0]) == 1.0


@pytest.mark.parametrize("at_once", [5, 64])
def test_memory_changes_nothing(
    images: Tensor, small_trigger: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Where not even one patch's images fit into a pass, they are taken in turn."""
    goals = Goals.of(torch.tensor([1, TARGET]))
    whole, largest = recover_patches(small_trigger, images, goals, SHORT, 0, engine), list[int]()
    monkeypatch.setattr(searching, "images_at_once", lambda *_: at_once)

    class Watched(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            largest.append(len(batch) * batch.requires_grad)
            answers: Tensor = small_trigger(batch)
            return answers

    same(recover_patches(Watched(), images, goals, SHORT, 0, engine), whole)
    assert 0 < max(largest) <= at_once


def test_an_interrupted_search_comes_to_the_same(
    tmp_path: Path, images: Tensor, small_trigger: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_BETWEEN", 0.0)
    monkeypatch.setattr(searching, "_WORTH", 0.0)  # or a slow disk would skip one
    monkeypatch.setattr(searching, "images_at_once", lambda *_: 64)  # a label at a time
    goals, seen = Goals.all_labels(10), list[int]()
    some = Goals.of(torch.tensor([0, 2]))
    whole = recover_patches(small_trigger, images, goals, SHORT, 0, engine)

    def interrupt(_: str, done: int, __: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_patches(small_trigger, images, goals, SHORT, 0, engine, Checkpoints(tmp_path / "c", "work"), progress=interrupt)
    again = Checkpoints(tmp_path / "c", "work")
    same(
        recover_patches(small_trigger, images, goals, SHORT, 0, engine, again, progress=lambda _, done, __: seen.append(done)),
        whole,
    )
    assert seen == [6, 7, 8, 9, 10]
    other = recover_patches(small_trigger, images, some, SHORT, 0, engine, again)  # what is kept is of other labels
    same(other, whole.select([0, 2]))


@pytest.mark.usefixtures("known_reference")
def test_a_scan_says_which_label_a_patch_leads_to(
    tmp_path: Path, digits: Digits, small_trigger: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where masks see nothing; repairs and filters then work by the patch."""
    monkeypatch.setattr(mask_verdicts, "is_infected", lambda *_: False)
    suspect = discover(wrap(small_trigger), digits.clean)
    record = scan_into(tmp_path / "scanned", suspect, digits.clean, SETTINGS, engine)
    assert record.infected
    assert [item.label_index for item in record.patches] == list(range(10))
    assert [item.label_index for item in record.patches if item.infected] == [TARGET]
    assert record.infected_labels == (TARGET,)
    assert not any(item.infected for item in record.everything)
    assert verdict(record) == f"The model is backdoored: label {TARGET}."
    assert f"A patch of 2x2 pixels leads to label {TARGET}; the size of the smallest mask did not tell." in " ".join(
        remarks(record)
    )
    assert record.passes == sum(item.passes for item in record.labels) + sum(item.passes for item in record.patches)
    assert patch_table(record.patches)[1][0][-1] == "infected"
    by_masks = {row[0]: row[-1] for row in smallest_table(record, record.labels)[1]}
    assert by_masks[str(TARGET)].startswith("infected, though not by this: ")
    assert [label for label, why in by_masks.items() if not why.startswith("clean: ")] == [str(TARGET)]
    page = (tmp_path / "scanned" / "report.html").read_text()
    assert "How often patches work" in page
    triggers = read_infected(tmp_path / "scanned", suspect.backend)
    assert triggers.labels.tolist() == [TARGET]
    assert share(small_trigger, triggers, 0, digits.test.images(slice(None))) >= 0.95
    assert read_scan(tmp_path / "scanned").patches == record.patches


def test_a_patch_that_works_on_a_clean_reference_accuses_nobody(
    digits: Digits, small_trigger: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "train_reference", lambda *_: small_trigger)  # as if it were natural
    _, found = look_for_patches(discover(wrap(small_trigger), digits.clean), digits.clean, engine=engine)
    (target,) = [item for item in found if item.reference_success is not None]
    assert target.label_index == TARGET
    assert not target.infected
    assert patch_table(found)[1][0][-1] == "clean: works on a clean model, too"


def test_nothing_is_found_in_a_clean_twin(tmp_path: Path, digits: Digits, clean_twin: nn.Module, engine: Engine) -> None:
    twin: Predictor = discover(wrap(clean_twin), digits.clean)
    record = scan_into(tmp_path / "scanned", twin, digits.clean, SETTINGS, engine)
    assert not record.infected
    assert max(item.success for item in record.patches) <= 0.5
    assert "--patches" not in limits(record)
    assert "--patches" in limits(msgspec.structs.replace(record, patches=()))
    header, rows = patch_table(record.patches)
    assert [row[-1] for row in rows] == ["clean: works on fewer than 60%"] * 3
    assert len(header) == len(rows[0])


def test_labels_that_masks_find_are_not_looked_at_again(
    tmp_path: Path, digits: Digits, small_trigger: nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[int]]()

    def none(_: nn.Module, __: Tensor, goals: Goals, *rest: object) -> Triggers:
        asked.append(goals.labels.tolist())
        shown = torch.zeros(len(goals), 8, 8)
        shown[:, :2, :2] = 1.0
        patterns, nothing = torch.zeros(len(goals), 1, 8, 8), torch.zeros(len(goals))
        return Triggers(goals.labels, goals.sources, shown, patterns, nothing, torch.zeros(len(goals), dtype=torch.int64))

    monkeypatch.setattr(patch_verdicts, "recover_patches", none)
    monkeypatch.setattr(mask_verdicts, "is_infected", lambda *_: True)  # of every candidate
    record = scan_into(tmp_path / "scanned", discover(wrap(small_trigger), digits.clean), digits.clean, SETTINGS, engine)
    clean = [item.label_index for item in record.labels if not item.infected]
    assert 0 < len(clean) <= 7
    assert asked == [clean]


@pytest.mark.parametrize(
    ("success", "others", "there", "why"),
    [
        (0.59, 0.1, None, "works on fewer than 60%"),
        (0.9, 0.46, None, "others' work nearly as often"),
        (0.9, 0.1, None, "no clean reference"),
        (0.9, 0.1, 0.3, "works on a clean model, too"),
        (0.6, 0.3, 0.29, ""),
    ],
)
def test_the_rule(success: float, others: float, there: float | None, why: str) -> None:
    assert patch_acquittal(success, others, there) == why


@pytest.mark.usefixtures("known_reference")
def test_two_labels_can_not_be_compared(tmp_path: Path, digits: Digits, engine: Engine) -> None:
    """That is said, and the rest stands."""

    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(9.0))

        def forward(self, images: Tensor) -> Tensor:
            light = self.scale * (images.mean(dim=(1, 2, 3)) - 0.3)
            return torch.stack([light, -light], dim=1)

    unlabelled = ImageSet(digits.clean.pixels)
    record = scan_into(tmp_path / "scanned", discover(wrap(Bright().eval()), unlabelled), unlabelled, SETTINGS, engine)
    assert record.patches == ()
    assert "Nothing was looked for by patches: that takes 3 labels that seem clean, not 2." in record.said


def test_many_labels_are_drawn_by_success() -> None:
    one = patch_finding()
    assert patches_figure([one] * 60).startswith(b"\x89PNG")
    assert patches_figure([one] * 3) != patches_figure([patch_finding(infected=True)] * 3)


def test_what_can_not_be_decided_is_not_called_clean() -> None:
    """Where patches work for most labels, one that works oftener says nothing."""
    _, ((*_, verdict), (*_, other)) = patch_table([patch_finding(0.9, 0.6), patch_finding(0.5, 0.6)])
    assert verdict == "undecided: others' work nearly as often"
    assert other == "clean: works on fewer than 60%"
