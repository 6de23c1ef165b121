"""Real images for a new version of a model, before anybody depends on it."""

from __future__ import annotations

import io
import itertools
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from guard import load_profile
from guard.errors import ServingError
from guard.loading import probe_images
from handlers.torchserve_api import Addresses, ask, version_path, words

_PROFILE = ("guard.json", "arrays.safetensors")
_IMAGES = 4
_ROUNDS, _PAUSE_SECONDS = 3, 1.0  # a guard that did not load is loaded anew after a second; a first answer may take too long
_REJECTED, _TOO_LARGE = 422, 413
_LATE = "out-of-time"


def archive_images(archive: Path) -> list[bytes]:
    """A few clean images of the profile in an archive, as PNG: none where it holds no profile, or no PNG holds its images.

    Raises:
        ServingError: No archive that can be read.
        GuardError: The profile can't be read.
        OSError: No room for a copy of the profile.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            if not set(_PROFILE) <= set(opened.namelist()):
                return []
            held = {name: opened.read(name) for name in _PROFILE}
    except (OSError, zipfile.BadZipFile) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else "not one"
        raise ServingError(f"expected a model archive, got {archive}: {got}; make one with guard export") from error
    with tempfile.TemporaryDirectory() as folder:
        for name, content in held.items():
            (Path(folder) / name).write_bytes(content)
        profile, arrays = load_profile(folder)
    if profile.input.channels not in (1, 3):
        return []
    found = []
    for image in probe_images(profile, arrays)[:_IMAGES].mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0] if profile.input.channels == 1 else image).save(buffer, format="PNG")
        found.append(buffer.getvalue())
    return found


def try_out(name: str, version: str, addresses: Addresses, images: Sequence[bytes], workers: int, timeout: float) -> int:
    """Send a version at least as many requests as it has workers, which take turns, and make sure that it answers them all.

    Args:
        name: Of the model.
        version: Its.
        addresses: Of the server.
        images: Clean ones, encoded. Without any, or where they are over its limits, what is tried is that it has loaded: an
            empty body is 400 then, and 503 otherwise.
        workers: Processes of the version.
        timeout: Seconds for one answer.

    Returns:
        How many images it judged.

    Raises:
        ServingError: It does not answer, or accepts none of the images.
    """
    bodies = list(itertools.islice(itertools.cycle(images or (b"",)), max(workers, len(images))))
    for attempt in range(_ROUNDS):
        time.sleep(_PAUSE_SECONDS if attempt else 0.0)
        answers = [_asked(name, version, addresses, timeout, body) for body in bodies]
        statuses = [status for status, _ in answers]
        accepted, rejected = sum(map(_is_success, statuses)), statuses.count(_REJECTED)
        failed = [answer for answer in answers if not _is_answer(*answer, bool(images), accepted > 0)]
        if failed:
            continue
        if rejected and images and not accepted:
            raise ServingError(
                f"expected {name} {version} to accept clean images of its own profile, got all {rejected} rejected: "
                "calibrate again"
            )
        return accepted + rejected if images else 0
    status, said = failed[-1]
    raise ServingError(f"expected {name} {version} to answer, got {status or 'nothing'}: {said}")


def _asked(name: str, version: str, addresses: Addresses, timeout: float, body: bytes) -> tuple[int, str]:
    """Status and words; 0 where the connection broke off, which is tried again, unlike what took too long."""
    try:
        status, answer = ask(addresses, "inference", "POST", version_path(name, version, "predictions"), timeout, body)
    except ServingError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise
        return 0, str(error)
    return status, words(answer)


def _is_answer(status: int, said: str, with_images: bool, others: bool) -> bool:
    """Whether a version that works may say so. A busy one may be late for one image, if not for all."""
    if not with_images:
        return _is_success(status) or status in (400, _REJECTED)
    return _is_success(status) or status in (_REJECTED, _TOO_LARGE) or (status == 503 and said == _LATE and others)


def _is_success(status: int) -> bool:
    """200, or what a handler behind the guard chose."""
    return 200 <= status < 300
