"""Runs an ASGI application with uvicorn: in the foreground for `guard serve`, in a thread for tests and the demo."""

from __future__ import annotations

import contextlib
import http.client
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self, final

from guard.errors import MissingExtraError, ServingError, one_line
from handlers.stopping import signals_call

try:
    import uvicorn
except ImportError as error:
    raise MissingExtraError("uvicorn", "asgi") from error

if TYPE_CHECKING:
    from starlette.types import ASGIApp

logger = logging.getLogger("guard.asgi")

_GRACE_SECONDS = 10
_POLL_SECONDS = 0.05


def serve_asgi(app: ASGIApp, host: str = "127.0.0.1", port: int = 8080, *, max_connections: int | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; requests that are under way are answered first, for at most ten seconds.

    Args:
        app: The application.
        host: Address to bind, and nothing else.
        port: 0 for a free one.
        max_connections: Connections over it get a 503; None for no bound.

    Raises:
        ServingError: The address can't be bound, or the application did not start.
    """
    listener = _listen(host, port)
    with listener:
        server = _server(app, max_connections)
        logger.info("serving on %s; stop with Ctrl+C", _url(listener))
        with _stopped_by_signals(server):
            _run(server, listener)


@final
class AsgiServer:
    """A server in a background thread, as a context manager; inside the block it answers.

    Args:
        app: The application.
        host: Address to bind, and nothing else.
        port: 0 for a free one.
        start_seconds: Time until `/ping` must answer.

    Raises:
        ServingError: The address can't be bound, or nothing answers in time.
    """

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1", port: int = 0, *, start_seconds: float = 30.0) -> None:
        self._listener = _listen(host, port)
        self._server = _server(app)
        self._start_seconds = start_seconds
        self._thread = threading.Thread(target=self._serve, name="asgi-server", daemon=True)
        self.url = _url(self._listener)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + self._start_seconds
        while not self._answers():
            if time.monotonic() > deadline or not self._thread.is_alive():
                self.close()
                raise ServingError(f"expected {self.url}/ping to answer, got nothing: see the log for why it did not start")
            time.sleep(_POLL_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop, after the requests that are under way."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(_GRACE_SECONDS + 5)
        self._listener.close()

    def _serve(self) -> None:
        try:
            _run(self._server, self._listener)
        except ServingError as error:
            logger.error("the server stopped: %s", error)

    def _answers(self) -> bool:
        host, port = self._listener.getsockname()[:2]
        connection = http.client.HTTPConnection(host, port, timeout=max(1.0, self._start_seconds))
        try:
            if not self._server.started:
                return False
            connection.request("GET", "/ping")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that an address in use is found before anything starts."""
    if not host or not 0 <= port <= 65535:
        raise ServingError(f"expected a host and a port from 0 to 65535, got {host!r} and {port}: try 127.0.0.1 and 8080")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ServingError(f"expected an address of this machine, got {host!r} ({one_line(error)}): try 127.0.0.1") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ServingError(
            f"can't listen on {host}:{port} ({error.strerror}): stop what uses it, or pick another port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _server(app: ASGIApp, max_connections: int | None = None) -> uvicorn.Server:
    """Without an access log (it would hold the client's text), websockets, or trust in forwarding headers."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        server.run(sockets=[listener])
    except SystemExit as error:  # uvicorn's way to say that the application's startup failed
        raise ServingError("expected the application to start, got a failure: see the log above") from error


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Make SIGINT, SIGTERM and a SIGHUP that is not ignored end the server and then return, instead of ending the process.

    uvicorn raises the signal again once it has stopped; whoever called us decides what comes next.
    """

    def stop(_: int, __: FrameType | None) -> None:
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with signals_call(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield
