"""A guarded toy model behind `ImageService`, images as PNG bytes, and a way to call ASGI applications."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping

import httpx
import numpy as np
import torch
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from guard import CalibratedDetector, Guard, Limits, Policy, Predictor, Quarantine
from guard.detectors import Strip
from guard.predictors import wrap
from handlers.service import ImageService
from tests.toy import ENTROPY_THRESHOLD, SIDE, SPEC, ToyNet, toy_images, toy_trigger

TIMEOUT = 60.0


def toy_guard(
    policy: Policy | None = None,
    quarantine: Quarantine | None = None,
    answers: Callable[[Tensor], Tensor] | None = None,
    detects: Callable[[Tensor], Tensor] | None = None,
) -> Guard:
    """STRIP over the toy net; `answers` or `detects` replaces the model that answers or the one that STRIP looks at."""
    net = ToyNet()
    detecting = Predictor(wrap(detects or net), SPEC, 4, "logits")
    overlays, _ = toy_images(40, seed=1)
    return Guard(
        Predictor(wrap(answers or net), SPEC, 4, "logits"),
        [CalibratedDetector(Strip(detecting, overlays), -ENTROPY_THRESHOLD)],
        policy=policy,
        quarantine=quarantine,
    )


def toy_pair() -> Guard:
    """Two STRIPs over the toy net; only `strip-logit` sees its trigger."""
    predictor = Predictor(wrap(ToyNet()), SPEC, 4, "logits")
    overlays, _ = toy_images(40, seed=1)
    pair = (
        Strip(predictor, overlays, "logit", 0.5, name="strip-logit"),  # a heavier one greys its white corner
        Strip(predictor, overlays, "demeaned", name="strip-demeaned"),
    )
    return Guard(predictor, [CalibratedDetector(strip, -ENTROPY_THRESHOLD) for strip in pair])


def toy_service(guard: Guard | None = None, limits: Limits | None = None, expose_scores: bool = False) -> ImageService:
    return ImageService(guard or toy_guard(), "toy", limits, expose_scores)


def png(image: Tensor) -> bytes:
    """A grey (1, H, W) image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().numpy().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def clean(row: int = 0) -> bytes:
    """A clean image of class `row % 4`."""
    return png(toy_images(8, seed=2)[0][row])


def triggered(row: int = 1) -> bytes:
    return png(toy_trigger(toy_images(8, seed=2)[0])[row])


def bomb(side: int = 10_000) -> bytes:
    """A few KB of PNG that decode to 100 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def nan_when_dark(images: Tensor) -> Tensor:
    """The toy net, answering NaN for an image that is black throughout."""
    logits: Tensor = ToyNet()(images)
    return torch.where(images.flatten(1).amax(dim=1, keepdim=True) == 0, torch.nan, logits)


def black() -> bytes:
    return png(torch.zeros(1, SIDE, SIDE))


def call(app: ASGIApp, *requests: httpx.Request) -> list[httpx.Response]:
    """Send requests one after another, without a socket."""

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.send(request) for request in requests]

    return asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def post(
    app: ASGIApp,
    content: bytes | None = None,
    path: str = "/predictions/toy",
    headers: Mapping[str, str] | None = None,
    files: list[tuple[str, tuple[str, bytes]]] | None = None,
    data: Mapping[str, str] | None = None,
) -> httpx.Response:
    request = httpx.Request("POST", f"http://test{path}", content=content, headers=headers, files=files, data=data)
    return call(app, request)[0]


def drive(
    app: ASGIApp,
    messages: list[Message],
    path: str = "/predictions/toy",
    headers: list[tuple[bytes, bytes]] | None = None,
    method: str = "POST",
) -> list[Message]:
    """Call an application with raw ASGI messages; once they are used up, the client goes silent for good."""
    sent: list[Message] = []
    waiting = list(messages)

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers or [],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(_connect(app, scope, receive, send), TIMEOUT))
    return sent


async def _connect(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def chunk(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


GONE: Message = {"type": "http.disconnect"}
