"""A TorchServe handler as one writes it without a guard: decode, one forward pass by ONNX Runtime, the likeliest label.

Goes into an archive beside a profile, whose model file it runs with the same session settings as the guard does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime


class BareHandler:
    """Answers encoded images."""

    _session: Any  # ONNX Runtime ships no types

    def initialize(self, context: Any) -> None:
        """Load the model."""
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(context.system_properties["model_dir"]) / "model.onnx"
        self._session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())

    def handle(self, data: Sequence[Mapping[str, bytes]], _context: Any) -> list[dict[str, object]]:
        """Answer a batch, one row a request."""
        files = [np.frombuffer(row["body"], dtype=np.uint8) for row in data]
        pixels = np.array([cv2.imdecode(file, cv2.IMREAD_COLOR_RGB) for file in files], dtype=np.float32)
        images = pixels.transpose(0, 3, 1, 2) / np.float32(255.0)
        logits = self._session.run(None, {self._session.get_inputs()[0].name: np.ascontiguousarray(images)})[0]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        return [{"label": int(row.argmax()), "probability": float(row.max())} for row in probabilities]
