"""Activation filters in a calibration: what they catch, on which images they are made, and which scans are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration import Calibration, Hints, Settings, calibrate, evaluate
from calibration.calibrate import Tripwire
from calibration.data import digests
from calibration.evaluation import judge
from calibration.filters import FoundTrigger, infected_triggers
from calibration.statistics import proportion
from calibration.thresholds import joint_rate
from cli.demonstration.digits import ATTACK, Digits
from guard import Guard, load_profile
from guard.detectors import ActivationFilter, excited_neurons
from guard.errors import CalibrationError, InspectionError, ModelError, ProfileError
from guard.predictors import Predictor, load_backend, wrap
from guard.predictors.activations import activations
from guard.profile import ModelRecord
from guard.records import ActivationFilterRecord
from tests.guard.models import save_exported, save_torchscript
from tests.scans import corner, write_scan
from tests.toy import SPEC

FILTER = Settings(detectors=(), overlays=100, frr=0.02)
MIX = Settings(detectors=("strip", "feature-squeezing"), overlays=20, frr=0.06)


@pytest.fixture(scope="module")
def triggers(backdoored: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[FoundTrigger, ...]:
    backend = wrap(backdoored)
    return infected_triggers(write_scan(tmp_path_factory.mktemp("scans") / "scan", backend, {7: corner()}), backend)


@pytest.fixture(scope="module")
def mixed(digits: Digits, backdoored: nn.Module, triggers: tuple[FoundTrigger, ...]) -> Calibration:
    return calibrate(backdoored, digits.clean, MIX, triggers=triggers)


def rejected(guard: Guard, images: Tensor) -> int:
    return sum(not verdict.accepted for verdict in guard(images))


def check_rate(calibration: Calibration, digits: Digits) -> None:
    """Fresh clean images are rejected no more often than promised, give or take what 500 images tell."""
    asked = joint_rate(calibration.thresholds)
    measured = proportion(rejected(calibration.guard(), digits.test.images(slice(None))), len(digits.test))
    assert measured.low <= asked.value <= asked.high
    assert asked.low <= measured.high
    assert measured.value <= asked.high


def test_a_filter_rejects_the_trigger_and_keeps_the_rate(
    digits: Digits, backdoored: nn.Module, triggers: tuple[FoundTrigger, ...]
) -> None:
    made = calibrate(backdoored, digits.clean, FILTER, triggers=triggers)
    figures = evaluate(made.guard(), digits.test, digits.triggered, ATTACK.target_label)
    assert figures.attack_success_rate is not None
    assert figures.guarded_attack_success_rate is not None
    assert figures.auroc is not None
    assert figures.attack_success_rate.value >= 0.95
    assert figures.guarded_attack_success_rate.value <= 0.01
    assert figures.auroc.value >= 0.99
    check_rate(made, digits)
    (verdict,) = made.guard()(digits.triggered.images(slice(0, 1)))
    assert (verdict.rejected_by, verdict.passes) == ("activation-filter-7", 1)


def test_the_neurons_are_chosen_on_images_that_set_no_threshold(
    digits: Digits, backdoored: nn.Module, mixed: Calibration
) -> None:
    model = Predictor(wrap(backdoored), SPEC, 10, "logits")
    overlays = mixed.strips[0].overlays
    clean, excited = (activations(model, images, "penultimate") for images in (overlays, ATTACK.trigger(overlays)))
    detector = mixed.parts[-1].detector
    assert isinstance(detector, ActivationFilter)
    assert detector.neurons.tolist() == excited_neurons(clean, excited, 10 / 64).tolist()
    assert {part.threshold.images for part in mixed.parts} == {len(digits.clean) - 20}
    alone = calibrate(backdoored, digits.clean, Settings(overlays=20, frr=0.06))
    assert set(digests(alone.strips[0].overlays)) == set(digests(overlays))


def test_all_detectors_share_the_rate_and_each_is_told(digits: Digits, mixed: Calibration) -> None:
    names = ["strip", "feature-squeezing", "activation-filter-7"]
    assert [part.detector.name for part in mixed.parts] == [record.title for record in mixed.profile.detectors] == names
    assert [threshold.frr for threshold in mixed.thresholds] == pytest.approx([0.02] * 3)
    for part in mixed.parts:
        assert part.threshold.rank == 11  # floor(.02 * 578)
        assert (part.scores >= np.float32(part.threshold.value)).sum() < 11
    check_rate(mixed, digits)
    guard = mixed.guard()
    triggered = digits.triggered.images(slice(0, 50))
    verdicts = guard(triggered)
    assert [finding.detector for finding in verdicts[0].findings] == names
    assert sum(verdict.findings[2].suspicious for verdict in verdicts) >= 48
    assert sum(verdict.findings[1].suspicious for verdict in verdicts) == 0  # squeezing is blind to a patch
    assert (mixed.most_passes, max(verdict.passes for verdict in verdicts)) == (25, 25)


def test_full_scores_give_the_verdicts_of_a_mix(digits: Digits, mixed: Calibration) -> None:
    guard = mixed.guard()
    for images in (digits.test, digits.triggered):
        some = images.select(torch.arange(150))
        seen = judge(guard, some, "")
        assert seen.rejected.tolist() == [not verdict.accepted for verdict in guard(some.images(slice(None)))]
        assert seen.rejected.tolist() == (seen.scores >= 0.0).tolist()


def test_a_mix_survives_the_disk(tmp_path: Path, digits: Digits, backdoored: nn.Module, mixed: Calibration) -> None:
    mixed.save(tmp_path / "profile")
    profile, _ = load_profile(tmp_path / "profile")
    assert profile.detectors == mixed.profile.detectors
    assert isinstance(profile.detectors[-1], ActivationFilterRecord)
    assert len(profile.detectors[-1].neurons) == 10
    images = torch.cat([digits.test.images(slice(0, 60)), digits.triggered.images(slice(0, 60))])
    assert Guard.load(tmp_path / "profile", backdoored)(images) == mixed.guard()(images)

    def predict(batch: Tensor) -> Tensor:
        answers: Tensor = backdoored(batch)
        return answers

    with pytest.raises(ProfileError, match=r"does not fit this model: expected a model whose layers can be watched"):
        Guard.load(tmp_path / "profile", predict)


def test_each_infected_label_gets_a_filter(tmp_path: Path, digits: Digits, backdoored: nn.Module) -> None:
    threes = digits.clean.images(digits.clean.known_labels == 3).mean(dim=0)
    backend = wrap(backdoored)
    scan = write_scan(tmp_path / "scan", backend, {3: (torch.full((8, 8), 0.9), threes), 7: corner()})
    made = calibrate(backdoored, digits.clean, FILTER, triggers=infected_triggers(scan, backend))
    assert [part.detector.name for part in made.parts] == ["activation-filter-3", "activation-filter-7"]
    assert [threshold.frr for threshold in made.thresholds] == [0.01, 0.01]
    found = {verdict.rejected_by for verdict in made.guard()(digits.triggered.images(slice(0, 50)))}
    assert "activation-filter-7" in found
    assert rejected(made.guard(), digits.triggered.images(slice(0, 50))) >= 48
    check_rate(made, digits)


def test_a_profile_of_a_loaded_file_is_used_with_it(tmp_path: Path, digits: Digits, backdoored: nn.Module) -> None:
    """As docs/detectors.md has it: what `load_backend` returned was taken for a function without layers."""
    model = load_backend(save_exported(backdoored, tmp_path / "model.pt2"))
    scan = write_scan(tmp_path / "scan", model, {7: corner()})
    calibrate(model, digits.clean, FILTER, triggers=infected_triggers(scan, model)).save(tmp_path / "profile")
    guard = Guard.load(tmp_path / "profile", model)
    assert guard.predictor.backend is model
    assert rejected(guard, digits.triggered.images(slice(0, 50))) >= 48


def test_modules_are_named_as_they_are(tmp_path: Path, backdoored: nn.Module) -> None:
    scan = write_scan(tmp_path / "scan", wrap(backdoored), {7: corner()})
    assert [item.name for item in infected_triggers(scan, backdoored)] == ["7"]
    with pytest.raises(ModelError, match=r"expected an nn\.Module or a function of a batch, got str"):
        infected_triggers(scan, "model.pt2")


def test_a_filter_looks_at_the_tripwire(
    digits: Digits, backdoored: nn.Module, clean_twin: nn.Module, triggers: tuple[FoundTrigger, ...]
) -> None:
    original = Tripwire(wrap(backdoored), ModelRecord(kind="module", output="logits", num_classes=10), Hints())
    made = calibrate(clean_twin, digits.clean, FILTER, tripwire=original, triggers=triggers)
    images = digits.triggered.images(slice(0, 100))
    verdicts = made.guard()(images)
    assert sum(verdict.suspicious for verdict in verdicts) >= 98
    assert [verdict.label_index for verdict in verdicts] == clean_twin(images).argmax(dim=1).tolist()


def test_scans_that_are_refused(tmp_path: Path, backdoored: nn.Module, clean_twin: nn.Module) -> None:
    backend = wrap(backdoored)
    scan = write_scan(tmp_path / "scan", backend, {7: corner()})
    with pytest.raises(InspectionError, match=r"is of another model \(SHA-256 differs\): scan the one that detects"):
        infected_triggers(scan, wrap(clean_twin))
    with pytest.raises(InspectionError, match="found no infected label, so there is no trigger to filter"):
        infected_triggers(write_scan(tmp_path / "clean", backend, {}), backend)
    with pytest.raises(InspectionError, match="found no infected label, only pairs of labels, so"):
        infected_triggers(write_scan(tmp_path / "pairs", backend, {}, infected_pair=True), backend)
    with pytest.raises(InspectionError, match=r"expected a scan's folder with scan\.json"):
        infected_triggers(tmp_path, backend)


@pytest.mark.parametrize("damage", ["no file", "no array", "no such label", "a mask of another size", "no number"])
def test_triggers_that_are_damaged(damage: str, tmp_path: Path, backdoored: nn.Module) -> None:
    backend = wrap(backdoored)
    file = write_scan(tmp_path / "scan", backend, {7: corner()}) / "triggers.safetensors"
    arrays = load_file(file)
    file.unlink()
    if damage == "no array":
        del arrays["labels.patterns"]
    elif damage == "no such label":
        arrays["labels.labels"] += 10
    elif damage == "a mask of another size":
        arrays["labels.masks"] = arrays["labels.masks"][:, 1:].contiguous()
    elif damage == "no number":
        arrays["labels.masks"][7, 0, 0] = torch.nan
    if damage != "no file":
        save_file(arrays, file)
    with pytest.raises(InspectionError, match=r"triggers\.safetensors.*: scan again") as raised:
        infected_triggers(tmp_path / "scan", backend)
    assert "\n" not in str(raised.value)


def test_triggers_that_do_not_work(digits: Digits, backdoored: nn.Module, triggers: tuple[FoundTrigger, ...]) -> None:
    (trigger,) = triggers
    other = FoundTrigger(4, trigger.mask, trigger.pattern)
    with pytest.raises(CalibrationError, match=r"sends clean images to label 4, got one that sends \d%: calibrate with"):
        calibrate(backdoored, digits.clean, FILTER, triggers=[other])
    small = FoundTrigger(7, trigger.mask[1:], trigger.pattern[:, 1:])
    with pytest.raises(CalibrationError, match=r"expected triggers of shape \(1, 8, 8\), got \(1, 7, 8\)"):
        calibrate(backdoored, digits.clean, FILTER, triggers=[small])


def test_models_that_can_not_be_looked_into(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, triggers: tuple[FoundTrigger, ...]
) -> None:
    with pytest.raises(ModelError, match=r"layers can be watched, got one of kind torchscript: pass package\.module:factory"):
        calibrate(load_backend(save_torchscript(backdoored, tmp_path / "m.pt")), digits.clean, FILTER, triggers=triggers)


def test_several_detectors_need_more_images(digits: Digits, backdoored: nn.Module, triggers: tuple[FoundTrigger, ...]) -> None:
    few = digits.clean.select(torch.arange(250))
    message = r"0\.01 for 2 detectors together needs at least 199 .* besides the overlays, got 150: .*, or use fewer detectors"
    with pytest.raises(CalibrationError, match=message):
        calibrate(backdoored, few, Settings(), triggers=triggers)


def test_a_second_trigger_of_a_label_has_a_filter_of_its_own(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, triggers: tuple[FoundTrigger, ...]
) -> None:
    backend = wrap(backdoored)
    both = infected_triggers(write_scan(tmp_path / "scan", backend, {7: corner()}, further=[(7, corner())]), backend)
    assert [trigger.name for trigger in both] == ["7", "7-2"]
    made = calibrate(backdoored, digits.clean, FILTER, triggers=both)
    names = ("activation-filter-7", "activation-filter-7-2")
    assert tuple(part.detector.name for part in made.parts) == names
    made.save(tmp_path / "profile")
    assert tuple(record.title for record in load_profile(tmp_path / "profile")[0].detectors) == names
    assert rejected(Guard.load(tmp_path / "profile", backdoored), digits.triggered.images(slice(0, 100))) >= 98
