"""The demo's client: images as PNG over HTTP, a few at a time."""

from __future__ import annotations

import http.client
import io
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor

from calibration import ImageSet
from guard.errors import ServingError

_CLIENTS = 2
_TIMED = 60
_TIMEOUT = 30.0


@final
@dataclass(frozen=True)
class Replies:
    """What came back, in the images' order.

    Attributes:
        statuses: HTTP status of each.
        labels: Label index of each; -1 where none was given.
        latency: Median seconds of single requests, one after the other.
    """

    statuses: list[int]
    labels: list[int]
    latency: float

    @property
    def share_rejected(self) -> float:
        """Share of the requests that were refused as suspicious."""
        return self.statuses.count(422) / len(self.statuses)

    def share_answered(self, wanted: Tensor) -> float:
        """Share of the requests that were answered with these labels."""
        hits = [label == int(want) for label, want in zip(self.labels, wanted.tolist(), strict=True)]
        return hits.count(True) / len(hits)


def send(url: str, images: ImageSet, what: str, progress: Callable[[str, int, int], None]) -> Replies:
    """POST every image; the first ones alone, to time them.

    Args:
        url: Of the model.
        images: Grey, uint8.
        what: For the progress display.
        progress: Told about each reply.

    Raises:
        ServingError: A status that the answers don't know.
    """
    bodies = [_png(pixels) for pixels in images.pixels]
    seconds: list[float] = []
    replies: list[tuple[int, int]] = []
    for body in bodies[:_TIMED]:
        started = time.perf_counter()
        replies.append(_post(url, body))
        seconds.append(time.perf_counter() - started)
        progress(what, len(replies), len(bodies))
    with ThreadPoolExecutor(_CLIENTS) as pool:
        for reply in pool.map(lambda body: _post(url, body), bodies[_TIMED:]):
            replies.append(reply)
            progress(what, len(replies), len(bodies))
    return Replies([status for status, _ in replies], [label for _, label in replies], statistics.median(seconds))


def _post(url: str, body: bytes) -> tuple[int, int]:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT)
    try:
        connection.request("POST", address.path, body, {"content-type": "image/png"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServingError(f"expected a JSON answer from {url}, got {type(error).__name__}: see the server's log") from error
    finally:
        connection.close()
    if response.status not in (200, 422):
        raise ServingError(f"expected status 200 or 422 from {url}, got {response.status}: {answer}")
    return response.status, int(answer["label_index"]) if response.status == 200 else -1


def _png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
