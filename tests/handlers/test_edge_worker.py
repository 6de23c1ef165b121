"""Jobs take turns, and go on where a server was stopped or killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from persistqueue import SQLiteAckQueue
from persistqueue.serializers import json as json_serializer

from guard.errors import EdgeError
from handlers import edge_worker
from handlers.edge_commands import MARK, Step
from handlers.edge_jobs import Job, JobStore
from handlers.edge_worker import MOST_STARTS
from tests.handlers.toy_edge import DEADLINE, NOBODY, REPAIR, SLEEPS, edge_server, queued, requested, running, sent_files
from tests.handlers.toy_service import TIMEOUT


def test_progress_is_shown_and_jobs_wait_for_each_other(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        first, second = edge.started(), edge.started()
        status = edge.until(first, lambda found: found.progress is not None)
        assert msgspec.to_builtins(status.progress) == {"what": "learning the trigger", "done": 1, "total": 9}
        assert [edge.status(second).state, edge.status(second).ahead] == ["queued", 1]


def test_deleting_a_job_stops_it_and_the_next_one_runs(tmp_path: Path) -> None:
    script = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{SLEEPS}"
    with edge_server(tmp_path, running(script)) as edge:
        first, second = edge.started(), edge.started()
        edge.until(first, lambda found: found.progress is not None)
        process = int((tmp_path / "pid").read_text())
        assert edge.send("DELETE", f"/v1/jobs/{first}").status_code == 204
        edge.until(second, lambda found: found.state == "running")
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
        assert not edge.store.folder(first).exists()


def test_a_job_that_goes_as_its_command_starts_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log that the command's progress is read from goes with it."""
    store, deleted = JobStore(tmp_path), threading.Event()

    def run(_: Step, folder: Path, *__: object) -> str | None:
        store.delete(folder.name)
        deleted.set()
        (folder / "log").open("rb")
        return None

    monkeypatch.setattr(edge_worker, "run_step", run)
    with edge_server(tmp_path) as server:
        server.started()
        assert deleted.wait(TIMEOUT)
    assert list((tmp_path / "jobs").iterdir()) == []
    assert "Traceback" not in caplog.text


def test_a_stopped_server_goes_on_with_its_job(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        job = edge.started()
        edge.until(job, lambda found: found.progress is not None)
    assert JobStore(tmp_path).get(job).state == "queued"
    with edge_server(tmp_path) as edge:
        assert edge.ended(job).state == "done"
        assert edge.store.get(job).starts == 1


def test_a_killed_server_ends_the_orphan_and_begins_its_job_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = _left_by_a_killed_server(tmp_path, store)
    left = store.sent(job) / ".clean.npz.0.part"
    left.write_bytes(b"half")
    (store.result(job) / ".profile.draft").mkdir(parents=True)
    command = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
    mine, other = (
        subprocess.Popen(command, env={**os.environ, MARK: str(folder)}) for folder in (store.folder(job), store.folder(NOBODY))
    )
    try:
        with edge_server(tmp_path) as edge:
            assert edge.ended(job).state == "done"
            assert mine.wait(DEADLINE) != 0
            assert other.poll() is None  # another job's
            assert not left.exists()
        with edge_server(tmp_path) as edge:  # it has left the queue
            assert edge.store.get(job).starts == 2
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def test_a_job_that_takes_the_server_down_each_time_is_given_up(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = _left_by_a_killed_server(tmp_path, store)
    store.update(job, starts=MOST_STARTS)
    with edge_server(tmp_path) as edge:
        assert "given up after 5 starts" in (edge.ended(job).error or "")


def test_a_server_that_is_killed_before_it_records_an_end_says_so(tmp_path: Path) -> None:
    """What the job was made from is gone by then: run again, it would tell of missing files, or make half a result."""
    store = JobStore(tmp_path)
    job = _left_by_a_killed_server(tmp_path, store)
    (store.sent(job) / "clean.npz").unlink()
    with edge_server(tmp_path) as edge:
        status = edge.ended(job)
    assert (status.state, status.error) == (
        "failed",
        "the edge server was stopped before it could record how the job ended: repair again",
    )
    assert queued(tmp_path) == []


def _without_a_row(queue: Path) -> None:
    with contextlib.closing(sqlite3.connect(queue / "data.db")) as database, database:
        database.execute("DELETE FROM ack_queue_default WHERE _id = 2")


def _with_a_row_that_is_no_json(queue: Path) -> None:
    with contextlib.closing(sqlite3.connect(queue / "data.db")) as database, database:
        database.execute("UPDATE ack_queue_default SET data = x'ff' WHERE _id = 2")


def _torn(queue: Path) -> None:
    data = (queue / "data.db").read_bytes()
    (queue / "data.db").write_bytes(data[:100] + bytes(range(1, 251)) * 8 + data[2100:])


def _no_database(queue: Path) -> None:
    (queue / "data.db").write_bytes(b"no database" * 1000)


@pytest.mark.parametrize(
    ("harm", "damaged"),
    [
        (shutil.rmtree, False),
        (_without_a_row, False),
        (_with_a_row_that_is_no_json, True),
        (_torn, True),
        (_no_database, True),
        (lambda _: None, False),
    ],
)
def test_a_queue_that_differs_from_the_jobs_is_put_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], damaged: bool
) -> None:
    store, files, ran = JobStore(tmp_path), sent_files(), list[str]()
    left = [_left_by_a_killed_server(tmp_path, store)]
    queue = SQLiteAckQueue(str(tmp_path / "queue"), multithreading=True, serializer=json_serializer)
    for number in (1.0, 2.0):
        left.append(store.create(requested(files)).id)
        for name, data in files.items():
            (store.sent(left[-1]) / name).write_bytes(data)
        store.update(left[-1], state="queued", received=tuple(files), queued=number)
        queue.put(left[-1])
    queue.close()
    harm(tmp_path / "queue")

    def plan(job: Job, store: JobStore) -> Iterator[Step]:
        ran.append(job.id)
        yield from running(REPAIR)(job, store)

    with edge_server(tmp_path, plan) as edge:
        assert {edge.ended(job).state for job in (*left, edge.started())} == {"done"}
    assert ("made again from the jobs" in caplog.text) is damaged
    expected = left if harm is not _without_a_row else [left[0], left[2], left[1]]  # what is there stays where it is
    assert ran[:3] == expected
    assert queued(tmp_path) == []


def test_one_server_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    with edge_server(tmp_path), pytest.raises(EdgeError, match="another edge server"), edge_server(tmp_path):
        pass
    with edge_server(tmp_path):
        pass


def _left_by_a_killed_server(folder: Path, store: JobStore) -> str:
    """A job that is running by its record, and neither acknowledged nor running any more."""
    files = sent_files()
    job = store.create(requested(files)).id
    for name, data in files.items():
        (store.sent(job) / name).write_bytes(data)
    store.update(job, state="running", received=tuple(files), starts=1)
    queue = SQLiteAckQueue(str(folder / "queue"), multithreading=True, serializer=json_serializer)
    queue.put(job)
    assert queue.get(timeout=1) == job
    queue.close()
    return job
