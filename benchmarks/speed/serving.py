"""TorchServe guarded against the same TorchServe without a guard: throughput, waiting times, and the time until it is ready.

    python -m benchmarks.speed.serving measure --all    # on an idle machine
    python -m benchmarks.speed.serving table

One model, one ONNX Runtime session with the same settings, one worker, batches of up to eight: behind `BareHandler`, and behind
a guard with STRIP at N = 100, exact and sequential. All of them run at once and are asked in turn, so that whatever else the
machine does hits all alike. Clients wait for each answer before they ask again, and share the cores with the server.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import msgspec
import numpy as np
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, run, versions
from benchmarks.roster import REPORTED
from benchmarks.speed.timing import median_ratio
from benchmarks.strip import as_onnx, shuffled
from benchmarks.victims import CACHE, bars, name_of, victim
from calibration import PassesChoice, Settings, calibrate
from calibration.sources import open_model
from export.archive import export_mar
from guard.errors import ServingError
from handlers.torchserve_server import ServerOptions, TorchServeProcess

TIMED: Mapping[str, Plan] = {name: REPORTED[name] for name in ("gtsrb-b", "cifar10-c")}
BARE = "bare"
_GUARDED: tuple[PassesChoice, ...] = ("exact", "sequential")
_CLIENTS = (1, 8, 32)
_ROUNDS, _REQUESTS, _IMAGES = 5, 400, 64
_STARTS = 5
_DEFENDER = 2_500
_OPTIONS = ServerOptions(workers=1, batch_size=8, max_batch_delay_ms=2)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One server under so many clients; medians over the rounds.

    Attributes:
        server: `bare`, or how STRIP's passes are spent.
        clients: That ask at once.
        per_second: Requests answered.
        milliseconds: That a client waits: the 50th, 95th and 99th percentile.
        throughput_kept: Of the bare server's, round by round.
        p95_times: The bare server's, round by round.
    """

    server: str
    clients: int
    per_second: float
    milliseconds: tuple[float, float, float]
    throughput_kept: float
    p95_times: float


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """How long a server takes to be ready; medians over the starts.

    Attributes:
        server: As in `Load`.
        seconds: From its start to its model's first answer.
        after_bare: More than the bare server, start by start.
    """

    server: str
    seconds: float
    after_bare: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        loads: By number of clients and server.
        starts: By server.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    loads: list[Load]
    starts: list[Start]
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    plan = TIMED[name]
    bodies = encoded(parts.evaluation.images(torch.arange(_IMAGES)))
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        store = Path(scratch)
        servers = {way: TorchServeProcess(store, {way: f"{way}.mar"}, _OPTIONS) for way in (BARE, *_GUARDED)}
        with bars() as progress:
            found = victim(plan, parts, cache, progress)
            as_onnx(found, parts, cache)
            source = open_model(str(cache / f"{name_of(plan)}.onnx"), None, store)
            defender = shuffled(parts.defender, 0).select(torch.arange(_DEFENDER))
            for passes in _GUARDED:
                made = calibrate(source.backend, defender, Settings(passes=passes), record=source.record, progress=progress)
                made.save(store / passes, source.file)
                export_mar(store / passes, store, passes)
            export_mar(store / _GUARDED[0], store, BARE, handler=Path(__file__).with_name("bare_handler.py"))
            starts = _starts(servers, bodies)
            for server in servers.values():
                stack.enter_context(server)
            loads = _loads(servers, bodies)
    return Report(
        name=name,
        command=f"python -m benchmarks.speed.serving measure --name {name}",
        plan=plan,
        loads=loads,
        starts=starts,
        libraries=versions(),
    )


def encoded(images: torch.Tensor) -> list[bytes]:
    """As PNG files; (B, 3, H, W), RGB, in [0, 1]."""
    pixels = images.mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [cv2.imencode(".png", np.ascontiguousarray(one[:, :, ::-1]))[1].tobytes() for one in pixels]


def _starts(servers: Mapping[str, TorchServeProcess], bodies: Sequence[bytes]) -> list[Start]:
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(_STARTS):
        for name, server in servers.items():
            started = time.perf_counter()
            with server:
                ask(f"{server.url}/predictions/{name}", bodies, clients=1, requests=1)
                seconds[name].append(time.perf_counter() - started)
    return [
        Start(
            server=name,
            seconds=statistics.median(own),
            after_bare=statistics.median(ours - bare for ours, bare in zip(own, seconds[BARE], strict=True)),
        )
        for name, own in seconds.items()
    ]


def _loads(servers: Mapping[str, TorchServeProcess], bodies: Sequence[bytes]) -> list[Load]:
    loads = []
    for clients in _CLIENTS:
        rates: dict[str, list[float]] = {name: [] for name in servers}
        waits: dict[str, list[list[float]]] = {name: [] for name in servers}
        for number in range(_ROUNDS + 1):
            for name, server in servers.items():
                rate, waited = ask(f"{server.url}/predictions/{name}", bodies, clients, _REQUESTS)
                if number:  # the first warms up
                    rates[name].append(rate)
                    waits[name].append([1_000.0 * float(np.percentile(waited, share)) for share in (50, 95, 99)])
        for name in servers:
            tails, bare_tails = ([wait[1] for wait in waits[way]] for way in (name, BARE))
            middle, tail, last = (statistics.median(column) for column in zip(*waits[name], strict=True))
            loads.append(
                Load(
                    server=name,
                    clients=clients,
                    per_second=statistics.median(rates[name]),
                    milliseconds=(middle, tail, last),
                    throughput_kept=median_ratio(rates[name], rates[BARE]),
                    p95_times=median_ratio(tails, bare_tails),
                )
            )
    return loads


def ask(url: str, bodies: Sequence[bytes], clients: int, requests: int) -> tuple[float, list[float]]:
    """Send images from so many clients at once, each over one connection.

    Args:
        url: To post them to.
        bodies: Encoded images, in turn.
        clients: At once.
        requests: In all.

    Returns:
        Requests a second, and the seconds that each took.

    Raises:
        ServingError: An answer was neither 200 nor a rejection.
    """
    numbers = itertools.count()
    ready, stopped = threading.Barrier(clients + 1, timeout=60), threading.Event()

    def client() -> list[float]:
        address = urlsplit(url)
        connection = HTTPConnection(address.hostname or "", address.port, timeout=60)
        waited = []
        with contextlib.closing(connection), contextlib.ExitStack() as ending:
            ending.callback(stopped.set)  # by then every request is sent, or one has failed
            connection.connect()
            ready.wait()
            while not stopped.is_set() and (number := next(numbers)) < requests:
                started = time.perf_counter()
                connection.request("POST", address.path, bodies[number % len(bodies)])
                response = connection.getresponse()
                response.read()
                waited.append(time.perf_counter() - started)
                if response.status not in (200, 422):
                    raise ServingError(f"expected an answer or a rejection from {url}, got status {response.status}")
        return waited

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        ready.wait()
        started = time.perf_counter()
        try:
            waited = [seconds for one in running for seconds in one.result()]
        finally:
            stopped.set()  # interrupted
        return requests / (time.perf_counter() - started), waited


def load_reports() -> list[Report]:
    """The committed results, in the order of `TIMED`."""
    return load_results("speed_serving", list(TIMED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown: under so many clients."""
    header = ("victim", "clients", "server", "requests/s", "p50, ms", "p95, ms", "p99, ms", "throughput kept", "p95 is longer")
    rows = []
    for report in reports:
        for number, load in enumerate(report.loads):
            first = load.server == BARE
            labels = ["" if number else report.name, str(load.clients) if first else "", load.server]
            waits = [f"{wait:.1f}" for wait in load.milliseconds]
            kept = [f"{load.throughput_kept:.0%}", f"{load.p95_times:.1f} times"]
            rows.append([*labels, f"{load.per_second:.0f}", *waits, *kept])
    return markdown(header, rows)


def starts_table(reports: Sequence[Report]) -> str:
    """Markdown: until ready."""
    rows = [
        [report.name, start.server, f"{start.seconds:.1f}", f"{start.after_bare:+.1f}"]
        for report in reports
        for start in report.starts
    ]
    return markdown(("victim", "server", "ready after, s", "after the bare server, s"), rows)


def main() -> int:
    """Run from the command line."""
    return run("speed_serving", __doc__, TIMED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
