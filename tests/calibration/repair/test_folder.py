"""A repaired model on disk: the kind that went in comes out, is accepted as MODEL, and brings along what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from calibration import Hints, Settings, calibrate
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.repair.folder import save_repaired
from calibration.repair.record import read_record
from calibration.sources import open_model, open_tripwire
from guard import Guard
from guard.errors import ModelError, ProfileError, RepairError
from guard.preprocessors import Gym
from tests.calibration.repair.toys import exported, factory, repaired_toy, toys
from tests.guard.models import save_exported, save_torchscript
from tests.toy import LearningToy


def _scripted(folder: Path) -> str:
    return str(save_torchscript(LearningToy(), folder / "toy.pt"))


def _exported_for_batches_of_fifty(folder: Path) -> str:
    return str(save_exported(LearningToy(), folder / "toy.pt2", batch=50))


KINDS = [
    (factory, "module", "model.safetensors"),
    (_scripted, "torchscript", "model.pt"),
    (exported, "torch-export", "model.pt2"),
    (_exported_for_batches_of_fifty, "torch-export", "model.pt2"),
]


@pytest.mark.parametrize(("make", "kind", "file"), KINDS)
def test_the_same_kind_comes_out_and_answers_as_it_did(
    make: Callable[[Path], str], kind: str, file: str, tmp_path: Path, engine: Engine
) -> None:
    source, made = repaired_toy(make(tmp_path), tmp_path, engine)
    images = toys(8).images(slice(None))
    before = source.backend.fingerprint()
    written = save_repaired(made, source, tmp_path / "out", images, b"<html>")
    assert source.backend.fingerprint() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [file, "learnt.json", "repair.json", "report.html"]
    )
    record = read_record(tmp_path / "out")
    assert record == written
    assert (record.method, record.model.kind, record.model.file) == ("gym", kind, file)
    assert record.original_sha256 == before
    assert record.model.sha256 != before
    assert (record.input.mean, record.input.std) == ((0.1,), (0.9,))
    for name in ("method", "clean_accuracy_before", "clean_accuracy_after", "attack_success_seen_before", "seconds"):
        assert name in msgspec.json.decode((tmp_path / "out" / "repair.json").read_bytes())

    again = open_model(str(tmp_path / "out"), None, tmp_path)
    assert again.preprocessor == Gym(kernel=1)
    predictor = discover(again.backend, toys(40), again.hints(Hints()))
    assert predictor.spec.mean == (0.1,)
    torch.testing.assert_close(predictor(images), made.predictor(images), atol=1e-5, rtol=0)
    assert (
        float((predictor(images) - discover(source.backend, toys(40), Hints(mean=(0.1,), std=(0.9,)))(images)).abs().max())
        > 1e-4
    )


def test_a_profile_of_it_uses_its_preprocessor(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired_toy(exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    again = open_model(str(tmp_path / "out"), None, tmp_path)
    settings = Settings(frr=0.05, overlays=20)
    calibration = calibrate(
        again.backend, toys(200), settings, hints=again.hints(Hints()), record=again.record, preprocessor=again.preprocessor
    )
    calibration.save(tmp_path / "profile", again.file)
    assert Guard.load(tmp_path / "profile").preprocessor == Gym(kernel=1)


def test_a_folder_that_was_tampered_with_is_refused(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired_toy(exported(tmp_path), tmp_path, engine)
    out = tmp_path / "out"
    save_repaired(made, source, out, toys(8).images(slice(None)))
    with pytest.raises(ModelError, match=r"expected package\.module:factory for --weights"):
        open_model(str(out), tmp_path / "weights.safetensors", tmp_path)
    (out / "model.pt2").write_bytes((tmp_path / "toy.pt2").read_bytes())
    with pytest.raises(RepairError, match="belongs to another model"):
        open_model(str(out), None, tmp_path)
    (out / "repair.json").write_text('{"schema": 99}')
    with pytest.raises(RepairError, match=r"expected repair\.json of schema 1, got 99"):
        open_model(str(out), None, tmp_path)
    (out / "repair.json").write_text('{"schema": 1, "method"')
    with pytest.raises(RepairError, match="damaged"):
        open_model(str(out), None, tmp_path)
    (out / "repair.json").unlink()
    with pytest.raises(ModelError, match="expected a model file, a folder that guard repair wrote"):
        open_model(str(out), None, tmp_path)


def test_what_is_there_stays_when_writing_fails(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = repaired_toy(factory(tmp_path), tmp_path, engine)
    out, images = tmp_path / "out", toys(8).images(slice(None))
    save_repaired(made, source, out, images)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("calibration.repair.folder.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RepairError, match="can't be saved"):
        save_repaired(made, source, out, images)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".out.*"))
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(RepairError, match=r"which holds something else \(thesis\.tex\)"):
        save_repaired(made, source, foreign, images)


def test_a_profile_error_of_a_folder_is_told_as_one_of_a_repair(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired_toy(exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    (tmp_path / "out" / "model.pt2").unlink()
    with pytest.raises(RepairError) as caught:
        open_model(str(tmp_path / "out"), None, tmp_path)
    assert not isinstance(caught.value, ProfileError)


def test_the_folder_knows_what_was_learnt_from(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired_toy(exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    learnt = open_model(str(tmp_path / "out"), None, tmp_path).learnt
    assert int(toys(200).among(learnt).sum()) == made.figures.clean_images - made.figures.held_out_clean
    assert not bool(toys(200, seed=7).among(learnt).any())
    (tmp_path / "out" / "learnt.json").write_text("[1")
    with pytest.raises(RepairError, match=r"learnt\.json is damaged"):
        open_model(str(tmp_path / "out"), None, tmp_path)
    (tmp_path / "out" / "learnt.json").unlink()  # as of a folder from elsewhere
    assert open_model(str(tmp_path / "out"), None, tmp_path).learnt == frozenset()


def test_only_the_original_is_taken_for_a_tripwire(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired_toy(exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    again, original, other = open_model(str(tmp_path / "out"), None, tmp_path), str(tmp_path / "toy.pt2"), factory(tmp_path)
    assert open_tripwire(original, None, tmp_path, Hints(), again)[0].backend.fingerprint() == source.backend.fingerprint()
    with pytest.raises(ModelError, match="expected the model that was repaired as the tripwire, got another"):
        open_tripwire(other, None, tmp_path, Hints(), again)
    for answers, advice in (
        (again, "pass the model that it was made from"),
        (source, "swap the two: MODEL is the repaired one"),
    ):
        with pytest.raises(ModelError, match=f"expected the original of a repaired model .* got a repaired one, .*: {advice}"):
            open_tripwire(str(tmp_path / "out"), None, tmp_path, Hints(), answers)
    with pytest.raises(ModelError, match="got the same model twice"):
        open_tripwire(original, None, tmp_path, Hints(), source)
