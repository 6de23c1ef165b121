"""Backend for a PyTorch `nn.Module` in this process."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from guard.errors import ModelError
from guard.images import Array
from guard.predictors.predictor import BackendKind


@final
@dataclass(frozen=True)
class ModuleBackend:
    """Runs an `nn.Module` as it stands: it must already be in eval mode, and is never switched.

    Args:
        module: Takes (B, C, H, W), returns logits, probabilities or labels.

    Raises:
        ModelError: A part of the module is in training mode, so that answers would depend on the rest of the batch.
    """

    module: nn.Module

    def __post_init__(self) -> None:
        """Refuse training mode."""
        _refuse_training(self.module)

    @property
    def kind(self) -> BackendKind:
        """`module`."""
        return "module"

    @property
    def batch_size(self) -> None:
        """Any."""

    def __call__(self, batch: Array) -> object:
        """Run the module on the device where its parameters are."""
        _refuse_training(self.module)
        state = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        tensor = torch.as_tensor(batch)
        return self.module(tensor if state is None else tensor.to(state.device))

    def fingerprint(self) -> str | None:
        """SHA-256 over the sorted state: names, types, shapes and bytes; None where it holds more than tensors."""
        state = self.module.state_dict()
        return state_sha256(state) if all(isinstance(value, Tensor) for value in state.values()) else None


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a state dictionary, independent of file format and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _refuse_training(module: nn.Module) -> None:
    if any(part.training for part in module.modules()):
        raise ModelError("expected a module in eval mode, got one in training mode: call model.eval() first")
