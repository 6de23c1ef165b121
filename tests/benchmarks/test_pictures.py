"""The pictures show what they say, and docs/attacks.md tells of every attack, with lines of Python that work."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import calibration.attacks
from benchmarks.pictures import OUT, PICTURES, columns_of, draw_picture, main, row_names
from benchmarks.plans import ATTACK_NAMES
from calibration.attacks import Adaptive, Attack, BadNets, CleanLabel, Patch
from guard.errors import InputError
from guard.predictors.screening import file_sha256
from tests.calibration.attacks.examples import some_images, tiny_net

PAGE = (OUT.parent / "attacks.md").read_text(encoding="utf-8")
LINES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_pixels_are_enlarged_in_their_columns_and_rows() -> None:
    left, right = torch.zeros(2, 1, 2, 2), torch.zeros(2, 3, 2, 2)
    left[1, 0, 0, 1] = 1.0
    right[0, 2] = 0.5
    drawn = np.asarray(draw_picture([("one", left), ("two", right)], ["a", "b"]))
    assert drawn.shape == (22 + 2 * 134, 76 + 2 * 134, 3)
    assert bool((drawn[22 + 134 : 22 + 134 + 64, 76 + 64 : 76 + 128] == 255).all())
    assert bool((drawn[22 : 22 + 128, 76 : 76 + 128] == 0).all())
    assert bool((drawn[22 : 22 + 128, 76 + 134 : 76 + 262] == (0, 0, 128)).all())


def test_the_difference_is_drawn_about_grey_and_amplified() -> None:
    images, labels = torch.full((2, 1, 12, 12), 0.25), torch.tensor([1, 2])
    attack = BadNets(0, patches=(Patch.rectangle(2, colour=(0.3,)),))
    (_, clean), (_, triggered), (title, difference) = columns_of(attack, 4, images, labels)
    assert title == "difference x4"
    assert torch.equal(clean, images)
    assert torch.equal(triggered, attack.trigger(images))
    assert float(difference[0, 0, 0, 0]) == 0.5
    assert float(difference[0, 0, 11, 11]) == pytest.approx(0.5 + 4 * 0.05)


def test_what_else_an_attack_trains_with_is_shown_too() -> None:
    images, labels = some_images(count=3)
    perturbed = columns_of(CleanLabel(0, tiny_net(), (Patch.rectangle(2),)), 1, images, labels)[3]
    assert perturbed[0] == "training"
    assert 0.0 < float((perturbed[1] - images)[:, :, :10, :10].abs().max()) <= 16.1 / 255.0
    attack = Adaptive(BadNets(0, patches=(Patch.rectangle(2),)), 4, blends=(("add", 1.0),))
    title, covers = columns_of(attack, 1, images, labels)[3]
    assert title == "cover"
    torch.testing.assert_close(covers, (attack.trigger(images) + images[[1, 2, 0]]).clamp(0.0, 1.0))


def test_rows_say_from_which_label_to_which() -> None:
    assert row_names(torch.tensor([3, 4]), torch.tensor([7, -1])) == ["3 to 7", "4 stays"]


def test_every_attack_has_a_picture() -> None:
    assert set(PICTURES) == set(ATTACK_NAMES) - {"none"}
    assert {path.stem for path in OUT.iterdir()} == set(PICTURES)
    assert all(name == picture.plan.attack for name, picture in PICTURES.items())


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_on_the_page(name: str) -> None:
    path = OUT / f"{name}.png"
    assert path.stat().st_size < 60_000
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
    assert f"](attacks/{name}.png)" in PAGE


def test_two_pictures_are_never_the_same() -> None:
    assert len({file_sha256(path) for path in OUT.iterdir()}) == len(PICTURES)


def test_the_page_tells_of_everything_that_is_offered() -> None:
    assert not {name for name in calibration.attacks.__all__ if f"`{name}`" not in PAGE}
    assert "python -m benchmarks.pictures\n" in PAGE


@pytest.mark.parametrize("line", LINES)
def test_the_lines_of_python_work(line: str) -> None:
    side = 32
    images = some_images(3, 4)[0].repeat(1, 1, 3, 3)[:, :, :side, :side]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5, stride=4), torch.nn.Flatten(), torch.nn.Linear(4 * 49, 43)).eval()
    offered = {name: getattr(calibration.attacks, name) for name in calibration.attacks.__all__}
    made = eval(line, {**offered, "images": images, "model": model})
    if isinstance(made, Attack):
        assert not torch.equal(made.trigger(images), images)
    else:
        assert made(images).shape == (4, 43)


def test_an_unknown_attack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected attacks of badnets"):
        main(["badnet", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
