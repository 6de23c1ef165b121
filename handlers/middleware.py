"""The guard in front of an existing ASGI application."""

from __future__ import annotations

import contextlib
import logging
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, final

import anyio

from guard.errors import GuardError, InputError, MissingExtraError, one_line
from handlers.answers import error_answer
from handlers.exchange import header_values, json_response, read_body
from handlers.multipart import OVERHEAD_BYTES, is_multipart, split_multipart
from handlers.service import ImageService, Outcome, new_request_id

try:
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("starlette", "asgi") from error

if TYPE_CHECKING:
    from handlers.prometheus import PrometheusMetrics

logger = logging.getLogger("guard.asgi")

_MAX_PARTS = 64
_WRAPPED = 32  # applications around one another
_FORM = re.compile(rb"form|url-?encoded")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PATTERN = re.compile(r"[{}<>*%]")  # of a router's templates; none may stand in a URL unescaped but *


@final
class GuardMiddleware:
    """Judges the images that are posted to some paths; the application sees only requests whose image was accepted.

    The body is one image file, or multipart/form-data with exactly one. What is refused is answered as
    `handlers.answers` says; what is accepted (in monitor mode also what is suspicious) is replayed to the application
    byte for byte. Other paths, methods, websockets and the lifespan pass through untouched.

    The guard judges what *our* decoder sees at the profile's size. An application that rotates by EXIF, takes another
    frame of an animation or resizes differently gives its model something else. A body that is no image (JSON with
    base64), or is announced as a form without a file, is refused. Headers and query parameters are not looked at.

    Args:
        app: The application.
        service: Judges; its guard must have no preprocessor, because the application decodes by itself.
        paths: Exact paths, or `/folder/*` for one and everything below it, also where a router has `/folder/{name}`. They count
            behind any prefix, too: `/predict` guards `/api/predict`, whatever root path the application sets. A middleware
            inside that changes the end of a path is not known here: wrap what it wraps.
        methods: Methods that carry images.
        form_fields: Names of plain form fields that may come along with the file, unjudged; no others may.
        metrics: Where requests are counted, under the service's model name.
        limiter: Bounds the worker threads in which the guard runs; two when None.
        body_seconds: Time for a client to send its body.

    Raises:
        GuardError: The service's guard has a preprocessor, no path is given, or one that would never match.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: ImageService,
        *,
        paths: Sequence[str] = ("/predict",),
        methods: Collection[str] = ("POST", "PUT", "PATCH"),
        form_fields: Collection[str] = (),
        metrics: PrometheusMetrics | None = None,
        limiter: anyio.CapacityLimiter | None = None,
        body_seconds: float = 60.0,
    ) -> None:
        if service.guard.preprocessor is not None:
            raise GuardError(
                "expected a guard without a preprocessor, got one that has it: the application decodes images by itself, "
                "so its model would not see the preprocessed ones; wrap the predict function with Guard.wrap instead"
            )
        if isinstance(paths, str) or not paths or not all(path.startswith("/") for path in paths):
            raise GuardError(f"expected a list of paths that start with /, got {paths!r}: name those that take images")
        self.app = app
        self.service = service
        self.paths = frozenset(_checked(path) for path in paths)
        self.methods = frozenset(method.upper() for method in methods)
        self.form_fields = frozenset(form_fields)
        self.metrics = metrics
        self.limiter = limiter or anyio.CapacityLimiter(2)
        self.body_seconds = body_seconds
        if metrics is not None:
            metrics.prepare(service.model_name, service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as any ASGI application does."""
        if not self._applies(scope):
            await self.app(scope, receive, send)
            return
        request_id = new_request_id()
        try:
            passed = await self._passed(scope, receive, request_id)
        except ClientDisconnect:
            logger.debug("the client of request %s left before its body was complete", request_id)
            return
        except Exception as error:  # fail closed: the application must not see what was not judged
            logger.exception("request %s failed: %s", request_id, one_line(error))
            passed = json_response(error_answer(GuardError(one_line(error)), request_id), request_id, finished=False)
        if isinstance(passed, bytes):
            await self.app(scope, _replay(passed, receive), send)
            return
        with contextlib.suppress(OSError):  # the client left meanwhile
            await passed(scope, receive, send)

    def _applies(self, scope: Scope) -> bool:
        """Too wide rather than too narrow: a path that the application takes for a guarded one must not slip by."""
        if scope["type"] != "http" or scope["method"].upper() not in self.methods:
            return False
        path: str = scope["path"]
        roots = {root.rstrip("/") for root in ("", scope.get("root_path", ""), *_root_paths(self.app))}
        paths = {found for root in roots for found in (path.removeprefix(root), f"{root}/{path}")}
        readings = {reading for found in paths for reading in _readings(found)}
        candidates = readings | {end for reading in readings for end in _ends(reading)}
        candidates |= {parent + "/*" for candidate in candidates for parent in _parents(candidate)}
        return not self.paths.isdisjoint(candidates)

    async def _passed(self, scope: Scope, receive: Receive, request_id: str) -> bytes | JSONResponse:
        """The body that may go on, or the answer that refuses it."""
        content_types = header_values(scope, b"content-type")
        multipart = is_multipart(content_types)
        limit = self.service.limits.max_bytes + (OVERHEAD_BYTES if multipart else 0)
        body = await read_body(scope, receive, limit, self.body_seconds)
        if isinstance(body.content, InputError):
            outcome = self.service([body.content], [request_id])[0]
        else:
            outcome = await anyio.to_thread.run_sync(self._judge, body.content, content_types, request_id, limiter=self.limiter)
        if self.metrics is not None:
            self.metrics.observe(outcome, self.service.model_name)
        if isinstance(body.content, bytes) and self._lets_through(outcome):
            return body.content
        return json_response(outcome.answer, request_id, finished=body.finished)

    def _lets_through(self, outcome: Outcome) -> bool:
        """Monitor mode never blocks: the application answers by itself, even what the guard could not judge."""
        accepted = outcome.verdict is not None and outcome.verdict.accepted
        return accepted or self.service.guard.policy.mode == "monitor"

    def _judge(self, body: bytes, content_types: list[bytes], request_id: str) -> Outcome:
        """Runs in a worker thread."""
        image: bytes | InputError
        try:
            image = self._file(body, content_types)
        except InputError as problem:
            image = problem
        return self.service([image], [request_id])[0]

    def _file(self, body: bytes, content_types: list[bytes]) -> bytes:
        multipart = is_multipart(content_types)
        announced = any(_FORM.search(value.lower()) for value in content_types)
        if announced and not multipart:  # to us it may be an image, to others its fields
            raise InputError(
                "expected an image or multipart/form-data with one, got a body announced as a form without files "
                "(application/x-www-form-urlencoded): send the image with its own content type"
            )
        if not multipart:
            return body
        parts = split_multipart(body, content_types, _MAX_PARTS)
        files = [part for part in parts if part.field not in self.form_fields]
        if len(files) != 1:
            named = ", ".join(sorted({part.field for part in files if part.field is not None}))
            fields = f" (with the form fields {named}, which this server does not expect)" if named else ""
            raise InputError(f"expected exactly one file, got {len(files)} parts{fields}: send one image a request")
        return files[0].data


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body once more, and then what really comes: the client's disconnect."""
    pending = [body]

    async def replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replayed


def _normal(path: str) -> str:
    """Without doubled or trailing slashes, and the line ends and their like, which some routers overlook."""
    return re.sub("/+", "/", _CONTROL.sub("", path)).rstrip("/") or "/"


def _readings(path: str) -> set[str]:
    """How a router may understand a path: as it is, or with its dots resolved."""
    normal = _normal(path)
    return {normal, _normal(posixpath.normpath(normal))}


def _root_paths(app: object) -> Iterator[str]:
    """Of an application that tells its own only once it is called, as FastAPI does, behind any number of others."""
    for _ in range(_WRAPPED):
        if app is None:
            return
        root = getattr(app, "root_path", None)
        if isinstance(root, str):
            yield root
        app = getattr(app, "app", None)


def _checked(path: str) -> str:
    """A path to guard, without what only routers understand: taken literally it would guard nothing."""
    normal = _normal(path)
    strange = _PATTERN.search(normal.removesuffix("/*"))
    if strange is not None:
        below = normal[: strange.start()].rpartition("/")[0] + "/*"
        raise GuardError(
            f"expected exact paths, or /folder/* for all below one, got {path!r}, which would guard nothing: write {below!r}"
        )
    return normal


def _ends(path: str) -> list[str]:
    """`/a/b/c` gives itself, `/b/c` and `/c`."""
    pieces = path.rstrip("/").split("/")
    return ["/" + "/".join(pieces[start:]) for start in range(1, len(pieces))]


def _parents(path: str) -> list[str]:
    """`/a/b/c` gives itself, `/a/b`, `/a` and the empty root."""
    pieces = path.rstrip("/").split("/")
    return ["/".join(pieces[:end]) for end in range(1, len(pieces) + 1)]
