"""Nothing left to answer: when the workers of a version may be ended.

TorchServe tells what is queued, not what workers are at, and it ends them in the middle of a batch. It hands the queue out in
order: a single worker that answers a request of ours has answered all before it. Of several, an idle one would answer while
another is busy.
"""

from __future__ import annotations

import time

from guard.errors import ServingError
from handlers.torchserve_api import Addresses, ask, describe_version, error_type, version_path
from handlers.torchserve_capacity import Capacity

_POLL_SECONDS = 0.2
_QUIET_SECONDS = 2.0  # without a queued request: who asked the version before it was replaced is in its queue by then
_RESPONSE_TIMEOUT = 120  # seconds; TorchServe's own default
_MARGIN_SECONDS = 1.0  # between our clock's reading and the worker's


def drain(name: str, version: str, addresses: Addresses, timeout: float, drain_timeout: float | None) -> None:
    """Wait until the workers of a version have finished.

    Args:
        name: Of the model.
        version: That nobody asks any more.
        addresses: Of the server.
        timeout: Seconds until its queue must be empty.
        drain_timeout: Seconds that its workers then get, at most its response timeout; that when None.

    Raises:
        ServingError: It was not finished by then, or the server does not know it.
    """
    emptied = _wait_until_queue_is_empty(name, version, addresses, timeout)
    found = describe_version(name, version, addresses)
    capacity = Capacity.read(found)
    given_up = (capacity.response_timeout or _RESPONSE_TIMEOUT) + (capacity.max_batch_delay or 0) / 1000 + _MARGIN_SECONDS
    patience = given_up if drain_timeout is None else min(drain_timeout, given_up)
    if len(found["workers"]) == 1:
        busy = _is_busy(name, version, addresses, time.monotonic() + max(patience, _MARGIN_SECONDS))
        if busy and patience < given_up:
            raise ServingError(f"after {patience:g} s its worker was still busy")
    elif found["workers"]:
        time.sleep(max(0.0, emptied + patience - time.monotonic()))


def _wait_until_queue_is_empty(name: str, version: str, addresses: Addresses, timeout: float) -> float:
    """Nothing queued for a while; since when, by the monotonic clock."""
    deadline, emptied = time.monotonic() + max(timeout, 2.0 * _QUIET_SECONDS), time.monotonic()
    while time.monotonic() - emptied < _QUIET_SECONDS:
        pending = int(describe_version(name, version, addresses).get("jobQueueStatus", {}).get("pendingRequests", 0))
        if pending > 0:
            emptied = time.monotonic()
        if time.monotonic() > deadline:
            raise ServingError(f"after {timeout:g} s it still had requests to answer, {pending} of them queued")
        time.sleep(_POLL_SECONDS)
    return emptied


def _is_busy(name: str, version: str, addresses: Addresses, deadline: float) -> bool:
    """Whether a worker has not answered until then, with whatever; one that died is not."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            _, body = ask(addresses, "inference", "POST", version_path(name, version, "predictions"), left)
        except ServingError as error:
            if isinstance(error.__cause__, TimeoutError):
                return True
            raise
        if error_type(body) != "ServiceUnavailableException":  # which is TorchServe's own: it has queued nothing
            return False
        time.sleep(_POLL_SECONDS)
    return any(worker["status"] == "READY" for worker in describe_version(name, version, addresses)["workers"])
