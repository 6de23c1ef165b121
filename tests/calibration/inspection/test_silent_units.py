"""A module that is silent without its trigger is found by gradients that pass it, and by no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibration.attacks import TrojanNet
from calibration.data import ImageSet
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.figures import remarks, verdict
from calibration.inspection.scan import ScanSettings, scan
from calibration.inspection.search import Search
from calibration.inspection.silent_units import check_rectifiers, through_silent_units
from calibration.inspection.triggers_file import read_infected
from calibration.inspection.work import scan_into
from cli.demonstration.digits import Digits
from guard.errors import InspectionError, ModelError
from guard.predictors import Predictor, load_backend, wrap
from tests.guard.models import save_exported, save_torchscript
from tests.toy import SIDE, SPEC


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the look behind silent units sees fewer: it is quicker."""
    monkeypatch.setattr("calibration.inspection.scan._SILENT_IMAGES", 16)


HIDDEN = TrojanNet(6, pattern=("10", "01"), bottom=1, right=1, tolerance=0.5)


class Given(nn.Module):
    """A rectifier and nothing else."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values * 1.0)


def in_place(values: Tensor) -> Tensor:
    """Its value alone is not used."""
    nn.functional.relu(values, True)
    return values


RECTIFIERS = {
    "module": nn.ReLU(),
    "module, in place": nn.ReLU(inplace=True),
    "function": torch.relu,
    "method": Tensor.relu,
    "function, in place": in_place,
    "operator": torch.ops.aten.relu.default,
    "clamp_min": lambda values: values.clamp_min(0.0),
    "clamp": lambda values: values.clamp(min=0),
}


@pytest.mark.parametrize("function", RECTIFIERS.values(), ids=RECTIFIERS.keys())
def test_silent_units_answer_as_before_and_pass_a_tenth(function: Callable[[Tensor], Tensor]) -> None:
    values = torch.tensor([-2.0, -0.5, 0.0, 3.0], requires_grad=True)
    found = through_silent_units(Given(function))(values)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0, 0.0, 3.0]
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.1, 0.1, 0.1, 1.0])


def test_what_limits_on_both_sides_is_no_rectifier() -> None:
    values = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    through_silent_units(Given(lambda given: given.clamp(0.0, 1.0)))(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 0.0]


class Rectified(nn.Module):
    """For files of programs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 6), nn.ReLU(), nn.Linear(6, 4))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.layers(images)
        return answers


def test_programs_are_looked_through_or_refused(tmp_path: Path) -> None:
    image = torch.rand(1, 1, SIDE, SIDE)

    def answers(path: Path) -> nn.Module:
        return TrainableCopy.of(Predictor(load_backend(str(path)), SPEC, 4, "logits")).answers()

    check_rectifiers(answers(save_exported(Rectified(), tmp_path / "net.pt2")), image)
    with pytest.raises(ModelError, match="expected a model with ReLUs that can be looked through, got one without"):
        check_rectifiers(answers(save_torchscript(Rectified(), tmp_path / "net.pt")), image)
    with pytest.raises(ModelError, match="with ReLUs"):
        check_rectifiers(nn.Flatten(), image)


def test_two_labels_are_too_few_to_compare(digits: Digits) -> None:
    """They were left out, and nothing said so."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    clean = ImageSet(digits.clean.pixels[:60])
    with pytest.raises(InspectionError, match=r"at least 3 labels, .* got 2: scan without --silent-units"):
        scan(discover(wrap(net), clean), clean, ScanSettings(silent_units=True))


@pytest.mark.usefixtures("known_reference")
def test_a_look_that_can_not_be_had_is_told(digits: Digits, small_trigger: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.inspection.scan._FEWEST_COMPARED", 10)  # one of ten labels is infected
    clean = digits.clean.select(torch.arange(400))
    settings = ScanSettings(search=Search(steps=128, first=64, draws=0), silent_units=True)
    found = scan(discover(wrap(small_trigger), clean), clean, settings).figures
    assert found.infected
    assert not found.silent_units
    assert "Nothing was looked for behind silent units: that takes 10 labels that seem clean, not 9." in found.said


@pytest.mark.usefixtures("known_reference")
def test_a_hidden_module_is_found_through_silent_units_alone(tmp_path: Path, digits: Digits, clean_twin: nn.Module) -> None:
    settings = ScanSettings(search=Search(steps=320, images=8, draws=0), silent_units=True)
    clean = digits.clean.select(torch.arange(400))
    suspect = discover(wrap(HIDDEN.insert(clean_twin)), clean)
    record = scan_into(tmp_path / "scan", suspect, clean, settings, Engine())
    assert not any(item.infected for item in record.labels)
    assert [item.label_index for item in record.silent_units if item.infected] == [HIDDEN.target_label]
    assert record.infected
    assert f"The model is backdoored: label {HIDDEN.target_label}" in verdict(record)
    assert any("behind units that are silent" in line for line in remarks(record))
    assert "behind silent units" in (tmp_path / "scan" / "report.html").read_text()
    found = read_infected(tmp_path / "scan", suspect.backend)
    assert _success(suspect, digits.test, found.put_on(0, digits.test.images(slice(None)))) >= 0.95


@pytest.mark.slow
@pytest.mark.usefixtures("known_reference")
def test_a_clean_twin_hides_nothing(digits: Digits, clean_twin: nn.Module) -> None:
    settings = ScanSettings(search=Search(steps=320, images=8, draws=0), silent_units=True)
    found = scan(discover(wrap(clean_twin), digits.clean), digits.clean, settings).figures
    assert not found.infected
    assert len(found.silent_units) == 10


def _success(predictor: Predictor, clean: ImageSet, triggered: Tensor) -> float:
    others = clean.known_labels != HIDDEN.target_label
    return float((predictor(triggered[others]).argmax(dim=1) == HIDDEN.target_label).double().mean())
