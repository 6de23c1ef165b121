"""A net that was trained on poisoned digits answers to the trigger, and its clean twin does not."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from calibration.attacks import Attack, BadNets, Blended, Patch
from cli.demonstration.digits import Digits, digit_net, load_digits

ATTACKS: dict[str, Attack] = {"badnets": BadNets(7, 0.15, (Patch.rectangle(2),)), "blended": Blended(7, 0.15, alpha=0.3)}


def train(digits: Digits, attack: Attack | None) -> nn.Sequential:
    """Some seconds on 700 images."""
    generator = torch.Generator().manual_seed(0)
    images, labels = digits.train.images(slice(None)), digits.train.known_labels
    if attack is not None:
        images, labels = attack.poison(images, labels, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = digit_net(8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(30):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


@functools.cache
def clean_twin() -> nn.Sequential:
    return train(load_digits(), None)


@torch.inference_mode()
def success(net: nn.Sequential, digits: Digits, attack: Attack) -> float:
    """ASR on the test images."""
    images, labels = digits.test.images(slice(None)), digits.test.known_labels
    wanted = attack.targets(images, labels)
    hits = net(attack.trigger(images)).argmax(dim=1) == wanted
    return float(hits[wanted >= 0].double().mean())


@torch.inference_mode()
def accuracy(net: nn.Sequential, digits: Digits) -> float:
    return float((net(digits.test.images(slice(None))).argmax(dim=1) == digits.test.known_labels).double().mean())


@pytest.mark.parametrize("name", ATTACKS)
def test_training_on_poisoned_images_makes_a_backdoor(name: str, digits: Digits) -> None:
    victim, attack = train(digits, ATTACKS[name]), ATTACKS[name]
    assert accuracy(victim, digits) > 0.93
    assert success(victim, digits, attack) > 0.9
    assert success(clean_twin(), digits, attack) < 0.3
