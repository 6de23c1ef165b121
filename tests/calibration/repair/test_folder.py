"""A repaired model on disk: the kind that went in comes out, is accepted as MODEL, and brings along what it needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from calibration import Hints, ImageSet, Settings, calibrate
from calibration.checkpoints import Checkpoints
from calibration.data import digests
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import clean_parts, load_quarantined, quarantined_parts
from calibration.repair.cyclegan import Training
from calibration.repair.folder import save_repaired
from calibration.repair.record import read_record
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from calibration.repair.work import repair_into
from calibration.sources import ModelSource, open_model, open_tripwire
from guard import Guard, Predictor, Quarantine
from guard.errors import CalibrationError, InputError, ModelError, ProfileError, QuarantineError, RepairError
from guard.predictors import wrap
from guard.preprocessors import Gym
from tests.guard.models import save_exported, save_onnx, save_torchscript
from tests.toy import SPEC, LearningToy, toy_images


def _factory(folder: Path) -> str:
    return "tests.toy:LearningToy"


def _scripted(folder: Path) -> str:
    return str(save_torchscript(LearningToy(), folder / "toy.pt"))


def _exported(folder: Path) -> str:
    return str(save_exported(LearningToy(), folder / "toy.pt2"))


def _exported_for_batches_of_fifty(folder: Path) -> str:
    return str(save_exported(LearningToy(), folder / "toy.pt2", batch=50))


KINDS = [
    (_factory, "module", "model.safetensors"),
    (_scripted, "torchscript", "model.pt"),
    (_exported, "torch-export", "model.pt2"),
    (_exported_for_batches_of_fifty, "torch-export", "model.pt2"),
]


def toys(count: int, labelled: bool = True, seed: int = 0) -> ImageSet:
    images, labels = toy_images(count, seed=seed)
    return ImageSet((images * 255).round().to(torch.uint8), labels if labelled else None)


def repaired(name: str, folder: Path, engine: Engine, labelled: bool = True) -> tuple[ModelSource, Repaired]:
    """Tuned for GYM, for a moment."""
    source = open_model(name, None, folder)
    clean = toys(200, labelled)
    settings = RepairSettings(method="gym", epochs=2, max_accuracy_drop=100.0)
    predictor = discover(source.backend, clean, Hints(mean=(0.1,), std=(0.9,)))
    return source, repair(predictor, clean, settings, engine=engine)


@pytest.mark.parametrize(("make", "kind", "file"), KINDS)
def test_the_same_kind_comes_out_and_answers_as_it_did(
    make: Callable[[Path], str], kind: str, file: str, tmp_path: Path, engine: Engine
) -> None:
    source, made = repaired(make(tmp_path), tmp_path, engine)
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
    source, made = repaired(_exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    again = open_model(str(tmp_path / "out"), None, tmp_path)
    settings = Settings(frr=0.05, overlays=20)
    calibration = calibrate(
        again.backend, toys(200), settings, hints=again.hints(Hints()), record=again.record, preprocessor=again.preprocessor
    )
    calibration.save(tmp_path / "profile", again.file)
    assert Guard.load(tmp_path / "profile").preprocessor == Gym(kernel=1)


def test_without_labels_agreement_stands_in_for_accuracy(tmp_path: Path, engine: Engine) -> None:
    _, made = repaired(_factory(tmp_path), tmp_path, engine, labelled=False)
    assert made.figures.clean_accuracy_before is None
    assert made.figures.clean_accuracy_after is None
    assert 0.0 < made.figures.agreement <= 1.0
    assert made.figures.drop == pytest.approx(100.0 * (1.0 - made.figures.agreement))


def test_a_repair_that_costs_too_much_is_refused_with_the_drop_and_the_option(tmp_path: Path, engine: Engine) -> None:
    _, made = repaired(_factory(tmp_path), tmp_path, engine)
    figures = msgspec.structs.replace(made.figures, clean_accuracy_before=0.95, clean_accuracy_after=0.9)
    dear = Repaired(made.predictor, made.preprocessor, figures, RepairSettings(method="codefend"))
    with pytest.raises(
        RepairError, match=r"costs 5\.0 points .* \(95\.0% to 90\.0%, 40 held-out.*allow it with --max-accuracy-drop 5"
    ):
        dear.check()
    Repaired(made.predictor, made.preprocessor, figures, RepairSettings(method="gym")).check()  # 12 are allowed
    with pytest.raises(RepairError, match="more than --max-accuracy-drop 4"):
        Repaired(made.predictor, None, figures, RepairSettings(method="gym", max_accuracy_drop=4.0)).check()


def test_a_folder_that_was_tampered_with_is_refused(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired(_exported(tmp_path), tmp_path, engine)
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
    source, made = repaired(_factory(tmp_path), tmp_path, engine)
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


@pytest.mark.parametrize("images", [10, 49])
def test_too_few_images(images: int, engine: Engine, tmp_path: Path) -> None:
    source = open_model(_factory(tmp_path), None, tmp_path)
    predictor = discover(source.backend, toys(60))
    with pytest.raises(RepairError, match=f"expected at least 50 clean images to repair with, got {images}"):
        repair(predictor, toys(images), RepairSettings(method="gym"), engine=engine)
    few = toys(20, seed=7).images(slice(None))
    with pytest.raises(RepairError, match="expected at least 30 quarantined images to learn the trigger from, got 20"):
        repair(predictor, toys(60), RepairSettings(method="codefend"), few, engine=engine)
    with pytest.raises(RepairError, match="expected --quarantine DIR for codefend"):
        repair(predictor, toys(60), RepairSettings(method="codefend"), engine=engine)


def test_onnx_can_not_be_repaired_and_the_error_says_what_to_pass(tmp_path: Path, engine: Engine) -> None:
    source = open_model(str(save_onnx(tmp_path / "toy.onnx", SPEC)), None, tmp_path)
    predictor = discover(source.backend, toys(60))
    with pytest.raises(
        ModelError, match=r"expected a model that can be fine-tuned \(a factory of an nn\.Module.*got a model of kind onnx"
    ):
        repair(predictor, toys(60), RepairSettings(method="gym"), engine=engine)


def test_a_profile_error_of_a_folder_is_told_as_one_of_a_repair(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired(_exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    (tmp_path / "out" / "model.pt2").unlink()
    with pytest.raises(RepairError) as caught:
        open_model(str(tmp_path / "out"), None, tmp_path)
    assert not isinstance(caught.value, ProfileError)


def test_labels_that_are_not_the_models_are_refused_before_any_work(tmp_path: Path, engine: Engine) -> None:
    source = open_model(_factory(tmp_path), None, tmp_path)
    predictor = discover(source.backend, toys(60))
    settings = RepairSettings(method="gym", epochs=1)
    images = toys(80)
    only_two = ImageSet(images.pixels, images.known_labels % 2, ("south-west", "south-east"))
    with pytest.raises(CalibrationError, match="expected 4 class folders, one per output of the model, got 2"):
        repair(predictor, only_two, settings, engine=engine)
    with pytest.raises(ModelError, match="expected a model with more than 6 outputs for these labels, got 4"):
        repair(predictor, ImageSet(images.pixels, images.known_labels + 3), settings, engine=engine)
    with pytest.raises(RepairError, match=r"near chance \(0\.0% right\)"):
        repair(predictor, ImageSet(images.pixels, (images.known_labels + 1) % 4), settings, engine=engine)


class NotANumber(LearningToy):
    """Its gradients are NaN."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = super().forward(images)
        return answers + 0.0 * self.learned.weight.sum().square().sqrt()


def test_a_training_that_fails_is_no_repair(engine: Engine, tmp_path: Path) -> None:
    predictor = Predictor(wrap(NotANumber()), SPEC, 4, "logits")
    with pytest.raises(ModelError, match="its loss is not a number"):
        repair(predictor, toys(120), RepairSettings(method="gym", epochs=2), engine=engine)


def test_allowances_that_are_no_points() -> None:
    with pytest.raises(RepairError, match="expected --max-accuracy-drop as points, got inf"):
        RepairSettings(method="gym", max_accuracy_drop=math.inf)


def test_three_images_of_a_hundred_are_three_points(tmp_path: Path, engine: Engine) -> None:
    _, made = repaired(_factory(tmp_path), tmp_path, engine)
    figures = msgspec.structs.replace(made.figures, clean_accuracy_before=0.97, clean_accuracy_after=0.94)
    Repaired(made.predictor, None, figures, RepairSettings(method="codefend")).check()


def test_images_that_are_too_small_for_codefend_are_told(engine: Engine) -> None:
    spec = msgspec.structs.replace(SPEC, height=7, width=7)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(49, 4)).eval()
    predictor = Predictor(wrap(net), spec, 4, "logits")
    images = ImageSet(torch.randint(0, 255, (120, 1, 7, 7), dtype=torch.uint8))
    with pytest.raises(RepairError, match="expected images of at least 8x8 pixels for codefend, got 7x7"):
        repair(
            predictor,
            images.select(torch.arange(80)),
            RepairSettings(method="codefend"),
            images.images(slice(80, None)),
            engine=engine,
        )


def test_equal_images_count_once(tmp_path: Path, engine: Engine) -> None:
    predictor = discover(open_model(_factory(tmp_path), None, tmp_path).backend, toys(60))
    images = toys(40).images(slice(None))
    parts = quarantined_parts(images.repeat(5, 1, 1, 1), predictor, 0)
    assert len(parts) == 40
    learnt = {image.numpy().tobytes() for part in (parts.tuning, parts.stopping) for image in part.images}
    assert not [image for image in parts.held_out.images if image.numpy().tobytes() in learnt]
    with pytest.raises(RepairError, match="got 10 different ones that are not among the clean images, of 90: serve on"):
        quarantined_parts(images[:10].repeat(9, 1, 1, 1), predictor, 0)


def test_equal_clean_images_count_once(tmp_path: Path, engine: Engine) -> None:
    predictor = discover(open_model(_factory(tmp_path), None, tmp_path).backend, toys(60))
    twice = toys(60)
    twice = ImageSet(twice.pixels.repeat(2, 1, 1, 1), twice.known_labels.repeat(2))
    parts = clean_parts(twice, predictor, 0)
    assert len(parts) == 60
    learnt = set(digests(torch.cat([parts.tuning.images, parts.stopping.images])))
    assert learnt.isdisjoint(digests(parts.held_out.images))
    with pytest.raises(RepairError, match="got 30 different ones among 120: add images"):
        clean_parts(ImageSet(twice.pixels[:30].repeat(4, 1, 1, 1)), predictor, 0)


def test_clean_images_in_a_quarantine_are_known_to_be_false_alarms(tmp_path: Path, engine: Engine) -> None:
    predictor = discover(open_model(_factory(tmp_path), None, tmp_path).backend, toys(60))
    clean, rejected = digests(toys(60).images(slice(None))), toys(40, seed=7).images(slice(None))
    mixed = torch.cat([rejected, toys(30).images(slice(None))])
    parts = quarantined_parts(mixed, predictor, 0, frozenset(clean))
    found = digests(torch.cat([parts.tuning.images, parts.stopping.images, parts.held_out.images]))
    assert sorted(found) == sorted(digests(rejected))


def test_the_folder_knows_what_was_learnt_from(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired(_exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    learnt = open_model(str(tmp_path / "out"), None, tmp_path).learnt
    assert int(toys(200).among(learnt).sum()) == made.figures.clean_images - made.figures.held_out_clean
    assert not bool(toys(200, seed=7).among(learnt).any())
    (tmp_path / "out" / "learnt.json").write_text("[1")
    with pytest.raises(RepairError, match=r"learnt\.json is damaged"):
        open_model(str(tmp_path / "out"), None, tmp_path)
    (tmp_path / "out" / "learnt.json").unlink()  # as of a folder from elsewhere
    assert open_model(str(tmp_path / "out"), None, tmp_path).learnt == frozenset()


def test_what_can_not_be_used_of_a_quarantine_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuarantineError, match="got an empty folder: nothing was rejected yet"):
        load_quarantined(tmp_path, (1, 8, 8))
    quarantine = Quarantine(tmp_path)
    for image in (torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), float("nan")), torch.full((1, 9, 9), 0.5)):
        quarantine.add(image, detector="strip", score=-0.01, threshold=-0.1, label_index=1, label="1")
    with pytest.raises(InputError, match=r"(NaN or Inf|is it another model's).*or pass --skip-unreadable"):
        load_quarantined(tmp_path, (1, 8, 8))
    found = load_quarantined(tmp_path, (1, 8, 8), skip_unreadable=True)
    assert len(found) == 1
    assert sorted(reason[:23] for _, reason in found.skipped) == ["expected finite pixels,", "expected quarantined im"]


def test_a_refused_repair_need_not_be_done_again(tmp_path: Path, engine: Engine) -> None:
    source, clean = open_model(_exported(tmp_path), None, tmp_path), toys(100)
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
    source, clean = open_model(_exported(tmp_path), None, tmp_path), toys(100)
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
    source, made = repaired(_exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    again = open_model(str(tmp_path / "out"), None, tmp_path)
    predictor = discover(again.backend, toys(60), again.hints(Hints()))
    with pytest.raises(RepairError, match="expected a model that was not repaired yet, got one that was: repair its original"):
        repair_into(tmp_path / "twice", again, predictor, toys(60), RepairSettings(method="gym"), None, engine)


def test_only_the_original_is_taken_for_a_tripwire(tmp_path: Path, engine: Engine) -> None:
    source, made = repaired(_exported(tmp_path), tmp_path, engine)
    save_repaired(made, source, tmp_path / "out", toys(8).images(slice(None)))
    again, original, other = open_model(str(tmp_path / "out"), None, tmp_path), str(tmp_path / "toy.pt2"), _factory(tmp_path)
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
