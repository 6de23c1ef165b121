"""What every predictor, every detector and every preprocessor does alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from torch import Tensor, nn

from guard.detectors import ActivationFilter, Blend, Detector, FeatureSqueezing, Strip
from guard.images import Container, DType, InputSpec, Layout
from guard.predictors import OutputKind, Predictor, load_backend
from guard.predictors.predictor import ACTIVATIONS_PER_INPUT
from guard.preprocessors import (
    Flip,
    Gym,
    GymIntensive,
    OpticalDistortion,
    Preprocessor,
    RandomShrinkPad,
    Sat,
    ShrinkPad,
    ThreeMedians,
)
from tests.guard.models import CLASSES, predict_function, predictor, save_onnx
from tests.toy import ENTROPY_THRESHOLD, SIDE, SPEC, LearningToy, ToyNet, toy_images, toy_trigger

FILES = ("torchscript", "torch-export", "torch-export-3", "onnx", "onnx-3")
CALLABLES = [
    (layout, container, dtype, output)
    for layout in get_args(Layout)
    for container in get_args(Container)
    for dtype in get_args(DType)
    for output in get_args(OutputKind)
]


def mixed(count: int = 7, seed: int = 5) -> Tensor:
    """Clean images, every second one triggered."""
    images, _ = toy_images(count, seed=seed)
    images[1::2] = toy_trigger(images[1::2])
    return images


def limited(model: Predictor, rows: int) -> Predictor:
    """The same predictor with memory for `rows` images at a time."""
    smaller = Predictor(
        model.backend, model.spec, model.num_classes, model.output, rows * SIDE * SIDE * 4 * ACTIVATIONS_PER_INPUT
    )
    assert smaller.max_rows == max(rows, model.backend.batch_size or 1)
    return smaller


def check_predictor(model: Predictor) -> None:
    images = mixed()
    before = images.clone()
    answers = model(images)
    expected = ToyNet()(images).softmax(dim=1)
    if model.labels_only:
        expected = nn.functional.one_hot(expected.argmax(dim=1), CLASSES).to(torch.float32)
    torch.testing.assert_close(answers, expected, atol=1e-5, rtol=0)
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers.sum(dim=1), torch.ones(len(images)), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), answers, atol=1e-6, rtol=0)
    torch.testing.assert_close(limited(model, 2)(images), answers, atol=1e-6, rtol=0)
    assert torch.equal(images, before)
    twice = model.backend.fingerprint(), model.backend.fingerprint()
    assert twice[0] == twice[1]


@pytest.mark.parametrize("kind", FILES)
def test_models_in_files(kind: str, model_files: dict[str, Path]) -> None:
    backend = load_backend(model_files[kind])
    assert backend.kind == kind.removesuffix("-3")
    check_predictor(Predictor(backend, SPEC, CLASSES, "logits"))


@pytest.mark.parametrize(("layout", "dtype"), [("NHWC", "float32"), ("NCHW", "uint8"), ("NHWC", "uint8")])
def test_onnx_models_of_other_layouts_and_types(layout: Layout, dtype: DType, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, layout=layout, dtype=dtype, container="numpy")
    check_predictor(Predictor(load_backend(save_onnx(tmp_path / "toy.onnx", spec)), spec, CLASSES, "logits"))


@pytest.mark.parametrize(("layout", "container", "dtype", "output"), CALLABLES)
def test_callables(layout: Layout, container: Container, dtype: DType, output: OutputKind) -> None:
    spec = msgspec.structs.replace(SPEC, layout=layout, container=container, dtype=dtype)
    check_predictor(predictor(predict_function(spec, output), spec, output))


def test_modules_keep_their_mode() -> None:
    net = ToyNet()
    net.requires_grad_(True)
    check_predictor(predictor(net))
    assert not any(part.training for part in net.modules())


class InPlace(ToyNet):
    """Normalises its own input in place, as some models do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.sub_(0.5).add_(0.5).clamp_(0, 1)) + images.mul_(0).sum()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW", "flat"])
@pytest.mark.parametrize("container", ["numpy", "torch"])
def test_models_that_write_into_their_input(layout: Layout, container: Container) -> None:
    spec = InputSpec(channels=1, height=SIDE, width=SIDE, layout=layout, container=container)
    net = ToyNet()

    def spoils(batch: Any) -> Tensor:
        logits: Tensor = net(torch.as_tensor(batch).reshape(-1, 1, SIDE, SIDE).clone())
        batch[...] = 0
        return logits

    check_predictor(predictor(spoils, spec))


def test_modules_that_write_into_their_input() -> None:
    check_predictor(predictor(InPlace().eval()))


def strip_of(blend: Blend, alpha: float, output: OutputKind = "logits") -> Callable[[int | None], Strip]:
    spec = msgspec.structs.replace(SPEC, container="numpy")
    overlays, _ = toy_images(24, seed=1)

    def make(rows: int | None) -> Strip:
        model = predictor() if output == "logits" else predictor(predict_function(spec, output), spec, output)
        return Strip(model if rows is None else limited(model, rows), overlays, blend, alpha)

    return make


def squeezing(output: OutputKind = "logits") -> Callable[[int | None], FeatureSqueezing]:
    def make(rows: int | None) -> FeatureSqueezing:
        model = predictor() if output == "logits" else predictor(predict_function(SPEC, output), SPEC, output)
        return FeatureSqueezing(model if rows is None else limited(model, rows))

    return make


def corner_filter(rows: int | None) -> ActivationFilter:
    """The filter over a toy whose penultimate neurons are white pixels: it looks at the trigger's four."""
    with torch.random.fork_rng(devices=[]):
        model = predictor(LearningToy())
    return ActivationFilter(model if rows is None else limited(model, rows), torch.tensor([54, 55, 62, 63]))


DETECTORS: dict[str, Callable[[int | None], Detector]] = {
    "strip-add": strip_of("add", 1.0),
    "strip-mix": strip_of("mix", 0.5),
    "strip-demeaned": strip_of("demeaned", 1.0),
    "strip-max": strip_of("max", 1.0),
    "strip-logit": strip_of("logit", 2.0),
    "strip-probabilities": strip_of("add", 1.0, "probabilities"),
    "strip-labels": strip_of("add", 1.0, "labels"),
    "feature-squeezing": squeezing(),
    "feature-squeezing-labels": squeezing("labels"),
    "activation-filter": corner_filter,
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str) -> None:
    detector = DETECTORS[name](None)
    images = mixed()
    before = images.clone()
    scores = detector.score(images)
    assert scores.shape == (len(images),)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    for threshold in (-ENTROPY_THRESHOLD, -1.0, 0.0, float(scores.median())):
        found = detector.inspect(images, threshold)
        assert torch.equal(found.exceeds, scores >= threshold)
        assert torch.equal(detector.exceeds(images, threshold), found.exceeds)
        singles = [detector.inspect(image[None], threshold) for image in images]
        assert torch.equal(torch.cat([single.exceeds for single in singles]), found.exceeds)
        assert (found.scores[found.exact] == scores[found.exact]).all()
        assert (found.scores[~found.exact] >= scores[~found.exact]).all()
        assert (found.passes >= 1).all()
    torch.testing.assert_close(torch.cat([detector.score(image[None]) for image in images]), scores, atol=1e-5, rtol=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("rows", [1, 5, 24, 50])
def test_memory_limits_change_no_score(name: str, rows: int) -> None:
    images = mixed()
    torch.testing.assert_close(DETECTORS[name](rows).score(images), DETECTORS[name](None).score(images), atol=1e-6, rtol=0)
    free, tight = (DETECTORS[name](limit).inspect(images, -ENTROPY_THRESHOLD) for limit in (None, rows))
    assert torch.equal(free.exceeds, tight.exceeds)
    assert torch.equal(free.passes, tight.passes)


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_leave_the_model_in_its_mode(name: str) -> None:
    detector = DETECTORS[name](None)
    assert isinstance(detector, Strip | FeatureSqueezing | ActivationFilter)
    detector.score(mixed(2))
    module = getattr(detector.predictor.backend, "module", None)
    assert module is None or not module.training


PREPROCESSORS: dict[str, Preprocessor] = {
    "gym": Gym(),
    "gym-3": Gym(kernel=3),
    "gym-still": Gym(shift=0.0, rotation=0.0, zoom=0.0),
    "gym-full-size": Gym(scale=1.0),
    "gym-unfiltered": Gym(kernel=1),
    "gym-intensive": GymIntensive(),
    "optical-distortion": OpticalDistortion(),
    "three-medians": ThreeMedians(kernel=3),
    "random-shrink-pad": RandomShrinkPad(),
    "sat": Sat(),
    "shrink-pad": ShrinkPad(pixels=0),
    "flip": Flip(),
}


@pytest.mark.parametrize("name", PREPROCESSORS)
@pytest.mark.parametrize("shape", [(7, 1, 8, 8), (3, 3, 9, 5), (2, 1, 1, 6), (2, 3, 6, 1), (1, 1, 1, 1), (2, 5, 2, 3)])
def test_preprocessors(name: str, shape: tuple[int, ...]) -> None:
    preprocess = PREPROCESSORS[name]
    images = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    before = images.clone()
    changed = preprocess(images, torch.Generator().manual_seed(4))
    assert changed.shape == images.shape
    assert changed.dtype == torch.float32
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(preprocess(images, torch.Generator().manual_seed(4)), changed)
    one_by_one = torch.Generator().manual_seed(4)
    torch.testing.assert_close(torch.cat([preprocess(image[None], one_by_one) for image in images]), changed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gym", "gym-3", "gym-intensive", "optical-distortion", "random-shrink-pad", "sat"])
def test_random_preprocessors_draw_from_their_generator(name: str) -> None:
    images, _ = toy_images(4)
    generator = torch.Generator().manual_seed(4)
    first = PREPROCESSORS[name](images, generator)
    assert not torch.equal(PREPROCESSORS[name](images, generator), first)
