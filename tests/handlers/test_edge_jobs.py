"""What an edge server keeps, for how long, and what it makes of records that it can't read."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from guard.errors import EdgeError
from handlers import edge_worker
from handlers.edge_jobs import JobStore
from handlers.edge_limits import EdgeLimits
from tests.handlers.toy_edge import NOBODY, SLEEPS, edge_server, queued, requested, running, sent_files
from tests.handlers.toy_service import TIMEOUT


def test_what_is_kept_is_nobody_elses_and_not_pickled(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        job = edge.started()
        edge.until(job, lambda status: status.state == "running")
        assert (tmp_path / "jobs").stat().st_mode & 0o077 == 0
        assert queued(tmp_path) == [job]


def test_unfinished_jobs_are_bounded_and_ended_ones_make_room(tmp_path: Path) -> None:
    with edge_server(tmp_path, limits=EdgeLimits(max_jobs=2)) as edge:
        old = edge.started()
        edge.ended(old)
        first, second = edge.create(requested(sent_files())), edge.create(requested(sent_files()))
        assert edge.send("GET", f"/v1/jobs/{old}").status_code == 404
        refused = edge.send("POST", "/v1/jobs", msgspec.json.encode(requested(sent_files())))
        assert [refused.status_code, refused.json()["reason"]] == [429, "too-many-jobs"]
        assert {edge.status(job).state for job in (first, second)} == {"receiving"}


def test_jobs_expire(tmp_path: Path) -> None:
    store = JobStore(tmp_path, EdgeLimits(receiving_seconds=0.0))
    waiting, running_one = (store.create(requested(sent_files())) for _ in range(2))
    # the second creation dropped the first: its files did not arrive in time
    assert [job.id for job in store.jobs()] == [running_one.id]
    store.update(running_one.id, state="running")
    store.expire()
    assert store.get(running_one.id).state == "running"
    with pytest.raises(EdgeError):
        store.get(waiting.id)


def test_what_is_too_old_goes_without_another_job(tmp_path: Path) -> None:
    job = JobStore(tmp_path, EdgeLimits()).create(requested(sent_files()))
    store = JobStore(tmp_path, EdgeLimits(receiving_seconds=0.0))
    store.tidy()
    assert not store.folder(job.id).exists()


@pytest.mark.parametrize("busy", [False, True])
def test_a_server_looks_for_what_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """Also while a job runs, which may take hours."""
    monkeypatch.setattr(edge_worker, "_LOOK_SECONDS", 0.05)
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        runs = edge.started() if busy else None
        if runs is not None:
            edge.until(runs, lambda found: found.state == "running")
        edge.store.limits = dataclasses.replace(edge.store.limits, receiving_seconds=0.5)
        job, deadline = edge.create(requested(sent_files())), time.monotonic() + TIMEOUT
        while edge.send("GET", f"/v1/jobs/{job}").status_code != 404:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert runs is None or edge.status(runs).state == "running"
    assert not edge.store.folder(job).exists()


@pytest.mark.parametrize("state", ["done", "failed"])
def test_what_devices_sent_goes_also_where_a_server_could_not_remove_it(tmp_path: Path, state: str) -> None:
    store = JobStore(tmp_path)
    ended, waiting = (store.create(requested(sent_files())).id for _ in range(2))
    for job in (ended, waiting):
        (store.sent(job) / "clean.npz").write_bytes(b"private")
        for left in (".result.checkpoint", ".result.draft", "result"):
            (store.folder(job) / left).mkdir()
    store.update(ended, state=state)
    store.tidy()
    kept = {"job.json", "result"} if state == "done" else {"job.json"}  # of one that failed nobody gets it
    assert {path.name for path in store.folder(ended).iterdir()} == kept
    assert (store.sent(waiting) / "clean.npz").read_bytes() == b"private"
    assert store.get(ended).state == state


def test_a_job_that_is_no_text_is_ignored(tmp_path: Path) -> None:
    store = JobStore(tmp_path, EdgeLimits())
    job = store.create(requested(sent_files()))
    (store.folder(job.id) / "job.json").write_bytes(b'{"id": "\xff"}')
    store.tidy()
    assert store.find(job.id) is None


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="pick another --folder"):
        JobStore(tmp_path / "file")


def test_a_damaged_record_stops_nothing(tmp_path: Path) -> None:
    with edge_server(tmp_path) as edge:
        broken = edge.create(requested(sent_files()))
        (edge.store.folder(broken) / "job.json").write_text("{")
        assert edge.send("GET", f"/v1/jobs/{broken}").status_code == 404
        assert edge.ended(edge.started()).state == "done"
        assert edge.send("DELETE", f"/v1/jobs/{broken}").status_code == 204
        assert not edge.store.folder(broken).exists()
        for other in (broken, NOBODY, "token"):
            assert edge.send("DELETE", f"/v1/jobs/{other}").status_code == 404


@pytest.mark.parametrize("change", [lambda text: text[:-10], lambda text: text.replace("receiving", "paused")])
def test_a_record_that_can_not_be_read_expires_by_its_files_time(tmp_path: Path, change: Callable[[str], str]) -> None:
    """Cut off, or another version's: what its device sent does not stay for good."""
    store = JobStore(tmp_path)
    old, young = (store.create(requested(sent_files())).id for _ in range(2))
    for job in (old, young):
        record = store.folder(job) / "job.json"
        record.write_text(change(record.read_text()))
    long_ago = time.time() - store.limits.kept_seconds - 60
    os.utime(store.folder(old) / "job.json", (long_ago, long_ago))
    store.expire()
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [young]


def test_a_folder_without_a_record_goes(tmp_path: Path) -> None:
    """Of a job that a full disk did not let begin, or of an upload to one that was deleted."""
    store = JobStore(tmp_path)
    store.sent(NOBODY).mkdir(parents=True)
    store.expire()
    assert list((tmp_path / "jobs").iterdir()) == []
