from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from guard import CalibratedDetector, Guard, Policy, Quarantine
from guard.detectors import Blend, Strip
from guard.errors import CalibrationError, InputError, ModelError
from guard.predictors.predictor import ACTIVATIONS_PER_INPUT
from guard.preprocessors import Gym, Preprocessor
from tests.export.profiles import onnx_profile
from tests.guard.guards import REJECTED, Scripted, detector, guarded, mixed, nan_when_dark, raises, with_detector
from tests.guard.models import predict_function, predictor, save_onnx
from tests.toy import ENTROPY_THRESHOLD, NAMES, SPEC, TARGET, ToyNet, toy_images, toy_trigger

# --- verdicts ---


def test_triggered_images_are_rejected_and_clean_ones_answered() -> None:
    images = mixed()
    before = images.clone()
    verdicts = guarded()(images)
    labels = ToyNet()(images).argmax(dim=1).tolist()
    assert [row for row, verdict in enumerate(verdicts) if not verdict.accepted] == REJECTED
    assert [verdict.label_index for verdict in verdicts] == labels
    assert torch.equal(images, before)


def test_what_a_verdict_says() -> None:
    images = mixed()
    probabilities = ToyNet()(images).softmax(dim=1)
    clean, bad = guarded()(images)[:2]
    assert (clean.verdict, clean.accepted, clean.suspicious, clean.reason, clean.failed) == (
        "accepted",
        True,
        False,
        None,
        False,
    )
    assert clean.label == NAMES[0]
    assert clean.probability == pytest.approx(float(probabilities[0].max()), abs=1e-6)
    assert clean.probabilities == pytest.approx(probabilities[0].tolist(), abs=1e-6)
    assert clean.rejected_by is None
    assert clean.quarantined is None
    assert (bad.verdict, bad.accepted, bad.suspicious, bad.reason) == ("rejected", False, True, "backdoor-suspected")
    assert (bad.label_index, bad.rejected_by, bad.failed) == (TARGET, "strip", False)
    finding = bad.finding("strip")
    assert finding is not None
    assert finding.score >= finding.threshold == -ENTROPY_THRESHOLD
    assert (finding.exact, finding.suspicious, finding.passes, bad.passes) == (True, True, 40, 40)
    assert clean.passes < 40
    assert clean.finding("other") is None


def test_verdicts_are_those_of_the_images_alone() -> None:
    images = mixed()
    guard = guarded()
    together = guard(images)
    for row, image in enumerate(images):
        alone = guard(image[None])[0]
        assert (alone.accepted, alone.label_index, alone.reason) == (
            together[row].accepted, together[row].label_index, together[row].reason,
        )  # fmt: skip


def test_labels_only() -> None:
    spec = msgspec.structs.replace(SPEC, container="numpy")
    answers = predictor(predict_function(spec, "labels"), spec, "labels")
    verdict = Guard(answers, [detector(answers)])(mixed())[2]
    assert (verdict.label_index, verdict.label, verdict.probability, verdict.probabilities) == (2, NAMES[2], None, ())


def test_without_detectors_everything_is_answered() -> None:
    assert all(verdict.accepted and verdict.findings == () for verdict in Guard(predictor(), [])(mixed()))


def test_any_detector_may_reject_and_the_first_is_named() -> None:
    images = mixed()
    bright = CalibratedDetector(Scripted(lambda images: images.amax(dim=(1, 2, 3)), "bright"), 2.0)
    fires = CalibratedDetector(Scripted(lambda images: torch.ones(len(images)), "always"), 0.5)
    verdicts = Guard(predictor(), [bright, detector(), fires])(images)
    assert not any(verdict.accepted for verdict in verdicts)
    assert [verdict.rejected_by for verdict in verdicts] == ["always", "strip"] * 4
    assert [[finding.detector for finding in verdict.findings] for verdict in verdicts[:1]] == [["bright", "strip", "always"]]


def test_the_tripwire_answers_with_the_repaired_model() -> None:
    """The suspicious model stays the detector's; another one answers."""
    repaired = predictor(lambda images: ToyNet()(images.clamp_max(0.9)))
    verdicts = Guard(repaired, [detector()], policy=Policy(mode="monitor"))(mixed())
    assert [row for row, verdict in enumerate(verdicts) if verdict.suspicious] == REJECTED
    assert any(verdict.label_index != TARGET for verdict in verdicts if verdict.suspicious)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(0, 1, 8, 8),
        torch.zeros(1, 8, 8),
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 8, 9),
        torch.full((1, 1, 8, 8), 2.0),
        torch.full((1, 1, 8, 8), math.nan),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        np.zeros((1, 1, 8, 8), np.float32),
    ],
)
def test_what_is_not_the_models_input_is_an_error(images: Any) -> None:
    with pytest.raises(InputError):
        guarded()(images)


# --- policy ---


def test_monitoring_never_blocks_and_still_sees(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    verdicts = guarded(policy=Policy(mode="monitor"), quarantine=quarantine)(mixed())
    assert all(verdict.accepted for verdict in verdicts)
    assert [row for row, verdict in enumerate(verdicts) if verdict.suspicious] == REJECTED
    assert all(verdict.reason is None for verdict in verdicts)
    assert len(quarantine.items()) == 4


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
@pytest.mark.parametrize("on_error", ["reject", "accept"])
def test_a_failing_detector(mode: Any, on_error: Any, caplog: pytest.LogCaptureFixture) -> None:
    guard = with_detector(raises, policy=Policy(mode=mode, on_error=on_error))
    verdicts = guard(mixed(3))
    assert [verdict.accepted for verdict in verdicts] == [mode == "monitor" or on_error == "accept"] * 3
    assert {verdict.reason for verdict in verdicts} == {"guard-failed"}
    assert all(verdict.failed and not verdict.suspicious and math.isnan(verdict.findings[0].score) for verdict in verdicts)
    assert all(verdict.label_index is not None for verdict in verdicts)
    assert "detector scripted failed: RuntimeError: out of memory" in caplog.text


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_error", ["reject", "accept"])
def test_a_score_that_is_not_finite_is_never_a_clean_one(score: float, on_error: Any) -> None:
    verdict = with_detector(lambda images: torch.full((len(images),), score), policy=Policy(on_error=on_error))(mixed(1))[0]
    assert (verdict.accepted, verdict.reason) == (on_error == "accept", "guard-failed")


@pytest.mark.parametrize("rows", [0, 99])
def test_a_detector_that_forgets_rows_has_failed(rows: int) -> None:
    verdicts = with_detector(lambda images: torch.full((rows,), -1.0))(mixed(3))
    assert [verdict.reason for verdict in verdicts] == ["guard-failed"] * 3


def test_one_detector_may_fail_while_another_rejects() -> None:
    guard = Guard(predictor(), [CalibratedDetector(Scripted(raises), 0.0), detector()], policy=Policy(on_error="accept"))
    verdicts = guard(mixed())
    assert [row for row, verdict in enumerate(verdicts) if not verdict.accepted] == REJECTED
    assert {verdict.reason for verdict in verdicts} == {"guard-failed", "backdoor-suspected"}


@pytest.mark.parametrize("policy", [Policy(), Policy(mode="monitor"), Policy(on_error="accept")])
def test_a_failing_model_gives_no_answer_whatever_the_policy(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    verdicts = guarded(predictor(raises), policy=policy)(mixed(2))
    for verdict in verdicts:
        assert (verdict.accepted, verdict.reason, verdict.failed) == (False, "model-failed", True)
        assert (verdict.label_index, verdict.label, verdict.probability, verdict.probabilities) == (None, None, None, ())
    assert verdicts[1].suspicious
    assert "the model failed" in caplog.text


def fails_when_dark(images: Tensor) -> Tensor:
    if bool((images.amax(dim=(1, 2, 3)) == 0).any()):
        raise RuntimeError("I hate the dark")
    logits: Tensor = ToyNet()(images)
    return logits


@pytest.mark.parametrize("model", [fails_when_dark, nan_when_dark])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_bad_image_does_not_take_its_neighbours_down(model: Callable[[Tensor], Tensor], place: int) -> None:
    images, labels = toy_images(5, seed=6)
    images[place] = 0.0
    verdicts = guarded(predictor(model))(images)
    for row, verdict in enumerate(verdicts):
        assert verdict.accepted == (row != place)
        assert verdict.label_index == (None if row == place else int(labels[row]))
    assert verdicts[place].reason == "model-failed"


def test_one_image_that_breaks_the_detector_is_judged_alone() -> None:
    def breaks(images: Tensor) -> Tensor:
        if bool((images.amax(dim=(1, 2, 3)) == 0).any()):
            raise RuntimeError("no")
        return torch.full((len(images),), -1.0)

    images, _ = toy_images(4, seed=6)
    images[1] = 0.0
    assert [verdict.reason for verdict in with_detector(breaks)(images)] == [None, "guard-failed", None, None]


def test_nan_in_one_pass_of_the_detectors_model_rejects() -> None:
    answers = predictor(lambda images: torch.where(images[:, :1, 0, 0] > 0.9, torch.nan, ToyNet()(images)))
    verdicts = Guard(predictor(), [detector(answers)])(torch.full((1, 1, 8, 8), 0.89))
    assert (verdicts[0].accepted, verdicts[0].reason) == (False, "guard-failed")


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_thresholds_that_decide_nothing(threshold: float) -> None:
    with pytest.raises(CalibrationError, match="expected a finite threshold"):
        CalibratedDetector(Scripted(raises), threshold)


def test_a_failing_preprocessor_gives_no_answer() -> None:
    def broken(images: Tensor, generator: torch.Generator) -> Tensor:
        raise RuntimeError("no")

    verdicts = guarded(preprocessor=broken)(mixed(2))
    assert [verdict.reason for verdict in verdicts] == ["model-failed"] * 2
    assert not any(verdict.accepted for verdict in verdicts)


def test_failures_reach_the_log_as_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "guard"):
        guarded(predictor(raises))(mixed(1))
    assert all("\n" not in record.getMessage() for record in caplog.records)


# --- quarantine ---


def test_what_is_suspicious_is_kept_as_it_arrived(tmp_path: Path) -> None:
    images = mixed()
    quarantine = Quarantine(tmp_path)
    verdicts = guarded(quarantine=quarantine, preprocessor=Gym())(images)
    items = quarantine.items()
    assert [verdict.quarantined for verdict in verdicts if verdict.quarantined] == [item.id for item in items]
    assert [row for row, verdict in enumerate(verdicts) if verdict.quarantined] == REJECTED
    for item, row in zip(items, REJECTED, strict=True):
        assert torch.equal(quarantine.image(item), images[row])
        assert item.detector == "strip"
        assert item.score >= item.threshold


def test_a_model_that_writes_into_its_input_does_not_spoil_the_evidence(tmp_path: Path) -> None:
    def spoils(images: Tensor) -> Tensor:
        logits: Tensor = ToyNet()(images.clone())
        images.zero_()
        return logits

    images = mixed()
    before = images.clone()
    quarantine = Quarantine(tmp_path)
    guarded(predictor(spoils), quarantine=quarantine)(images)
    assert torch.equal(images, before)
    assert torch.equal(quarantine.image(quarantine.items()[0]), before[1])


def test_a_quarantine_that_fails_does_not_stop_answers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "file")
    verdicts = guarded(quarantine=quarantine)(mixed())
    assert [row for row, verdict in enumerate(verdicts) if not verdict.accepted] == REJECTED
    assert all(verdict.quarantined is None for verdict in verdicts)
    assert quarantine.failures == 4


# --- preprocessing ---


def test_the_preprocessor_changes_the_answer_and_not_the_detection() -> None:
    images = mixed()
    guard = guarded(preprocessor=Gym(), policy=Policy(mode="monitor"), seed=0)
    verdicts = guard(images)
    assert [row for row, verdict in enumerate(verdicts) if verdict.suspicious] == REJECTED
    assert sum(verdict.label_index == TARGET for verdict in verdicts) < 5


def test_draws_come_from_the_seed_or_from_the_system() -> None:
    images = mixed()
    first, again, other = (guarded(preprocessor=Gym(), seed=seed).answer(images) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    guard = guarded(preprocessor=Gym(), seed=1)
    assert not torch.equal(guard.answer(images), guard.answer(images))
    assert not torch.equal(guarded(preprocessor=Gym()).answer(images), guarded(preprocessor=Gym()).answer(images))


def test_a_forked_worker_draws_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    images = mixed()
    guard, seeded = guarded(preprocessor=Gym()), guarded(preprocessor=Gym(), seed=1)
    twins = copy.deepcopy(guard._generator), copy.deepcopy(seeded._generator)
    here = guard.answer(images), seeded.answer(images)
    guard._generator, seeded._generator = twins
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert not torch.equal(guard.answer(images), here[0])
    assert torch.equal(seeded.answer(images), here[1])


def test_a_callers_autocast_changes_no_verdict() -> None:
    images = mixed()
    for guard in (guarded(), guarded(preprocessor=Gym(), seed=0)):
        state = guard._generator.get_state()
        expected, answers = guard(images), guard.answer(images)
        guard._generator.set_state(state)
        with torch.autocast("cpu", torch.bfloat16):
            assert [verdict.findings for verdict in guard(images)] == [verdict.findings for verdict in expected]
            assert torch.equal(guard.answer(images), answers)


def test_answer_is_the_model_without_detectors() -> None:
    images = mixed()
    torch.testing.assert_close(guarded().answer(images), ToyNet()(images).softmax(dim=1))


# --- threads ---


@pytest.mark.parametrize("preprocessor", [None, Gym(kernel=3)])
def test_threads_get_their_own_verdicts(preprocessor: Preprocessor | None, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    guard = guarded(preprocessor=preprocessor, quarantine=quarantine)
    images = mixed()
    expected = [row in REJECTED for row in range(8)]

    def ask(seed: int) -> None:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            found = [not verdict.accepted for verdict in guard(images[order])]
            assert found == [expected[row] for row in order.tolist()]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    assert len(quarantine.items()) == 4
    assert quarantine.failures == 0


# --- loading ---


def test_the_memory_limit_is_of_both_models(profile: Path) -> None:
    guard = Guard.load(profile, memory_limit=3 * 8 * 8 * 4 * ACTIVATIONS_PER_INPUT)
    (strip,) = (item.detector for item in guard.detectors)
    assert isinstance(strip, Strip)
    assert (guard.predictor.max_rows, strip.predictor.max_rows) == (3, 3)
    with pytest.raises(InputError, match="expected a memory limit of at least 1 byte, got 0: leave it out for 1 GiB"):
        Guard.load(profile, memory_limit=0)
    with pytest.raises(InputError, match="expected a memory limit of at least 1 byte, got '1GB': leave it out for 1 GiB"):
        Guard.load(profile, memory_limit="1GB")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"a memory limit of at least 20480 bytes \(1 MiB\), what one image takes by the estimate, got 256"
    ):
        Guard.load(profile, memory_limit=256)


def test_a_model_of_a_fixed_batch_takes_one_whatever_the_limit(tmp_path: Path) -> None:
    folder = onnx_profile(tmp_path / "toy", save_onnx(tmp_path / "toy.onnx", batch=8))
    assert Guard.load(folder, memory_limit=20480).predictor.max_rows == 8


def test_a_device_may_be_pytorchs_own(profile: Path) -> None:
    assert Guard.load(profile, device=torch.device("cpu", 0)).device == "cpu"
    with pytest.raises(ModelError, match="expected the device cpu or cuda, got None"):
        Guard.load(profile, device=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("mode", "Enforce"), ("mode", None), ("on_error", "Reject")])
def test_a_misspelt_policy_is_refused_not_taken_for_one_that_lets_all_in(name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"expected {name} to be one of \w+, \w+, got {value!r}"):
        Policy(**{name: value})  # type: ignore[arg-type]


class Overwriting(ToyNet):
    """Works in place."""

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = super().forward(images)
        images.zero_()
        return answers


@pytest.mark.parametrize("blend", ["logit", "add", "mix", "max", "demeaned"])
def test_a_model_that_overwrites_its_input_changes_no_verdict(blend: Blend) -> None:
    images, _ = toy_images(6)
    images = torch.cat([images[:3], toy_trigger(images[3:])])
    before = images.clone()
    verdicts = []
    for model in (ToyNet(), Overwriting()):
        strip = Strip(predictor(model), toy_images(12, seed=1)[0], blend, 0.5)
        guard = Guard(strip.predictor, [CalibratedDetector(strip, -ENTROPY_THRESHOLD)])
        verdicts.append(guard(images))
    assert verdicts[0] == verdicts[1]
    assert torch.equal(images, before)
