"""Runs an edge server's jobs, one after the other.

The queue is an embedded one (persist-queue over SQLite, items as JSON). A job leaves it once its end is on disk: so one that
a killed server was at is begun again, and its commands go on from their own checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self, final

import msgspec

from guard.errors import EdgeError, GuardError, MissingExtraError, one_line
from guard.predictors.screening import file_sha256
from handlers.edge_commands import Step, Stopped, end_processes, run_step
from handlers.edge_jobs import Job, JobStore
from handlers.edge_protocol import FileInfo, Manifest, Progress, Sealed, is_result_name, seal

try:
    from persistqueue import Empty, SQLiteAckQueue
    from persistqueue.serializers import json as json_serializer
except ImportError as error:
    raise MissingExtraError("persist-queue", "edge") from error

logger = logging.getLogger("guard.edge")

MOST_STARTS = 5
"""After so many a job that takes the server down each time is given up."""

_IDLE_SECONDS = 0.2
_EXPIRY_SECONDS = 60.0  # between looks for jobs that are too old
_AGAIN_SECONDS = 10.0  # after the queue itself failed

Plan = Callable[[Job, JobStore], Iterator[Step]]
"""A job's commands, the next one asked for when the last one has ended; what is done already is left out."""


@final
class EdgeWorker:
    """Takes jobs from the queue in a thread, inside its block.

    Args:
        store: The jobs.
        folder: Of the queue; one server at a time uses it.
        plan: What a job's commands are.
        token: That results are sealed with.
    """

    def __init__(self, store: JobStore, folder: Path, plan: Plan, token: str) -> None:
        self._store, self._folder, self._plan, self._token = store, folder.absolute(), plan, token
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="edge-worker", daemon=True)
        self._queue: SQLiteAckQueue | None = None
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Start.

        Raises:
            EdgeError: Another server uses the folder.
        """
        self._lock = _locked(self._folder / ".lock")
        try:
            self._store.tidy()
            self._queue = SQLiteAckQueue(str(self._folder / "queue"), multithreading=True, serializer=json_serializer)
        except (OSError, sqlite3.Error) as error:
            self._lock.close()
            raise EdgeError(f"can't keep a queue in {self._folder} ({one_line(error)}): pick another --folder") from error
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop; the job that is under way goes on when a server starts again."""
        self._stopping.set()
        self._thread.join()
        if self._queue is not None:
            self._queue.close()
        if self._lock is not None:
            self._lock.close()

    def submit(self, job_id: str) -> Job:
        """Put a job into the queue; one that is there already stays where it is.

        Raises:
            EdgeError: Files are missing, or there is no such job.
        """
        if self._queue is None:
            raise EdgeError("expected a worker that was started, got one that was not: use it as a context manager")
        with self._store.lock:
            job = self._store.get(job_id)
            if job.state != "receiving":
                return job
            if job.missing:
                raise EdgeError(f"expected {', '.join(job.missing)} first: send them, then start", 409, "files-missing")
            self._queue.put(job_id)  # first: were it the other way round, a crash between the two would lose the job
            return self._store.update(job_id, state="queued", queued=time.time())

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._stopping.is_set():
            try:
                self._take()
                if time.monotonic() - looked > _EXPIRY_SECONDS:
                    self._store.expire()
                    looked = time.monotonic()
            except Exception:  # a full disk, a locked database: neither is a reason to stop serving
                logger.exception("the queue failed, trying again")
                self._stopping.wait(_AGAIN_SECONDS)

    def _take(self) -> None:
        """Run the next job, if there is one; it leaves the queue once its end is recorded."""
        if self._queue is None:
            return
        try:
            item = self._queue.get(timeout=_IDLE_SECONDS, raw=True)
        except Empty:
            return
        job_id = str(item["data"])
        try:
            self._run(job_id)
        except Stopped:
            logger.info("job %s was stopped", job_id)
        except Exception as error:  # whatever one job met, the next one has its turn
            logger.exception("job %s failed", job_id)
            self._end(job_id, f"the edge server could not run the job: {one_line(error)}")
        if not self._stopping.is_set():
            self._queue.ack(id=item["pqid"])
            self._queue.clear_acked_data(keep_latest=0)

    def _run(self, job_id: str) -> None:
        folder, note = self._store.folder(job_id), None
        end_processes(folder)
        with self._store.lock:
            job = self._store.find(job_id)
            if job is None or not job.active:
                self._store.clear(job_id)
                return
            if job.starts >= MOST_STARTS:
                self._end(job_id, f"given up after {job.starts} starts: the edge server went down with it each time")
                return
            job = self._store.update(job_id, state="running", starts=job.starts + 1, progress=None)
        for draft in self._store.result(job_id).glob(".*"):  # of a command that was killed
            shutil.rmtree(draft, ignore_errors=True)
        try:
            for step in self._plan(job, self._store):
                logger.info("job %s: %s", job_id, step.what)
                problem = run_step(
                    step, folder, functools.partial(self._report, job_id), functools.partial(self._stopped, job_id)
                )
                if problem is not None and step.required:
                    self._end(job_id, problem)
                    return
                note = problem or note
            result = self._sealed(job, note)
        except Stopped:
            with contextlib.suppress(EdgeError):  # deleted
                self._store.update(job_id, state="queued", starts=job.starts - 1)
            self._store.clear(job_id)
            raise
        except GuardError as error:
            self._end(job_id, str(error))
            return
        with contextlib.suppress(EdgeError):  # deleted
            self._store.update(job_id, state="done", result=result, progress=None)
            logger.info("job %s is done", job_id)
        self._drop_inputs(job_id)

    def _report(self, job_id: str, progress: Progress) -> None:
        with contextlib.suppress(EdgeError):  # deleted, which stops the command
            self._store.update(job_id, progress=progress)

    def _stopped(self, job_id: str) -> bool:
        return self._stopping.is_set() or self._store.find(job_id) is None

    def _sealed(self, job: Job, note: str | None) -> Sealed:
        folder = self._store.result(job.id)
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in found]
        strange = [name for name in names if not is_result_name(name)]
        if strange:
            raise EdgeError(
                f"expected files of a repaired model's folder, got {strange[0]} too: bring the edge server up to date"
            )
        files = tuple(
            FileInfo(name=name, size=path.stat().st_size, sha256=file_sha256(path))
            for name, path in zip(names, found, strict=True)
        )
        manifest = msgspec.json.encode(Manifest(job=job.id, sent=job.request.files, files=files, note=note)).decode()
        return Sealed(manifest=manifest, seal=seal(self._token, manifest))

    def _end(self, job_id: str, problem: str) -> None:
        """Record a failure; a job that was deleted meanwhile has none."""
        with contextlib.suppress(EdgeError):
            self._store.update(job_id, state="failed", error=problem, progress=None)
        self._drop_inputs(job_id)

    def _drop_inputs(self, job_id: str) -> None:
        """What the device sent is private, and needed no longer."""
        shutil.rmtree(self._store.sent(job_id), ignore_errors=True)
        result = self._store.result(job_id)
        shutil.rmtree(result.parent / f".{result.name}.checkpoint", ignore_errors=True)  # of a repair that was refused
        self._store.clear(job_id)


def _locked(path: Path) -> IO[bytes]:
    """An open file that no other process has locked; the system unlocks it when this one ends, however it ends."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise EdgeError(f"another edge server uses {path.parent}: stop it, or pick another --folder") from error
    return file
