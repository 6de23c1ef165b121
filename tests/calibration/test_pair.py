"""Two blends in one profile: a toy of which each sees another trigger, and what the pair promises."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration import BlendChoice, Calibration, Hints, ImageSet, Settings, calibrate
from calibration.evaluation import joint_scores, judge
from calibration.settings import check_settings, strips
from calibration.thresholds import joint_rate, needed_images, rank, set_threshold, share
from cli.demonstration.digits import Digits
from guard import Guard, Verdict
from guard.detectors import Blend
from guard.errors import CalibrationError, TooFewImagesError
from tests.toy import NAMES, ToyNet, toy_images

PAIR: BlendChoice = "logit+demeaned"
SETTINGS = Settings(blend=PAIR, overlays=40, frr=0.02)


class TwoTriggers(ToyNet):
    """A white corner north-west, which only `logit` leaves white, and a grey one south-east: `demeaned` darkens it less."""

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = super().forward(images)
        white = images[:, 0, :2, :2].flatten(1).min(dim=1).values > 0.9
        corner = images[:, 0, -2:, -2:].flatten(1)
        grey = (corner.min(dim=1).values > 0.24) & (corner.max(dim=1).values < 0.6)
        return answers + 100.0 * (white | grey).unsqueeze(1) * torch.eye(4)[0]


def even_corners(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The toy's images, both corners much darker than the mean: superimposed, they darken what is there."""
    images, labels = toy_images(count, seed)
    images[:, :, :2, :2] = images[:, :, -2:, -2:] = 26 / 255
    return images, labels


def clean_set(count: int = 240) -> ImageSet:
    images, labels = even_corners(count, 0)
    return ImageSet((images * 255).round().to(torch.uint8), labels, NAMES)


def stamped(white: bool = False, grey: bool = False) -> Tensor:
    images, _ = even_corners(50, 9)
    if white:
        images[:, :, :2, :2] = 1.0
    if grey:
        images[:, :, -2:, -2:] = 0.5
    return images


def fired(verdicts: tuple[Verdict, ...]) -> dict[str, int]:
    """On how many images each detector found something."""
    return {
        name: sum(finding.suspicious for verdict in verdicts for finding in verdict.findings if finding.detector == name)
        for name in ("strip-logit", "strip-demeaned")
    }


@pytest.fixture(scope="module")
def pair() -> Calibration:
    return calibrate(TwoTriggers(), clean_set(), SETTINGS)


def test_either_of_the_two_rejects(pair: Calibration) -> None:
    guard = pair.guard()
    clean = fired(guard(stamped()))
    assert max(clean.values()) <= 2
    for images, seen in (
        (stamped(white=True), {**clean, "strip-logit": 50}),
        (stamped(grey=True), {**clean, "strip-demeaned": 50}),
        (stamped(white=True, grey=True), dict.fromkeys(clean, 50)),
    ):
        verdicts = guard(images)
        found = fired(verdicts)
        assert {name: count == 50 for name, count in found.items()} == {name: count == 50 for name, count in seen.items()}
        assert sum(found.values()) <= sum(seen.values())
        assert not any(verdict.accepted for verdict in verdicts)
    assert [verdict.accepted for verdict in guard(stamped())].count(False) <= sum(clean.values())


def test_a_single_blend_sees_one_trigger_only() -> None:
    for blend, seen in (("logit", [True, False]), ("demeaned", [False, True])):
        settings = msgspec.convert({"blend": blend, "overlays": 40, "frr": 0.02}, Settings)
        guard = calibrate(TwoTriggers(), clean_set(), settings).guard()
        rejected = [sum(not verdict.accepted for verdict in guard(images)) for images in (stamped(True), stamped(grey=True))]
        assert [count == 50 for count in rejected] == seen
        assert min(rejected) <= 4  # about as many as of clean images


def test_overlays_and_rate_are_shared_and_passes_are_no_more(pair: Calibration) -> None:
    assert [len(strip.overlays) for strip in pair.strips] == [20, 20]
    assert [(strip.name, strip.blend, strip.alpha) for strip in pair.strips] == [
        ("strip-logit", "logit", 3.5),
        ("strip-demeaned", "demeaned", 1.5),
    ]
    for part in pair.parts:
        assert (part.threshold.frr, part.threshold.images, part.threshold.rank) == (0.01, 200, 2)  # floor(.01 * 201)
        assert (part.scores >= np.float32(part.threshold.value)).sum() == 1
    odd = calibrate(TwoTriggers(), clean_set(), msgspec.structs.replace(SETTINGS, overlays=41))
    assert [len(strip.overlays) for strip in odd.strips] == [21, 20]
    both = {image.numpy().tobytes() for strip in pair.strips for image in strip.overlays}
    assert len(both) == 40
    verdicts = pair.guard()(stamped(white=True, grey=True))
    assert {verdict.passes for verdict in verdicts} == {40}


@pytest.mark.parametrize("blend", ["logit", "logit+demeaned"])
def test_curtailed_verdicts_are_those_of_all_passes(digits: Digits, backdoored: nn.Module, blend: BlendChoice) -> None:
    guard = calibrate(backdoored, digits.clean, Settings(blend=blend)).guard()
    for images in (digits.test.select(torch.arange(150)), digits.triggered.select(torch.arange(100))):
        seen = judge(guard, images, "")
        verdicts = guard(images.images(slice(None)))
        assert seen.rejected.tolist() == [not verdict.accepted for verdict in verdicts]
        limit = 0.0 if len(guard.detectors) > 1 else np.float32(guard.detectors[0].threshold)
        assert seen.rejected.tolist() == (seen.scores >= limit).tolist()
        for number, item in enumerate(guard.detectors):
            fires = seen.by_detector[number] >= np.float32(item.threshold)
            assert fires.tolist() == [verdict.findings[number].suspicious for verdict in verdicts]


def test_a_pair_survives_the_disk(tmp_path: Path, pair: Calibration) -> None:
    pair.save(tmp_path / "profile")
    loaded = Guard.load(tmp_path / "profile", TwoTriggers())
    images = torch.cat([stamped(), stamped(white=True), stamped(grey=True)])
    assert loaded(images) == pair.guard()(images)


def test_labels_alone_will_do() -> None:
    net, hints = TwoTriggers(), Hints(container="torch", layout="NCHW", dtype="float32")
    guard = calibrate(lambda batch: torch.argmax(net(batch), dim=1), clean_set(), SETTINGS, hints=hints).guard()
    for images in (stamped(white=True), stamped(grey=True)):
        triggered = guard(images)
        assert not any(verdict.accepted for verdict in triggered)
        assert {verdict.passes for verdict in triggered} == {40}
    assert sum(not verdict.accepted for verdict in guard(stamped())) <= 4


class Sure(TwoTriggers):
    """Certain of whatever `logit` shows it, where no pixel is quite black."""

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = super().forward(images)
        lit = images.flatten(1).min(dim=1).values > 0.0  # `demeaned` makes some pixels black
        return torch.where(lit.unsqueeze(1), 1e4 * torch.eye(4)[0], answers)


def test_one_that_can_reject_nothing_is_named() -> None:
    images, labels = even_corners(240, 0)
    clean = ImageSet((images * 255).round().clamp_min(1).to(torch.uint8), labels, NAMES)
    with pytest.raises(CalibrationError, match=r"rejected by the blend logit: .* name a single one, --blend demeaned"):
        calibrate(Sure(), clean, msgspec.structs.replace(SETTINGS, allow_missing_classes=True))


@pytest.mark.parametrize(
    ("choice", "alpha", "expected"),
    [
        ("logit", None, (("logit", 3.5),)),
        ("logit", 0.7, (("logit", 0.7),)),
        ("logit+demeaned", None, (("logit", 3.5), ("demeaned", 1.5))),
        ("add", None, (("add", 1.0),)),
        ("mix", None, (("mix", 0.5),)),
        ("demeaned", None, (("demeaned", 1.5),)),
        ("max", None, (("max", 1.0),)),
        ("demeaned", 0.7, (("demeaned", 0.7),)),
    ],
)
def test_what_a_choice_stands_for(choice: BlendChoice, alpha: float | None, expected: tuple[tuple[Blend, float], ...]) -> None:
    assert strips(choice, alpha) == expected


@pytest.mark.parametrize(
    ("settings", "images", "message"),
    [
        (Settings(blend=PAIR, alpha=0.5), 500, "expected alpha with a single blend, got 0.5 for logit.demeaned: name one"),
        (Settings(blend=PAIR, overlays=3), 500, "at least 4 overlays for logit.demeaned"),
        (Settings(overlays=1), 500, "at least 2 overlays, got 1"),
        (Settings(), 198, "rate of 0.01 needs at least 99 clean images besides the overlays, got 98"),
        (Settings(blend=PAIR), 298, "0.01 for 2 blends together needs at least 199 clean images besides the overlays, got 198"),
        (Settings(blend=PAIR, confidence=0.9), 300, "confidence 0.9 for 2 blends together needs at least 598 clean images"),
        (Settings(frr=1.0), 500, "between 0 and 1, got 1.0"),
        (Settings(frr=1.5), 500, "between 0 and 1, got 1.5"),
    ],
)
def test_what_one_blend_and_the_pair_need(settings: Settings, images: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        check_settings(settings, images)
    if isinstance(caught.value, TooFewImagesError):
        check_settings(settings, caught.value.needed + settings.overlays)


def test_at_most_the_rate_asked_for_is_rejected_whatever_the_scores() -> None:
    """Each of n + 1 images in turn is the later one: exchangeable, so the mean over them is the expected rate."""
    rng = np.random.default_rng(0)
    total, frr = 400, 0.02
    apart = rng.normal(size=(2, total))
    alike = np.stack([apart[0], apart[0] + 0.1 * apart[1]])
    for scores in (apart, alike, np.round(apart), -apart[:, apart[0].argsort()]):
        rejected = 0
        for row in range(total):
            others = np.delete(scores, row, axis=1).astype(np.float32)
            limits = [set_threshold(own, frr, detectors=2).value for own in others]
            rejected += any(np.float32(scores[number, row]) >= np.float32(limits[number]) for number in range(2))
        assert rejected <= frr * total
    assert rank(total - 1, frr / 2) == 4


def test_shared_confidence() -> None:
    frr, confidence = share(0.01, 0.95, 2)
    assert frr == 0.005
    assert confidence == pytest.approx(0.975)
    assert needed_images(frr, confidence) == 736  # .995 ** 736 <= .025
    record = set_threshold(np.arange(1000, dtype=np.float32), 0.01, confidence=0.95, detectors=2)
    assert (record.frr, record.confidence) == (frr, confidence)
    assert set_threshold(np.arange(1000, dtype=np.float32), 0.01, detectors=1).frr == 0.01


def test_bounds_of_the_joint_rate() -> None:
    first = set_threshold(np.arange(999, dtype=np.float32), 0.02, detectors=2)
    second = set_threshold(np.arange(499, dtype=np.float32), 0.02, detectors=2)
    joint = joint_rate([first, second])
    assert (joint.value, joint.low, joint.high) == (0.02, max(first.frr_low, second.frr_low), first.frr_high + second.frr_high)
    alone = joint_rate([first])
    assert (alone.value, alone.low, alone.high) == (first.frr, first.frr_low, first.frr_high)


def test_joint_scores_by_hand() -> None:
    by_detector = np.array([[-0.1, -0.4, -0.0, -1.0], [-2.0, -0.5, -3.0, np.nan]], dtype=np.float32)
    found = joint_scores(by_detector, [-0.2, -1.0])
    assert found[:3].tolist() == pytest.approx([0.5, 0.5, 1.0])  # .1 is half of .2; .5 is half of 1; 0 is all of .2 less
    assert np.isnan(found[3])
    assert joint_scores(by_detector[:1], [-0.2]).tolist() == by_detector[0].tolist()
    assert len(joint_scores(by_detector[:0], [])) == 0


@pytest.mark.parametrize("limit", [-0.5, -1e-40, -0.0, 0.0, 1e-45, 0.5])
def test_joint_scores_have_the_sign_of_the_verdict(limit: float) -> None:
    threshold = float(np.float32(limit))
    scores = np.array([-3.0, -0.5, -0.4999999, -1e-40, -1e-45, -0.0], dtype=np.float32)
    joint = joint_scores(np.stack([scores, np.full_like(scores, -9.0)]), [threshold, -1.0])
    assert (joint >= 0.0).tolist() == (scores >= np.float32(threshold)).tolist()
    assert np.isfinite(joint).all()
