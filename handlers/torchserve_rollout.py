"""A new version of a model in a running TorchServe, without a lost request.

1. register the archive beside the version that is serving, and wait until its workers are ready
2. send it images of its own
3. make it the default: from now on requests without a version go to it
4. wait until the old version has nothing left to answer, then end its workers

At every step before the fourth, a failure leaves the old version and the model store as they were, and removes the new version.
One that an earlier roll-out kept without workers is not registered, but gets workers again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from urllib.parse import urlencode

from guard.errors import ServingError
from handlers.torchserve_api import Addresses, ask, describe_default, describe_version, version_path, words
from handlers.torchserve_capacity import Capacity
from handlers.torchserve_drain import drain
from handlers.torchserve_store import Delivery
from handlers.torchserve_trial import try_out

_UNKNOWN, _CONFLICT = 404, 409
_POLL_SECONDS = 0.2


@final
@dataclass(frozen=True)
class RollOut:
    """What came of it.

    Attributes:
        version: That serves now.
        replaced: The version that served before.
        seconds: From registering to the end of the old workers.
        tried: Images that it judged before it served; if none, it was only made sure that it had loaded.
    """

    version: str
    replaced: str
    seconds: float
    tried: int


def archive_version(archive: Path) -> str:
    """The version that `guard export --version` wrote into an archive.

    Raises:
        ServingError: No archive.
    """
    with _opened(archive) as (_, model):
        return str(model["modelVersion"])


def archive_config(archive: Path) -> dict[str, object]:
    """An archive's model-config, empty where it has none.

    Raises:
        ServingError: No archive, or a model-config that can't be read.
    """
    yaml = importlib.import_module("yaml")
    with _opened(archive) as (opened, model):
        if model.get("configFile") is None:
            return {}
        try:
            found = yaml.safe_load(opened.read(model["configFile"]))
        except yaml.YAMLError as error:
            raise ServingError(f"expected YAML in the model-config of {archive}, got something else") from error
    return found if isinstance(found, dict) else {}


def roll_out(
    name: str,
    file: str,
    version: str,
    addresses: Addresses,
    *,
    delivery: Delivery | None = None,
    images: Sequence[bytes] = (),
    capacity: Capacity | None = None,
    keep_old: bool = False,
    timeout: float = 120.0,
    drain_timeout: float | None = None,
) -> RollOut:
    """Replace the version of a model that answers by default.

    Args:
        name: Of the model.
        file: The new archive's file name in the server's model store.
        version: Of the new archive.
        addresses: Of the server.
        delivery: Brings the archive there; None where it is there already.
        images: Clean ones, encoded, that the new version must judge before it serves; see `archive_images`.
        capacity: Of the new version; what it does not say is as in the old one. One that was kept has the batches that it had.
        keep_old: Leave the old version registered, without workers, so that it can be rolled out again.
        timeout: Seconds until the new version must be ready, and until the old one's queue must be empty.
        drain_timeout: Seconds that the old version's workers then get to finish what they have taken, at most its response
            timeout, after which TorchServe gives a request up by itself; that when None. A single worker is ended as soon as
            it has finished, and left if by then it has not. Of several nothing tells when the last has finished: they are
            ended when that time has passed.

    Raises:
        ServingError: The server can't be reached, does not know the model, or the new version does not work, and the old
            one serves on; or the new one serves, and the old one could not be ended: the message says which.
    """
    started = time.monotonic()
    serving = describe_default(name, addresses)
    before = str(serving["modelVersion"])
    if before == version:
        raise ServingError(f"expected another version of {name} than {version}, which is serving: export with --version")
    wanted = (capacity or Capacity()).or_else(Capacity.read(serving))
    workers = wanted.workers or 1
    kept = _is_kept(name, version, addresses, delivery, timeout)
    locked = contextlib.nullcontext if delivery is None else delivery.locked
    placed = contextlib.nullcontext(_nothing) if delivery is None or kept else delivery.placed(file)
    with placed as is_needed, contextlib.ExitStack() as undo:
        undo.callback(_take_back, name, version, addresses, timeout, kept, locked, is_needed)
        if not kept:
            status, body = ask(addresses, "management", "POST", f"/models?{_query(name, file, wanted)}", timeout)
            if status == _CONFLICT:  # with another roll-out, whose version is not ours to remove
                undo.pop_all()
                is_needed()
                raise ServingError(
                    f"expected {name} {version} to be new, got 409: {words(body)}; {_ways_out(name, version, addresses)}"
                )
            if status not in (200, 202):
                raise ServingError(f"expected TorchServe to register {file}, got {status}: {words(body)}")
        _wait_until_ready(name, version, workers, addresses, timeout)
        tried = try_out(name, version, addresses, images, workers, timeout)
        with locked():
            _make_default(name, version, before, addresses, timeout)
        undo.pop_all()
    try:
        _end(name, before, addresses, keep_old, timeout, drain_timeout)
    except ServingError as error:
        raise ServingError(f"{name} {version} serves now, but {before} could not be ended ({error}): end it by hand") from error
    return RollOut(version, before, time.monotonic() - started, tried)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """An archive and what its manifest says of the model."""
    try:
        with zipfile.ZipFile(archive) as opened:
            yield opened, json.loads(opened.read("MAR-INF/MANIFEST.json"))["model"]
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ServingError(f"expected a model archive, got {archive}: make one with guard export") from error


def _query(name: str, file: str, wanted: Capacity) -> str:
    """The parameters of registering. Batch size and delay prevail over those of the archive's model-config.

    Not `synchronous`, as TorchServe does unless told: it would hold up some clients until the new workers have loaded.
    """
    settings = {
        "batch_size": wanted.batch_size,
        "max_batch_delay": wanted.max_batch_delay,
        "response_timeout": wanted.response_timeout,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    return urlencode({**given, "url": file, "model_name": name, "initial_workers": wanted.workers or 1, "synchronous": "false"})


def _is_kept(name: str, version: str, addresses: Addresses, delivery: Delivery | None, timeout: float) -> bool:
    """Whether the version is registered already, of the same archive and without workers, as --keep-old leaves it.

    Raises:
        ServingError: It is registered otherwise, and what is to be rolled out would not be what serves.
    """
    path = version_path(name, version)
    if ask(addresses, "management", "GET", path, timeout)[0] != 200:
        return False
    found = describe_version(name, version, addresses)
    if found["workers"] or found.get("minWorkers", 0):
        state = "and has workers"
    elif delivery is None:
        state = "and without --store its archive can't be compared"
    elif not delivery.is_in_store_as(str(found.get("modelUrl", ""))):
        state = "from an archive of other content"
    else:
        return True
    raise ServingError(
        f"expected {name} {version} to be new, got one that is registered already, {state}: "
        + _ways_out(name, version, addresses)
    )


def _ways_out(name: str, version: str, addresses: Addresses) -> str:
    url = addresses.management + version_path(name, version)
    return f"export with another --version, or end that one first (curl -X DELETE {url})"


def _nothing() -> None:
    """Nothing was placed that could be needed."""


def _take_back(
    name: str,
    version: str,
    addresses: Addresses,
    timeout: float,
    kept: bool,
    locked: Callable[[], contextlib.AbstractContextManager[None]],
    is_needed: Callable[[], None],
) -> None:
    """The version as it was before, which is none unless it was kept; one that serves by now, or may, is left alone."""
    method, end = ("PUT", "?min_worker=0&max_worker=0") if kept else ("DELETE", "")
    with contextlib.suppress(ServingError), locked():  # what went wrong first is what is told
        try:
            serves = describe_default(name, addresses)["modelVersion"] == version
        except ServingError:
            serves = True
        if serves:
            is_needed()
        else:
            ask(addresses, "management", method, f"{version_path(name, version)}{end}", timeout)


def _wait_until_ready(name: str, version: str, workers: int, addresses: Addresses, timeout: float) -> None:
    """As many workers as wanted; where the archive's model-config has made it others, they are told."""
    deadline, path = time.monotonic() + timeout, version_path(name, version)
    found = describe_version(name, version, addresses)
    if found.get("minWorkers", workers) != workers:
        scaled = f"{path}?min_worker={workers}&max_worker={workers}"
        status, body = ask(addresses, "management", "PUT", scaled, timeout)
        if status not in (200, 202):
            raise ServingError(f"expected {workers} workers of {name} {version}, got {status}: {words(body)}")
        found = describe_version(name, version, addresses)
    processes: dict[str, int] = {}
    while len(found["workers"]) != workers or any(worker["status"] != "READY" for worker in found["workers"]):
        for worker in found["workers"]:
            process, key = worker.get("pid", -1), worker.get("id", "")
            if process > 0 and processes.setdefault(key, process) != process:  # TorchServe starts it over and over
                raise ServingError(f"a worker of {name} {version} died while it loaded its model: see the server's log")
        if time.monotonic() > deadline:
            raise ServingError(f"expected {name} {version} to be ready within {timeout:g} s: see the server's log")
        time.sleep(_POLL_SECONDS)
        found = describe_version(name, version, addresses)


def _make_default(name: str, version: str, before: str, addresses: Addresses, timeout: float) -> None:
    """Let it serve, unless another roll-out was faster."""
    if (now := describe_default(name, addresses)["modelVersion"]) != before:
        raise ServingError(
            f"expected {name} {before} to serve until {version} does, got {now} meanwhile: roll out anew if wanted"
        )
    if not describe_version(name, version, addresses)["workers"]:
        raise ServingError(f"expected workers of {name} {version}, got none: another roll-out has ended them; roll out anew")
    try:
        status, body = ask(addresses, "management", "PUT", f"{version_path(name, version)}/set-default", timeout)
        problem = "" if status == 200 else f"got {status}: {words(body)}"
    except ServingError as error:  # it may have come to pass all the same
        problem = f"got {error}"
    if (now := describe_default(name, addresses)["modelVersion"]) != version:
        problem = problem or f"got {now}, set by somebody else: roll out anew if wanted"
        raise ServingError(f"expected {name} {version} to serve now, {problem}")


def _end(name: str, version: str, addresses: Addresses, keep: bool, timeout: float, drain_timeout: float | None) -> None:
    """Let the old version finish, and go; somebody else may have ended it already."""
    path = version_path(name, version)
    method, query = ("PUT", "?min_worker=0&max_worker=0&synchronous=true") if keep else ("DELETE", "")
    try:
        drain(name, version, addresses, timeout, drain_timeout)
        if describe_default(name, addresses)["modelVersion"] == version:
            raise ServingError("it serves again, set by somebody else")
        status, body = ask(addresses, "management", method, f"{path}{query}", timeout)
        if status not in (200, 202):
            raise ServingError(f"got {status}: {words(body)}")
    except ServingError:
        if ask(addresses, "management", "GET", path, timeout)[0] != _UNKNOWN:
            raise
