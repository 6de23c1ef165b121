"""Models with a fixed batch size: cut a batch into chunks, and fill the last one up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from guard.images import Array
from guard.predictors.outputs import as_tensor


def run_in_chunks(run: Callable[[Array], object], batch: Array, batch_size: int | None) -> object:
    """Run a model that takes exactly `batch_size` rows on a batch of any size.

    Args:
        run: Takes `batch_size` rows.
        batch: Any number of rows, at least one.
        batch_size: The fixed size; None for a model that takes any.

    Returns:
        The model's answers, one row per row of `batch`.
    """
    if batch_size is None or len(batch) == batch_size:
        return run(batch)
    answers: list[Tensor] = []
    for start in range(0, len(batch), batch_size):
        part = batch[start : start + batch_size]
        rows = len(part)
        if rows < batch_size:
            part = _repeat_last(part, batch_size - rows)
        raw = run(part)
        answers.append((raw if isinstance(raw, Tensor) else as_tensor(raw, batch_size))[:rows])  # a tensor keeps its gradients
    return torch.cat(answers)


def _repeat_last(part: Array, times: int) -> Array:
    if isinstance(part, Tensor):
        return torch.cat([part, part[-1:].expand(times, *part.shape[1:])])
    return np.concatenate([part, np.repeat(part[-1:], times, axis=0)])
