"""The ASGI application: images over HTTP, guarded.

    POST /predictions/{model}   an image as the body, or multipart/form-data with one file or several
    GET  /ping                  {"status": "Healthy"}
    GET  /metrics               Prometheus text, for clients on this machine

Several files are answered by a 207 with `{"predictions": [{"status": 200, ...}, ...]}`, one object per file, in order.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import anyio

from guard.decoding import Limits, count_pixels
from guard.errors import GuardError, InputError, MissingExtraError, TooLargeError, one_line
from handlers.answers import Answer, error_answer
from handlers.exchange import header_values, json_response, read_body
from handlers.multipart import OVERHEAD_BYTES, is_multipart, split_multipart
from handlers.prometheus import PrometheusMetrics
from handlers.service import ImageService, Outcome, new_request_id

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("starlette", "asgi") from error

logger = logging.getLogger("guard.asgi")

MAX_FILES = 64
"""Files in one multipart request."""

BODY_SECONDS = 60.0
"""Time for a client to send its body."""

MAX_TOGETHER = 4
"""Times the limit of one image's pixels, and by default of its bytes, that one multipart request may hold."""

WORKERS = 2
"""Guards that run at once: PyTorch spreads one over the cores already."""

_FORWARDED = (b"forwarded", b"via", b"x-real-ip")  # and whatever starts with x-forwarded-: a proxy's, for somebody else


def create_app(
    services: Mapping[str, ImageService],
    metrics: PrometheusMetrics | None = None,
    *,
    limiter: anyio.CapacityLimiter | None = None,
    max_files: int = MAX_FILES,
    max_batch_bytes: int | None = None,
    body_seconds: float = BODY_SECONDS,
    public_metrics: bool = False,
) -> Starlette:
    """Make the application.

    Args:
        services: By the model's name in the path.
        metrics: Where requests are counted; made here when None.
        limiter: Bounds the worker threads in which guards run; two when None.
        max_files: Files in one multipart request.
        max_batch_bytes: Body of one multipart request; four times the service's limit of one image when None.
        body_seconds: Time for a client to send its body.
        public_metrics: Answer `/metrics` to everybody. They are exact: what they rise by around one request is its score. False
            answers clients on this machine, unless a proxy says that it asks for another.
    """
    metrics = metrics or PrometheusMetrics()
    for model, service in services.items():
        metrics.prepare(model, service)
    predictions = _Predictions(
        dict(services), metrics, limiter or anyio.CapacityLimiter(WORKERS), max_files, max_batch_bytes, body_seconds
    )

    async def ping(_: Request) -> Response:
        return JSONResponse({"status": "Healthy"})

    async def exposition(request: Request) -> Response:
        if not (public_metrics or _is_local(request.scope)):
            message = "expected a client on the server's own machine, got another: scrape the metrics there"
            return _refused(403, "metrics-are-local", message, new_request_id())
        content, content_type = metrics.render()
        return Response(content, headers={"content-type": content_type})

    routes = [
        Route("/predictions/{model}", predictions, methods=["POST"]),
        Route("/ping", ping),
        Route("/metrics", exposition),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


@final
@dataclass(frozen=True)
class _Predictions:
    """Answers `POST /predictions/{model}`; itself an ASGI application."""

    services: Mapping[str, ImageService]
    metrics: PrometheusMetrics
    limiter: anyio.CapacityLimiter
    max_files: int
    max_batch_bytes: int | None
    body_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        try:
            response = await self._respond(scope, receive, request_id)
        except ClientDisconnect:
            logger.debug("the client of request %s left before its body was complete", request_id)
            return
        except Exception as error:  # fail closed: whatever went wrong, nothing is given out
            logger.exception("request %s failed: %s", request_id, one_line(error))
            response = json_response(error_answer(GuardError(one_line(error)), request_id), request_id, finished=False)
        with contextlib.suppress(OSError):  # the client left meanwhile
            await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, request_id: str) -> Response:
        model: str = scope["path_params"]["model"]
        service = self.services.get(model)
        if service is None:
            message = "expected the name of a model that is served, got another"
            return _refused(404, "unknown-model", message, request_id)
        content_types = header_values(scope, b"content-type")
        multipart = is_multipart(content_types)
        body = await read_body(scope, receive, self._max_bytes(service, multipart), self.body_seconds)
        if isinstance(body.content, InputError):
            outcomes = service([body.content], [request_id])
        else:
            outcomes = await anyio.to_thread.run_sync(
                self._judge, service, body.content, content_types if multipart else [], request_id, limiter=self.limiter
            )
        for outcome in outcomes:
            self.metrics.observe(outcome, model)
        return json_response(_combine(outcomes), request_id, finished=body.finished)

    def _max_bytes(self, service: ImageService, multipart: bool) -> int:
        one = service.limits.max_bytes
        if not multipart:
            return one
        return MAX_TOGETHER * one + OVERHEAD_BYTES if self.max_batch_bytes is None else self.max_batch_bytes

    def _judge(self, service: ImageService, body: bytes, multipart: list[bytes], request_id: str) -> list[Outcome]:
        """Runs in a worker thread. `multipart` holds the Content-Type headers of a multipart request."""
        images: list[bytes | InputError] = [body]
        if multipart:
            try:
                images = [part.data for part in split_multipart(body, multipart, self.max_files)]
                if service.guard.predictor.spec.resize and len(images) > 1:  # others are decoded at the model's size alone
                    images = _bounded(images, service.limits)
            except InputError as problem:
                images = [problem]
        ids = [request_id] if len(images) == 1 else [f"{request_id}-{row}" for row in range(len(images))]
        return service(images, ids)


def _bounded(images: list[bytes | InputError], limits: Limits) -> list[bytes | InputError]:
    """The images of one request, but for those that its pixels altogether don't leave room for."""
    room, bounded = MAX_TOGETHER * limits.max_pixels, list[bytes | InputError]()
    for image in images:
        with contextlib.suppress(InputError):  # what it is instead, decoding it will say
            room -= count_pixels(image, limits) if isinstance(image, bytes) else 0
        full = TooLargeError(f"expected at most {MAX_TOGETHER * limits.max_pixels} pixels in one request: send fewer images")
        bounded.append(image if room >= 0 else full)
    return bounded


def _combine(outcomes: list[Outcome]) -> Answer:
    if len(outcomes) == 1:
        return outcomes[0].answer
    return Answer(207, {"predictions": [{"status": item.answer.status, **item.answer.body} for item in outcomes]})


def _refused(status: int, reason: str, message: str, request_id: str) -> Response:
    """A refusal before the request's body was read."""
    body: dict[str, object] = {"reason": reason, "message": message, "request_id": request_id}
    return json_response(Answer(status, body), request_id, finished=False)


def _is_local(scope: Scope) -> bool:
    """Whether a client on this machine asks for itself; one behind a Unix socket, where proxies are, is nobody."""
    if any(name.lower() in _FORWARDED or name.lower().startswith(b"x-forwarded-") for name, _ in scope["headers"]):
        return False
    try:
        address = ipaddress.ip_address(scope["client"][0])
    except (KeyError, TypeError, ValueError):  # no client, or none with an address
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # ::ffff:127.0.0.1, where a socket takes both


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405) as JSON; nothing of the client's text comes back."""
    request_id = new_request_id()
    status = error.status_code if isinstance(error, HTTPException) else 503
    reason = {404: "not-found", 405: "method-not-allowed"}.get(status, "bad-request")
    response = json_response(Answer(status, {"reason": reason, "request_id": request_id}), request_id)
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    return response
