from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import torch
from starlette.applications import Starlette
from torch import Tensor

from guard.errors import ServingError
from handlers.asgi import create_app
from handlers.asgi_server import AsgiServer, serve_asgi
from tests.handlers.toy_service import clean, toy_guard, toy_service

TIMEOUT = 30.0


def test_it_answers_inside_the_block_and_frees_its_port_after_it() -> None:
    with AsgiServer(create_app({"toy": toy_service()})) as server:
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert httpx.get(f"{server.url}/ping", timeout=TIMEOUT).json() == {"status": "Healthy"}
    with AsgiServer(create_app({}), port=server.port) as again:
        assert again.port == server.port


def test_an_address_in_use_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for start in (serve_asgi, lambda app, port: AsgiServer(app, port=port)):
            with pytest.raises(ServingError, match=f"can't listen on 127.0.0.1:{port}") as caught:
                start(create_app({}), port=port)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("host", "port"), [("", 8080), ("127.0.0.1", 70000), ("127.0.0.1", -1), ("203.0.113.7", 0)])
def test_an_address_that_is_not_ours_is_refused(host: str, port: int) -> None:
    with pytest.raises(ServingError):
        AsgiServer(create_app({}), host, port)


def test_only_what_was_given_is_bound() -> None:
    with AsgiServer(create_app({})) as server, pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{server.port}/ping", timeout=TIMEOUT)


def test_an_application_that_fails_to_start_is_an_error() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        int("no")
        yield

    with pytest.raises(ServingError):
        serve_asgi(Starlette(lifespan=lifespan), port=0)
    with pytest.raises(ServingError), AsgiServer(Starlette(lifespan=lifespan)):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_after_the_requests_under_way(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    guard = toy_guard(answers=_slow)
    answers: list[int] = []

    def client() -> None:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(transport=httpx.HTTPTransport(retries=20), timeout=TIMEOUT) as session:
            session.get(f"{url}/ping")
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            answers.append(session.post(f"{url}/predictions/toy", content=clean()).status_code)

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=client)
    thread.start()
    started = time.monotonic()
    serve_asgi(create_app({"toy": toy_service(guard)}), port=port)
    thread.join(TIMEOUT)
    assert answers == [200]
    assert time.monotonic() - started < TIMEOUT
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def _slow(images: Tensor) -> Tensor:
    time.sleep(0.5)
    return torch.eye(4)[torch.zeros(len(images), dtype=torch.int64)]


@pytest.mark.parametrize("host", ["127.0.0..1", "a" * 300])
def test_a_host_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(ServingError, match="expected an address of this machine"), AsgiServer(create_app({}), host, 0):
        pass
