from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast, get_args

import msgspec
import pytest
import torch
from torch import Tensor

from guard.detectors import Blend, Inspection, Strip, blend_images, entropy_bits
from guard.detectors.detector import at_or_over
from guard.errors import CalibrationError, InputError, ModelError
from guard.images import Array, InputSpec
from guard.predictors import BackendKind, Predictor
from tests.guard.models import predict_function, predictor
from tests.toy import ENTROPY_THRESHOLD, SPEC, toy_images

KEYED = InputSpec(channels=1, height=1, width=2)


@dataclass
class Table:
    """A model whose answer to a blend of image i and overlay n is chosen: `answers[i, n]`, whatever else is in the batch."""

    answers: Tensor
    rows: list[int] = field(default_factory=list)
    calls: int = 0

    @property
    def kind(self) -> BackendKind:
        return "callable"

    @property
    def batch_size(self) -> None:
        return None

    def __call__(self, batch: Array) -> object:
        assert isinstance(batch, Tensor)
        self.calls += 1
        image, overlay = (batch[:, 0, 0] * 255).round().to(torch.int64).unbind(dim=1)
        self.rows += image.tolist()
        return self.answers[image, overlay]

    def fingerprint(self) -> str | None:
        return None


def keyed(answers: Tensor, stage_rows: int = 4) -> tuple[Strip, Tensor, Table]:
    """STRIP over a table of answers (B, N, M), and the B images whose answers those are."""
    batch, total, classes = answers.shape
    table = Table(answers)
    images = torch.zeros(batch, 1, 1, 2)
    images[:, 0, 0, 0] = torch.arange(batch) / 255
    overlays = torch.zeros(total, 1, 1, 2)
    overlays[:, 0, 0, 1] = torch.arange(total) / 255
    return Strip(Predictor(table, KEYED, classes, "probabilities"), overlays, stage_rows=stage_rows), images, table


def peaked(entropy_of: Tensor) -> Tensor:
    """Two-class answers [1 - p, p] with p given: the nastier p, the nastier the float that its entropy is."""
    return torch.stack([1 - entropy_of, entropy_of], dim=-1)


def test_entropy_is_in_bits_over_the_classes() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125]])
    torch.testing.assert_close(entropy_bits(rows), torch.tensor([0.0, 1.0, 2.0, 1.75], dtype=torch.float64))


def test_entropy_is_never_negative_and_keeps_nan() -> None:
    over = torch.tensor([[1.0 + 1e-7, 0.0], [math.nan, math.nan]])
    found = entropy_bits(over)
    assert found[0] == 0
    assert math.isnan(found[1])


@pytest.mark.parametrize(
    ("blend", "alpha", "expected"),
    [
        ("add", 1.0, [0.5, 0.9, 1.0, 0.2]),
        ("add", 0.5, [0.35, 0.75, 1.0, 0.2]),
        ("mix", 0.5, [0.25, 0.45, 0.6, 0.1]),
        ("mix", 1.0, [0.3, 0.3, 0.4, 0.0]),  # nothing left of the image
        ("mix", 0.25, [0.225, 0.525, 0.7, 0.15]),
        ("demeaned", 1.0, [0.25, 0.65, 0.95, 0.0]),  # mean of the overlay: 0.25
        ("demeaned", 2.0, [0.3, 0.7, 1.0, 0.0]),
        ("max", 1.0, [0.3, 0.6, 0.8, 0.2]),
        ("max", 3.0, [0.9, 0.9, 1.0, 0.2]),
        # z = [1, 1, 3, -5] / 3: odds of 1:4, 3:2, 4:1 and 1:4 times e to the power of alpha z
        ("logit", 1.0, [0.2586638, 0.6767230, 0.9157836, 0.0450978]),
        ("logit", 2.0, [0.3274675, 0.7450097, 0.9672685, 0.0088406]),
    ],
)
def test_blends(blend: Blend, alpha: float, expected: list[float]) -> None:
    image = torch.tensor([0.2, 0.6, 0.8, 0.2]).reshape(1, 1, 2, 2)
    overlay = torch.tensor([0.3, 0.3, 0.4, 0.0]).reshape(1, 1, 2, 2)
    blended = blend_images(image, overlay, blend, alpha)
    torch.testing.assert_close(blended, torch.tensor(expected).reshape(1, 1, 1, 2, 2))


def test_demeaned_subtracts_one_scalar_over_all_channels() -> None:
    overlay = torch.stack([torch.full((2, 2), 0.2), torch.full((2, 2), 0.6)])[None]
    blended = blend_images(torch.full((1, 2, 2, 2), 0.5), overlay, "demeaned", 1.0)
    torch.testing.assert_close(blended[0, 0, :, 0, 0], torch.tensor([0.3, 0.7]))


def stripes(light: float, dark: float) -> Tensor:
    """An overlay (1, 1, 2, 4) of two levels, as much of the one as of the other."""
    return torch.tensor([light, dark]).repeat(4).reshape(1, 1, 2, 4)


def moved(level: float, overlay: Tensor, alpha: float = 2.0) -> float:
    """By how much `logit` moves an even image under an overlay, at most."""
    return float((blend_images(torch.full((1, 1, 2, 4), level), overlay, "logit", alpha) - level).abs().max())


def test_logit_moves_mid_tones_and_hardly_black_and_white() -> None:
    overlay = stripes(0.9, 0.1)
    assert moved(0.5, overlay) == pytest.approx(0.3807971, abs=1e-6)  # 1 / (1 + e^-2) - 1 / 2
    assert moved(0.0, overlay) == pytest.approx(0.0073423, abs=1e-6)  # e^2 / (999 + e^2)
    assert moved(1.0, overlay) == pytest.approx(0.0073423, abs=1e-6)


def test_logit_moves_mid_tones_as_much_under_faint_overlays_as_under_strong_ones() -> None:
    for image in (0.3, 0.5, 0.7):
        strong = moved(image, stripes(1.0, 0.0))
        for light, dark in ((0.55, 0.45), (0.1, 0.05), (1.0, 0.9)):
            assert moved(image, stripes(light, dark)) == pytest.approx(strong, abs=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_logit_neither_divides_by_nothing_nor_blows_up_the_noise_of_a_flat_overlay(level: float) -> None:
    images = torch.tensor([0.01, 0.3, 0.5, 0.99]).repeat(2).reshape(1, 1, 2, 4)
    torch.testing.assert_close(blend_images(images, torch.full_like(images, level), "logit", 2.0)[0], images)
    assert moved(0.5, stripes(0.5, 0.5 - 1 / 255)) < 0.06


def test_alpha_scales_what_logit_moves() -> None:
    images, overlay = (torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    images = images * 0.8 + 0.1
    shifts = [
        torch.logit(blend_images(images, overlay, "logit", alpha)[0, 0]) - torch.logit(images[0]) for alpha in (0.5, 1.0, 2.0)
    ]
    torch.testing.assert_close(shifts[1], 2.0 * shifts[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shifts[2], 4.0 * shifts[0], atol=1e-4, rtol=1e-4)
    assert shifts[1].mean() == pytest.approx(0.0, abs=1e-5)
    assert shifts[1].square().mean().sqrt() == pytest.approx(1.0, abs=1e-4)  # alpha, in logits


@pytest.mark.parametrize("blend", get_args(Blend))
@pytest.mark.parametrize("alpha", [0.01, 1.0, 50.0])
def test_blends_stay_pixels(blend: Blend, alpha: float) -> None:
    corners = torch.tensor([0.0, 1.0, 0.5, 0.0]).reshape(1, 1, 2, 2)
    images = torch.cat([corners, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)])
    before = images.clone()
    blended = blend_images(images, images, blend, min(alpha, 1.0) if blend == "mix" else alpha)
    assert blended.dtype == torch.float32
    assert torch.isfinite(blended).all()
    assert 0.0 <= blended.min() <= blended.max() <= 1.0
    assert torch.equal(images, before)


def test_every_image_meets_every_overlay_in_order() -> None:
    images, overlays = (
        torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)) / 2,
        torch.rand(5, 2, 2, 2, generator=torch.Generator().manual_seed(1)) / 2,
    )
    blended = blend_images(images, overlays)
    assert blended.shape == (3, 5, 2, 2, 2)
    for row in range(3):
        for column in range(5):
            torch.testing.assert_close(blended[row, column], images[row] + overlays[column])


def test_score_is_minus_the_mean_entropy() -> None:
    answers = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], [[1.0, 0.0]] * 4])
    strip, images, _ = keyed(answers)
    assert strip.score(images).tolist() == [-0.5, 0.0]
    torch.testing.assert_close(strip.pass_entropies(images), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.float64))


def test_no_images_have_no_scores(strip: Strip, clean: Tensor) -> None:
    assert strip.score(clean[:0]).shape == (0,)
    assert strip.pass_entropies(clean[:0]).shape == (0, len(strip.overlays))


def test_triggered_outscores_clean(strip: Strip, clean: Tensor, triggered: Tensor) -> None:
    assert strip.score(triggered).min() > -ENTROPY_THRESHOLD > strip.score(clean).max()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_trigger_survives_every_weight_of_added_overlays(
    alpha: float, overlays: Tensor, clean: Tensor, triggered: Tensor
) -> None:
    strip = Strip(predictor(), overlays, "add", alpha)
    assert strip.score(triggered).min() > strip.score(clean).max()


def nasty_thresholds(scores: Tensor) -> list[float]:
    exact = [float(score) for score in scores]
    beside = [float(torch.nextafter(score, score.new_tensor(end))) for score in scores for end in (-math.inf, math.inf)]
    random = torch.rand(20, generator=torch.Generator().manual_seed(9)).mul(-1).tolist()
    return [*exact, *beside, *random, 0.0, -0.0, 1e-45, -1e-45, -1.0, 1.0, 0.1 + 0.2]


def inspected(strip: Strip, images: Tensor, table: Table) -> Iterator[tuple[Tensor, Tensor, Inspection]]:
    """At each threshold: full scores, the verdicts that follow from them, and what was found, which has the same verdicts."""
    scores = strip.score(images)
    for threshold in nasty_thresholds(scores):
        expected = scores >= torch.tensor(threshold, dtype=torch.float32)
        table.rows.clear()
        found = strip.inspect(images, threshold)
        assert torch.equal(found.exceeds, expected), threshold
        assert found.passes.tolist() == [table.rows.count(row) for row in range(len(images))]
        assert torch.equal(found.scores[found.exact], scores[found.exact])
        alone = strip.inspect(images[7:8], threshold)
        assert alone.exceeds.tolist() == expected[7:8].tolist()
        yield scores, expected, found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stage_rows", [1, 4, 64])
def test_curtailed_verdicts_are_those_of_the_full_score(seed: int, stage_rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(9, 37, generator=generator)
    draws[0] = 0.0  # entropy exactly 0
    draws[1] = 0.1  # 0.1 summed 37 times is not 3.7
    draws[2, 1:] = 0.0  # all of it in the first pass
    draws[3, :-1] = 0.0  # all of it in the last pass
    draws[4] = 1e-30
    draws[5] *= 10.0 ** -(torch.rand(37, generator=generator) * 12)
    draws[6] = draws[7].flip(0)  # the same entropies, summed the other way round
    strip, images, table = keyed(peaked(draws), stage_rows)
    for scores, _, found in inspected(strip, images, table):
        assert torch.equal(found.exact, found.passes == 37)
        assert (found.scores >= scores).all()
    for row, score in enumerate(strip.score(images)):
        assert strip.exceeds(images[row : row + 1], float(score)).tolist() == [True]


def test_a_threshold_equal_to_the_score_exceeds() -> None:
    strip, images, _ = keyed(peaked(torch.full((1, 10), 0.1)))
    score = float(strip.score(images))
    assert strip.exceeds(images, score).tolist() == [True]
    over = float(torch.nextafter(torch.tensor(score), torch.tensor(1.0)))
    assert strip.exceeds(images, over).tolist() == [False]


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_no_threshold_makes_a_broken_score_pass(threshold: float) -> None:
    scores = torch.tensor([math.nan, math.inf, -math.inf])
    assert at_or_over(scores, threshold).all()
    assert at_or_over(torch.tensor([-1.0]), math.nan).all()


def test_clean_inputs_cost_few_passes(strip: Strip, clean: Tensor, triggered: Tensor) -> None:
    on_clean = strip.inspect(clean, -ENTROPY_THRESHOLD).passes
    on_triggered = strip.inspect(triggered, -ENTROPY_THRESHOLD).passes
    assert on_triggered.tolist() == [40] * len(triggered)
    assert on_clean.max() < 40
    assert on_clean.float().mean() < 15


def test_a_lone_input_takes_few_calls() -> None:
    strip, images, table = keyed(peaked(torch.zeros(1, 100)))
    strip.inspect(images, 0.0)
    assert len(table.rows) == 100
    assert table.calls == len(strip.stage_ends()) <= 12


@pytest.mark.parametrize(("side", "most"), [(32, 65), (224, 8)])
def test_no_stage_is_larger_than_what_fills_a_processor(side: int, most: int) -> None:
    """A few large images do that, and whatever is tried at once is tried in vain if the first of them decides."""
    spec = InputSpec(channels=3, height=side, width=side)
    strip = Strip(predictor(spec=spec), torch.zeros(1, *spec.shape).expand(400, -1, -1, -1))
    sizes = [after - before for before, after in itertools.pairwise([0, *strip.stage_ends()])]
    assert max(sizes) == most


@pytest.mark.parametrize(("active", "stage_rows"), [(1, 4), (3, 4), (100, 4), (1, 1), (2, 0)])
def test_stages_end_at_the_last_overlay(active: int, stage_rows: int) -> None:
    strip, _, _ = keyed(peaked(torch.zeros(1, 100)), stage_rows)
    ends = strip.stage_ends(active)
    assert ends[-1] == 100
    assert ends == sorted(set(ends))


def test_one_row_without_an_answer_exceeds_and_leaves_the_others_alone() -> None:
    answers = peaked(torch.full((3, 8), 0.5))
    answers[1, 5] = math.nan
    strip, images, _ = keyed(answers)
    scores = strip.score(images)
    assert torch.isnan(scores).tolist() == [False, True, False]
    found = strip.inspect(images, -2.0)
    assert found.exceeds.tolist() == [True, True, True]


@pytest.mark.parametrize("when", [0, 3, 7])
def test_nan_exceeds_whichever_pass_gave_it(when: int) -> None:
    answers = peaked(torch.full((1, 8), 0.5))
    answers[0, when] = math.nan
    strip, images, _ = keyed(answers)
    found = strip.inspect(images, -1.5)  # one bit a pass never reaches 1.5 bits: all passes run
    assert found.exceeds.tolist() == [True]
    assert found.passes.tolist() == [8]


def test_a_failure_after_the_verdict_was_certain_is_not_looked_for() -> None:
    answers = peaked(torch.full((1, 8), 0.5))
    answers[0, 7] = math.nan
    strip, images, _ = keyed(answers)
    found = strip.inspect(images, -0.25)
    assert found.exceeds.tolist() == [False]
    assert found.passes.tolist() == [4]


def test_label_only_models_are_judged_by_the_histogram_of_their_labels() -> None:
    labels = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 3]]), 4).float()
    strip, images, table = keyed(labels)
    by_labels = Strip(
        Predictor(lambda_backend(table), KEYED, 4, "labels"),
        strip.overlays,
    )
    assert by_labels.score(images).tolist() == [-1.0, 0.0, -2.0]
    table.rows.clear()
    found = by_labels.inspect(images, -0.5)
    assert found.exceeds.tolist() == [False, True, False]
    assert found.passes.tolist() == [4, 4, 4]
    assert found.exact.all()
    assert len(table.rows) == 12


def lambda_backend(table: Table) -> Table:
    """The same table, answering labels."""

    class Labels(Table):
        def __call__(self, batch: Array) -> object:
            answer = table(batch)
            assert isinstance(answer, Tensor)
            return answer.argmax(dim=1)

    return Labels(table.answers)


def test_label_only_toy_sees_the_trigger(overlays: Tensor, clean: Tensor, triggered: Tensor) -> None:
    spec = msgspec.structs.replace(SPEC, container="numpy")
    strip = Strip(predictor(predict_function(spec, "labels"), spec, "labels"), overlays)
    assert strip.score(triggered).min() >= 0
    assert strip.score(clean).max() < -0.1


@pytest.mark.parametrize("seed", range(4))
def test_sums_never_fall_and_do_not_depend_on_where_stages_are_cut(seed: int) -> None:
    """What curtailment rests on: adding entropies in one order, in float64, never decreases a sum."""
    entropies = torch.rand(1, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    entropies *= 10.0 ** -(torch.rand(1, 50, generator=torch.Generator().manual_seed(seed + 10), dtype=torch.float64) * 17)
    strip, _, _ = keyed(peaked(torch.zeros(1, 50)))
    padded = [torch.nn.functional.pad(entropies[:, :end], (0, 50 - end)) for end in range(51)]
    scores = torch.cat([strip.score_passes(part) for part in padded])
    assert (scores[1:] <= scores[:-1]).all()


@pytest.mark.parametrize(
    ("blend", "alpha"),
    [
        ("add", 0.0),
        ("add", -1.0),
        ("add", math.nan),
        ("add", math.inf),
        ("mix", 1.5),
        ("mix", 0.0),
        ("demeaned", 0.0),
        ("logit", 0.0),
    ],
)
def test_weights_out_of_range(blend: Blend, alpha: float, overlays: Tensor) -> None:
    with pytest.raises(CalibrationError, match="expected alpha"):
        Strip(predictor(), overlays, blend, alpha)


def test_a_misspelt_blend_is_not_taken_for_another(overlays: Tensor) -> None:
    with pytest.raises(CalibrationError, match="expected a blend of add, mix, demeaned, max, logit, got 'Mix'"):
        Strip(predictor(), overlays, cast(Blend, "Mix"), 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, 1, 8), "add a batch axis"),
        (torch.full((4, 1, 8, 8), 2.0), "expected pixel values in"),
        (torch.full((4, 1, 8, 8), math.nan), "NaN"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "float32"),
        (torch.zeros(4, 3, 8, 8), "expected images of shape"),
        (torch.zeros(4, 1, 1, 1), "expected images of shape"),  # would be broadcast in silence
    ],
)
def test_overlays_that_are_not_the_models_images(wrong: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Strip(predictor(), wrong)


def test_no_overlays() -> None:
    with pytest.raises(CalibrationError, match="at least one overlay"):
        Strip(predictor(), torch.zeros(0, 1, 8, 8))


def test_one_overlay_is_enough_to_run(clean: Tensor, triggered: Tensor) -> None:
    strip = Strip(predictor(), toy_images(1, seed=1)[0])
    assert strip.score(triggered).min() > strip.score(clean).max()


def test_a_model_that_fails_says_so(overlays: Tensor, clean: Tensor) -> None:
    def fails(batch: Tensor) -> Tensor:
        raise ZeroDivisionError("no")

    with pytest.raises(ModelError, match="the model failed on a batch of"):
        Strip(predictor(fails), overlays).score(clean)


def test_logit_blends_have_the_same_bits_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    images, overlays = torch.rand(9, 3, 11, 13, generator=generator), torch.rand(17, 3, 11, 13, generator=generator)
    whole = blend_images(images, overlays, "logit", 2.0)
    for rows, columns in ((slice(0, 1), slice(0, 17)), (slice(3, 8), slice(5, 6)), (slice(0, 9), slice(2, 13))):
        assert torch.equal(blend_images(images[rows], overlays[columns], "logit", 2.0), whole[rows, columns])


def test_a_huge_logit_alpha_gives_black_and_white_not_nan() -> None:
    image = torch.linspace(0.0, 1.0, 16).reshape(1, 1, 4, 4)
    blended = blend_images(image, image.flip(2), "logit", 1e6)
    assert bool(torch.isfinite(blended).all())
    assert bool(((blended < 1e-3) | (blended > 0.999)).all())
