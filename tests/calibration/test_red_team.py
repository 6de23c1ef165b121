"""The red team: its images are its own, the model stays as it was, a bad setting isn't chosen, what it can't say it says."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from calibration import BlendChoice, ImageSet, RedTeam, red_team, split
from calibration.planting import Say, draw_plants
from calibration.red_team import _ranked, check_images, choose
from calibration.red_team_report import far_table, red_team_report, remarks
from calibration.statistics import Estimate, proportion
from calibration.trials import Figures, Planted, Setting
from guard.detectors import Blend
from guard.errors import CalibrationError, ModelError, TooFewImagesError
from guard.predictors import Predictor, wrap
from tests.toy import NAMES, SPEC, LearningToy, toy_images

GOOD, BAD = ("add", 1.0), ("mix", 0.05)
CANDIDATES: tuple[tuple[Blend, float], ...] = (("mix", 0.05), ("add", 1.0))
OVERLAYS = 16


def toy_set(count: int, labelled: bool = True) -> ImageSet:
    images, labels = toy_images(count)
    return ImageSet((images * 255).round().to(torch.uint8), labels if labelled else None, NAMES)


def contents(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def toy_predictor() -> Predictor:
    return Predictor(wrap(LearningToy()), SPEC, 4, "logits")


@pytest.fixture(scope="module")
def toy() -> Predictor:
    return toy_predictor()


def run(predictor: Predictor, clean: ImageSet, seed: int = 0) -> RedTeam:
    return red_team(predictor, clean, overlays=OVERLAYS, seed=seed, candidates=CANDIDATES)


@pytest.fixture(scope="module")
def found(toy: Predictor) -> RedTeam:
    return run(toy, toy_set(400))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_two_parts_share_no_image(seed: int) -> None:
    clean = toy_set(401)
    first, rest = split(clean, seed)
    assert len(contents(clean.pixels)) == 401  # so that an image is known by its pixels
    assert (len(first), len(rest)) == (200, 201)
    assert not contents(first.pixels) & contents(rest.pixels)
    assert contents(first.pixels) | contents(rest.pixels) == contents(clean.pixels)
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(clean.pixels, clean.known_labels, strict=True)}
    assert [labels[image.numpy().tobytes()] for image in rest.pixels] == rest.known_labels.tolist()
    assert contents(split(clean, seed)[0].pixels) == contents(first.pixels)


def test_a_large_clean_set_keeps_most_for_the_threshold() -> None:
    numbers = torch.arange(10_000)
    images = torch.stack([numbers // 256, numbers % 256], dim=1).to(torch.uint8).view(-1, 1, 1, 2)
    first, rest = split(ImageSet(images), 0)
    assert (len(first), len(rest)) == (1_700, 8_300)


def test_copies_of_an_image_are_not_on_both_sides() -> None:
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(3, 1, 1, 1)
    first, rest = split(ImageSet(images), 0)
    assert len(first) + len(rest) == 200
    assert not contents(first.pixels) & contents(rest.pixels)


def test_a_setting_that_hardly_superimposes_is_not_chosen(found: RedTeam) -> None:
    assert (found.chosen.blend, found.chosen.alpha) == GOOD
    deciding = [plant for plant in found.planted if plant.say == "decides" and plant.figures]
    assert len(deciding) == 3
    for plant in deciding:
        assert plant.attack_success.value >= 0.8
        assert plant.clean_accuracy >= 0.8
    assert mean_far(deciding, *GOOD) < 0.6 < 0.9 < mean_far(deciding, *BAD)


def mean_far(plants: list[Planted], blend: str, alpha: float) -> float:
    rates = [
        item.far.value
        for plant in plants
        for item in plant.figures
        if (item.setting.blend, item.setting.alpha) == (blend, alpha)
    ]
    return sum(rates) / len(rates)


def test_the_same_seed_finds_the_same_and_another_plants_others(toy: Predictor, found: RedTeam) -> None:
    again = run(toy, toy_set(400))
    assert msgspec.structs.replace(again, seconds=0.0) == msgspec.structs.replace(found, seconds=0.0)
    assert run(toy, toy_set(400), seed=1).planted != found.planted


def test_model_images_and_global_generator_stay_as_they_were() -> None:
    predictor, clean = toy_predictor(), toy_set(300)
    images = clean.images(slice(0, 64))
    pixels, answers, fingerprint = clean.pixels.clone(), predictor(images), predictor.backend.fingerprint()
    state = torch.get_rng_state()
    shown: list[tuple[str, int, int]] = []
    red_team(predictor, clean, overlays=OVERLAYS, candidates=(("add", 1.0),), progress=lambda *step: shown.append(step))
    assert predictor.backend.fingerprint() == fingerprint
    assert predictor(images).numpy().tobytes() == answers.numpy().tobytes()
    assert torch.equal(clean.pixels, pixels)
    assert torch.equal(torch.get_rng_state(), state)
    assert {"planting triggers"} <= {what for what, _, _ in shown}
    last = {what: (done, total) for what, done, total in shown}
    assert all(done == total > 0 for done, total in last.values())


def test_images_without_labels_get_the_models_answers(toy: Predictor, found: RedTeam) -> None:
    assert run(toy, toy_set(400, labelled=False)).planted == found.planted  # the toy answers its clean images rightly


@pytest.mark.parametrize(
    ("count", "frr", "overlays", "message"),
    [
        (207, 0.01, 8, "needs at least 208 clean images, got 207"),
        (299, 0.01, 100, "needs at least 300 clean images, got 299"),
        (500, 0.001, 8, "needs at least 1107 clean images, got 500"),
        (500, 0.01, 1, "at least 4 overlays"),
        (500, 0.0, 8, "between 0 and 1"),
        (500, float("nan"), 8, "between 0 and 1"),
        (500, 1.0, 8, "between 0 and 1"),
    ],
)
def test_too_little_says_how_much(toy: Predictor, count: int, frr: float, overlays: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        red_team(toy, toy_set(count), frr, overlays)


def test_the_number_that_is_asked_for_is_enough(toy: Predictor) -> None:
    with pytest.raises(TooFewImagesError) as caught:
        check_images(1, 0.005, OVERLAYS)
    found = red_team(toy, toy_set(caught.value.needed), 0.005, OVERLAYS, candidates=(("add", 1.0),))
    assert (found.tuning_images, found.choosing_images) == (100, 199)


def test_images_of_one_class_are_refused_whatever_the_seed(toy: Predictor) -> None:
    clean = toy_set(1_600)
    same = clean.select(torch.nonzero(clean.known_labels == 3).squeeze(1))
    for seed in range(4):
        with pytest.raises(CalibrationError, match="of several classes, got one class"):
            run(toy, same, seed)


def test_a_rare_class_that_is_all_overlays_is_none_to_compare_on(toy: Predictor) -> None:
    clean = toy_set(1_600)
    rows = torch.nonzero(clean.known_labels == 3).squeeze(1)
    rare = torch.nonzero(clean.known_labels == 1).squeeze(1)[:1]
    for seed in range(4):
        with pytest.raises(CalibrationError, match="several clean images of several classes, got one class"):
            run(toy, clean.select(torch.cat([rows, rare])), seed)


def test_labels_in_another_order_are_refused(toy: Predictor) -> None:
    clean = toy_set(400)
    with pytest.raises(CalibrationError, match=r"answers 0% of .*near chance: check .*order of labels"):
        run(toy, ImageSet(clean.pixels, (clean.known_labels + 1) % 4, NAMES))


def test_a_model_through_which_no_gradient_comes_is_refused_at_once() -> None:
    class Rounds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LearningToy()

        def forward(self, images: Tensor) -> Tensor:
            answers: Tensor = (10.0 * self.inner(images)).round()
            return answers

    predictor = Predictor(wrap(Rounds().eval()), SPEC, 4, "logits")
    with pytest.raises(ModelError, match="got one without gradients"):
        run(predictor, toy_set(400))


def test_images_too_small_for_a_patch_are_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 4x4 pixels to plant patches in, got 40x3"):
        draw_plants((1, 40, 3), 4, torch.Generator())
    for plant in draw_plants((1, 4, 4), 4, torch.Generator()):
        plant.attack.trigger(torch.rand(2, 1, 4, 4))


def test_labels_must_be_the_models(toy: Predictor) -> None:
    clean = toy_set(300)
    with pytest.raises(ModelError, match="more than 7 outputs"):
        run(toy, ImageSet(clean.pixels, clean.known_labels + 4))
    with pytest.raises(CalibrationError, match="expected 4 class folders"):
        run(toy, ImageSet(clean.pixels, clean.known_labels.clamp_max(2), NAMES[:3]))


def rate(count: int) -> Estimate:
    return proportion(count, 100)


def planted(name: str, say: Say, accepted: dict[Setting, int], area: float = 0.9) -> Planted:
    figures = tuple(
        Figures(setting=setting, far=rate(count), auroc=Estimate(area, area, area)) for setting, count in accepted.items()
    )
    return Planted(
        name=name,
        say=say,
        target_label=0,
        clean_accuracy=0.99,
        attack_success=rate(97 if accepted else 12),
        figures=figures,
    )


ADD, MIX = Setting("add", 1.0, 8), Setting("mix", 0.5, 8)


def test_only_those_that_decide_and_took_decide() -> None:
    found = [
        planted("square", "decides", {ADD: 3, MIX: 9}),
        planted("bar", "decides", {}),
        planted("blend", "breaks ties", {ADD: 90, MIX: 0}),
        planted("all to all", "none", {ADD: 100, MIX: 0}),
    ]
    assert choose(found) == ADD


@pytest.mark.parametrize(("add_on_patches", "expected"), [(0, MIX), (14, MIX), (16, ADD)])
def test_among_those_that_see_patches_as_well_the_blend_breaks_the_tie(add_on_patches: int, expected: Setting) -> None:
    patches = [
        planted("square", "decides", {ADD: 3, MIX: 3 + add_on_patches}),
        planted("bar", "decides", {ADD: 0, MIX: 0}),
        planted("noise", "decides", {ADD: 0, MIX: 0}),
    ]
    assert choose([*patches, planted("blend", "breaks ties", {ADD: 90, MIX: 40})]) == expected
    assert choose([*patches, planted("blend", "breaks ties", {ADD: 90, MIX: 60})]) == ADD  # blind to it both
    assert choose([*patches, planted("blend", "breaks ties", {})]).blend == "add"  # the blend did not take


def test_beyond_a_tie_the_blend_has_no_say() -> None:
    far_off = Setting("max", 1.0, 8)
    patch = planted("square", "decides", {ADD: 5, far_off: 95, MIX: 15})
    blend = planted("blend", "breaks ties", {ADD: 90, far_off: 40, MIX: 90})
    assert _ranked([patch, blend]) == [ADD, MIX, far_off]


def test_fewer_overlays_are_enough_only_where_they_see_the_blend_as_well() -> None:
    few, many = Setting("add", 1.0, 4), Setting("add", 1.0, 8)
    square = planted("square", "decides", {few: 1, many: 1})
    assert choose([square, planted("blend", "breaks ties", {few: 49, many: 5})]) == few
    assert choose([square, planted("blend", "breaks ties", {few: 50, many: 5})]) == many


def test_when_nothing_takes_it_says_so() -> None:
    with pytest.raises(CalibrationError, match="got square 12%, bar 12%, blend 97%: give more clean images"):
        choose([planted("square", "decides", {}), planted("bar", "decides", {}), planted("blend", "breaks ties", {ADD: 0})])


def reported() -> RedTeam:
    return RedTeam(
        chosen=ADD,
        frr=0.01,
        planted=(
            planted("square", "decides", {MIX: 9, ADD: 3}),
            planted("<b>all to all</b>", "none", {ADD: 50, MIX: 99}),
            planted("blend", "breaks ties", {}),
        ),
        tuning_images=120,
        choosing_images=100,
        seconds=1.0,
    )


def test_what_it_is_blind_to_and_what_it_does_not_know_is_said_by_name() -> None:
    said = remarks(reported())
    assert "120 clean images planted them, 100 set" in said[0]
    assert "no guarantee" in said[0]
    assert "blind here, even with the chosen setting, to: <b>all to all</b> (50% accepted)" in said[1]
    assert "nothing is known about: blend (12%)" in said[2]
    assert len(said) == 3


def test_the_table_has_a_row_per_setting_and_a_column_per_trigger() -> None:
    header, rows = far_table(reported())
    assert [cell.strip() for cell in header] == ["setting", "square", "<b>all to all</b>", "blend"]
    assert [row[0] for row in rows] == ["  mix 0.5, N = 8", "* add 1, N = 8"]
    assert rows[1][1] == "3.0% 0.6-8.5"
    assert rows[1][3] == "not learned"


def test_the_page_needs_nothing_else_and_shows_the_intervals() -> None:
    page = red_team_report(reported()).decode()
    assert page.count("data:image/png;base64,") == 1
    assert "3.0% 0.6-8.5" in page
    assert "<b>" not in page
    assert "http" not in page
    assert 'class="marked"' in page


def test_a_candidate_that_needs_more_images_is_left_out_and_named(toy: Predictor) -> None:
    pair: tuple[tuple[BlendChoice, float | None], ...] = (("logit+demeaned", None), ("add", 1.0))
    few = red_team(toy, toy_set(300), overlays=OVERLAYS, candidates=pair)
    assert few.left_out == (("logit+demeaned", None),)
    assert few.chosen.blend == "add"
    assert any("logit+demeaned" in text for text in remarks(few))
    enough = red_team(toy, toy_set(700), overlays=OVERLAYS, candidates=pair)
    assert enough.left_out == ()
    assert {item.setting.blend for item in enough.planted[0].figures} == {"logit+demeaned", "add"}
