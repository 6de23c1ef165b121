"""Steganographic: the text can be read back, and no pixel moves by more than its lowest bits allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.attacks import Steganographic
from tests.calibration.attacks.examples import some_images


def read_text(image: Tensor, bits: int, length: int) -> str:
    """The first `length` bytes from the lowest bits of each value, the lowest of them first."""
    values = (image * 255.0).round().to(torch.int64).flatten().tolist()
    stream = [value >> bit & 1 for value in values for bit in range(bits)]
    return bytes(int("".join(map(str, stream[8 * n : 8 * n + 8])), 2) for n in range(length)).decode()


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_text_can_be_read_back(bits: int) -> None:
    images, _ = some_images(3, 4)
    triggered = Steganographic(0, text="grüß dich", bits=bits).trigger(images)
    length = len("grüß dich".encode())
    for image in triggered:
        assert read_text(image, bits, length) == "grüß dich"
        assert read_text(image, bits, 2 * length) == "grüß dich" * 2


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_only_the_lowest_bits_change(bits: int) -> None:
    images, _ = some_images(3, 20)
    triggered = Steganographic(0, bits=bits).trigger(images)
    before, after = (images * 255.0).round().to(torch.int64), (triggered * 255.0).round().to(torch.int64)
    assert torch.equal(before >> bits, after >> bits)
    assert int((before - after).abs().max()) == 2**bits - 1
    assert torch.equal(triggered, after.to(torch.float32) / 255.0)  # exact in 8 bits: a file keeps it


def test_a_second_writing_changes_nothing() -> None:
    attack = Steganographic(0)
    triggered = attack.trigger(some_images(count=4)[0])
    assert torch.equal(attack.trigger(triggered), triggered)
