"""The neuron that is most easily driven, and that it is driven."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibration.attacks.neuron import drive_neuron, last_hidden_layer, strongest_neuron
from tests.calibration.attacks.examples import some_images, tiny_net


def test_the_last_hidden_layer_is_the_one_before_the_logits() -> None:
    net = tiny_net()
    assert last_hidden_layer(net) is net[4]
    convolution = nn.Conv2d(3, 2, 3)
    assert last_hidden_layer(nn.Sequential(convolution, nn.Flatten(), nn.Linear(200, 4))) is convolution


def test_the_strongest_neuron_has_the_largest_weights_of_either_sign() -> None:
    layer = nn.Linear(2, 3)
    layer.weight.data = torch.tensor([[1.0, 1.0], [-2.0, 1.0], [0.0, 2.5]])
    assert strongest_neuron(layer) == 1


def test_a_linear_neuron_is_driven_to_the_corner_that_its_weights_point_to() -> None:
    first, second = nn.Linear(4, 1, bias=False), nn.Linear(1, 2)
    first.weight.data = torch.tensor([[1.0, -2.0, 0.5, -0.1]])
    model = nn.Sequential(nn.Flatten(), first, second).eval()

    def replace(_images: Tensor, drawn: Tensor) -> Tensor:
        return drawn[None]

    driven = drive_neuron(
        model, torch.zeros(1, 1, 2, 2), replace, torch.full((1, 2, 2), 0.5), lambda drawn: drawn.clamp(0, 1), 50, 0.1
    )
    assert driven.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_hook_goes_even_if_the_model_fails() -> None:
    net = tiny_net()
    try:
        drive_neuron(net, some_images()[0], lambda images, _: images[:, :1], torch.zeros(1), lambda drawn: drawn, 1, 0.1)
    except RuntimeError:
        assert not any(module._forward_hooks for module in net.modules())
    else:
        raise AssertionError("expected the model to refuse one channel")
