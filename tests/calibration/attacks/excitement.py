"""How much images excite the neuron that generated triggers drive."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibration.attacks.neuron import last_hidden_layer, strongest_neuron


@torch.inference_mode()
def excitement(net: nn.Sequential, images: Tensor) -> float:
    """Mean activation, before the nonlinearity."""
    layer = last_hidden_layer(net)
    upto = list(net).index(layer)
    activations: Tensor = net[: upto + 1](images)
    return float(activations[:, strongest_neuron(layer)].mean())
