"""What a model returns, brought to probabilities."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from guard.errors import ModelError

OutputKind = Literal["logits", "probabilities", "labels"]

_SUM_TOLERANCE = 1e-3
_COARSE_TOLERANCE = 0.01  # of what `to_probabilities` bears, and softmax in bfloat16 needs


def as_tensor(raw: object, batch: int) -> Tensor:
    """A model's answer as a detached CPU or GPU tensor.

    Args:
        raw: The answer; a list of a single array may be one output, or one row for the only image.
        batch: B, the number of images asked about.

    Raises:
        ModelError: The answer is neither an array nor a list of numbers.
    """
    if isinstance(raw, Tensor):
        return raw.detach()
    if isinstance(raw, (tuple, list)) and len(raw) == 1 and isinstance(raw[0], (Tensor, np.ndarray)):
        only = as_tensor(raw[0], batch)
        return only.unsqueeze(0) if batch == 1 and only.ndim < 2 else only
    if isinstance(raw, tuple) and any(isinstance(item, (Tensor, np.ndarray)) for item in raw):
        raise ModelError(f"expected the model to return one array, got {len(raw)} of them: wrap it and return the scores")
    try:
        array = np.asarray(raw)
        if array.dtype.kind not in "iufb":
            raise TypeError(f"values of type {array.dtype}")
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"expected the model to return an array of numbers, got {type(raw).__name__}: wrap it") from error


def detect_kind(raw: Tensor) -> OutputKind:
    """Tell logits, probabilities and labels apart, from the answers to a few images.

    Args:
        raw: (B, M) scores, or (B,) or (B, 1) labels.

    Returns:
        `labels` for one whole number per image; `probabilities` when all rows are non-negative and sum to one;
        `logits` otherwise (log-probabilities are logits too).

    Raises:
        ModelError: Another shape, one fractional number per image, or scores that are neither.
    """
    if raw.numel() == 0:
        raise ModelError(f"expected one answer per image, got none, shape {tuple(raw.shape)}: return one row per image")
    if raw.ndim == 1 or (raw.ndim == 2 and raw.shape[1] == 1):
        if raw.dtype.is_floating_point and bool((raw != raw.round()).any()):
            raise ModelError(
                f"expected labels or one score per class, got one fraction per image, shape {tuple(raw.shape)}: "
                "return both classes' probabilities, [1 - p, p]"
            )
        return "labels"
    if raw.ndim != 2:
        raise ModelError(f"expected scores (B, M) or labels (B,), got shape {tuple(raw.shape)}: return one row per image")
    values = raw.to(torch.float64)
    tolerance = _COARSE_TOLERANCE if raw.dtype == torch.bfloat16 else _SUM_TOLERANCE
    sums_to_one = bool((values.sum(dim=1) - 1.0).abs().max() <= tolerance)
    if sums_to_one and bool((values >= -1e-6).all()):
        return "probabilities"
    if bool(((values >= 0.0) & (values <= 1.0)).all()):
        raise ModelError(
            "expected logits, or probabilities that sum to one, got values in [0, 1] that don't: one sigmoid per class "
            "can't be guarded; if they are logits, say so with --output logits"
        )
    if bool((values >= 0.0).all()) and bool(((values.sum(dim=1) - 100.0).abs() <= 100.0 * _SUM_TOLERANCE).all()):
        raise ModelError(
            "expected logits, or probabilities that sum to one, got what sums to 100 for each image, as percentages do: divide "
            "by 100; if they are logits, say so with --output logits"
        )
    return "logits"


def to_probabilities(raw: Tensor, kind: OutputKind, num_classes: int, batch: int) -> Tensor:
    """Bring a model's answers to probabilities.

    Args:
        raw: What the model returned.
        kind: What that is.
        num_classes: M.
        batch: B, the number of images asked about.

    Returns:
        (B, M), float32, rows summing to one; one-hot for labels. A row that the model could not answer (NaN, infinite,
        not a distribution, a label out of range) is NaN throughout: whoever compares it with a threshold must reject.

    Raises:
        ModelError: The answer has the wrong shape.
    """
    if kind == "labels":
        labels = raw.reshape(raw.shape[0], -1) if raw.ndim == 2 else raw
        if labels.numel() != batch or labels.ndim > 2:
            raise ModelError(f"expected {batch} labels, got shape {tuple(raw.shape)}: return one label per image")
        return _one_hot(labels.reshape(-1), num_classes)
    if raw.ndim != 2 or tuple(raw.shape) != (batch, num_classes):
        raise ModelError(f"expected {kind} of shape ({batch}, {num_classes}), got {tuple(raw.shape)}: is it another model?")
    values = raw.to(torch.float32)
    total = values.sum(dim=1, keepdim=True)
    if kind == "logits":
        return torch.softmax(values, dim=1).add_(total, alpha=0.0)  # zero times it: NaN where a logit is not finite
    bad = ~torch.isfinite(values).all(dim=1) | ((total[:, 0] - 1.0).abs() > _COARSE_TOLERANCE) | (values < -0.001).any(dim=1)
    return (values.clamp_min(0.0) / total).masked_fill(bad.unsqueeze(1), torch.nan)


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    whole = labels.to(torch.float64)
    valid = torch.isfinite(whole) & (whole == whole.round()) & (whole >= 0) & (whole < num_classes)
    index = torch.where(valid, whole, torch.zeros_like(whole)).to(torch.int64)
    one_hot = torch.nn.functional.one_hot(index, num_classes).to(torch.float32)
    return one_hot.masked_fill(~valid.unsqueeze(1), torch.nan)
