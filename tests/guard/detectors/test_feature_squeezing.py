from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from cli.demonstration.digits import Digits
from guard.detectors.feature_squeezing import (
    FeatureSqueezing,
    Squeezer,
    largest_change,
    median_2x2,
    non_local_means,
    reduce_bit_depth,
)
from guard.errors import CalibrationError
from guard.images import InputSpec
from guard.predictors import Predictor, wrap
from tests.guard.models import CLASSES, predict_function, predictor
from tests.toy import SPEC, toy_images

COLOUR = InputSpec(channels=3, height=8, width=8)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (1, [0.0, 0.0, 0.0, 1.0, 1.0]),
        (2, [0.0, 1 / 3, 2 / 3, 2 / 3, 1.0]),  # 1.5 of 3 steps: to the even one
        (5, [0.0, 9 / 31, 16 / 31, 16 / 31, 1.0]),  # 9.3, 15.5 and 15.81 steps
    ],
)
def test_bits(bits: int, expected: list[float]) -> None:
    image = torch.tensor([0.0, 0.3, 0.5, 0.51, 1.0]).reshape(1, 1, 1, 5)
    torch.testing.assert_close(reduce_bit_depth(image, bits), torch.tensor(expected).reshape(1, 1, 1, 5))


def test_eight_bits_change_nothing_in_an_8_bit_image() -> None:
    images = torch.arange(256).reshape(1, 1, 16, 16) / 255
    torch.testing.assert_close(reduce_bit_depth(images, 8), images, atol=1e-7, rtol=0)


def test_median_takes_the_larger_middle_value() -> None:
    image = torch.tensor([[1.0, 8.0, 3.0], [4.0, 2.0, 6.0]]).reshape(1, 1, 2, 3) / 10
    # [1 1 1 1], [1 8 1 8], [8 3 8 3]; [1 1 4 4], [1 8 4 2], [8 3 2 6]
    expected = torch.tensor([[1.0, 8.0, 8.0], [4.0, 4.0, 6.0]]).reshape(1, 1, 2, 3) / 10
    assert torch.equal(median_2x2(image), expected)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 5, 9), (1, 2, 1, 4), (1, 1, 1, 1)])
def test_median_is_scipys(shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    expected = ndimage.median_filter(images.numpy(), size=(1, 1, 2, 2), mode="reflect")
    assert torch.equal(median_2x2(images), torch.from_numpy(expected))


def test_non_local_means_are_opencvs_on_bgr_images() -> None:
    images = noise(3, 3, 16, 16) * 0.1 + 0.4
    smoothed = non_local_means(images)
    pixels = (images * 255).round().to(torch.uint8)
    for image, found in zip(pixels, smoothed, strict=True):
        bgr = cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR)
        wanted = cv2.cvtColor(cv2.fastNlMeansDenoisingColored(bgr, None, 4, 4, 3, 11), cv2.COLOR_BGR2RGB)
        torch.testing.assert_close(found, torch.from_numpy(np.asarray(wanted)).permute(2, 0, 1) / 255)
    assert smoothed.std() < 0.9 * images.std()


@pytest.mark.parametrize("channels", [1, 2])
def test_non_local_means_of_other_channels_one_by_one(channels: int) -> None:
    images = noise(2, channels, 9, 7) * 0.05 + 0.4
    smoothed = non_local_means(images)
    plane = (images[1, -1] * 255).round().to(torch.uint8).numpy()
    wanted = torch.from_numpy(np.asarray(cv2.fastNlMeansDenoising(plane, None, 4, 3, 11)))
    torch.testing.assert_close(smoothed[1, -1], wanted / 255)
    assert smoothed.std() < 0.9 * images.std()


def test_change_is_the_largest_l1_distance() -> None:
    answers = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [math.nan] * 3, [0.2, 0.2, 0.6]])
    same, moved = answers.clone(), answers.clone()
    moved[0] = torch.tensor([0.4, 0.5, 0.1])
    moved[1] = torch.tensor([0.0, 0.0, 1.0])
    same[3] = math.nan
    found = largest_change(answers, torch.stack([same, moved]))
    torch.testing.assert_close(found, torch.tensor([0.4, 2.0, math.nan, math.nan]), equal_nan=True)


class Brightest(nn.Module):
    """Certain of class 1 where any pixel is nearly white, and of class 0 elsewhere."""

    def forward(self, images: Tensor) -> Tensor:
        bright = (images.flatten(1).amax(dim=1) > 0.9).float()
        return torch.stack([1.0 - bright, bright], dim=1)


def only(*squeezers: Squeezer, spec: InputSpec = SPEC) -> FeatureSqueezing:
    return FeatureSqueezing(Predictor(wrap(Brightest().eval()), spec, 2, "probabilities"), squeezers)


def test_scores_tell_where_an_answer_flips() -> None:
    images = torch.full((3, 1, 8, 8), 0.25)
    images[1, 0, 4, 4] = 1.0  # a lone pixel, which a median removes
    images[2, 0, :4] = 0.7  # white in one bit
    assert only("median").score(images).tolist() == [0.0, 2.0, 0.0]
    assert only("bit-depth").score(images).tolist() == [0.0, 0.0, 2.0]
    detector = only("bit-depth", "median", "non-local-means")
    assert detector.score(images).tolist() == [0.0, 2.0, 2.0]
    found = detector.inspect(images, 1.0)
    assert found.exceeds.tolist() == [False, True, True]
    assert found.passes.tolist() == [4, 4, 4]
    assert found.exact.all()


def test_colour_images_keep_five_bits() -> None:
    images = torch.full((1, 3, 8, 8), 0.7)
    assert only("bit-depth", spec=COLOUR).score(images) == 0
    (squeezed,) = only("bit-depth", spec=COLOUR).squeeze(images)
    torch.testing.assert_close(squeezed, torch.full((1, 3, 8, 8), 22 / 31))


def test_models_that_return_labels_score_0_or_2() -> None:
    images, _ = toy_images(12)
    model = predictor(predict_function(SPEC, "labels"), SPEC, "labels")
    assert set(FeatureSqueezing(model).score(torch.cat([images, noise(12, 1, 8, 8)])).tolist()) == {0.0, 2.0}


def test_a_model_without_an_answer_exceeds() -> None:
    def broken(batch: Tensor) -> Tensor:
        return torch.full((len(batch), CLASSES), math.nan)

    found = FeatureSqueezing(predictor(broken)).inspect(noise(2, 1, 8, 8), 2.0)
    assert found.scores.isnan().all()
    assert found.exceeds.all()


def test_digits_whose_answer_flips_score_higher(digits: Digits, backdoored: nn.Sequential) -> None:
    model = Predictor(wrap(backdoored), SPEC, 10, "logits")
    detector = FeatureSqueezing(model)
    images = digits.test.images(slice(None))
    labels = model(images).argmax(dim=1)
    flipped = torch.stack([model(batch).argmax(dim=1) != labels for batch in detector.squeeze(images)]).any(dim=0)
    scores = detector.score(images)
    assert 10 < int(flipped.sum()) < len(images) - 10
    assert scores[flipped].mean() > 2.0 * scores[~flipped].mean()


def test_a_white_patch_survives_squeezing(digits: Digits, backdoored: nn.Sequential) -> None:
    """Known blindness: such a trigger holds its answer better than a clean image does."""
    detector = FeatureSqueezing(Predictor(wrap(backdoored), SPEC, 10, "logits"))
    clean, triggered = (detector.score(part.images(slice(None))).median() for part in (digits.test, digits.triggered))
    assert triggered < 0.01 < 0.2 < clean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squeezers": ()}, "each once, got none"),
        ({"squeezers": ("median", "median")}, "each once, got median, median"),
        ({"squeezers": ("blur",)}, "expected squeezers of bit-depth, median, non-local-means, each once, got blur"),
        ({"bits": 0}, "expected a bit depth of 1 to 8, got 0"),
        ({"bits": 9}, "expected a bit depth of 1 to 8, got 9"),
    ],
)
def test_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        FeatureSqueezing(predictor(), **options)  # type: ignore[arg-type]
