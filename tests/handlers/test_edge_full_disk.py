"""A full disk costs an edge server neither a job nor its end."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from persistqueue import SQLiteAckQueue

from handlers import edge_worker
from handlers.edge_commands import Step
from handlers.edge_jobs import Job, JobStore
from tests.handlers.toy_edge import FAILS, REPAIR, SLEEPS, edge_server, queued, requested, running, sent_files
from tests.handlers.toy_service import TIMEOUT


def _filled(monkeypatch: pytest.MonkeyPatch, full: Callable[[JobStore, Job], bool]) -> None:
    """A disk on which no job's record can be written while `full` says so."""
    write = JobStore._write

    def attempt(store: JobStore, job: Job) -> None:
        if full(store, job):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.folder(job.id)))
        write(store, job)

    monkeypatch.setattr(JobStore, "_write", attempt)


@pytest.mark.parametrize(("script", "state"), [(REPAIR, "done"), (FAILS, "failed")])
def test_on_a_full_disk_inputs_make_room_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str
) -> None:
    _filled(monkeypatch, lambda store, job: job.state in ("done", "failed") and store.sent(job.id).exists())
    with edge_server(tmp_path, running(script)) as edge:
        job = edge.started()
        assert edge.ended(job).state == state
        assert not edge.store.sent(job).exists()


def test_a_done_job_is_recorded_before_anything_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that dies between the two would lose hours of work."""
    drop, states = JobStore.drop_inputs, list[str]()

    def watched(store: JobStore, job_id: str) -> None:
        states.append(store.get(job_id).state)
        drop(store, job_id)

    monkeypatch.setattr(JobStore, "drop_inputs", watched)
    with edge_server(tmp_path) as edge:
        job = edge.started()
        assert edge.ended(job).state == "done"
        edge.until(job, lambda _: bool(states))
    assert set(states) == {"done"}


def test_an_end_that_can_not_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_worker, "_LOOK_SECONDS", 0.05)
    full, scripts = threading.Event(), iter([REPAIR, SLEEPS])
    _filled(monkeypatch, lambda _, job: full.is_set() and job.state in ("done", "failed"))
    full.set()

    def plan(job: Job, store: JobStore) -> Iterator[Step]:
        yield from running(next(scripts))(job, store)

    with edge_server(tmp_path, plan) as edge:
        first, second = edge.started(), edge.started()
        edge.until(second, lambda found: found.state == "running")  # its turn comes all the same
        assert edge.status(first).state == "running"
        assert not edge.store.sent(first).exists()
        full.clear()
        status = edge.ended(first)
        assert (status.state, status.result is not None) == ("done", True)
        assert edge.status(second).state == "running"
    assert queued(tmp_path) == [second]


def test_a_job_whose_end_is_recorded_leaves_a_queue_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_worker, "_LOOK_SECONDS", 0.05)
    acknowledge, refused = SQLiteAckQueue.ack, list[int]()

    def attempt(queue: SQLiteAckQueue, *, id: int) -> None:  # noqa: A002 - its own name
        if len(refused) < 2:
            refused.append(id)
            raise sqlite3.OperationalError("database or disk is full")
        acknowledge(queue, id=id)

    monkeypatch.setattr(SQLiteAckQueue, "ack", attempt)
    with edge_server(tmp_path) as edge:
        assert edge.ended(edge.started()).state == "done"
        deadline = time.monotonic() + TIMEOUT
        while queued(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(refused) == 2


def test_progress_that_can_not_be_written_is_no_reason_to_end_a_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(monkeypatch, lambda _, job: job.progress is not None)
    with edge_server(tmp_path) as edge:
        assert edge.ended(edge.started()).state == "done"


def test_a_disk_that_is_full_as_a_job_begins_is_told_without_our_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(monkeypatch, lambda _, job: job.state == "running")
    with edge_server(tmp_path) as edge:
        status = edge.ended(edge.started())
    assert (status.state, status.error) == ("failed", "the edge server could not run the job: No space left on device")


def test_a_server_that_is_stopped_on_a_full_disk_goes_on_with_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = threading.Event()
    _filled(monkeypatch, lambda _, job: full.is_set() and job.state == "queued")
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        job = edge.started()
        edge.until(job, lambda found: found.progress is not None)
        full.set()
    full.clear()
    with edge_server(tmp_path) as edge:
        assert edge.ended(job).state == "done"


def test_what_could_not_be_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(tmp_path)
    job = store.create(requested(sent_files()))

    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        store.update(job.id, state="failed")
    assert {path.name for path in store.folder(job.id).iterdir()} == {"job.json", "sent"}
    assert store.get(job.id) == job
