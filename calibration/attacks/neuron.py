"""Triggers that a model's own neuron is looking for; shared by the Trojan and the invisible attacks.

The neuron is the output channel of a layer with the largest sum of absolute incoming weights, the one most easily driven
(Trojaning Attack, section IV-A). Pixels then climb the gradient of its mean activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from guard.errors import InputError


def last_hidden_layer(model: nn.Module) -> nn.Conv2d | nn.Linear:
    """The last convolution or dense layer before the one that gives the logits.

    Raises:
        InputError: There is none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if len(layers) < 2:
        raise InputError(f"expected a model with at least two convolutions or dense layers, got {len(layers)}")
    return layers[-2]


def strongest_neuron(layer: nn.Conv2d | nn.Linear) -> int:
    """The output channel with the largest sum of absolute incoming weights."""
    return int(layer.weight.detach().abs().flatten(1).sum(dim=1).argmax())


def drive_neuron(
    model: nn.Module,
    images: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    project: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
) -> Tensor:
    """Change a trigger by gradient ascent until it excites the neuron on the given images.

    Args:
        model: In eval mode; its weights stay as they are.
        images: (B, C, H, W), in [0, 1]; what the trigger is put on meanwhile.
        apply: (images, trigger) to triggered images.
        start: The first trigger.
        project: Brings a trigger back to what is allowed, after each step.
        steps: Of Adam.
        rate: Its learning rate.

    Returns:
        The trigger, of `start`'s shape.
    """
    trigger = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([trigger], lr=rate)
    with _watched(model) as activation:
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(-activation(apply(images, trigger)), trigger)
            trigger.grad = gradient
            optimizer.step()
            with torch.no_grad():
                trigger.copy_(project(trigger))
    return trigger.detach()


def contributions(model: nn.Module, images: Tensor, triggered: Tensor) -> Tensor:
    """How much the change of each pixel adds to the neuron's activation, to first order; (H, W).

    The change is that of the images, not of the trigger: where clamping has stopped a pixel it no longer counts.
    """
    moved = triggered.detach().requires_grad_(True)
    with _watched(model) as activation:
        (gradient,) = torch.autograd.grad(activation(moved), moved)
    return (gradient * (triggered - images)).sum(dim=(0, 1)).detach()


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from images to the neuron's mean activation."""
    layer = last_hidden_layer(model)
    neuron = strongest_neuron(layer)
    outputs: list[Tensor] = []

    def activation(images: Tensor) -> Tensor:
        outputs.clear()
        model(images)
        return outputs[0][:, neuron].mean()

    hook = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield activation
    finally:
        hook.remove()
