"""Asking a running TorchServe: its management API, and its inference API where a version is addressed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Literal, final
from urllib.parse import quote, urlsplit

from guard.errors import ServingError


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


def read_keys(path: Path) -> dict[str, str]:
    """The tokens of the APIs (`management`, `inference`) from TorchServe's `key_file.json`.

    Raises:
        ServingError: It can't be read.
    """
    try:
        return {api: str(entry["key"]) for api, entry in json.loads(path.read_text()).items() if "key" in entry}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ServingError(f"expected TorchServe's key_file.json, got {path}, which can't be read") from error


def version_path(name: str, version: str, root: str = "models") -> str:
    """Path of a version: of the management API under `models`, of the inference API under `predictions`."""
    return f"/{root}/{quote(name, safe='')}/{quote(version, safe='')}"


def describe_version(name: str, version: str, addresses: Addresses) -> dict[str, Any]:
    """What the management API says of a version.

    Raises:
        ServingError: It does not know it.
    """
    return _describe(version_path(name, version), addresses, f"know {name} {version}")


def describe_default(name: str, addresses: Addresses) -> dict[str, Any]:
    """What the management API says of the version that answers requests without one.

    Raises:
        ServingError: It does not know the model.
    """
    return _describe(f"/models/{quote(name, safe='')}", addresses, f"serve {name}", "; name what it serves by --name")


def ask(
    addresses: Addresses,
    api: Literal["management", "inference"],
    method: str,
    path: str,
    timeout: float,
    body: bytes = b"",
) -> tuple[int, bytes]:
    """Send a request; its body, if it has one, is an image.

    Returns:
        Status and body.

    Raises:
        ServingError: No answer (after a timeout its cause is a TimeoutError), or the token is not the server's.
    """
    url = getattr(addresses, api)
    status, answer = _request(url, getattr(addresses, f"{api}_token"), method, path, timeout, body)
    if status == 400 and error_type(answer) == "InvalidKeyException":  # 400 is also what a handler says of a body that is none
        raise ServingError(f"expected {url} to take the token, got: {words(answer)}; pass its key_file.json by --key-file")
    return status, answer


def error_type(body: bytes) -> str | None:
    """TorchServe's own name of an error; None where a handler answered by itself."""
    try:
        return str(json.loads(body)["type"])
    except (ValueError, KeyError, TypeError):
        return None


def words(body: bytes) -> str:
    """The server's own message, or a handler's reason, on one line."""
    try:
        found = json.loads(body)
        text = str(found.get("message") or found.get("reason", ""))
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:300] or "no message"


def _describe(path: str, addresses: Addresses, expected: str, advice: str = "") -> dict[str, Any]:
    status, body = ask(addresses, "management", "GET", path, 30.0)
    if status != 200:
        raise ServingError(f"expected TorchServe to {expected}, got {status}: {words(body)}{advice}")
    try:
        found = json.loads(body)[0]
    except (ValueError, LookupError, TypeError):
        found = None
    if not isinstance(found, dict) or not {"modelVersion", "workers"} <= found.keys():
        raise ServingError("expected TorchServe's description of a model, got another answer: is this its management API?")
    return found


def _request(url: str, token: str | None, method: str, path: str, timeout: float, body: bytes) -> tuple[int, bytes]:
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
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, path, body or None, {**headers, "Content-Type": "image/png"} if body else headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, HTTPException) as error:
        raise ServingError(f"expected TorchServe at {url}, got {type(error).__name__}: is it running?") from error
    finally:
        connection.close()
