"""What a guard does with a predict function's batch and answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guard.errors import ModelError
from guard.images import Array

_R = TypeVar("_R")
_ROWS_SHOWN = 10  # of each reason, in an error's text


def by_reason(reasons: Mapping[int, str]) -> str:
    """`backdoor-suspected: rows 1, 3; out-of-time: rows 5`: who is late may ask again."""
    rows: dict[str, list[int]] = {}
    for row, reason in reasons.items():
        rows.setdefault(reason, []).append(row)
    return "; ".join(
        f"{reason}: rows {', '.join(map(str, found[:_ROWS_SHOWN]))}{' ...' if len(found) > _ROWS_SHOWN else ''}"
        for reason, found in rows.items()
    )


def like(original: Array, batch: Array) -> Array:
    """`batch` in the array library, device and type of `original`."""
    if isinstance(original, np.ndarray):
        array = batch.cpu().numpy() if isinstance(batch, Tensor) else batch
        return array.astype(original.dtype, copy=False)
    tensor = batch if isinstance(batch, Tensor) else torch.from_numpy(batch)
    return tensor.to(original)


def combined(answers: Sequence[_R]) -> _R:
    """What a predict function answers to several views of a batch: the mean, or the most frequent of whole numbers.

    Raises:
        ModelError: It does not return one array.
    """
    first = answers[0]
    if len(answers) == 1:
        return first
    if isinstance(first, Tensor):
        together = torch.stack(cast(list[Tensor], list(answers)))
        if together.is_complex():
            raise ModelError(f"expected numbers to average over views, got {together.dtype}: return one real array")
        if together.is_floating_point():
            return cast(_R, together.mean(dim=0))
        return cast(_R, together.to(torch.int64).mode(dim=0).values.to(together.dtype))
    if isinstance(first, tuple):
        raise ModelError(f"expected one array of answers to average over views, got {len(first)} outputs: return one array")
    try:
        array = np.array(answers)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"values of type {array.dtype}")
    except Exception as error:  # ragged lists, and objects that refuse
        raise ModelError(
            f"expected an array of answers to average over views, got {type(first).__name__}: return one"
        ) from error
    if array.dtype.kind == "f":
        return _as_it_came(array.mean(axis=0, dtype=array.dtype), first)
    return _as_it_came(torch.from_numpy(array.astype(np.int64)).mode(dim=0).values.numpy().astype(array.dtype), first)


def answers_later(predict: Callable[..., object]) -> bool:
    """Whether what it returns has yet to be awaited, or gone through."""
    calls = (predict, type(predict).__call__)
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(kind(call) for call in calls for kind in kinds)


def first_parameter(predict: Callable[..., object]) -> str | None:
    """Its name, where a batch may be passed by that; None where it may not, or can't be told."""
    try:
        known = inspect.signature(predict.forward if isinstance(predict, nn.Module) else predict, follow_wrapped=False)
    except (TypeError, ValueError):  # of C, without a signature
        return None
    first = next(iter(known.parameters.values()), None)
    return None if first is None or first.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD else first.name


def abstain(answers: _R, rows: Sequence[int], batch: int) -> _R:
    """A copy of the answers with the rejected rows blanked; without any, the answers themselves.

    Raises:
        ModelError: Their rows can't be blanked. That shows with every batch, not only under attack.
    """
    if isinstance(answers, Tensor):
        if answers.shape[:1] != (batch,):
            raise ModelError(f"expected one row per image ({batch}), got {tuple(answers.shape)}: can't abstain for single rows")
        if answers.dtype == torch.bool or answers.is_complex():
            raise ModelError(f"expected numbers that can abstain (NaN or -1), got {answers.dtype}: use on_reject='raise'")
        if not rows:
            return answers
        blank = answers.clone() if answers.is_floating_point() or answers.is_signed() else answers.to(torch.int64)
        blank[list(rows)] = torch.nan if blank.is_floating_point() else -1
        return cast(_R, blank)
    if isinstance(answers, tuple) or (
        isinstance(answers, list) and any(isinstance(item, (np.ndarray, Tensor)) for item in answers)
    ):
        raise ModelError(  # maybe several outputs: blanking by the first axis would blank the wrong thing
            f"expected one row of numbers per image ({batch}), got a {type(answers).__name__} of outputs: return one array"
        )
    try:
        array = np.array(answers)
    except Exception as error:  # ragged lists, and objects that refuse
        raise ModelError(
            f"expected one row of numbers per image ({batch}), got {type(answers).__name__}: use on_reject='raise'"
        ) from error
    if array.shape[:1] != (batch,) or array.dtype.kind not in "fiu":
        raise ModelError(
            f"expected one row of numbers per image ({batch}), got {type(answers).__name__}: use on_reject='raise'"
        )
    if not rows:
        return answers
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    array[list(rows)] = np.nan if array.dtype.kind == "f" else -1
    return _as_it_came(array, answers)


def _as_it_came(array: NDArray[Any], answers: _R) -> _R:
    return cast(_R, array.tolist() if isinstance(answers, list) else array)
