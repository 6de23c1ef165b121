from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from guard import Guard, Predictor
from guard.errors import InputError
from guard.predictors import wrap
from guard.preprocessors import Gym, answer_through
from tests.toy import SPEC, TARGET, ToyNet, toy_images, toy_trigger


def attack_success(images: Tensor, labels: Tensor) -> float:
    answers = ToyNet()(images).argmax(dim=1)
    return float((answers[labels != TARGET] == TARGET).float().mean())


@pytest.mark.parametrize("gym", [Gym(), Gym(kernel=3), Gym(shift=0.0, rotation=0.0, zoom=0.0)])
def test_it_breaks_the_toys_trigger(gym: Gym) -> None:
    images, labels = toy_images(40, seed=3)
    triggered = toy_trigger(images)
    assert attack_success(triggered, labels) == 1.0
    assert attack_success(gym(triggered, torch.Generator().manual_seed(0)), labels) < 0.2


def test_clean_images_keep_most_labels() -> None:
    images, labels = toy_images(40, seed=3)
    answers = ToyNet()(Gym(kernel=3)(images, torch.Generator().manual_seed(0))).argmax(dim=1)
    assert (answers == labels).float().mean() > 0.9


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 7), (1, 1, 7, 1), (1, 3, 2, 2), (2, 1, 13, 5)])
def test_the_filter_keeps_constant_images(shape: tuple[int, ...], value: float) -> None:
    images = torch.full(shape, value)
    torch.testing.assert_close(Gym().filter(images), images, atol=1e-6, rtol=0)


def test_the_filter_draws_nothing_and_sat_draws() -> None:
    images, _ = toy_images(3)
    gym = Gym()
    assert torch.equal(gym.filter(images), gym.filter(images))
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    moved = gym.sat(images, generator)
    assert not torch.equal(generator.get_state(), state)
    assert not torch.equal(moved, images)


def test_it_is_the_filter_and_then_sat() -> None:
    images, _ = toy_images(3)
    gym = Gym()
    whole = gym(images, torch.Generator().manual_seed(1))
    assert torch.equal(whole, gym.sat(gym.filter(images), torch.Generator().manual_seed(1)))


def test_sat_leaves_zeros_at_the_border() -> None:
    moved = Gym(shift=0.5, rotation=0.0, zoom=0.0).sat(torch.ones(8, 1, 16, 16), torch.Generator().manual_seed(0))
    assert moved.min() == 0
    assert moved.max() <= 1


def test_images_that_require_gradients_are_no_trouble() -> None:
    images, _ = toy_images(2)
    gym = Gym()
    plain = gym(images, torch.Generator().manual_seed(0))
    assert torch.equal(gym(images.requires_grad_(True), torch.Generator().manual_seed(0)).detach(), plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel": 4}, {"kernel": 7}, {"scale": 0.0}, {"scale": 1.1}, {"scale": math.nan}, {"shift": 1.0}, {"shift": -0.1},
        {"zoom": 1.0}, {"zoom": math.nan}, {"rotation": 181.0}, {"rotation": math.nan}, {"shift": math.inf}, {"views": 0},
    ],
)  # fmt: skip
def test_parameters_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        Gym(**wrong)


def test_views_are_averaged() -> None:
    images, _ = toy_images(6, seed=2)
    net, gym = ToyNet(), Gym(kernel=1, views=3)
    found = answer_through(lambda part: net(part).softmax(dim=1), gym, images, torch.Generator().manual_seed(0))
    generator, one = torch.Generator().manual_seed(0), Gym(kernel=1)
    singles = [net(one(images, generator)).softmax(dim=1) for _ in range(3)]
    torch.testing.assert_close(found, torch.stack(singles).mean(dim=0))
    alone = answer_through(net, one, images, torch.Generator().manual_seed(0))
    assert torch.equal(alone, net(one(images, torch.Generator().manual_seed(0))))
    assert torch.equal(answer_through(net, None, images, torch.Generator()), net(images))


def test_a_guard_averages_them_too() -> None:
    images, labels = toy_images(40, seed=2)
    model = Predictor(wrap(ToyNet()), SPEC, 4, "logits")
    right = []
    for views in (1, 25):
        guard = Guard(model, [], preprocessor=Gym(kernel=1, shift=0.4, views=views), seed=0)
        right.append(sum(verdict.label_index == int(label) for verdict, label in zip(guard(images), labels, strict=True)))
    assert right[1] > right[0]


def test_it_survives_json() -> None:
    gym = Gym(kernel=3, shift=0.1)
    assert msgspec.json.decode(msgspec.json.encode(gym), type=Gym) == gym
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"name": "gym", "kernal": 3}', type=Gym)
