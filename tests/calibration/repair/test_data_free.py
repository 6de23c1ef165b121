"""DHBE through the one door: without any image, or with images that only measure it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from calibration import Hints, ImageSet
from calibration.discovery import discover, discover_without_images
from calibration.engine import Engine
from calibration.repair.dhbe_settings import Dhbe
from calibration.repair.figures import figure_rows, is_reliable, remarks
from calibration.repair.record import RepairRecord
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from calibration.repair.work import repair_into
from calibration.sources import ModelSource, open_model
from guard import InputSpec, Predictor
from guard.errors import RepairError
from guard.predictors import wrap
from tests.calibration.repair.test_dhbe import TINY, Normed
from tests.toy import LearningToy, toy_images

SETTINGS = RepairSettings(method="dhbe", epochs=4, dhbe=msgspec.structs.replace(TINY, iterations=2, batch=64, rate=1e-2))


def toys(count: int = 60, labelled: bool = True) -> ImageSet:
    images, labels = toy_images(count)
    return ImageSet((images * 255).round().to(torch.uint8), labels if labelled else None)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_model("tests.toy:LearningToy", None, tmp_path)


@pytest.fixture
def blind(source: ModelSource) -> Predictor:
    """The model of which nothing is known but the shape."""
    return discover_without_images(source.backend, (1, 8, 8))


def interrupting(at: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == "erasing backdoors" and done == at:
            raise KeyboardInterrupt

    return progress


def test_without_data_nothing_is_claimed_to_be_measured(
    source: ModelSource, blind: Predictor, tmp_path: Path, engine: Engine
) -> None:
    written = repair_into(tmp_path / "out", source, blind, None, SETTINGS, None, engine)
    assert isinstance(written, RepairRecord)
    record = json.loads((tmp_path / "out" / "repair.json").read_text())
    assert record["method"] == "dhbe"
    assert record["clean_accuracy_before"] is None
    assert record["clean_accuracy_after"] is None
    assert record["clean_images"] == record["held_out_clean"] == 0
    assert record["agreement"] == record["generated_agreement"]
    assert 0.0 < record["agreement"] <= 1.0
    assert record["generated_samples"] == 1024
    assert record["generated_labels"] > 1
    assert json.loads((tmp_path / "out" / "learnt.json").read_text()) == []
    again = open_model(str(tmp_path / "out"), None, tmp_path)
    assert again.repair is not None
    assert again.repair.generated_agreement == written.generated_agreement
    assert again.learnt == frozenset()
    said = " ".join(remarks(written, None))
    assert "No accuracy was measured, as there were no clean images. Agreement is of generated samples" in said
    assert "neither --mean nor --std was given; samples had a mean of 0.5 and a standard deviation of 0.25" in said
    assert "have no labels" not in said
    names = [row[0] for row in figure_rows(written)]
    assert "agreement on generated samples" in names
    assert not {"agreement with the original", "clean accuracy after", "clean images, of which held out"} & set(names)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "what that leaves open is said below" in page
    assert "What the generators drew in the end" in page
    assert "points of clean accuracy" not in page
    assert "Nothing has measured this copy" in page


@pytest.mark.parametrize("labelled", [True, False])
def test_images_that_are_given_only_measure(
    labelled: bool, source: ModelSource, blind: Predictor, tmp_path: Path, engine: Engine
) -> None:
    settings = msgspec.structs.replace(SETTINGS, max_accuracy_drop=100.0)
    predictor = discover(source.backend, toys(60, labelled), Hints())
    rejected = toy_images(40, seed=5)[0]
    with_images = repair(predictor, toys(60, labelled), settings, rejected, engine=engine)
    without = repair(blind, None, settings, engine=engine)
    probe = toy_images(20, seed=2)[0]
    torch.testing.assert_close(with_images.predictor(probe), without.predictor(probe), atol=1e-6, rtol=0.0)
    figures = with_images.figures
    assert (figures.clean_images, figures.held_out_clean) == (60, 60)
    assert (figures.quarantined_images, figures.held_out_quarantined) == (40, 40)
    assert figures.attack_success_seen_after is not None
    assert figures.generated_agreement == without.figures.agreement
    assert with_images.images == frozenset()
    images, labels = toys().images(slice(None)), toys().known_labels
    answers = with_images.predictor(images).argmax(dim=1)
    assert figures.agreement == pytest.approx(float((answers == predictor(images).argmax(dim=1)).double().mean()))
    if labelled:
        assert figures.clean_accuracy_before == 1.0
        assert figures.clean_accuracy_after == pytest.approx(float((answers == labels).double().mean()))
    else:
        assert figures.clean_accuracy_before is None
    said = " ".join(remarks(figures, None))
    assert "all of them measured the repair" in said
    assert ("have no labels" in said) != labelled


def test_an_interrupted_repair_ends_as_an_uninterrupted_one(
    source: ModelSource, blind: Predictor, tmp_path: Path, engine: Engine
) -> None:
    def answers(name: str) -> Tensor:
        return open_model(str(tmp_path / name), None, tmp_path).backend(toy_images(20)[0])  # type: ignore[return-value]

    repair_into(tmp_path / "whole", source, blind, None, SETTINGS, None, engine)
    with pytest.raises(KeyboardInterrupt):
        repair_into(tmp_path / "halved", source, blind, None, SETTINGS, None, engine, interrupting(2))
    assert (tmp_path / ".halved.checkpoint").is_dir()
    assert not (tmp_path / "halved").exists()
    told: list[tuple[str, int]] = []
    repair_into(
        tmp_path / "halved", source, blind, None, SETTINGS, None, engine, lambda what, done, _: told.append((what, done))
    )
    assert ("erasing backdoors", 1) not in told
    assert not (tmp_path / ".halved.checkpoint").exists()
    torch.testing.assert_close(answers("halved"), answers("whole"), atol=1e-4, rtol=1e-4)


def test_one_that_was_refused_for_want_of_images_goes_on_with_some(
    source: ModelSource, blind: Predictor, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(repaired: Repaired) -> None:
        raise RepairError("collapsed")

    settings = msgspec.structs.replace(SETTINGS, max_accuracy_drop=100.0)
    with monkeypatch.context() as patched:
        patched.setattr(Repaired, "check", collapsed)
        with pytest.raises(RepairError, match="collapsed"):
            repair_into(tmp_path / "out", source, blind, None, settings, None, engine)
    named = ImageSet(toys().pixels, toys().labels, ("a", "b", "c", "d"))
    predictor = discover(source.backend, named)
    found = repair_into(tmp_path / "out", source, predictor, named, settings, None, engine, interrupting(1))
    assert found is not None
    assert found.held_out_clean == 60


def test_a_collapsed_copy_is_refused_where_nothing_else_measures_it(blind: Predictor, engine: Engine) -> None:
    shrinking = msgspec.structs.replace(TINY, iterations=9, batch=64, rate=0.01, momentum=0.0, decay=99.0)  # no weight is left
    original = Predictor(wrap(Normed()), InputSpec(channels=1, height=8, width=8), 4, "logits")
    made = repair(original, None, RepairSettings(method="dhbe", dhbe=shrinking, max_accuracy_drop=100.0), engine=engine)
    with pytest.raises(RepairError, match="got one that gives all of 1024 generated samples the same"):
        made.check()
    measured = msgspec.structs.replace(made.figures, held_out_clean=60, agreement=0.99)
    Repaired(made.predictor, None, measured, RepairSettings(method="dhbe")).check()
    low = msgspec.structs.replace(measured, agreement=0.96)
    dear = Repaired(made.predictor, None, low, RepairSettings(method="dhbe"))
    with pytest.raises(RepairError, match=r"more than --max-accuracy-drop 3: give it more --epochs, or allow it"):
        dear.check()


def test_little_agreement_on_generated_samples_is_told_and_not_refused(blind: Predictor, engine: Engine) -> None:
    made = repair(blind, None, SETTINGS, engine=engine)
    low = msgspec.structs.replace(made.figures, agreement=0.3, generated_agreement=0.3)
    Repaired(made.predictor, None, low, SETTINGS).check()
    assert ("agreement on generated samples", "30.00%") in figure_rows(low)
    assert is_reliable(low)


@pytest.mark.parametrize(
    ("module", "said"), [(Normed(), "rate of 0.1: its batch norm"), (LearningToy(), "rate of 0.01: models")]
)
def test_a_model_without_batch_norm_learns_slower(
    module: torch.nn.Module, said: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[bool] = []

    def suited(_: InputSpec, batch_norm: bool) -> Dhbe:
        rates.append(batch_norm)
        return msgspec.structs.replace(TINY, batch=64, rate=0.1 if batch_norm else 0.01)

    monkeypatch.setattr("calibration.repair.methods.Dhbe.suited", suited)
    original = Predictor(wrap(module), InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.5,)), 4, "logits")
    made = repair(original, None, RepairSettings(method="dhbe", recipe="paper", epochs=2), engine=engine)
    assert rates == [isinstance(module, Normed)]
    assert f"learnt for 2 epochs, at first at a {said}" in made.figures.said[0]
    assert len(made.figures.said) == 1  # it normalises as it was said to


def test_a_method_that_learns_needs_images(blind: Predictor, engine: Engine) -> None:
    with pytest.raises(RepairError, match="expected clean images for nad, which learns from them, got none"):
        repair(blind, None, RepairSettings(method="nad"), engine=engine)
