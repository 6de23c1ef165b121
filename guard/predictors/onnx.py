"""Backend for an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from guard.errors import MissingExtraError, ModelError
from guard.images import Array
from guard.predictors.chunks import run_in_chunks
from guard.predictors.predictor import BackendKind

_TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


@final
@dataclass(frozen=True)
class OnnxBackend:
    """Runs an ONNX model that has one image input; its first output is the answer.

    Args:
        session: The ONNX Runtime session.
        input_name: Name of the input.
        input_shape: Declared shape; None where an axis is dynamic.
        input_dtype: `float32` or `uint8`.
        sha256: Of its file.
    """

    session: Any  # onnxruntime ships no types
    input_name: str
    input_shape: tuple[int | None, ...]
    input_dtype: str
    sha256: str

    @classmethod
    def load(cls, path: Path, threads: int = 0) -> OnnxBackend:
        """Load a file.

        Args:
            path: The `.onnx` file.
            threads: Threads of one forward pass; 0 lets ONNX Runtime choose.

        Raises:
            ModelError: Not an ONNX model, or not one of a single image batch.
            MissingExtraError: ONNX Runtime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnx") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take cores from PyTorch
        options.log_severity_level = 3
        try:
            data = path.read_bytes()  # from memory: what is hashed is what runs
            # Weights in further files are refused: they would be looked for in the current folder.
            nowhere = str(path / "none")
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", nowhere)
            session = onnxruntime.InferenceSession(data, options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime raises a dozen types without a common base
            raise ModelError(
                f"expected an ONNX model, got {path.name}, which ONNX Runtime does not load: export it again, as one file"
            ) from error
        inputs = session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _TYPES or len(inputs[0].shape) < 2:
            got = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
            raise ModelError(f"expected one float or uint8 input of image batches in {path.name}, got {got}")
        shape = tuple(size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape)
        return cls(session, inputs[0].name, shape, _TYPES[inputs[0].type], hashlib.sha256(data).hexdigest())

    @property
    def kind(self) -> BackendKind:
        """`onnx`."""
        return "onnx"

    @property
    def batch_size(self) -> int | None:
        """The fixed batch size that it was exported with; None when the batch is dynamic."""
        return self.input_shape[0]

    def __call__(self, batch: Array) -> object:
        """Run the model, in chunks where its batch size is fixed."""
        return run_in_chunks(self._run, batch, self.batch_size)

    def _run(self, batch: Array) -> object:
        array = batch.cpu().numpy() if isinstance(batch, Tensor) else batch
        return self.session.run(None, {self.input_name: np.ascontiguousarray(array)})[0]

    def fingerprint(self) -> str | None:
        """SHA-256 of the file."""
        return self.sha256
