"""Backend for a `torch.export` archive (`.pt2`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from guard.errors import ModelError
from guard.images import Array
from guard.predictors.chunks import run_in_chunks
from guard.predictors.predictor import BackendKind
from guard.predictors.screening import file_sha256, screen_exported


@final
@dataclass(frozen=True)
class ExportedBackend:
    """Runs a `torch.export` program; its mode was fixed when it was exported.

    Args:
        run: The program as a function.
        input_shape: Declared shape; None where an axis is dynamic.
        sha256: Of its file.
        device: Where it runs.
    """

    run: Callable[[Tensor], object]
    input_shape: tuple[int | None, ...]
    sha256: str
    device: str = "cpu"

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> ExportedBackend:
        """Load a file after screening it.

        Raises:
            ModelError: Not a `torch.export` archive, damaged, unsafe, or not a function of one batch.
        """
        screened = screen_exported(path)
        try:
            program = torch.export.load(screened)
            if device != "cpu":
                program = move_to_device_pass(program, device)
        except Exception as error:  # the loader raises whatever its parser met
            raise ModelError(
                f"expected a torch.export archive, got {path.name}, which does not load: export it again"
            ) from error
        inputs = program.graph_signature.user_inputs
        shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
        if len(shapes) != 1 or len(shapes[0]) == 0:
            raise ModelError(f"expected a program of one batch of images, got {path.name} with {len(shapes)} inputs")
        shape = tuple(size if isinstance(size, int) else None for size in shapes[0])
        return cls(program.module(), shape, file_sha256(path), device)

    @property
    def kind(self) -> BackendKind:
        """`torch-export`."""
        return "torch-export"

    @property
    def batch_size(self) -> int | None:
        """The fixed batch size that it was exported with; None when the batch is dynamic."""
        return self.input_shape[0]

    def __call__(self, batch: Array) -> object:
        """Run the program, in chunks where its batch size is fixed."""
        return run_in_chunks(lambda part: self.run(torch.as_tensor(part).to(self.device)), batch, self.batch_size)

    def fingerprint(self) -> str | None:
        """SHA-256 of the file."""
        return self.sha256
