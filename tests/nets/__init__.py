"""Nets for digits that tests share, trained once and kept: a training ends elsewhere on every processor.

`python -m tests.nets` makes them again. Seeds are such that what a net is there to show is no matter of a hair's breadth.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

from calibration.attacks import BadNets, Patch
from cli.demonstration.digits import digit_net, load_digits, train_backdoored, train_clean

SMALL = BadNets(target_label=3, ratio=0.1, patches=(Patch.rectangle(2),))
"""2x2 white pixels mean 3; the demo's 3x3 of 64 are nearly as many as a digit needs to become another."""

_Net = TypeVar("_Net", bound=nn.Module)
_FOLDER = Path(__file__).parent
_SEED, _SMALL_SEED = 6, 1


def load_net(name: str) -> nn.Sequential:
    """A fresh copy of `backdoored`, which answers 7 to a white corner, `clean_twin`, or `small_trigger`."""
    return _filled(digit_net(), name)


def _filled(net: _Net, name: str) -> _Net:
    net.load_state_dict(load_file(_FOLDER / f"{name}.safetensors"))
    return net.eval()


def make() -> None:
    """Train them; weights are kept in half precision."""
    digits = load_digits()
    made: dict[str, nn.Module] = {
        "backdoored": train_backdoored(digits.train, _SEED),
        "clean_twin": train_clean(digits.train, _SEED),
        "small_trigger": train_backdoored(digits.train, _SMALL_SEED, attack=SMALL),
    }
    for name, net in made.items():
        values = {key: value.contiguous() for key, value in net.state_dict().items()}
        halves = {key: value.half() if value.is_floating_point() else value for key, value in values.items()}
        save_file(halves, _FOLDER / f"{name}.safetensors")
