"""A predictor: images in, probabilities out, whatever runs behind it."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final

import msgspec
import torch
from torch import Tensor

from guard.errors import GuardError, ModelError, one_line
from guard.images import Array, InputSpec
from guard.predictors.execution import ORDINARY, Execution
from guard.predictors.outputs import OutputKind, as_tensor, to_probabilities

BackendKind = Literal["module", "torchscript", "torch-export", "onnx", "callable"]

DEFAULT_MEMORY_LIMIT = 1024**3
ACTIVATIONS_PER_INPUT = 80
"""Bytes for each of an image's own, while a model runs: VGG-16's first layers take about 70, most models fewer."""

_FLOAT = 4  # bytes
_CPU_NUMBERS = 400_000  # 128 images of 32x32 pixels; larger batches fall out of a processor's cache, and take longer an image
_CPU_LEAST, _CPU_MOST = 2, 128  # images


class Backend(Protocol):
    """One kind of model that can be wrapped: runs a batch in the model's own layout and type."""

    @property
    def kind(self) -> BackendKind:
        """Which kind."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Rows of a forward pass, where it takes no other number: fewer are filled up; None for any."""
        ...

    def __call__(self, batch: Array) -> object:
        """Run the model on a batch of at least one row."""
        ...

    def fingerprint(self) -> str | None:
        """SHA-256 (hex) of the weights or the file; None where there is nothing to hash."""
        ...


@final
@dataclass(frozen=True)
class Predictor:
    """Images to probabilities.

    A predictor never changes a module's train or eval mode.

    Args:
        backend: Runs the model.
        spec: Maps images to the model's input.
        num_classes: M.
        output: What the model returns.
        memory_limit: Bytes that one forward pass may take, estimated as 80 times its input. A model whose batch is fixed takes
            one batch at least.
        execution: How PyTorch runs it.
    """

    backend: Backend
    spec: InputSpec
    num_classes: int
    output: OutputKind
    memory_limit: int = DEFAULT_MEMORY_LIMIT
    execution: Execution = ORDINARY

    def __post_init__(self) -> None:
        """Refuse what can't be a classifier."""
        if self.num_classes < 2:
            raise ModelError(f"expected a classifier with at least 2 classes, got {self.num_classes}")

    @property
    def labels_only(self) -> bool:
        """True when the model gives labels without probabilities."""
        return self.output == "labels"

    @functools.cached_property
    def max_rows(self) -> int:
        """Images that fit one forward pass under the memory limit; those of one at least."""
        return self._whole(self.memory_limit // bytes_per_image(self.spec))

    @functools.cached_property
    def _cpu_rows(self) -> int:
        most = max(_CPU_LEAST, min(_CPU_MOST, _CPU_NUMBERS // math.prod(self.spec.shape)))
        return self._whole(min(self.max_rows, most))

    def in_full_precision(self) -> Predictor:
        """For answers that go out: itself, where it is that already."""
        if self.execution.precision == "float32":
            return self
        return replace(self, execution=msgspec.structs.replace(self.execution, precision="float32"))

    def __call__(self, images: Tensor, *, keep: bool = True) -> Tensor:
        """Answer a batch, in as many forward passes as the memory limit needs.

        Args:
            images: (B, C, H, W), float32, in [0, 1].
            keep: They are needed afterwards; without, a model that works in place may change them.

        Returns:
            (B, M), float32, rows summing to one; a row that the model could not answer is NaN.

        Raises:
            ModelError: The model raised, or returned another shape.
        """
        rows = self._cpu_rows if images.device.type == "cpu" else self.max_rows
        with without_gradients(self.backend):
            if len(images) <= rows:
                return self._forward(images, keep)
            parts = [self._forward(part, keep) for part in images.split(rows)]
        return torch.cat(parts)

    def _whole(self, rows: int) -> int:
        """So many images, at most, that no forward pass is filled up but the last."""
        fixed = self.backend.batch_size or 1
        return max(fixed, rows // fixed * fixed)

    def _forward(self, images: Tensor, keep: bool) -> Tensor:
        try:
            raw = as_tensor(self.execution.run(self.backend, self.spec.to_model(images, keep=keep)), len(images))
            return to_probabilities(raw, self.output, self.num_classes, images.shape[0]).to(images.device)
        except GuardError:
            raise
        except (Exception, SystemExit) as error:  # a model is foreign code: whatever it raises becomes ours
            raise ModelError(f"the model failed on a batch of {images.shape[0]}: {one_line(error)}") from error


def without_gradients(backend: Backend) -> contextlib.AbstractContextManager[object]:
    """The quickest way to run a model: a caller's own must not be left with tensors that can't be trained with."""
    return torch.no_grad() if backend.kind in ("module", "callable") else torch.inference_mode()


def bytes_per_image(spec: InputSpec) -> int:
    """That a forward pass takes for each, by the estimate that memory limits go by."""
    return math.prod(spec.shape) * _FLOAT * ACTIVATIONS_PER_INPUT
