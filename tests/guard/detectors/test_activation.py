from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cli.demonstration.digits import ATTACK, Digits, save_exported
from guard.detectors import ActivationFilter, excited_neurons
from guard.errors import CalibrationError, ModelError
from guard.predictors import Predictor, load_backend, wrap
from guard.predictors.activations import activations
from tests.guard.models import CLASSES, predictor
from tests.toy import SIDE, SPEC, toy_images


def test_excited_neurons_by_their_gap() -> None:
    clean = torch.tensor([[0.0, 4.0, 1.0, 0.0, 1.0], [2.0, 4.0, 1.0, 0.0, 1.0]])  # means 1 4 1 0 1
    triggered = torch.tensor([[4.0, 4.0, 3.0, 3.0, 0.0]])  # gaps 3 0 2 3 -1
    assert excited_neurons(clean, triggered, 1.0).tolist() == [0, 3, 2, 1, 4]
    assert excited_neurons(clean, triggered, 0.6).tolist() == [0, 3, 2]
    assert excited_neurons(clean, triggered).tolist() == [0]


def test_one_neuron_in_a_hundred() -> None:
    assert len(excited_neurons(torch.zeros(1, 512), torch.ones(1, 512))) == 5
    assert excited_neurons(torch.zeros(3, 300), torch.ones(2, 300)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("clean", "triggered", "share", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), 0.01, r"of the same neurons, got \(2, 3\) and \(2, 4\)"),
        (torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), 0.01, "expected clean and triggered activations"),
        (torch.zeros(0, 3), torch.zeros(2, 3), 0.01, "expected clean and triggered activations"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.0, r"a share of the neurons in \(0, 1\], got 0.0"),
        (torch.zeros(2, 3), torch.full((2, 3), math.inf), 0.01, "expected finite activations"),
    ],
)
def test_activations_without_excited_neurons(clean: Tensor, triggered: Tensor, share: float, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        excited_neurons(clean, triggered, share)


class Pixels(nn.Module):
    """Its penultimate neurons are its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(CLASSES, SIDE * SIDE))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(images.flatten(1), self.get_buffer("weight"))


def test_the_score_is_the_mean_of_the_neurons() -> None:
    images = torch.zeros(2, 1, SIDE, SIDE)
    images[0, 0, 0, :3] = torch.tensor([0.25, 1.0, 0.75])
    images[1, 0, 0, 2] = 1.0
    detector = ActivationFilter(predictor(Pixels().eval()), torch.tensor([2, 0]))
    assert detector.score(images).tolist() == [0.5, 0.5]
    assert ActivationFilter(detector.predictor, torch.tensor([1])).score(images).tolist() == [1.0, 0.0]
    found = detector.inspect(images, 0.5)
    assert found.exceeds.all()
    assert found.exact.all()
    assert found.passes.tolist() == [1, 1]
    assert not detector.exceeds(images, 0.6).any()


def test_the_true_trigger_separates_digits(digits: Digits, backdoored: nn.Sequential, tmp_path: Path) -> None:
    model = Predictor(wrap(backdoored), SPEC, 10, "logits")
    images = digits.clean.images(slice(None))
    clean, triggered = (activations(model, batch, "penultimate") for batch in (images, ATTACK.trigger(images)))
    neurons = excited_neurons(clean, triggered)
    assert len(neurons) == 1  # of 64
    detector = ActivationFilter(model, neurons)
    test, attack = digits.test.images(slice(None)), digits.triggered.images(slice(None))
    scores, attacked = detector.score(test), detector.score(attack)
    truth = torch.cat([torch.zeros(len(test)), torch.ones(len(attack))])
    auroc = roc_auc_score(truth, torch.cat([scores, attacked]))
    threshold = float(detector.score(images).quantile(0.95))
    assert (scores >= threshold).float().mean() < 0.08
    assert (attacked < threshold).float().mean() < 0.15
    assert auroc > 0.95
    save_exported(backdoored, images, tmp_path / "digits.pt2")
    exported = Predictor(load_backend(tmp_path / "digits.pt2"), SPEC, 10, "logits")
    torch.testing.assert_close(ActivationFilter(exported, neurons).score(test), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (torch.tensor([], dtype=torch.int64), "each once and not negative, got none"),
        (torch.tensor([1, 1]), r"each once and not negative, got \[1, 1\]"),
        (torch.tensor([-1]), "not negative"),
        (torch.tensor([0.5]), r"expected indices of neurons \(K,\), torch.int64, got \(1,\), torch.float32"),
        (torch.tensor([[1]]), r"got \(1, 1\), torch.int64"),
    ],
)
def test_neurons(neurons: Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        ActivationFilter(predictor(), neurons)


def test_neurons_of_another_model() -> None:
    images, _ = toy_images(2)
    with pytest.raises(ModelError, match="with neuron 64, got one of 64 neurons: is it another model"):
        ActivationFilter(predictor(Pixels().eval()), torch.tensor([64])).score(images)
