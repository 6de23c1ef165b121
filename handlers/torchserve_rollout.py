"""A new version of a model in a running TorchServe, without a lost request.

1. register the archive beside the version that is serving, and wait until its workers are ready
2. send it a request of its own
3. make it the default: from now on requests without a version go to it
4. wait until the old version has nothing left to answer, then end its workers

At every step before the third, a failure leaves the old version as it was, and removes the new one.
"""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, final
from urllib.parse import quote, urlencode, urlsplit

from guard.errors import ServingError

_CONFLICT = 409
_POLL_SECONDS = 0.2
_QUIET_SECONDS = 2.0  # without a queued request, before the old version's workers end; what they work on then is answered


@final
@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a TorchServe listens.

    Args:
        management: URL of the management API.
        inference: URL of the inference API.
        management_token: For the first, where it asks for one.
        inference_token: For the second.
    """

    management: str
    inference: str
    management_token: str | None = None
    inference_token: str | None = None


@final
@dataclass(frozen=True)
class RollOut:
    """What came of it.

    Attributes:
        version: That serves now.
        replaced: The version that served before.
        seconds: From registering to the end of the old workers.
    """

    version: str
    replaced: str
    seconds: float


def archive_version(archive: Path) -> str:
    """The version that `guard export --version` wrote into an archive.

    Raises:
        ServingError: No archive.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            return str(json.loads(opened.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"])
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ServingError(f"expected a model archive, got {archive}: make one with guard export") from error


def read_keys(path: Path) -> dict[str, str]:
    """The tokens of the APIs (`management`, `inference`) from TorchServe's `key_file.json`.

    Raises:
        ServingError: It can't be read.
    """
    try:
        return {api: str(entry["key"]) for api, entry in json.loads(path.read_text()).items() if "key" in entry}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ServingError(f"expected TorchServe's key_file.json, got {path}, which can't be read") from error


def roll_out(
    name: str,
    file: str,
    version: str,
    addresses: Addresses,
    *,
    workers: int = 1,
    options: Mapping[str, object] | None = None,
    keep_old: bool = False,
    timeout: float = 120.0,
) -> RollOut:
    """Replace the version of a model that answers by default.

    Args:
        name: Of the model.
        file: The new archive's file name in the server's model store.
        version: Of the new archive.
        addresses: Of the server.
        workers: Processes of the new version.
        options: Further parameters of registering: `batch_size`, `max_batch_delay`, `response_timeout`.
        keep_old: Leave the old version registered, without workers, so that it can be scaled up again.
        timeout: Seconds until the new version must be ready, and until the old one must have answered what it had.

    Raises:
        ServingError: The server can't be reached, does not know the model, or the new version does not work, and the old
            one serves on; or the new one serves, and the old one could not be ended: the message says which.
    """
    started = time.monotonic()
    before = _default(name, addresses)
    if before == version:
        raise ServingError(f"expected another version of {name} than {version}, which is serving: export with --version")
    query = {**(options or {}), "url": file, "model_name": name, "initial_workers": workers, "synchronous": "true"}
    status, _ = _ask(addresses, "GET", _path(name, version), timeout)
    taken = status == 200  # by a version that was there before, which is not ours to remove
    try:
        status, body = _ask(addresses, "POST", f"/models?{urlencode(query)}", timeout)
        taken = taken or status == _CONFLICT
        if status != 200:
            raise ServingError(f"expected TorchServe to register {file}, got {status}: {_words(body)}")
        _wait_until_ready(name, version, workers, addresses, timeout)
        _try(name, version, addresses, timeout)
        status, body = _ask(addresses, "PUT", f"{_path(name, version)}/set-default", timeout)
        if status != 200:
            raise ServingError(f"expected TorchServe to make {name} {version} the default, got {status}: {_words(body)}")
    except BaseException:
        if not taken:
            with contextlib.suppress(ServingError):  # what went wrong first is what is told
                _ask(addresses, "DELETE", _path(name, version), timeout)
        raise
    try:
        _wait_until_idle(name, before, addresses, timeout)
        method, end = ("PUT", "?min_worker=0&max_worker=0&synchronous=true") if keep_old else ("DELETE", "")
        status, body = _ask(addresses, method, f"{_path(name, before)}{end}", timeout)
        if status not in (200, 202):
            raise ServingError(f"got {status}: {_words(body)}")
    except ServingError as error:
        raise ServingError(f"{name} {version} serves now, but {before} could not be ended ({error}): end it by hand") from error
    return RollOut(version, before, time.monotonic() - started)


def _default(name: str, addresses: Addresses) -> str:
    status, body = _ask(addresses, "GET", f"/models/{quote(name, safe='')}", 30.0)
    if status != 200:
        raise ServingError(f"expected TorchServe to serve {name}, got {status}: {_words(body)}; name what it serves by --name")
    return str(_first(body)["modelVersion"])


def _describe(name: str, version: str, addresses: Addresses) -> dict[str, Any]:
    status, body = _ask(addresses, "GET", _path(name, version), 30.0)
    if status != 200:
        raise ServingError(f"expected TorchServe to know {name} {version}, got {status}: {_words(body)}")
    return _first(body)


def _first(body: bytes) -> dict[str, Any]:
    """Of the versions that TorchServe describes."""
    try:
        found = json.loads(body)[0]
    except (ValueError, LookupError, TypeError):
        found = None
    if not isinstance(found, dict) or not {"modelVersion", "workers"} <= found.keys():
        raise ServingError("expected TorchServe's description of a model, got another answer: is this its management API?")
    return found


def _wait_until_ready(name: str, version: str, workers: int, addresses: Addresses, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        found = _describe(name, version, addresses)["workers"]
        if len(found) >= workers and all(worker["status"] == "READY" for worker in found):
            return
        if time.monotonic() > deadline:
            raise ServingError(f"expected {name} {version} to be ready within {timeout:g} s: see the server's log")
        time.sleep(_POLL_SECONDS)


def _try(name: str, version: str, addresses: Addresses, timeout: float) -> None:
    """An empty body is no image: a handler that has loaded its model says so with 400, one that has not with 503."""
    path = f"/predictions/{quote(name, safe='')}/{quote(version, safe='')}"
    status, body = _request(addresses.inference, addresses.inference_token, "POST", path, timeout)
    if status not in (200, 400, 422):
        raise ServingError(f"expected {name} {version} to answer, got {status}: {_words(body)}")


def _wait_until_idle(name: str, version: str, addresses: Addresses, timeout: float) -> None:
    """Nothing queued for a while: who asked before the change has been answered."""
    deadline, quiet = time.monotonic() + max(timeout, 2.0 * _QUIET_SECONDS), time.monotonic()
    while time.monotonic() - quiet < _QUIET_SECONDS:
        pending = int(_describe(name, version, addresses).get("jobQueueStatus", {}).get("pendingRequests", 0))
        if pending > 0:
            quiet = time.monotonic()
        if time.monotonic() > deadline:
            raise ServingError(f"after {timeout:g} s it still had requests to answer, {pending} of them queued")
        time.sleep(_POLL_SECONDS)


def _path(name: str, version: str) -> str:
    return f"/models/{quote(name, safe='')}/{quote(version, safe='')}"


def _ask(addresses: Addresses, method: str, path: str, timeout: float) -> tuple[int, bytes]:
    return _request(addresses.management, addresses.management_token, method, path, timeout)


def _request(url: str, token: str | None, method: str, path: str, timeout: float) -> tuple[int, bytes]:
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ServingError(f"expected a token of printable ASCII characters for {url}, got another: look at the key file")
    try:
        address = urlsplit(url)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(url)
        address.hostname.encode("idna")
        connection = HTTPConnection(address.hostname, address.port, timeout=timeout)
    except (ValueError, HTTPException) as error:  # a UnicodeError is a ValueError
        raise ServingError(f"expected an address like http://127.0.0.1:8081, got {url}") from error
    try:
        connection.request(method, path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, HTTPException) as error:
        raise ServingError(f"expected TorchServe at {url}, got {type(error).__name__}: is it running?") from error
    finally:
        connection.close()


def _words(body: bytes) -> str:
    """The server's own message, on one line."""
    try:
        text = str(json.loads(body).get("message", ""))
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:300] or "no message"
