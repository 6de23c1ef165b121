"""One HTTP exchange over ASGI: read a request's body within bounds, and turn an answer into a response."""

from __future__ import annotations

from dataclasses import dataclass

import anyio

from guard.errors import InputError, MissingExtraError, TooLargeError
from handlers.answers import Answer

try:
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.types import Receive, Scope
except ImportError as error:
    raise MissingExtraError("starlette", "asgi") from error

_LINGER_SECONDS = 2.0
_LONGEST_LENGTH = 18  # digits: more would be an exabyte, and Python refuses to convert thousands of them


@dataclass(frozen=True)
class Body:
    """What came of reading a request's body.

    Attributes:
        content: The bytes, or why they were not read.
        finished: False when the client may still be sending, so that the connection can't be used again.
    """

    content: bytes | InputError
    finished: bool


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of one header; `name` in lower case."""
    return [value for key, value in scope["headers"] if key.lower() == name]


async def read_body(scope: Scope, receive: Receive, max_bytes: int, seconds: float) -> Body:
    """Read a body, never holding more than `max_bytes` of it.

    Args:
        scope: The request.
        receive: Its channel.
        max_bytes: Over it nothing is kept; what the client declares is checked first, what it sends all the same.
        seconds: For the whole body.

    Returns:
        The body, or a `TooLargeError` or `InputError` in its place.

    Raises:
        ClientDisconnect: The client left before its body was complete.
    """
    try:
        declared = _declared_length(scope)
    except InputError as problem:
        return Body(problem, finished=False)
    if declared is not None and declared > max_bytes:
        waits = bool(header_values(scope, b"expect"))  # for a 100 Continue, which reading would send
        return Body(_too_large(max_bytes, declared), finished=not waits and await _discard(receive))
    content = bytearray()
    more = True
    try:
        with anyio.fail_after(seconds):
            while more:
                chunk, more = await _chunk(receive)
                if len(content) + len(chunk) > max_bytes:
                    content.clear()
                    return Body(_too_large(max_bytes, None), finished=not more or await _discard(receive))
                content += chunk
    except TimeoutError:
        slow = InputError(f"expected the whole body within {seconds:g} s, got {len(content)} bytes of it: send it faster")
        return Body(slow, finished=False)
    if declared not in (None, len(content)):
        return Body(InputError(f"expected the {declared} bytes of Content-Length, got {len(content)}: send them all"), True)
    return Body(bytes(content), finished=True)


def json_response(answer: Answer, request_id: str, *, finished: bool = True) -> JSONResponse:
    """An answer as a response that carries our request id.

    Args:
        answer: Status and JSON object.
        request_id: Ours.
        finished: Whether the request's body was read to its end; otherwise the connection is closed.
    """
    headers = {"x-request-id": request_id} | ({} if finished else {"connection": "close"})
    return JSONResponse(answer.body, answer.status, headers)


def _declared_length(scope: Scope) -> int | None:
    values = set(header_values(scope, b"content-length"))
    if not values:
        return None
    value = values.pop()
    if values or not value.isdigit() or len(value) > _LONGEST_LENGTH:
        raise InputError("expected one Content-Length in digits, got something else: send the body's size in bytes")
    return int(value)


def _too_large(max_bytes: int, declared: int | None) -> TooLargeError:
    got = "more" if declared is None else str(declared)
    return TooLargeError(f"expected at most {max_bytes} bytes, got {got}: send less at once")


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    """The next piece of the body, and whether there is more."""
    message = await receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def _discard(receive: Receive) -> bool:
    """Take the rest of a body without keeping it: a client reads no answer while it still writes. False if it went on."""
    with anyio.move_on_after(_LINGER_SECONDS):
        while (await _chunk(receive))[1]:
            continue
        return True
    return False
