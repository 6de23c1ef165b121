"""Reflection: x' = clamp(x + alpha (k * r)) with the kernels of three kinds of glass."""

from __future__ import annotations

import pytest
import torch

from calibration.attacks import Reflection
from calibration.attacks.reflection import Optics, reflected
from tests.calibration.attacks.examples import some_images

DOT = torch.zeros(1, 12, 12).index_put((torch.tensor(0), torch.tensor(4), torch.tensor(5)), torch.tensor(1.0))
OPTICS: tuple[Optics, ...] = ("sharp", "blurred", "ghost")


def test_sharp_adds_alpha_times_the_image() -> None:
    images, scene = some_images()[0], some_images(count=1, seed=3)[0][0]
    triggered = Reflection(0, scene, "sharp", alpha=0.3).trigger(images)
    torch.testing.assert_close(triggered, (images + 0.3 * scene).clamp(0.0, 1.0))
    assert float(triggered.max()) == 1.0


@pytest.mark.parametrize("optics", OPTICS)
def test_every_glass_keeps_an_even_scene_as_it_is(optics: Optics) -> None:
    scene = torch.full((3, 12, 12), 0.7)
    torch.testing.assert_close(reflected(scene, optics), scene)


def test_a_ghost_has_two_pulses() -> None:
    seen = reflected(DOT, "ghost")[0]
    assert torch.nonzero(seen).tolist() == [[4, 5], [6, 7]]
    assert (float(seen[4, 5]), float(seen[6, 7])) == pytest.approx((0.65, 0.35))


def test_blur_is_a_gaussian() -> None:
    seen = reflected(DOT, "blurred")[0]
    assert float(seen.sum()) == pytest.approx(1.0)
    assert seen.argmax() == 4 * 12 + 5
    assert float(seen[4, 6] / seen[4, 5]) == pytest.approx(0.6065, abs=1e-4)  # exp(-1 / 2)
    assert float(seen[5, 6] / seen[4, 5]) == pytest.approx(0.3679, abs=1e-4)  # exp(-1)
    assert torch.equal(seen[1:8, 2:9], seen[1:8, 2:9].T)


def test_channels_do_not_mix() -> None:
    scene = torch.zeros(3, 12, 12)
    scene[1] = 0.5
    for optics in OPTICS:
        assert reflected(scene, optics).sum(dim=(1, 2)).tolist() == pytest.approx([0.0, 72.0, 0.0], rel=1e-5)


def test_the_paper_poisons_the_target_class_and_keeps_its_labels() -> None:
    images, labels = some_images()
    attack = Reflection(2, some_images(count=1, seed=3)[0][0], ratio=0.5)
    poisoned, relabelled = attack.poison(images, labels, torch.Generator().manual_seed(0))
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert int(changed.sum()) == 10
    assert bool((labels[changed] == 2).all())
    assert torch.equal(relabelled, labels)
