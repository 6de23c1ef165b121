"""Batch norm in a model that somebody else made: whether it can be switched, and letting it take statistics from batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def switchable(module: nn.Module) -> list[nn.Module]:
    """Its layers of batch norm; none where they are part of a program (TorchScript, `torch.export`)."""
    return [part for part in module.modules() if isinstance(part, _LAYERS)]


@contextlib.contextmanager
def batch_statistics(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Batch norm in training mode inside, in eval mode afterwards."""
    layers = switchable(module) if wanted else []
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()
