"""The edge server as an ASGI application: devices send jobs and fetch results. `handlers.edge_protocol` has the routes.

Nothing but `/ping` is answered without the token, and nothing is read before. Bodies go to disk as they come, and never over
what was declared of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, final

import anyio
import msgspec

from guard.errors import UNREADABLE, EdgeError, GuardError, InputError, MissingExtraError, TooLargeError, one_line
from handlers.answers import Answer
from handlers.edge_jobs import Job, JobStore
from handlers.edge_protocol import FileInfo, JobRequest, Manifest, check_token
from handlers.edge_worker import EdgeWorker
from handlers.exchange import header_values, json_response, read_body
from handlers.service import new_request_id

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("starlette", "edge") from error

logger = logging.getLogger("guard.edge")

BODY_SECONDS = 60.0
"""Time for a client to send a request, and the next piece of a file."""

MAX_CONNECTIONS = 64
"""At once; over it a connection gets a 503."""

_NOTE_SECONDS = 5.0  # between records that a file is still arriving
_REQUEST_BYTES = 64 * 1024
_Handler = Callable[[Request], Awaitable[Response]]


def create_edge_app(
    store: JobStore,
    worker: EdgeWorker,
    token: str,
    allowed_factories: tuple[str, ...] = (),
    *,
    body_seconds: float = BODY_SECONDS,
) -> ASGIApp:
    """Make the application.

    Args:
        store: Its jobs.
        worker: That runs them.
        token: That clients must know.
        allowed_factories: `package.module:factory` of modules that a job may be run with: making one runs its code.
        body_seconds: Time for a client to send a request, and the next piece of a file.

    Raises:
        EdgeError: A token that is too short.
    """
    edge = _Edge(store, worker, frozenset(allowed_factories), body_seconds)

    async def ping(_: Request) -> Response:
        return JSONResponse({"status": "Healthy"})

    routes = [
        Route("/ping", ping),
        Route("/v1/jobs", _answered(edge.create), methods=["POST"]),
        Route("/v1/jobs/{job}", _answered(edge.show), methods=["GET"]),
        Route("/v1/jobs/{job}", _answered(edge.delete), methods=["DELETE"]),
        Route("/v1/jobs/{job}/start", _answered(edge.start), methods=["POST"]),
        Route("/v1/jobs/{job}/files/{name}", _answered(edge.receive), methods=["PUT"]),
        Route("/v1/jobs/{job}/files/{name:path}", _answered(edge.send), methods=["GET"]),
    ]
    return BearerToken(Starlette(routes=routes, exception_handlers={HTTPException: _http_error}), token=token, free=("/ping",))


@final
class BearerToken:
    """Lets requests through that carry the token, and answers all others 401 without reading them.

    Args:
        app: The application behind.
        token: That clients must know.
        free: Paths that need none.

    Raises:
        EdgeError: A token that is too short.
    """

    def __init__(self, app: ASGIApp, *, token: str, free: tuple[str, ...] = ()) -> None:
        self._app = app
        self._expected = f"Bearer {check_token(token)}".encode()
        self._free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http" or scope["path"] in self._free or self._knows(scope):
            await self._app(scope, receive, send)
            return
        body: dict[str, object] = {
            "reason": "unauthorized",
            "message": "expected Authorization: Bearer TOKEN, with the edge's token",
        }
        response = _json(401, body, finished=False)
        response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        values = header_values(scope, b"authorization")
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)


@final
class _Edge:
    """The answers."""

    def __init__(self, store: JobStore, worker: EdgeWorker, allowed: frozenset[str], body_seconds: float) -> None:
        self._store, self._worker, self._allowed, self._body_seconds = store, worker, allowed, body_seconds

    async def create(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, _REQUEST_BYTES, self._body_seconds)
        if isinstance(body.content, InputError):
            return _refusal(body.content, finished=body.finished)
        try:
            asked = msgspec.json.decode(body.content, type=JobRequest)
        except UNREADABLE as error:
            raise InputError(f"expected a job of this version's form, got another: {one_line(error)}") from error
        if asked.factory is not None and asked.factory not in self._allowed:
            raise EdgeError(
                "expected a factory that this edge server allows, got another: start it with --allow-factory "
                f"{asked.factory}, or send the model as .pt2 or TorchScript",
                403,
                "factory-not-allowed",
            )
        job = await anyio.to_thread.run_sync(self._store.create, asked)
        logger.info("job %s: %s, %d bytes to come", job.id, asked.options.method, sum(item.size for item in asked.files))
        return await self._status(job, 201)

    async def show(self, request: Request) -> Response:
        return await self._status(await self._job(request))

    async def delete(self, request: Request) -> Response:
        job_id = request.path_params["job"]
        await anyio.to_thread.run_sync(self._store.delete, job_id)
        logger.info("job %s was deleted", job_id)
        return Response(status_code=204)

    async def start(self, request: Request) -> Response:
        job = await self._job(request)
        return await self._status(await anyio.to_thread.run_sync(self._worker.submit, job.id), 202)

    async def receive(self, request: Request) -> Response:
        job = await self._job(request)
        expected = job.request.file(request.path_params["name"])
        if expected is None:
            raise EdgeError("expected a file that the job declared, got another name", 404, "unknown-file")
        if job.state != "receiving":
            raise EdgeError(f"expected no more files for a job that is {job.state}, got one", 409, "not-receiving")
        part = self._store.sent(job.id) / f".{expected.name}.{secrets.token_hex(8)}.part"
        try:
            await self._write(request, part, expected, job.id)
            await anyio.to_thread.run_sync(self._store.accept, job.id, part, expected)
        except FileNotFoundError:
            await self._job(request)  # it was deleted meanwhile
            raise
        finally:
            part.unlink(missing_ok=True)
        return Response(status_code=204)

    async def send(self, request: Request) -> Response:
        job, name = await self._job(request), request.path_params["name"]
        if job.result is None:
            raise EdgeError(f"expected a job that is done, got one that is {job.state}: wait for it", 409, "not-done")
        manifest = msgspec.json.decode(job.result.manifest, type=Manifest)
        path = self._store.result(job.id) / name
        if name not in [item.name for item in manifest.files] or not path.is_file():
            raise EdgeError("expected a file of the result, got another name", 404, "unknown-file")
        return FileResponse(path, media_type="application/octet-stream")

    async def _job(self, request: Request) -> Job:
        return await anyio.to_thread.run_sync(self._store.get, request.path_params["job"])

    async def _status(self, job: Job, code: int = 200) -> Response:
        status = await anyio.to_thread.run_sync(self._store.status, job)
        return Response(msgspec.json.encode(status), code, media_type="application/json")

    async def _write(self, request: Request, part: Path, expected: FileInfo, job_id: str) -> None:
        """Write a body to disk as it comes, and verify it."""
        with part.open("wb") as file:
            size, digest = await self._copy(request, file, expected.size, job_id)
        if size != expected.size:
            raise EdgeError(
                f"expected the {expected.size} bytes of {expected.name}, got {size}: send it again", 422, "truncated"
            )
        if not hmac.compare_digest(digest, expected.sha256):
            raise EdgeError(f"expected {expected.name} with the declared SHA-256, got another: send it again", 422, "damaged")

    async def _copy(self, request: Request, file: IO[bytes], most: int, job_id: str) -> tuple[int, str]:
        size, digest, noted = 0, hashlib.sha256(), time.monotonic()
        chunks = request.stream()
        while True:
            try:
                with anyio.fail_after(self._body_seconds):
                    chunk = await anext(chunks, None)
            except TimeoutError as error:
                raise EdgeError(f"expected more of the file within {self._body_seconds:g} s, got none", 408, "slow") from error
            if chunk is None:
                return size, digest.hexdigest()
            size += len(chunk)
            if size > most:
                raise TooLargeError(f"expected the {most} bytes that were declared, got more: declare them all")
            await anyio.to_thread.run_sync(_append, file, chunk, digest.update)
            if time.monotonic() - noted >= _NOTE_SECONDS:
                with contextlib.suppress(OSError):  # of a full disk the file itself will tell
                    await anyio.to_thread.run_sync(self._store.update, job_id)  # or it would expire under the upload
                noted = time.monotonic()


def _append(file: IO[bytes], chunk: bytes, digest: Callable[[bytes], None]) -> None:
    file.write(chunk)
    digest(chunk)


def _answered(handler: _Handler) -> _Handler:
    """A handler whose errors become answers."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            logger.info("a device left before its request was complete")
            return Response(status_code=400)  # nobody reads it
        except GuardError as error:
            return _refusal(error, finished=request.method != "PUT")
        except Exception as error:  # whatever went wrong, the device learns that it did, and no more
            logger.exception("a request failed: %s", one_line(error))
            return _refusal(EdgeError("the edge server failed: see its log", 503), finished=False)

    return answer


def _refusal(error: GuardError, *, finished: bool = True) -> Response:
    status = error.status if isinstance(error, EdgeError) else 413 if isinstance(error, TooLargeError) else 400
    return _json(status, {"reason": error.code, "message": str(error)}, finished=finished)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405) as JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 503
    reason = {404: "not-found", 405: "method-not-allowed"}.get(status, "bad-request")
    response = _json(
        status, {"reason": reason, "message": f"expected a route of handlers.edge_protocol, got another: {reason}"}
    )
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    return response


def _json(status: int, body: dict[str, object], *, finished: bool = True) -> JSONResponse:
    request_id = new_request_id()
    return json_response(Answer(status, {**body, "request_id": request_id}), request_id, finished=finished)
