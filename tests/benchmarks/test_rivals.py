"""STRIP as others run it: the same numbers whatever the order of loops, and ours where the blend is ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.speed.rivals import RIVALS, Pixels, art, backdoorbench, entropy, notebook, trojanzoo
from guard.detectors import Strip
from tests.guard.models import predictor
from tests.toy import toy_images

MODEL = predictor()


def predict(batch: Pixels) -> Pixels:
    answers: Pixels = MODEL(torch.from_numpy(batch)).numpy()
    return answers


def test_loops_may_be_turned_round() -> None:
    inputs, overlays = (toy_images(count, seed)[0].numpy() for count, seed in ((7, 0), (5, 1)))
    np.testing.assert_allclose(notebook(predict, inputs, overlays), backdoorbench(predict, inputs, overlays), atol=1e-5)
    np.testing.assert_allclose(art(predict, inputs, overlays), trojanzoo(predict, inputs, overlays), atol=1e-5)


def test_half_and_half_is_our_mix() -> None:
    inputs, overlays = (toy_images(count, seed)[0] for count, seed in ((7, 0), (5, 1)))
    ours = -Strip(MODEL, overlays, "mix", 0.5).score(inputs).numpy()
    np.testing.assert_allclose(trojanzoo(predict, inputs.numpy(), overlays.numpy()), ours, atol=1e-4)


def test_entropy_is_in_bits() -> None:
    assert entropy(np.full((2, 4), 0.25, dtype=np.float32)) == pytest.approx(2.0)


def test_each_asks_for_all_passes() -> None:
    inputs, overlays = (toy_images(count, seed)[0].numpy() for count, seed in ((3, 0), (5, 1)))
    for name, rival in RIVALS.items():
        asked: list[int] = []

        def counting(batch: Pixels, asked: list[int] = asked) -> Pixels:
            asked.append(len(batch))
            return predict(batch)

        assert rival(counting, inputs, overlays).shape == (3,)
        assert sum(asked) == 15, name
