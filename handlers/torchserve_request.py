"""What TorchServe hands to a handler, and what it takes back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from guard import GuardError, InputError
from handlers.answers import Answer, error_answer
from handlers.service import Outcome, new_request_id

Row = Mapping[str, object]
"""One request of a batch: values by the names of its fields; `body` is a request's bare body."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_EXPECTED = "expected one image, as the request's body or as its only field"


class Context(Protocol):
    """The part of `ts.context.Context` that is used here."""

    model_name: str
    model_yaml_config: Any
    metrics: Any
    request_ids: dict[int, str] | None
    request_processor: Any

    @property
    def system_properties(self) -> Mapping[str, Any]:
        """`model_dir`, `gpu_id` and others."""
        ...

    def get_request_id(self, idx: int = 0) -> str | None:
        """The id that TorchServe gave to a request."""
        ...

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """The status of one answer; the phrase must be ASCII."""
        ...

    def set_response_content_type(self, idx: int, value: str) -> None:
        """The content type of one answer."""
        ...


def image_body(row: Row) -> bytes | bytearray | GuardError:
    """The encoded image of one request.

    A second field, be it a query parameter, is refused: a handler behind the guard might read that one.
    """
    if len(row) != 1:
        return InputError(f"{_EXPECTED}, got {len(row)} fields: send the image alone")
    body = next(iter(row.values()))
    if not isinstance(body, (bytes, bytearray)):
        return InputError(f"{_EXPECTED}, got JSON or text: send the file's bytes, not application/json or text/*")
    return body


def request_ids(context: Context, count: int) -> list[str]:
    """TorchServe's own ids, which it also logs; new ones where they are not what it makes."""
    ids = [context.get_request_id(row) for row in range(count)]
    return [name if name is not None and _UUID.fullmatch(name) else new_request_id() for name in ids]


def failed_outcome(request_id: str, seconds: float = 0.0) -> Outcome:
    """Fail closed: 503, without telling the client why."""
    return Outcome(request_id, error_answer(GuardError(), request_id), None, seconds)


def send(context: Context, row: int, answer: Answer) -> dict[str, object]:
    """Set status and content type of one answer, and return its body."""
    context.set_response_status(answer.status, answer.phrase, idx=row)
    context.set_response_content_type(row, "application/json")
    return answer.body


def sendable(result: object) -> bool:
    """Whether TorchServe can send a result: NaN is not JSON, and what json.dumps refuses would fail the whole batch."""
    if isinstance(result, (str, bytes, bytearray, Tensor)):
        return True
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def subset(context: Context, rows: Sequence[int]) -> Context:
    """A context for some rows of a batch, counted from zero; what is set there arrives at the original rows."""
    view = copy.copy(context)
    ids = context.request_ids or {}
    view.request_ids = {index: ids[row] for index, row in enumerate(rows) if row in ids}
    view.request_processor = [context.request_processor[row] for row in rows]
    view.metrics = copy.copy(context.metrics)
    if view.metrics is not None:
        view.metrics.request_ids = view.request_ids
    return view
