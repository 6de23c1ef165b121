"""A guard around a predict function: what it refuses, what it passes on, and what an answer looks like then."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast, get_args

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard import CalibratedDetector, Guard, Policy
from guard.errors import InputError, ModelError, RejectedError
from guard.images import Array, Container, DType, InputSpec, Layout
from guard.predictors import OutputKind
from guard.preprocessors import Gym
from tests.guard.guards import REJECTED, Scripted, detector, guarded, mixed, nan_when_dark, raises, values
from tests.guard.models import predict_function, predictor
from tests.toy import SPEC, ToyNet, toy_images, toy_trigger


@pytest.mark.parametrize("container", [torch.from_numpy, None])
def test_a_wrapped_function_answers_the_mean_of_its_views(container: Callable[[Any], Tensor] | None) -> None:
    net, calls = ToyNet(), []

    def predict(batch: Tensor) -> Any:
        calls.append(batch)
        return net(batch).detach() if container else net(batch).detach().numpy()

    images, gym = mixed()[::2], Gym(views=4)
    answer = Guard(predictor(), [detector()], preprocessor=gym, seed=3).wrap(predict)(images)
    assert len(calls) == 4
    assert not torch.equal(calls[0], calls[1])
    with torch.no_grad():
        wanted = torch.stack([net(batch) for batch in calls]).mean(dim=0)
    torch.testing.assert_close(torch.as_tensor(answer), wanted)
    assert isinstance(answer, Tensor) == (container is not None)


def test_a_wrapped_function_of_labels_answers_the_most_frequent_of_its_views() -> None:
    votes = iter([[0, 1], [2, 1], [2, 3]])
    guard = Guard(predictor(), [detector()], preprocessor=Gym(views=3), policy=Policy(mode="monitor"))
    assert guard.wrap(lambda batch: torch.tensor(next(votes)))(mixed(2)).tolist() == [2, 1]
    with pytest.raises(ModelError, match="expected one array of answers to average over views"):
        guard.wrap(lambda batch: (batch, batch))(mixed(2))


def wrapped(spec: InputSpec, output: OutputKind, on_reject: Any, **options: Any) -> Callable[[Array], Any]:
    predict = predict_function(spec, output)
    answers = predictor(predict, spec, output)
    return cast(Callable[[Array], Any], Guard(answers, [detector(answers)], **options).wrap(predict, on_reject))


WAYS = [
    (layout, container, dtype, output)
    for layout in get_args(Layout)
    for container in get_args(Container)
    for dtype in get_args(DType)
    for output in get_args(OutputKind)
]


@pytest.mark.parametrize(("layout", "container", "dtype", "output"), WAYS)
def test_abstaining(layout: Layout, container: Container, dtype: DType, output: OutputKind) -> None:
    spec = msgspec.structs.replace(SPEC, layout=layout, container=container, dtype=dtype)
    batch = spec.to_model(mixed())
    before = values(batch)
    answers = wrapped(spec, output, "abstain")(batch)
    plain = predict_function(spec, output)(batch)
    assert type(answers) is type(plain)
    answers, plain = values(answers), values(plain)
    assert np.array_equal(values(batch), before)
    assert answers.shape == plain.shape
    kept = [row for row in range(8) if row not in REJECTED]
    assert np.array_equal(answers[kept], plain[kept])
    assert (answers[REJECTED] == -1).all() if output == "labels" else np.isnan(answers[REJECTED]).all()
    assert np.array_equal(values(wrapped(spec, output, "abstain")(batch[kept])), plain[kept])


@pytest.mark.parametrize("container", get_args(Container))
def test_raising(container: Container) -> None:
    spec = msgspec.structs.replace(SPEC, container=container, layout="NHWC", dtype="uint8")
    calls: list[int] = []
    inner = predict_function(spec, "logits")

    def predict(batch: Array) -> object:
        calls.append(len(batch))
        return inner(batch)

    guard = Guard(predictor(inner, spec), [detector(predictor(inner, spec))])
    safe = guard.wrap(predict)
    batch = spec.to_model(mixed())
    with pytest.raises(RejectedError, match="4 of 8 inputs rejected: backdoor-suspected: rows 1, 3, 5, 7") as raised:
        safe(batch)
    assert raised.value.rows == (1, 3, 5, 7)
    assert calls == []
    safe(batch[::2])
    assert calls == [4]


def test_many_rejected_rows_are_named_in_the_error_not_in_its_text() -> None:
    images = toy_trigger(toy_images(30)[0])
    with pytest.raises(RejectedError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 \.\.\.$") as raised:
        guarded().wrap(lambda batch: batch)(images)
    assert raised.value.rows == tuple(range(30))


def test_an_error_tells_what_is_suspicious_from_what_could_not_be_judged() -> None:
    images = mixed()
    images[2] = 0.25

    def grey(batch: Tensor) -> Tensor:
        return torch.where((batch == 0.25).all(dim=3).all(dim=2).all(dim=1), torch.nan, -1.0)

    guard = Guard(predictor(), [detector(), CalibratedDetector(Scripted(grey), 0.0)])
    with pytest.raises(RejectedError, match=r"rejected: backdoor-suspected: rows 1, 3, 5, 7; guard-failed: rows 2$") as raised:
        guard.wrap(lambda batch: batch)(images)
    assert raised.value.rows == (1, 2, 3, 5, 7)
    assert (raised.value.code, raised.value.reasons[2], raised.value.reasons[3]) == (
        "backdoor-suspected",
        "guard-failed",
        "backdoor-suspected",
    )
    late = guarded(policy=Policy(latency_budget=1e-9))
    with pytest.raises(RejectedError, match=r"8 of 8 inputs rejected: out-of-time: rows 0, 1, 2, 3, 4, 5, 6, 7$") as raised:
        late.wrap(lambda batch: batch)(mixed())
    assert (raised.value.code, set(raised.value.reasons.values())) == ("out-of-time", {"out-of-time"})


def test_the_wrapped_function_looks_like_the_original_and_passes_arguments_on() -> None:
    def classify(batch: Tensor, scale: float, /, power: int = 1, *, flip: bool = False) -> Tensor:
        """Classify."""
        logits: Tensor = ToyNet()(batch) * scale**power
        return logits.flip(1) if flip else logits

    safe = guarded().wrap(classify)
    images = mixed()[::2]
    torch.testing.assert_close(safe(images, 2.0, power=2, flip=True), ToyNet()(images).flip(1) * 4)
    assert safe.__name__ == "classify"
    assert safe.__doc__ == "Classify."
    assert inspect.signature(safe) == inspect.signature(classify)


def test_a_batch_may_be_passed_by_its_name() -> None:
    def classify(batch: Tensor, scale: float = 1.0) -> Tensor:
        answers: Tensor = ToyNet()(batch) * scale
        return answers

    safe, images = cast(Any, guarded().wrap(classify)), mixed()
    torch.testing.assert_close(safe(batch=images[::2], scale=2.0), ToyNet()(images[::2]) * 2.0)
    with pytest.raises(RejectedError):
        safe(scale=2.0, batch=images)
    with pytest.raises(InputError, match="expected a batch of images as the first argument, got none"):
        safe(scale=2.0)


def test_functions_whose_answers_come_later_are_refused() -> None:
    async def later(batch: Tensor) -> Tensor:
        return batch

    def one_by_one(batch: Tensor) -> Iterator[Tensor]:
        yield from batch

    class Later:
        async def __call__(self, batch: Tensor) -> Tensor:
            return batch

    images = mixed()
    for function in (later, one_by_one, Later()):
        with pytest.raises(InputError, match="got an async function or a generator"):
            guarded().wrap(function, ABSTAIN)
        with pytest.raises(InputError, match="got an async function or a generator"):
            guarded(preprocessor=Gym()).wrap(function)
    safe = guarded().wrap(later)  # what is rejected is never called
    assert torch.equal(asyncio.run(safe(images[::2])), images[::2])
    with pytest.raises(RejectedError):
        asyncio.run(safe(images))


def test_a_module_takes_its_batch_by_name_too_and_what_takes_none_says_so() -> None:
    images = mixed()[::2]
    torch.testing.assert_close(cast(Any, guarded().wrap(ToyNet()))(images=images), ToyNet()(images))
    with pytest.raises(InputError, match="got none: pass it by position"):
        cast(Any, guarded().wrap(functools.partial(torch.mul, other=2.0)))(input=images)


def test_lists_stay_lists() -> None:
    def labels(batch: Tensor) -> list[int]:
        found: list[int] = ToyNet()(batch).argmax(dim=1).tolist()
        return found

    images = mixed(4)
    expected = labels(images)
    assert guarded().wrap(labels, ABSTAIN)(images) == [expected[0], -1, expected[2], -1]


def test_a_failure_is_a_rejection() -> None:
    with pytest.raises(RejectedError):
        guarded(predictor(raises)).wrap(lambda batch: batch)(mixed(2)[:1])
    guard = guarded(predictor(nan_when_dark))
    images, _ = toy_images(3)
    images[1] = 0
    blank = guard.wrap(lambda batch: ToyNet()(batch), "abstain")(images)
    assert torch.isnan(blank).all(dim=1).tolist() == [False, True, False]


def test_monitoring_lets_everything_through() -> None:
    images = mixed()
    assert torch.equal(guarded(policy=Policy(mode="monitor")).wrap(ToyNet())(images), ToyNet()(images))


@pytest.mark.parametrize("container", get_args(Container))
@pytest.mark.parametrize("dtype", get_args(DType))
def test_the_function_gets_preprocessed_images_of_the_same_kind(container: Container, dtype: DType) -> None:
    spec = msgspec.structs.replace(SPEC, container=container, dtype=dtype, layout="NHWC")
    seen: list[Array] = []
    inner = predict_function(spec, "logits")

    def predict(batch: Array) -> object:
        seen.append(batch)
        return inner(batch)

    answers = predictor(inner, spec)
    still = Gym(kernel=3, shift=0.0, rotation=0.0, zoom=0.0)
    batch = spec.to_model(mixed()[::2])
    before = values(batch)
    Guard(answers, [detector(answers)], preprocessor=still).wrap(predict)(batch)
    assert type(seen[0]) is type(batch)
    assert seen[0].dtype == batch.dtype
    expected = spec.to_model(still.filter(mixed()[::2]))
    tolerance = 1e-5 if dtype == "float32" else 1
    np.testing.assert_allclose(values(seen[0]).astype(float), values(expected).astype(float), atol=tolerance)
    assert np.array_equal(values(batch), before)


def test_doubles_stay_doubles() -> None:
    spec = msgspec.structs.replace(SPEC, container="numpy")
    seen: list[str] = []

    def predict(batch: NDArray[np.float64]) -> int:
        seen.append(str(batch.dtype))
        return 0

    guard = Guard(predictor(predict_function(spec, "logits"), spec), [], preprocessor=Gym())
    guard.wrap(predict)(mixed().numpy().astype(np.float64))
    assert seen == ["float64"]


ABSTAIN: Literal["abstain"] = "abstain"


@pytest.mark.parametrize(
    ("answer", "blank"),
    [
        (np.array([5, 6], np.int32), [5, -1]),
        (np.array([5, 6], np.uint8), [5, -1]),
        (torch.tensor([5, 6]), [5, -1]),
        (torch.tensor([5, 6], dtype=torch.uint8), [5, -1]),
        ([5, 6], [5, -1]),
        ([0.5, 0.25], [0.5, None]),
        ([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [None, None]]),
        (np.ones((2, 2, 2), np.float16), [[[1, 1], [1, 1]], [[None, None], [None, None]]]),
        (torch.ones(2, 1, requires_grad=True), [[1], [None]]),
    ],
)
def test_rejected_rows_are_blank_in_every_kind_of_answer(answer: Any, blank: Any) -> None:
    before = values(answer)
    found = guarded().wrap(lambda batch: answer, ABSTAIN)(mixed(2))
    np.testing.assert_array_equal(values(found).astype(float), np.array(blank, dtype=float))  # None is NaN
    assert np.array_equal(values(answer), before)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "cat",
        ["cat", "dog"],
        {"label": [1, 2]},
        7,
        np.zeros(3),
        torch.zeros(3, 4),
        torch.tensor(1.0),
        np.array([True, False]),
        torch.tensor([True, False]),
        torch.zeros(2, dtype=torch.complex64),
        [[1.0], [1.0, 2.0]],
        np.array(["a", "b"]),
        (np.array([1, 2]), np.array([0.5, 0.6])),
        [np.array([1, 2]), np.array([0.5, 0.6])],
        (torch.zeros(2, 4), torch.zeros(2, 4)),
        [torch.zeros(2, 4), torch.zeros(2, 4)],
    ],
)
def test_answers_that_can_not_abstain_are_an_error_and_not_given_out(answer: Any) -> None:
    """Two outputs for two images must not be taken for two rows: the first would leak the rejected row's label."""
    with pytest.raises(ModelError):
        guarded().wrap(lambda batch: answer, ABSTAIN)(mixed(2))
    assert guarded().wrap(lambda batch: answer)(mixed(2)[:1]) is answer
    assert guarded(policy=Policy(mode="monitor")).wrap(lambda batch: answer, ABSTAIN)(mixed(2)) is answer


@pytest.mark.parametrize("answer", [{"label": [1]}, (np.array([1]), np.array([0.5])), ["cat"], torch.tensor([True])])
def test_what_can_not_abstain_shows_before_an_attack(answer: Any) -> None:
    with pytest.raises(ModelError):
        guarded().wrap(lambda batch: answer, ABSTAIN)(mixed(2)[:1])


@pytest.mark.parametrize("answer", [np.array([5], np.uint8), torch.tensor([5], dtype=torch.uint8), [[0.5, 0.5]]])
def test_answers_without_a_rejected_row_are_passed_on(answer: Any) -> None:
    assert guarded().wrap(lambda batch: answer, ABSTAIN)(mixed(2)[:1]) is answer


def test_other_ways_to_reject() -> None:
    with pytest.raises(InputError, match="expected on_reject 'raise' or 'abstain', got 'drop'"):
        guarded().wrap(ToyNet(), cast(Any, "drop"))


@pytest.mark.parametrize(
    "batch", [None, [[0.0]], np.zeros((2, 1, 8, 8), np.uint8), torch.zeros(1, 8, 8), torch.full((1, 1, 8, 8), 9.0)]
)
def test_a_wrapped_function_checks_its_input(batch: Any) -> None:
    with pytest.raises(InputError):
        guarded().wrap(ToyNet())(batch)
