"""Runs an edge server's jobs, one after the other.

The queue is an embedded one (persist-queue over SQLite, items as JSON). A job leaves it once its end is on disk: so one that
a killed server was at is begun again, and its commands go on from their own checkpoints. What the device sent goes first: that
makes room on a disk that is too full to write an end to. One that can't be written all the same is tried again. Where queue and
jobs differ when a server starts, the jobs are right.
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
from dataclasses import dataclass
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
_LOOK_SECONDS = 10.0  # between looks for jobs that are too old, and for ends that could not be recorded
_AGAIN_SECONDS = 10.0  # after the queue itself failed

Plan = Callable[[Job, JobStore], Iterator[Step]]
"""A job's commands, the next one asked for when the last one has ended; what is done already is left out."""


@final
@dataclass(frozen=True)
class _End:
    """How a job ended.

    Attributes:
        job_id: Of the job.
        changes: To its record; None for a job that was deleted, which has none.
    """

    job_id: str
    changes: dict[str, object] | None


@final
class EdgeWorker:
    """Takes jobs from the queue in a thread, and drops what is too old in another, inside its block.

    Args:
        store: The jobs.
        folder: Of the queue; one server at a time uses it.
        plan: What a job's commands are.
        token: That results are sealed with.
    """

    def __init__(self, store: JobStore, folder: Path, plan: Plan, token: str) -> None:
        self._store, self._folder, self._plan, self._token = store, folder.absolute(), plan, token
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("edge-worker", self._work), ("edge-keeper", self._keep))
        ]
        self._queue: SQLiteAckQueue | None = None
        self._ends: dict[int, _End] = {}  # by their number in the queue: those that are not recorded yet
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Start.

        Raises:
            EdgeError: Another server uses the folder.
        """
        self._lock = _locked(self._folder / ".lock")
        try:
            self._store.tidy()
            self._queue = self._filled_queue()
        except (OSError, sqlite3.Error) as error:
            self._lock.close()
            raise EdgeError(f"can't keep a queue in {self._folder} ({one_line(error)}): pick another --folder") from error
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop; the job that is under way goes on when a server starts again."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._queue is not None:
            self._record_ends(self._queue)
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

    def _filled_queue(self) -> SQLiteAckQueue:
        """The queue, with every job in it that is to run."""
        queue, waiting = _opened(self._folder / "queue")
        for job in sorted(self._store.jobs(), key=lambda job: job.queued):
            if job.state in ("queued", "running") and job.id not in waiting:
                logger.warning("job %s was not in the queue and is put into it", job.id)
                queue.put(job.id)
        return queue

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._take()
            except Exception:  # a full disk, a locked database: neither is a reason to stop serving
                logger.exception("the queue failed, trying again")
                self._stopping.wait(_AGAIN_SECONDS)

    def _keep(self) -> None:
        """On time also while a job runs for hours."""
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                if self._queue is not None:
                    self._record_ends(self._queue)
                self._store.expire()
            except Exception:  # as above
                logger.exception("jobs could not be looked through, trying again")

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
            changes = self._run(job_id)
        except Stopped:
            logger.info("job %s was stopped", job_id)
            if self._stopping.is_set():
                return
            changes = None
        except Exception as error:  # whatever one job met, the next one has its turn
            logger.exception("job %s failed", job_id)
            reason = error.strerror if isinstance(error, OSError) else None  # without the server's paths
            changes = _failed(f"the edge server could not run the job: {reason or 'see its log'}")
        with self._store.lock:
            self._ends[item["pqid"]] = _End(job_id, changes)
        self._record_ends(self._queue)

    def _record_ends(self, queue: SQLiteAckQueue) -> None:
        """Record how jobs ended, and take them out of the queue; where that fails, they stay to be tried again."""
        with self._store.lock:
            for number, end in list(self._ends.items()):
                try:
                    self._record(end)
                    queue.ack(id=number)
                    queue.clear_acked_data(keep_latest=0)
                except (OSError, sqlite3.Error) as error:
                    logger.error("the end of job %s can't be recorded (%s), trying again", end.job_id, one_line(error))
                    continue
                del self._ends[number]

    def _record(self, end: _End) -> None:
        if end.changes is not None:
            if end.changes["state"] == "failed":
                self._store.drop_result(end.job_id)
            with contextlib.suppress(EdgeError):  # deleted meanwhile
                try:
                    self._store.update(end.job_id, progress=None, **end.changes)
                except OSError:  # a full disk, on which what the device sent takes the room
                    self._store.drop_inputs(end.job_id)
                    self._store.update(end.job_id, progress=None, **end.changes)
                logger.info("job %s is %s", end.job_id, end.changes["state"])
            self._store.drop_inputs(end.job_id)
        self._store.clear(end.job_id)

    def _run(self, job_id: str) -> dict[str, object] | None:
        """Run a job's commands; returns what its end changes, None for a job that has ended already or was deleted."""
        note, until = None, time.monotonic() + self._store.limits.job_seconds
        end_processes(self._store.folder(job_id))
        with self._store.lock:
            job = self._store.find(job_id)
            if job is None or not job.active:
                return None
            if job.starts >= MOST_STARTS:
                return _failed(f"given up after {job.starts} starts: the edge server went down with it each time")
            if not all((self._store.sent(job_id) / item.name).is_file() for item in job.request.files):
                return _failed("the edge server was stopped before it could record how the job ended: repair again")
            job = self._store.update(job_id, state="running", starts=job.starts + 1, progress=None)
        self._drop_drafts(job_id)
        try:
            for step in self._plan(job, self._store):
                logger.info("job %s: %s", job_id, step.what)
                problem = self._run_step(step, job_id, until)
                if problem is not None and step.required:
                    return _failed(problem)
                note = problem or note
            self._drop_drafts(job_id)
            return {"state": "done", "result": self._sealed(job, note)}
        except Stopped:
            with contextlib.suppress(EdgeError, OSError):  # deleted, or a full disk: then it is queued by the next server
                self._store.update(job_id, state="queued", starts=job.starts - 1)
            self._store.clear(job_id)
            raise
        except GuardError as error:
            return _failed(str(error))

    def _run_step(self, step: Step, job_id: str, until: float) -> str | None:
        """Run one command, and end it where the job's time is over; returns its problem."""
        report = functools.partial(self._report, job_id)
        try:
            return run_step(step, self._store.folder(job_id), report, lambda: self._stopped(job_id) or time.monotonic() > until)
        except FileNotFoundError as error:
            if self._store.is_deleted(job_id):  # and its log with it
                raise Stopped from error
            raise
        except Stopped:
            if self._stopped(job_id):
                raise
            minutes = self._store.limits.job_seconds / 60
            logger.warning("job %s: %s was ended, its time is over", job_id, step.what)
            return (
                f"expected {step.what} to end within the {minutes:g} minutes that a job has, got no end: ask for fewer epochs, "
                "or start the edge server with a larger --max-job-minutes"
            )

    def _report(self, job_id: str, progress: Progress) -> None:
        with contextlib.suppress(EdgeError, OSError):  # deleted, which stops the command; or a full disk, which need not
            self._store.update(job_id, progress=progress)

    def _stopped(self, job_id: str) -> bool:
        return self._stopping.is_set() or self._store.is_deleted(job_id)

    def _drop_drafts(self, job_id: str) -> None:
        """Of a command that was killed."""
        for draft in self._store.result(job_id).glob(".*"):
            shutil.rmtree(draft, ignore_errors=True)

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


def _opened(folder: Path) -> tuple[SQLiteAckQueue, set[str]]:
    """The queue in a folder, and the jobs in it; a damaged one makes room for an empty one."""
    try:
        return _read(folder)
    except (sqlite3.Error, TypeError, ValueError) as error:
        logger.warning("the queue in %s can't be read (%s) and is made again from the jobs", folder, one_line(error))
    shutil.rmtree(folder)  # not before the old one's connections are closed: they would remove the new one's log
    return _read(folder)


def _read(folder: Path) -> tuple[SQLiteAckQueue, set[str]]:
    queue = SQLiteAckQueue(str(folder), multithreading=True, serializer=json_serializer)
    try:
        queue.clear_acked_data(keep_latest=0)
        return queue, {item["data"] for item in queue.queue()}
    except BaseException:
        queue.close()
        raise


def _failed(problem: str) -> dict[str, object]:
    return {"state": "failed", "error": problem}


def _locked(path: Path) -> IO[bytes]:
    """An open file that no other process has locked; the system unlocks it when this one ends, however it ends."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise EdgeError(f"another edge server uses {path.parent}: stop it, or pick another --folder") from error
    return file
