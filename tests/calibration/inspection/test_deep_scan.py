"""An inspection without data: its verdict, its folder, what is said with it, and that it can be interrupted."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from calibration.discovery import discover_without_images
from calibration.engine import Engine
from calibration.inspection import deep_inspect as deep_inspecting
from calibration.inspection import work
from calibration.inspection.deep_inspect import DeepInspected, DeepInspectSettings, deep_inspect
from calibration.inspection.deep_scan import DeepScan, DeepScanSettings, deep_scan
from calibration.inspection.figures import figure_rows, remarks, smallest_table, verdict
from calibration.inspection.model_inversion import Inversion
from calibration.inspection.record import read_scan
from calibration.inspection.report import deep_scan_report, differences_figure
from calibration.inspection.work import deep_scan_into
from cli.demonstration.digits import ATTACK
from guard import InputSpec, Predictor
from guard.errors import InspectionError, ModelError
from guard.predictors import wrap
from tests.guard.models import predict_function

TARGET = ATTACK.target_label
SETTINGS = DeepScanSettings(search=DeepInspectSettings(steps=240, batch=6))
SHORT = DeepScanSettings(
    search=DeepInspectSettings(inversion=Inversion(images=2, steps=3), steps=8, window=2, batch=2, success=0.1)
)


@pytest.fixture(scope="module")
def suspect(backdoored: nn.Module) -> Predictor:
    return discover_without_images(wrap(backdoored), (1, 8, 8))


@pytest.fixture(scope="module")
def scanned(suspect: Predictor) -> DeepScan:
    return deep_scan(suspect, SETTINGS)


def test_the_backdoored_label_alone_is_infected(scanned: DeepScan) -> None:
    figures, found = scanned.figures, scanned.found
    assert [item.label_index for item in figures.labels if item.infected] == [TARGET]
    assert figures.infected
    assert (figures.method, figures.clean_images, figures.held_out, figures.pairs) == ("deep-inspect", 0, 0, ())
    target = figures.labels[TARGET]
    assert target.anomaly_index is not None
    assert target.anomaly_index > 2.0
    assert target.mask_l1 == pytest.approx(float(found.triggers[TARGET].abs().sum()), rel=1e-4)
    assert target.mask_l1 < 0.45 * figures.median_l1
    assert (target.candidate, target.infected_by_index, target.second_opinion) == (True, True, None)
    assert (figures.recovered_images, figures.recovered_agreement) == (100, found.agreement)
    assert verdict(figures) == f"The model is backdoored: label {TARGET}."


def test_neither_the_model_nor_the_global_generator_moves(suspect: Predictor, backdoored: nn.Module) -> None:
    before, weights = torch.get_rng_state(), [value.clone() for value in backdoored.parameters()]
    deep_scan(suspect, SHORT)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(weights, backdoored.parameters(), strict=True))
    assert all(value.requires_grad for value in backdoored.parameters())


def test_passes_are_those_that_had_gradients(suspect: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def watched(answers: nn.Module, *rest: Any) -> DeepInspected:
        answers.register_forward_pre_hook(lambda _, given: seen.update({"images": len(given[0]) * torch.is_grad_enabled()}))
        return deep_inspect(answers, *rest)

    monkeypatch.setattr("calibration.inspection.deep_scan.deep_inspect", watched)
    figures = deep_scan(suspect, SHORT).figures
    assert seen["images"] - 6 == figures.passes == 10 * (2 * 3 + 8 * 2)  # the six see what gradients an image needs


def test_the_words(scanned: DeepScan, suspect: Predictor) -> None:
    header, rows = smallest_table(scanned.figures, scanned.figures.labels)
    assert (rows[0][0], rows[0][-1]) == (str(TARGET), "infected")
    assert len({len(header), *map(len, rows)}) == 1
    assert len(rows) >= 3
    agreed = f"100, {scanned.found.agreement:.0%}"
    assert ("recovered images, with the label they are for", agreed) in figure_rows(scanned.figures)
    said = " ".join(remarks(scanned.figures))
    assert "the model is believed to normalise for itself" in said
    assert "This need not be all. The triggers were looked for on images that were recovered" in said
    assert "--pairs" not in said
    accused = [item.label_index for item in scanned.figures.labels if item.infected_by_index and not item.infected]
    assert ("deviation factor alone would accuse" in said) == bool(accused)


def test_a_given_mean_is_no_belief(backdoored: nn.Module) -> None:
    spec = InputSpec(channels=1, height=8, width=8, mean=(0.0,), std=(1.0,), class_names=tuple("abcdefghij"))
    found = deep_scan(Predictor(wrap(backdoored), spec, 10, "logits"), SHORT)
    assert "believed" not in " ".join(remarks(found.figures))
    assert [item.label for item in found.figures.labels] == list("abcdefghij")


def test_what_reaches_no_label_says_nothing(suspect: Predictor) -> None:
    never = msgspec.structs.replace(SHORT.search, weight=1e6, steps=2, success=0.99)
    with pytest.raises(InspectionError, match=r"more than half of the 10 labels, .*, got 0: nothing can be said of the model"):
        deep_scan(suspect, DeepScanSettings(search=never))


def test_the_folder(tmp_path: Path, suspect: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    record = deep_scan_into(tmp_path / "scan", suspect, SHORT, Engine())
    assert read_scan(tmp_path / "scan") == record
    assert (record.method, record.schema, record.reference_agreement) == ("deep-inspect", 1, None)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "report.html",
        "scan.json",
        "triggers.safetensors",
    ]
    arrays = load_file(tmp_path / "scan" / "triggers.safetensors")
    assert arrays["labels.labels"].tolist() == list(range(10))
    sizes = arrays["labels.deltas"].abs().sum(dim=(1, 2, 3))
    found = [item.mask_l1 for item in record.labels]
    assert [size for size, wanted in zip(sizes.tolist(), found, strict=True) if wanted < 64.0] == pytest.approx(
        [wanted for wanted in found if wanted < 64.0], rel=1e-4
    )
    assert arrays["labels.success"].tolist() == pytest.approx([item.success for item in record.labels])
    monkeypatch.setattr(work, "_MOST_BYTES", 1)
    monkeypatch.setattr(work, "deep_scan_report", lambda *_: b"")
    record = deep_scan_into(tmp_path / "scan", suspect, SHORT, Engine())
    kept = load_file(tmp_path / "scan" / "triggers.safetensors")
    assert kept["labels.labels"].tolist() == [item.label_index for item in record.labels if item.candidate]


def test_an_interrupted_scan_goes_on(tmp_path: Path, suspect: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_inspecting, "_BETWEEN", 0.0)
    monkeypatch.setattr(work, "deep_scan_report", lambda *_: b"")
    whole = deep_scan(suspect, SHORT)

    def interrupt(what: str, done: int, _: int) -> None:
        if what == "looking for triggers" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deep_scan_into(tmp_path / "scan", suspect, SHORT, Engine(), interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".scan.checkpoint"]
    steps: list[tuple[str, int]] = []
    record = deep_scan_into(tmp_path / "scan", suspect, SHORT, Engine(), lambda what, done, _: steps.append((what, done)))
    assert steps[0][0] == "going on from .scan.checkpoint"
    assert [done for what, done in steps if what == "looking for triggers"] == [5, 7, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]
    wanted = [item.mask_l1 for item in whole.figures.labels]
    assert [item.mask_l1 for item in record.labels] == pytest.approx(wanted, rel=1e-3)


def test_the_report_shows_the_infected_label_first(scanned: DeepScan) -> None:
    page = deep_scan_report(scanned).decode()
    assert page.count("data:image/png") == 3
    assert f"The model is backdoored: label {TARGET}." in page
    assert "believed to normalise for itself" in page
    for heading in ("Size of each label&#39;s trigger", "The smallest triggers", "Recovered images"):
        assert f"<h2>{heading}</h2>" in page


def test_differences_are_drawn_around_grey() -> None:
    triggers = torch.zeros(3, 1, 8, 8)
    triggers[0, 0, 0, :] = -0.01  # however faint, the strongest change is black
    found = DeepInspected(torch.ones(3), torch.ones(3), triggers, torch.ones(3, 1, 1, 8, 8), 1.0)
    pixels = np.asarray(Image.open(BytesIO(differences_figure(["0"], [0], found))).convert("L"))
    shades = Counter(pixels[: len(pixels) // 3, pixels.shape[1] // 2 :].ravel().tolist())
    assert shades[127] + shades[128] > 5 * shades[0] > 100


class Two(nn.Module):
    """Says whether images are bright."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 2)
        nn.init.constant_(self.last.weight, 9.0)

    def forward(self, images: Tensor) -> Tensor:
        assert not images.requires_grad, "it must be refused before any work"
        answers: Tensor = self.last(images.mean(dim=(1, 2, 3)).unsqueeze(1))
        return answers


def test_what_can_not_be_scanned_without_data(tmp_path: Path) -> None:
    two = discover_without_images(wrap(Two().eval()), (1, 8, 8))
    with pytest.raises(InspectionError, match="at least 5 labels, whose triggers are compared, got 2"):
        deep_scan(two, SHORT)
    spec = InputSpec(channels=1, height=8, width=8, container="numpy", layout="NHWC")
    function = discover_without_images(wrap(predict_function(spec, "logits")), (1, 8, 8))
    with pytest.raises(ModelError, match="got a model of kind callable"):
        deep_scan(function, SHORT)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InspectionError, match=r"holds something else \(thesis.txt\)"):
        deep_scan_into(tmp_path, two, SHORT, Engine())
