"""Backend for a TorchScript file (`.pt`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from guard.errors import ModelError
from guard.images import Array
from guard.predictors.predictor import BackendKind
from guard.predictors.screening import file_sha256, screen_torchscript


@final
@dataclass(frozen=True)
class TorchScriptBackend:
    """Runs a TorchScript module that this backend loaded, so it may put it into eval mode.

    Args:
        module: The loaded module.
        sha256: Of its file.
    """

    module: torch.jit.ScriptModule
    sha256: str

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> TorchScriptBackend:
        """Load a file after screening it.

        Raises:
            ModelError: Not TorchScript, damaged, or unsafe.
        """
        screened = screen_torchscript(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(screened, map_location=device)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"expected a TorchScript file, got {path.name}, which does not load: save it again") from error
        module.eval()
        return cls(module, file_sha256(path))

    @property
    def kind(self) -> BackendKind:
        """`torchscript`."""
        return "torchscript"

    @property
    def batch_size(self) -> None:
        """Any."""

    def __call__(self, batch: Array) -> object:
        """Run the module on the device where its parameters are."""
        parameter = next(iter(self.module.parameters()), None)
        tensor = torch.as_tensor(batch)
        return self.module(tensor if parameter is None else tensor.to(parameter.device))

    def fingerprint(self) -> str | None:
        """SHA-256 of the file."""
        return self.sha256
