"""How PyTorch runs a model on a CPU: the order of an image's axes in memory, and the numbers that it computes with.

Neither touches the model itself. Convolutions run faster with channels last, where a model allows it, to the same answers
but for rounding. bfloat16 keeps 8 bits of a mantissa: enough to tell a constant prediction from others, and only detectors'
passes use it, never an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import msgspec
import torch
from torch import Tensor

from guard.images import Array

MemoryFormat = Literal["contiguous", "channels-last"]
Precision = Literal["float32", "bfloat16"]


@final
class Execution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What calibration found to be fastest; see `calibration.execution`.

    On other devices, and for models that PyTorch does not run, it changes nothing.

    Attributes:
        memory_format: Of the batches that the model gets.
        precision: Of detectors' passes.
    """

    memory_format: MemoryFormat = "contiguous"
    precision: Precision = "float32"

    def run(self, backend: Callable[[Array], object], batch: Array) -> object:
        """Call a backend with a batch in the model's own layout and type."""
        if not isinstance(batch, Tensor) or batch.device.type != "cpu":
            return backend(batch)
        if self.memory_format == "channels-last" and batch.ndim == 4:
            batch = channels_last(batch)
        if self.precision == "float32":
            return backend(batch)
        with torch.autocast("cpu", torch.bfloat16):
            return backend(batch)

    def __str__(self) -> str:
        """For people."""
        return f"{self.memory_format.replace('-', ' ')}, {self.precision}"


def channels_last(batch: Tensor) -> Tensor:
    """(B, C, H, W), in that order in memory.

    With one channel both orders are one, and PyTorch takes it for the ordinary one unless its strides say otherwise: a
    convolution's result is in the order of its batch.
    """
    if batch.shape[1] > 1:
        return batch.contiguous(memory_format=torch.channels_last)
    _, _, height, width = batch.shape
    return batch.contiguous().as_strided(batch.shape, (height * width, 1, width, 1))


ORDINARY = Execution()
"""PyTorch's defaults."""
