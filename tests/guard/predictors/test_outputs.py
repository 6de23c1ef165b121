from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.errors import ModelError
from guard.predictors import OutputKind, Predictor, wrap
from guard.predictors.outputs import as_tensor, detect_kind, to_probabilities
from tests.guard.models import predictor
from tests.toy import SPEC

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.0, 3.0]])


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (LOGITS, "logits"),
        (LOGITS.softmax(dim=1), "probabilities"),
        (LOGITS.log_softmax(dim=1), "logits"),
        (LOGITS.softmax(dim=1).half(), "probabilities"),
        (torch.linspace(-4.0, 4.0, 1000).repeat(4, 1).bfloat16().softmax(dim=1), "probabilities"),  # which add up to 0.998
        (LOGITS.softmax(dim=1) * 2, "logits"),
        (torch.tensor([[2.0, -1.0], [0.5, 0.5]]), "logits"),  # sums to one, but not a distribution
        (torch.eye(3), "probabilities"),
        (torch.full((2, 3), math.nan), "logits"),
        (torch.tensor([0, 2]), "labels"),
        (torch.tensor([[0], [2]]), "labels"),
        (torch.tensor([0.0, 2.0]), "labels"),
        (torch.tensor([True, False]), "labels"),
    ],
)
def test_kinds_are_told_apart(raw: Tensor, kind: OutputKind) -> None:
    assert detect_kind(raw) == kind


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.tensor([0.2, 0.9]), "one fraction per image"),
        (torch.tensor([[0.2], [0.9]]), "one fraction per image"),
        (torch.tensor([math.nan]), "one fraction per image"),
        (torch.zeros(2, 3, 4), "one row per image"),
        (torch.tensor(1.0), "one row per image"),
        (torch.zeros(0, 3), "got none"),
        (torch.zeros(0), "got none"),
        (torch.zeros(2, 0), "got none"),
        (LOGITS.softmax(dim=1) * 100, "as percentages do: divide by 100"),
    ],
)
def test_answers_that_are_no_classifiers(raw: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        detect_kind(raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits(dtype: torch.dtype) -> None:
    found = to_probabilities(LOGITS.to(dtype), "logits", 3, 2)
    torch.testing.assert_close(found, LOGITS.softmax(dim=1))
    assert found.dtype == torch.float32


def test_log_probabilities_are_logits() -> None:
    torch.testing.assert_close(to_probabilities(LOGITS.log_softmax(dim=1), "logits", 3, 2), LOGITS.softmax(dim=1))


def test_large_logits_do_not_overflow() -> None:
    found = to_probabilities(torch.tensor([[1e30, 0.0, -1e30], [-1e4, -1e4, -1e4]]), "logits", 3, 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_probabilities_are_brought_to_a_sum_of_one() -> None:
    found = to_probabilities(torch.tensor([[0.5, 0.505, 0.0], [1e-9, -1e-9, 1.0]]), "probabilities", 3, 2)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
    assert (found >= 0).all()
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.505, 0.0]) / 1.005)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("logits", [math.nan, 0.0, 0.0]),
        ("logits", [math.inf, 0.0, 0.0]),
        ("logits", [-math.inf, 0.0, 0.0]),
        ("probabilities", [math.nan, 0.5, 0.5]),
        ("probabilities", [math.inf, 0.0, 0.0]),
        ("probabilities", [0.9, 0.3, 0.0]),
        ("probabilities", [0.3, 0.3, 0.3]),
        ("probabilities", [1.5, -0.5, 0.0]),
        ("probabilities", [0.0, 0.0, 0.0]),
        ("probabilities", [2.0, 1.0, -1.0]),
    ],
)
def test_a_row_without_an_answer_is_nan_throughout_and_alone(kind: OutputKind, row: list[float]) -> None:
    good = [0.0, 1.0, 0.0]
    found = to_probabilities(torch.tensor([good, row, good]), kind, 3, 3)
    assert torch.isnan(found).all(dim=1).tolist() == [False, True, False]
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("label", [3, -1, 1.5, math.nan, math.inf, 1e30])
def test_labels_out_of_range_are_nan(label: float) -> None:
    found = to_probabilities(torch.tensor([1.0, label, 0.0], dtype=torch.float64), "labels", 3, 3)
    assert torch.isnan(found).all(dim=1).tolist() == [False, True, False]
    assert found[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "raw", [torch.tensor([2, 0]), torch.tensor([[2], [0]]), torch.tensor([2.0, 0.0]), torch.tensor([2, 0]).byte()]
)
def test_labels_become_one_hot(raw: Tensor) -> None:
    assert to_probabilities(raw, "labels", 3, 2).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (torch.zeros(2, 4), "logits"),
        (torch.zeros(3, 3), "logits"),
        (torch.zeros(6), "logits"),
        (torch.zeros(2, 3, 1), "logits"),
        (torch.zeros(1, 3), "probabilities"),
        (torch.zeros(2, 3), "labels"),
        (torch.zeros(3), "labels"),
        (torch.zeros(2, 1, 1), "labels"),
        (torch.tensor(0), "labels"),
    ],
)
def test_wrong_shapes(raw: Tensor, kind: OutputKind) -> None:
    with pytest.raises(ModelError, match="expected"):
        to_probabilities(raw, kind, 3, 2)


class Unfriendly:
    def __array__(self, dtype: object = None, copy: object = None) -> object:
        raise ValueError("no")


class Output(dict[str, Tensor]):
    """What transformers return."""


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "cat",
        ["cat", "dog"],
        Output(logits=LOGITS),
        (LOGITS, LOGITS),
        (LOGITS.argmax(dim=1).numpy(), LOGITS.amax(dim=1).numpy()),
        [[1.0], [1.0, 2.0]],
        Unfriendly(),
        np.array(["a"]),
        np.zeros((2, 3), np.complex64),
        [torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)],
    ],
)
def test_answers_that_are_no_numbers(raw: Any) -> None:
    with pytest.raises(ModelError):
        as_tensor(raw, 2)


@pytest.mark.parametrize(
    "raw",
    [
        LOGITS, LOGITS.numpy(), LOGITS.tolist(), LOGITS.clone().requires_grad_(True), (LOGITS,), [LOGITS.numpy()],
        LOGITS.numpy().astype(np.float64), np.asfortranarray(LOGITS.numpy()), LOGITS.numpy()[::-1][::-1],
    ],
)  # fmt: skip
def test_answers_in_any_container(raw: Any) -> None:
    tensor = as_tensor(raw, len(LOGITS))
    assert not tensor.requires_grad
    torch.testing.assert_close(tensor.to(torch.float32), LOGITS)


@pytest.mark.parametrize(
    "answer",
    [
        torch.zeros(2, 4, dtype=torch.complex64), torch.zeros(2, 4).to_sparse(), torch.zeros(2, 5), None, "label",
        torch.zeros(3, 4), [[1.0] * 4, [1.0] * 3], torch.zeros(2, 4, device="meta"),
    ],
)  # fmt: skip
def test_whatever_a_model_returns_becomes_our_error(answer: Any, clean: Tensor) -> None:
    with pytest.raises(ModelError):
        predictor(lambda batch: answer)(clean[:2])


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, StopIteration, RecursionError, TypeError])
def test_whatever_a_model_raises_becomes_our_error(error: type[Exception], clean: Tensor) -> None:
    def fails(batch: Tensor) -> Tensor:
        raise error("first line\nsecond line")

    with pytest.raises(ModelError, match="the model failed on a batch of 2") as raised:
        predictor(fails)(clean[:2])
    assert "\n" not in str(raised.value)


def test_a_classifier_has_two_classes_or_more() -> None:
    with pytest.raises(ModelError, match="at least 2 classes"):
        Predictor(wrap(lambda batch: batch), SPEC, 1, "logits")


@pytest.mark.parametrize("row", [np.arange(4.0), torch.arange(4.0)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_list_of_one_row_per_image_is_that_for_one_image_too(row: Any, batch: int) -> None:
    assert as_tensor([row] * batch, batch).shape == (batch, 4)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_single_output_in_a_list_is_that_output(batch: int) -> None:
    assert as_tensor([np.zeros((batch, 4))], batch).shape == (batch, 4)
    labels = as_tensor([np.zeros(batch, np.int64)], batch)
    torch.testing.assert_close(to_probabilities(labels, "labels", 4, batch), torch.eye(4)[:1].expand(batch, 4))
