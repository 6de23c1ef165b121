"""What a model takes is found out without any image; with images, see `test_calibrate`."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration import Hints
from calibration.discovery import discover_without_images
from calibration.sources import open_model
from guard import InputSpec
from guard.errors import InputError, ModelError
from guard.predictors import load_backend, wrap
from tests.guard.models import predict_function, predictor, save_exported, save_onnx, save_torchscript
from tests.toy import SPEC, LearningToy, ToyNet, toy_images

SHAPE = SPEC.shape


class Normalised(nn.Module):
    """The toy, of images of which 0.3 was subtracted, and that were divided by 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = ToyNet()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.toy(images * 0.2 + 0.3)
        return answers


def test_mean_and_std_are_taken_as_they_are_given() -> None:
    images, labels = toy_images(40)
    found = discover_without_images(wrap(Normalised()), SHAPE, Hints(mean=(0.3,), std=(0.2,), class_names=SPEC.class_names))
    assert (found.spec.shape, found.spec.mean, found.spec.std) == (SHAPE, (0.3,), (0.2,))
    assert (found.num_classes, found.output, found.spec.class_names) == (4, "logits", SPEC.class_names)
    torch.testing.assert_close(found(images), ToyNet()(images).softmax(dim=1))
    assert found(images).argmax(dim=1).tolist() == labels.tolist()
    bare = discover_without_images(wrap(ToyNet()), SHAPE)
    assert (bare.spec.mean, bare.spec.std) == ((), ())
    torch.testing.assert_close(bare(images), found(images))


def test_the_convention_of_a_function_is_found_out() -> None:
    spec = InputSpec(channels=1, height=8, width=8, layout="NHWC", dtype="uint8", container="numpy")
    found = discover_without_images(wrap(predict_function(spec, "probabilities")), SHAPE)
    assert (found.spec.container, found.spec.dtype, found.output) == ("numpy", "uint8", "probabilities")
    images, labels = toy_images(40)
    assert found(images).argmax(dim=1).tolist() == labels.tolist()


def test_what_noise_can_not_tell_must_be_said() -> None:
    def predict(batch: NDArray[np.generic]) -> object:
        values = np.asarray(batch, dtype=np.float64).reshape(len(batch), -1)
        return np.stack([values.mean(axis=1), np.full(len(batch), 40.0)], axis=1)  # uint8 and float disagree

    with pytest.raises(ModelError, match=r"answers differently.*--layout, --dtype or --container"):
        discover_without_images(wrap(predict), SHAPE)
    assert discover_without_images(wrap(predict), SHAPE, Hints(dtype="float32")).spec.dtype == "float32"


def test_another_shape_and_contradicting_hints_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    with pytest.raises(ModelError, match=r"got shape \(3, 9, 9\) \(C, H, W\), on which it does not run"):
        discover_without_images(wrap(net), (3, 9, 9))
    with pytest.raises(InputError, match="expected 1 values of mean, one per channel, got 3"):
        discover_without_images(wrap(net), SHAPE, Hints(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(InputError, match="at most 16,777,216 numbers, got 1x99999x99999: check --shape"):
        discover_without_images(wrap(net), (1, 99_999, 99_999))


def test_a_shape_that_the_file_contradicts_is_told_by_the_file(tmp_path: Path) -> None:
    wrong = r"expected images of shape \(1, 8, 8\) \(C, H, W\), as the model's file declares, got \(3, 9, 9\): check the images"
    for path in (save_onnx(tmp_path / "toy.onnx", SPEC), save_exported(ToyNet(), tmp_path / "toy.pt2")):
        with pytest.raises(ModelError, match=wrong):
            discover_without_images(load_backend(str(path)), (3, 9, 9))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    discover_without_images(wrap(ToyNet()), SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shape_that_a_file_declares(tmp_path: Path) -> None:
    for file in (
        save_onnx(tmp_path / "a.onnx"),
        save_onnx(tmp_path / "b.onnx", msgspec.structs.replace(SPEC, layout="NHWC")),
        save_exported(LearningToy(), tmp_path / "c.pt2"),
        save_exported(LearningToy(), tmp_path / "d.pt2", batch=5),
    ):
        assert open_model(str(file), None, tmp_path).image_shape == SPEC.shape
    assert open_model("tests.toy:LearningToy", None, tmp_path).image_shape is None
    assert open_model(str(save_torchscript(LearningToy(), tmp_path / "e.pt")), None, tmp_path).image_shape is None


class Remembering(ToyNet):
    """The toy with a tensor that it computes at its first call and keeps, as positions in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = images.new_ones(4) * 1.0
        answers: Tensor = super().forward(images) * (self.gain * self.kept)
        return answers


@pytest.mark.parametrize("what", ["module", "callable"])
@pytest.mark.parametrize("at", ["discovery", "answers"])
def test_a_callers_module_can_be_trained_afterwards(what: str, at: str) -> None:
    net, images = Remembering(), toy_images(2)[0]
    model: object = net if what == "module" else net.forward
    if at == "discovery":
        discover_without_images(wrap(model), SHAPE)
    else:
        predictor(model)(images)
    assert net.kept is not None
    net(images).sum().backward()
    assert net.gain.grad is not None
