"""An edge server whose jobs are quick: a few lines of Python take the place of `guard repair` and `guard calibrate`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import sqlite3
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import numpy as np
from starlette.types import ASGIApp

from handlers.edge import create_edge_app
from handlers.edge_commands import Step
from handlers.edge_jobs import Job, JobStore
from handlers.edge_limits import EdgeLimits
from handlers.edge_protocol import FileInfo, JobRequest, JobStatus, RepairOptions
from handlers.edge_worker import EdgeWorker, Plan
from tests.handlers.toy_service import call

TOKEN = "a-token-of-some-length"
AUTHORISED = {"authorization": f"Bearer {TOKEN}"}
DEADLINE = 30.0
NOBODY = "0" * 32

REPAIR = """
import pathlib, sys
sent, result = map(pathlib.Path, sys.argv[1:3])
print("learning the trigger 1/2", file=sys.stderr, flush=True)
(result / "profile").mkdir(parents=True, exist_ok=True)
(result / "model.pt2").write_bytes((sent / "model.pt2").read_bytes()[::-1])
(result / "repair.json").write_text("{}")
(result / "profile" / "guard.json").write_text("{}")
print("learning the trigger 2/2", file=sys.stderr, flush=True)
"""

FAILS = """
import sys
print("a line before", file=sys.stderr)
print(f"guard: expected more of {sys.argv[1]}/clean.npz, got less", file=sys.stderr)
sys.exit(2)
"""

SLEEPS = """
import sys, time
print("learning the trigger 1/9", file=sys.stderr, flush=True)
time.sleep(300)
"""


def running(*scripts: str, required: bool = True) -> Plan:
    """Jobs that run these, one after the other."""

    def plan(job: Job, store: JobStore) -> Iterator[Step]:
        for script in scripts:
            arguments = [str(store.sent(job.id)), str(store.result(job.id))]
            yield Step("the step", [sys.executable, "-S", "-c", script, *arguments], required)

    return plan


@dataclass(frozen=True)
class Edge:
    """A server without a socket."""

    app: ASGIApp
    store: JobStore
    worker: EdgeWorker

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> httpx.Response:
        request = httpx.Request(method, f"http://test{path}", content=body, headers={**AUTHORISED, **headers})
        return call(self.app, request)[0]

    def create(self, request: JobRequest) -> str:
        answer = self.send("POST", "/v1/jobs", msgspec.json.encode(request))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def started(self, files: dict[str, bytes] | None = None) -> str:
        """A job whose files have arrived, in the queue."""
        sent = files or sent_files()
        job = self.create(requested(sent))
        for name, data in sent.items():
            assert self.send("PUT", f"/v1/jobs/{job}/files/{name}", data).status_code == 204
        assert self.send("POST", f"/v1/jobs/{job}/start").status_code == 202
        return job

    def status(self, job: str) -> JobStatus:
        return msgspec.json.decode(self.send("GET", f"/v1/jobs/{job}").content, type=JobStatus)

    def until(self, job: str, wanted: Callable[[JobStatus], bool]) -> JobStatus:
        deadline = time.monotonic() + DEADLINE
        while not wanted(status := self.status(job)):
            assert time.monotonic() < deadline, status
            time.sleep(0.05)
        return status

    def ended(self, job: str) -> JobStatus:
        return self.until(job, lambda status: status.state in ("done", "failed"))


@contextmanager
def edge_server(
    folder: Path,
    plan: Plan | None = None,
    limits: EdgeLimits | None = None,
    factories: tuple[str, ...] = (),
    seconds: float = 60.0,
) -> Iterator[Edge]:
    """A server that works inside the block."""
    store = JobStore(folder, limits)
    with EdgeWorker(store, folder, plan or running(REPAIR), TOKEN) as worker:
        yield Edge(create_edge_app(store, worker, TOKEN, factories, body_seconds=seconds), store, worker)


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(values) for name, values in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def archive(**entries: bytes) -> bytes:
    """A zip file, the same one at any time; `__` stands for a slash."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(name.replace("__", "/")), data)
    return buffer.getvalue()


def sent_files() -> dict[str, bytes]:
    """What a device sends for codefend."""
    return dict(_sent_files())


@functools.cache
def _sent_files() -> dict[str, bytes]:
    """Once: archives carry the time at which they were made."""
    return {
        "model.pt2": archive(m__models__model=b"{}", m__data__sample_inputs__model=b""),
        "clean.npz": npz(x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4)),
        "quarantine.npz": npz(x=np.ones((4, 8, 8), np.uint8)),
    }


def requested(files: dict[str, bytes], factory: str | None = None) -> JobRequest:
    infos = tuple(FileInfo(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items())
    return JobRequest(options=RepairOptions(method="codefend"), files=infos, factory=factory)


def queued(folder: Path) -> list[str]:
    """Jobs in the queue, also those that are at work."""
    with contextlib.closing(sqlite3.connect(folder / "queue" / "data.db")) as database:
        return [json.loads(data) for (data,) in database.execute("SELECT data FROM ack_queue_default").fetchall()]
