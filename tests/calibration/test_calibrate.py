"""Calibration end to end on a really backdoored classifier, and everything that it must refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration import BlendChoice, Calibration, Hints, ImageSet, PassesChoice, Settings, calibrate, evaluate
from calibration.discovery import discover
from cli.demonstration.digits import ATTACK, Digits
from guard import Guard
from guard.errors import CalibrationError, GuardError, ModelError, ProfileError, TooFewImagesError
from guard.predictors import wrap
from tests.toy import NAMES, ToyNet, toy_images, toy_trigger


def toy_set(count: int = 240, seed: int = 0) -> ImageSet:
    images, labels = toy_images(count, seed)
    return ImageSet((images * 255).round().to(torch.uint8), labels, NAMES)


SMALL = Settings(overlays=40, frr=0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blend", "x"),
        ("passes", "all"),
        ("precision", "float16"),
        ("preprocess", "Gym"),
        ("method", "t"),
        ("detectors", ("STRIP",)),
    ],
)
def test_misspelt_settings_are_refused_not_taken_for_others(name: str, value: object) -> None:
    with pytest.raises(CalibrationError, match="to be one of"):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_the_guard_refuses_triggers_and_keeps_clean_inputs(digits: Digits, calibration: Calibration) -> None:
    figures = evaluate(calibration.guard(), digits.test, digits.triggered, ATTACK.target_label)
    assert figures.attack_success_rate is not None
    assert figures.guarded_attack_success_rate is not None
    assert figures.auroc is not None
    assert figures.attack_success_rate.value >= 0.95
    assert figures.guarded_attack_success_rate.value <= 0.02
    assert figures.frr.value <= 0.03
    assert figures.auroc.value >= 0.99


def test_saved_and_loaded_it_says_the_same(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, calibration: Calibration
) -> None:
    calibration.save(tmp_path / "profile")
    images = torch.cat([digits.test.images(slice(0, 40)), digits.triggered.images(slice(0, 40))])
    loaded = Guard.load(tmp_path / "profile", backdoored)
    assert [v.accepted for v in loaded(images)] == [v.accepted for v in calibration.guard()(images)]
    assert [v.label_index for v in loaded(images)] == [v.label_index for v in calibration.guard()(images)]


@pytest.mark.usefixtures("one_order")
def test_the_same_seed_gives_the_same_profile(digits: Digits, backdoored: nn.Module) -> None:
    calibration, again = (calibrate(backdoored, digits.clean, Settings()) for _ in range(2))
    assert again.thresholds == calibration.thresholds
    other = calibrate(backdoored, digits.clean, Settings(seed=1))
    for number, strip in enumerate(calibration.strips):
        assert torch.equal(again.strips[number].overlays, strip.overlays)
        assert not torch.equal(other.strips[number].overlays, strip.overlays)


def test_overlays_and_threshold_images_are_disjoint_and_all_classes_are_overlaid(
    digits: Digits, calibration: Calibration
) -> None:
    assert [threshold.images for threshold in calibration.thresholds] == [len(digits.clean) - 100]
    assert [len(strip.overlays) for strip in calibration.strips] == [100]
    distances = torch.cdist(calibration.strips[0].overlays.flatten(1), digits.clean.images(slice(None)).flatten(1))
    sources = distances.argmin(dim=1)
    assert len(set(sources.tolist())) == 100
    assert torch.bincount(digits.clean.known_labels[sources], minlength=10).min() >= 1


def test_ordering_saves_passes_and_changes_no_verdict(digits: Digits, calibration: Calibration) -> None:
    images = torch.cat([digits.test.images(slice(0, 300)), digits.triggered.images(slice(0, 100))])
    for strip, part in zip(calibration.strips, calibration.parts, strict=True):
        threshold = part.threshold.value
        found = strip.inspect(images, threshold)
        assert torch.equal(found.exceeds, strip.score(images) >= threshold)
        clean = found.passes[:300].double().mean()
        shuffled = torch.randperm(len(strip.overlays), generator=torch.Generator().manual_seed(0))
        plain = dataclasses.replace(strip, overlays=strip.overlays[shuffled])
        assert clean < plain.inspect(images[:300], threshold).passes.double().mean()
        singles = [int(strip.inspect(images[row : row + 1], threshold).passes[0]) for row in range(100)]
        assert part.mean_passes == pytest.approx(np.mean(singles), rel=0.35)


def test_global_generator_and_mode_are_left_alone(digits: Digits, backdoored: nn.Module) -> None:
    state = torch.get_rng_state()
    calibrate(backdoored, toy_like(digits), Settings(overlays=20, frr=0.05))
    assert torch.equal(torch.get_rng_state(), state)
    assert not backdoored.training


def toy_like(digits: Digits) -> ImageSet:
    return digits.clean.select(torch.arange(150))


@pytest.mark.parametrize(
    ("blend", "alpha"), [("add", None), ("mix", None), ("demeaned", None), ("max", None), ("logit", 0.5)]
)  # a heavier logit darkens white to less than the toy's trigger must be
def test_every_blend_sees_the_toys_trigger(blend: BlendChoice, alpha: float | None) -> None:
    settings = Settings(blend=blend, alpha=alpha, overlays=40, frr=0.02)
    guard = calibrate(ToyNet(), toy_set(), settings).guard()
    images, _ = toy_images(100, seed=9)
    clean = sum(not verdict.accepted for verdict in guard(images))
    caught = sum(not verdict.accepted for verdict in guard(toy_trigger(images)))
    assert clean <= 6
    assert caught == 100 if blend in ("add", "max", "logit") else caught >= 20  # mixing dims a white trigger


def test_labels_only_models_are_calibrated_too() -> None:
    net = ToyNet()

    def predict(batch: Tensor) -> Tensor:
        return torch.argmax(net(batch), dim=1)

    settings = msgspec.structs.replace(SMALL, blend="add")
    calibration = calibrate(predict, toy_set(), settings, hints=Hints(container="torch", layout="NCHW", dtype="float32"))
    images, _ = toy_images(60, seed=4)
    assert calibration.profile.model.output == "labels"
    verdicts = calibration.guard()(toy_trigger(images))
    assert sum(not verdict.accepted for verdict in verdicts) == 60
    assert verdicts[0].probability is None
    assert sum(not verdict.accepted for verdict in calibration.guard()(images)) <= 4


def test_labels_only_models_under_the_default_blend(digits: Digits, backdoored: nn.Module) -> None:
    def predict(batch: Tensor) -> Tensor:
        return torch.argmax(backdoored(batch), dim=1)

    hints = Hints(container="torch", layout="NCHW", dtype="float32")
    guard = calibrate(predict, digits.clean, Settings(frr=0.02), hints=hints).guard()
    triggered = guard(digits.triggered.images(slice(0, 40)))
    assert sum(not verdict.accepted for verdict in triggered) >= 38
    assert {verdict.passes for verdict in triggered} == {100}
    assert sum(not verdict.accepted for verdict in guard(digits.test.images(slice(0, 200)))) <= 12


def test_too_few_images_say_how_many() -> None:
    with pytest.raises(TooFewImagesError, match="needs at least 99 clean images besides the overlays, got 60") as caught:
        calibrate(ToyNet(), toy_set(100), Settings(overlays=40))
    assert caught.value.needed == 99


def test_a_missing_class_is_named_and_allowed_on_demand() -> None:
    clean = toy_set()
    three = clean.select(torch.nonzero(clean.known_labels != 2).squeeze(1))
    with pytest.raises(CalibrationError, match=r"none of 1 \(south-west\).*--allow-missing-classes"):
        calibrate(ToyNet(), three, SMALL)
    assert calibrate(ToyNet(), three, msgspec.structs.replace(SMALL, allow_missing_classes=True)).profile.model.num_classes == 4


def test_class_folders_must_match_the_models_outputs() -> None:
    clean = toy_set()
    wrong = ImageSet(clean.pixels, clean.known_labels.clamp_max(2), NAMES[:3])
    with pytest.raises(CalibrationError, match=r"expected 4 class folders.*got 3"):
        calibrate(ToyNet(), wrong, SMALL)


def test_labels_over_the_models_outputs_are_another_model() -> None:
    clean = toy_set()
    with pytest.raises(ModelError, match="more than 9 outputs"):
        calibrate(ToyNet(), ImageSet(clean.pixels, clean.known_labels + 6), SMALL)


class Broken(nn.Module):
    """Answers with NaN, or with the wrong number of axes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "nan":
            return torch.full((len(images), 4), torch.nan)
        if self.kind == "map":
            return images
        if self.kind == "one":
            return torch.rand(len(images))
        return torch.zeros(len(images), 4)


class Dropping(ToyNet):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.5, training=True)


class BatchMinded(ToyNet):
    def forward(self, images: Tensor) -> Tensor:
        answers = super().forward(images)
        return answers.squeeze() if self.kind == "squeeze" else answers - 4.0 * answers.mean(dim=0)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


class Sigmoids(ToyNet):
    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(images) - 6.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Dropping(), "differently each time"),
        (BatchMinded("squeeze"), "not a single image"),
        (BatchMinded("mean"), "on its own than in a batch"),
        (Sigmoids(), "one sigmoid per class"),
    ],
)
def test_models_that_cannot_be_calibrated_say_why(model: nn.Module, message: str) -> None:
    with torch.random.fork_rng(), pytest.raises(ModelError, match=message):
        calibrate(model, toy_set(), SMALL)


def test_an_accuracy_drop_of_nan_allows_nothing(digits: Digits, backdoored: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="points of clean accuracy"):
        calibrate(backdoored, digits.clean, Settings(preprocess="gym", max_accuracy_drop=float("nan")))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("nan", "NaN or Inf"), ("map", "one row per image"), ("one", "one fraction per image")],
)
def test_useless_answers_are_refused(kind: str, message: str) -> None:
    with pytest.raises(GuardError, match=message):
        calibrate(Broken(kind), toy_set(), SMALL)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        calibrate(ToyNet().train(), toy_set(), SMALL)


def test_entropy_of_zero_everywhere_can_reject_nothing() -> None:
    class Certain(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(images.flatten(1).argmax(dim=1) * 0, 4) * 1e4

    with pytest.raises(CalibrationError, match=r"no input could ever be rejected: .* overlays; try another --blend"):
        calibrate(Certain().eval(), toy_set(), SMALL)


@pytest.mark.parametrize("passes", ["exact", "votes"])
def test_a_constant_model_is_refused(passes: PassesChoice) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([1.0, 2.0, 3.0, 0.5]) + 0.0 * images.flatten(1)[:, :1]

    with pytest.raises(CalibrationError, match="answers hang on the image, got one that is as unsure of all 200 clean images"):
        calibrate(Constant().eval(), toy_set(), msgspec.structs.replace(SMALL, passes=passes))


class Surer(nn.Module):
    """The same labels, with logits so many times as large."""

    def __init__(self, model: nn.Module, times: float) -> None:
        super().__init__()
        self.model, self.times = model, times

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return self.times * logits


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("votes", "no input could ever be rejected: .* overlays; take --passes exact, try another"),
        ("sequential", "sequential passes can't decide by the blend logit: .*; take --passes exact$"),
    ],
)
def test_passes_that_an_overconfident_model_leaves_blind_name_the_way_out(
    digits: Digits, backdoored: nn.Module, passes: PassesChoice, message: str
) -> None:
    surer = Surer(backdoored, 100.0).eval()
    with pytest.raises(CalibrationError, match=message):
        calibrate(surer, digits.clean, Settings(passes=passes))
    assert calibrate(surer, digits.clean, Settings()).thresholds[0].value < 0.0


@pytest.mark.usefixtures("one_order")
def test_gym_on_a_model_not_tuned_for_it_is_refused_with_the_drop(digits: Digits, backdoored: nn.Module) -> None:
    settings = Settings(preprocess="gym")
    with pytest.raises(CalibrationError, match=r"costs \d+\.\d points of clean accuracy.*--max-accuracy-drop 3"):
        calibrate(backdoored, digits.clean, settings)
    allowed = calibrate(backdoored, digits.clean, msgspec.structs.replace(settings, max_accuracy_drop=100.0))
    assert allowed.profile.preprocessor is not None
    assert allowed.profile.clean_accuracy is not None
    assert allowed.profile.clean_accuracy_raw is not None
    assert allowed.profile.clean_accuracy < allowed.profile.clean_accuracy_raw
    images = digits.triggered.images(slice(0, 50))
    seen = [verdict.findings[0].score for verdict in allowed.guard()(images)]
    raw = calibrate(backdoored, digits.clean, Settings()).guard()(images)
    assert seen == [verdict.findings[0].score for verdict in raw]  # STRIP looks at the raw image


def test_a_profile_for_another_model_is_refused(tmp_path: Path, digits: Digits, calibration: Calibration) -> None:
    calibration.save(tmp_path / "profile")
    from cli.demonstration.digits import digit_net

    with pytest.raises(ProfileError, match="another model"):
        Guard.load(tmp_path / "profile", digit_net().eval())


CONVENTIONS = [
    (container, layout, dtype)
    for container in ("numpy", "torch")
    for layout in ("NCHW", "NHWC", "NHW", "flat")
    for dtype in ("uint8", "float32")
]


@pytest.mark.parametrize(("container", "layout", "dtype"), CONVENTIONS)
def test_conventions_of_a_function_are_found_out(container: str, layout: str, dtype: str) -> None:
    net = ToyNet()

    def predict(batch: object) -> object:
        """Takes exactly one convention, as a careless user's function does: others give an error or nonsense."""
        if isinstance(batch, np.ndarray) != (container == "numpy"):
            raise TypeError("wrong array library")
        tensor = torch.as_tensor(np.asarray(batch)).float()
        if dtype == "uint8":
            tensor = tensor / 255
        shapes = {"NCHW": (-1, 1, 8, 8), "NHWC": (-1, 8, 8, 1), "NHW": (-1, 8, 8), "flat": (-1, 64)}
        if tensor.shape[1:] != shapes[layout][1:]:
            raise ValueError("wrong shape")
        answer = net(tensor.reshape(-1, 1, 8, 8)).softmax(dim=1)
        return answer.numpy() if container == "numpy" else answer

    spec = discover(wrap(predict), toy_set()).spec
    found = (spec.container, spec.layout, spec.dtype)
    if dtype == "float32":  # values of 0..255 saturate this function into the same labels: both conventions are right
        assert found[:2] == (container, layout)
    else:
        assert found == (container, layout, dtype)


def test_without_labels_an_ambiguous_function_must_be_explained() -> None:
    def predict(batch: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> object:
        values = np.asarray(batch, dtype=np.float64).reshape(len(batch), -1)
        return np.stack([values.mean(axis=1), np.full(len(batch), 40.0)], axis=1)  # uint8 and float disagree

    clean = ImageSet(toy_set().pixels)
    with pytest.raises(ModelError, match="answers differently"):
        discover(wrap(predict), clean)
    assert discover(wrap(predict), clean, Hints(dtype="uint8")).spec.dtype == "uint8"


def test_a_function_that_always_fails_tells_its_own_error() -> None:
    def predict(batch: object) -> object:
        raise RuntimeError("no such host")

    with pytest.raises(ModelError, match="RuntimeError: no such host"):
        discover(wrap(predict), toy_set())


def test_images_off_the_grid_of_eight_bits_can_be_saved(tmp_path: Path, backdoored: nn.Module, digits: Digits) -> None:
    made = calibrate(
        backdoored, ImageSet(digits.clean.images(slice(0, 300)) * 0.99, digits.clean.known_labels[:300]), Settings()
    )
    folder = made.save(tmp_path / "profile")
    assert len(Guard.load(tmp_path / "profile", backdoored)(digits.test.images(slice(0, 4)))) == 4, folder
