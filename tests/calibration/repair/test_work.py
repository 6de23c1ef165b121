"""A repair into a folder goes on from where an earlier one ended, if that was the same one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from calibration import Hints
from calibration.checkpoints import Checkpoints
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection.triggers import Triggers
from calibration.repair.cyclegan import Training
from calibration.repair.folder import save_repaired
from calibration.repair.repair import Repaired
from calibration.repair.settings import RepairSettings
from calibration.repair.work import repair_into
from calibration.sources import ModelSource, open_model
from guard.errors import RepairError
from tests.calibration.repair.toys import exported, repaired_toy, toys


def test_a_refused_repair_need_not_be_done_again(tmp_path: Path, engine: Engine) -> None:
    source, clean = open_model(exported(tmp_path), None, tmp_path), toys(100)
    predictor, told = discover(source.backend, clean), []
    settings = RepairSettings(method="gym", epochs=3, max_accuracy_drop=-100.0)

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)

    with pytest.raises(RepairError, match="more than --max-accuracy-drop -100"):
        repair_into(tmp_path / "out", source, predictor, clean, settings, None, engine, progress)
    assert "fine-tuning" in told
    told.clear()
    allowed = msgspec.structs.replace(settings, max_accuracy_drop=100.0)
    repair_into(tmp_path / "out", source, predictor, clean, allowed, None, engine, progress)
    assert told == ["going on from .out.checkpoint"]
    assert not (tmp_path / ".out.checkpoint").exists()


def test_checkpoints_that_are_kept_give_the_same_model_again(tmp_path: Path, engine: Engine) -> None:
    source, clean = open_model(exported(tmp_path), None, tmp_path), toys(100)
    rejected = toys(60, seed=7).images(slice(None))
    settings = RepairSettings(method="codefend", epochs=2, gan=Training(epochs=2, width=4, blocks=1), max_accuracy_drop=100.0)
    predictor, records = discover(source.backend, clean), []
    for name in ("first", "second"):
        repair_into(tmp_path / name, source, predictor, clean, settings, rejected, engine, work=tmp_path / "work")
        records.append(open_model(str(tmp_path / name), None, tmp_path))
    first, second = (item.backend(clean.images(slice(None))) for item in records)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert (tmp_path / "work").is_dir()


def test_a_repaired_model_is_not_repaired_again(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired_toy(exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    again = open_model(str(tmp_path / "out"), None, tmp_path)
    predictor = discover(again.backend, toys(60), again.hints(Hints()))
    with pytest.raises(RepairError, match="expected a model that was not repaired yet, got one that was: repair its original"):
        repair_into(tmp_path / "twice", again, predictor, toys(60), RepairSettings(method="gym"), None, engine)


def test_checkpoints_are_of_the_triggers_that_are_repaired_by(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, clean = open_model("tests.toy:LearningToy", None, tmp_path), toys(200)
    predictor = discover(source.backend, clean)
    settings, said = RepairSettings(method="unlearn"), list[str]()
    first = Triggers(
        torch.tensor([1]), torch.tensor([-1]), torch.ones(1, 8, 8), torch.ones(1, 1, 8, 8), torch.ones(1), torch.zeros(1)
    )

    def interrupted(*args: object, checkpoints: Checkpoints, **kwargs: object) -> Repaired:
        time.sleep(0.01)
        checkpoints.save("unlearning", 1, arrays={"some": torch.zeros(1)})
        raise RepairError("interrupted")

    def attempt(triggers: Triggers, source: ModelSource = source) -> bool:
        """Whether it goes on from the last attempt."""

        def show(what: str, done: int, total: int) -> None:
            said.append(what)

        said.clear()
        with pytest.raises(RepairError, match="interrupted"):
            repair_into(tmp_path / "out", source, predictor, clean, settings, None, engine, show, triggers=triggers)
        return said == ["going on from .out.checkpoint"]

    monkeypatch.setattr("calibration.repair.work.repair", interrupted)
    assert not attempt(first)
    assert attempt(first)
    for other in (replace(first, labels=first.labels + 1), replace(first, sources=first.sources + 1)):
        assert not attempt(other)
        assert attempt(other)
    twin = replace(source, record=msgspec.structs.replace(source.record, factory="tests.toy:another"))  # of the same weights
    assert not attempt(first, twin)
