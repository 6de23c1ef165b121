"""Jobs of an edge server: a folder each, with what is known of the job in `job.json`, which is written whole or not at all.

    FOLDER/jobs/ID/job.json   a job exists when this does
                   sent/      what the device sent; deleted once the job has ended
                   result/    what it gets
                   log        what the commands wrote to stderr

Names of folders and files are ours: a device's text never becomes a path.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import msgspec

from guard.errors import UNREADABLE, EdgeError
from guard.folders import write_whole
from handlers.edge_limits import EdgeLimits
from handlers.edge_protocol import JOB_ID, FileInfo, JobRequest, JobStatus, Progress, Sealed, State

logger = logging.getLogger("guard.edge")

_JSON = "job.json"
_ACTIVE: tuple[State, ...] = ("receiving", "queued", "running")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What `job.json` holds.

    Attributes:
        id: Random.
        created: Seconds since the epoch.
        changed: Likewise.
        state: Where it is.
        request: What the device asked for.
        received: Files that have arrived.
        queued: When it was; seconds since the epoch.
        starts: How often it was begun: a job that takes the server down with it must not do so for ever.
        progress: Of the step that runs.
        error: Why it failed.
        result: What came of it.
    """

    id: str
    created: float
    changed: float
    state: State
    request: JobRequest
    received: tuple[str, ...] = ()
    queued: float = 0.0
    starts: int = 0
    progress: Progress | None = None
    error: str | None = None
    result: Sealed | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Files that have not arrived."""
        return tuple(item.name for item in self.request.files if item.name not in self.received)

    @property
    def active(self) -> bool:
        """Whether there is still something to be done."""
        return self.state in _ACTIVE


@final
class JobStore:
    """Jobs on disk. Whatever reads a job and then writes it holds `lock`.

    Args:
        folder: Made with access for nobody else: models and images are private.
        limits: How much it takes and keeps.
    """

    def __init__(self, folder: Path, limits: EdgeLimits | None = None) -> None:
        self.limits = limits or EdgeLimits()
        self.lock = threading.RLock()
        self._unreadable: set[str] = set()
        self._jobs = folder.resolve() / "jobs"  # whatever it is called, it is the same in the marks of processes
        try:
            self._jobs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._jobs.chmod(0o700)
        except OSError as error:
            raise EdgeError(f"can't keep jobs in {folder} ({error.strerror or error}): pick another --folder") from error

    def create(self, request: JobRequest) -> Job:
        """A job that waits for its files.

        Raises:
            TooLargeError: It declares more than is taken.
            EdgeError: There are as many unfinished jobs as are kept.
        """
        self.limits.check_request(request)
        with self.lock:
            self.expire()
            self._make_room()
            now = time.time()
            job = Job(id=secrets.token_hex(16), created=now, changed=now, state="receiving", request=request)
            (self.folder(job.id) / "sent").mkdir(parents=True)
            self._write(job)
        return job

    def find(self, job_id: str) -> Job | None:
        """A job, or None when there is none of this id."""
        try:
            return msgspec.json.decode((self.folder(job_id) / _JSON).read_bytes(), type=Job)
        except OSError:
            return None
        except UNREADABLE as error:
            if job_id not in self._unreadable:  # once: jobs are looked through all the time
                logger.warning("job %s can't be read (%s) and is ignored", job_id, error)
            self._unreadable.add(job_id)
            return None

    def get(self, job_id: str) -> Job:
        """A job.

        Raises:
            EdgeError: There is none of this id.
        """
        job = self.find(job_id) if JOB_ID.fullmatch(job_id) else None
        if job is None:
            raise _unknown()
        return job

    def update(self, job_id: str, **changes: Any) -> Job:
        """Write a job with some fields changed.

        Raises:
            EdgeError: It was deleted.
        """
        with self.lock:
            job = msgspec.structs.replace(self.get(job_id), changed=time.time(), **changes)
            self._write(job)
        return job

    def delete(self, job_id: str) -> None:
        """Forget a job, also one that can't be read; a worker that is at it stops.

        Raises:
            EdgeError: There is none of this id.
        """
        with self.lock:
            if not JOB_ID.fullmatch(job_id) or self.is_deleted(job_id):
                raise _unknown()
            (self.folder(job_id) / _JSON).unlink()
            self.clear(job_id)

    def is_deleted(self, job_id: str) -> bool:
        """Whether a job is no longer kept; one that can't be read is."""
        return not (self.folder(job_id) / _JSON).exists()

    def clear(self, job_id: str) -> None:
        """Remove what is left of a job that was deleted, and nothing of one that was not."""
        if self.is_deleted(job_id):
            shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def drop_inputs(self, job_id: str) -> None:
        """Remove what a job is made from: what the device sent is private, and needed no longer than the job runs."""
        left = self.folder(job_id).glob(".*")  # a refused repair's checkpoint, a killed one's draft
        for folder in (self.sent(job_id), *left):
            shutil.rmtree(folder, ignore_errors=True)

    def drop_result(self, job_id: str) -> None:
        """Remove what a job that failed has made, which nobody gets."""
        shutil.rmtree(self.result(job_id), ignore_errors=True)

    def accept(self, job_id: str, part: Path, expected: FileInfo) -> None:
        """Take a file that arrived whole.

        Args:
            job_id: Of the job.
            part: The file, in `sent`.
            expected: What was declared of it; the caller has verified it.

        Raises:
            TooLargeError: It unpacks to more than is taken.
            EdgeError: It holds pickles, is no archive though its name says so, or the job no longer takes files.
            OSError: The disk fails, or the job was deleted meanwhile (FileNotFoundError).
        """
        self.limits.check_file(part, expected.name)
        with self.lock:
            job = self.get(job_id)
            if job.state != "receiving":
                raise EdgeError(f"expected no more files for a job that is {job.state}, got one", 409, "not-receiving")
            part.replace(self.sent(job_id) / expected.name)
            self.update(job_id, received=(*(name for name in job.received if name != expected.name), expected.name))

    def status(self, job: Job) -> JobStatus:
        """What the device is told."""
        ahead = 0
        if job.state == "queued":
            ahead = sum(other.state == "running" or _before(other, job) for other in self.jobs())
        return JobStatus(
            id=job.id,
            state=job.state,
            ahead=ahead,
            missing=job.missing if job.state == "receiving" else (),
            progress=job.progress,
            error=job.error,
            result=job.result,
        )

    def jobs(self) -> Iterator[Job]:
        """All jobs, in no order."""
        for job_id in self._ids():
            job = self.find(job_id)
            if job is not None:
                yield job

    def expire(self) -> None:
        """Drop what is too old, and what is left of deleted jobs."""
        with self.lock:
            for job_id in self._ids():
                if self.is_deleted(job_id):
                    self.clear(job_id)
                elif self._is_too_old(job_id):
                    self.delete(job_id)

    def _is_too_old(self, job_id: str) -> bool:
        job, now = self.find(job_id), time.time()
        if job is None:  # it can't be read: what the device sent must not stay for good
            return now - (self.folder(job_id) / _JSON).stat().st_mtime > self.limits.kept_seconds
        if job.state == "receiving":
            return now - job.changed > self.limits.receiving_seconds
        return not job.active and now - job.changed > self.limits.kept_seconds

    def _make_room(self) -> None:
        """For another job: the oldest ended ones go.

        Raises:
            EdgeError: There is none to be had.
        """
        kept = sorted(self.jobs(), key=lambda item: item.changed)
        surplus = len(kept) + 1 - self.limits.max_jobs
        ended = [job for job in kept if not job.active]
        if surplus > len(ended):
            raise EdgeError(
                f"the edge server has {len(kept)} unfinished jobs and takes no more: try again later", 429, "too-many-jobs"
            )
        for job in ended[: max(0, surplus)]:
            self.delete(job.id)

    def tidy(self) -> None:
        """Put right what a server left that was killed: half-made jobs, half-sent files, ended jobs' inputs, unended jobs.

        On a full disk what goes goes first, to make room.
        """
        with self.lock:
            self.expire()
            for part in self._jobs.glob("*/sent/*.part"):
                part.unlink(missing_ok=True)
            jobs = list(self.jobs())
            for job in jobs:
                if not job.active:
                    self.drop_inputs(job.id)
                if job.state == "failed":
                    self.drop_result(job.id)
            for job in jobs:
                if job.state == "running":
                    self.update(job.id, state="queued", progress=None)

    def folder(self, job_id: str) -> Path:
        """A job's own; the id must be one that we gave."""
        return self._jobs / job_id

    def sent(self, job_id: str) -> Path:
        """Where the device's files are."""
        return self.folder(job_id) / "sent"

    def result(self, job_id: str) -> Path:
        """Where the result is."""
        return self.folder(job_id) / "result"

    def _ids(self) -> list[str]:
        return [folder.name for folder in self._jobs.iterdir() if JOB_ID.fullmatch(folder.name)]

    def _write(self, job: Job) -> None:
        write_whole(self.folder(job.id) / _JSON, msgspec.json.format(msgspec.json.encode(job), indent=1))


def _unknown() -> EdgeError:
    return EdgeError("expected the id of a job that is kept here, got another: it may have expired", 404, "unknown-job")


def _before(other: Job, job: Job) -> bool:
    return other.state == "queued" and other.queued < job.queued
