from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from persistqueue import SQLiteAckQueue
from persistqueue.serializers import json as json_serializer

from guard.errors import EdgeError
from handlers import edge, edge_worker
from handlers.edge import BearerToken
from handlers.edge_commands import MARK, Step, run_step
from handlers.edge_jobs import Job, JobStore
from handlers.edge_limits import EdgeLimits
from handlers.edge_protocol import Manifest, open_sealed
from handlers.edge_worker import MOST_STARTS
from tests.handlers.toy_edge import (
    AUTHORISED,
    DEADLINE,
    FAILS,
    REPAIR,
    SLEEPS,
    TOKEN,
    Edge,
    edge_server,
    requested,
    running,
    sent_files,
)
from tests.handlers.toy_service import TIMEOUT, call, chunk, drive

NOBODY = "0" * 32
ROUTES = [
    ("POST", "/v1/jobs"),
    ("GET", f"/v1/jobs/{NOBODY}"),
    ("DELETE", f"/v1/jobs/{NOBODY}"),
    ("POST", f"/v1/jobs/{NOBODY}/start"),
    ("PUT", f"/v1/jobs/{NOBODY}/files/clean.npz"),
    ("GET", f"/v1/jobs/{NOBODY}/files/model.pt2"),
    ("GET", "/elsewhere"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_is_answered_or_read_without_the_token(tmp_path: Path, method: str, path: str) -> None:
    wrong: list[list[tuple[bytes, bytes]]] = [
        [],
        [(b"authorization", b"Bearer " + b"x" * len(TOKEN))],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", f"Basic {TOKEN}".encode())],
        [(b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer other")],
    ]
    with edge_server(tmp_path) as edge:
        for headers in wrong:
            sent = drive(edge.app, [], path, headers, method)  # a client that never sends its body
            assert sent[0]["status"] == 401
            assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
            assert (b"connection", b"close") in sent[0]["headers"]


def test_ping_needs_no_token(tmp_path: Path) -> None:
    with edge_server(tmp_path) as edge:
        (answer,) = call(edge.app, httpx.Request("GET", "http://test/ping"))
    assert answer.json() == {"status": "Healthy"}


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "with blanks in between", "umläute-umläute-umläute"])
def test_a_token_that_is_too_weak_is_refused(token: str) -> None:
    with pytest.raises(EdgeError, match="at least 16"):
        BearerToken(lambda *_: contextlib.nullcontext(), token=token)  # type: ignore[arg-type]


def test_a_job_from_its_announcement_to_its_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    files = sent_files()
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        for number, (name, data) in enumerate(files.items()):
            assert edge.status(job).missing == tuple(files)[number:]
            assert edge.send("PUT", f"/v1/jobs/{job}/files/{name}", data).status_code == 204
        assert edge.send("GET", f"/v1/jobs/{job}/files/model.pt2").status_code == 409
        assert edge.send("POST", f"/v1/jobs/{job}/start").status_code == 202
        status = edge.ended(job)
        assert status.state == "done"
        assert status.result is not None
        manifest = open_sealed(TOKEN, status.result)
        assert [item.name for item in manifest.files] == ["model.pt2", "profile/guard.json", "repair.json"]
        assert {item.name for item in manifest.sent} == set(files)
        for item in manifest.files:
            data = edge.send("GET", f"/v1/jobs/{job}/files/{item.name}").content
            assert (len(data), hashlib.sha256(data).hexdigest()) == (item.size, item.sha256)
        assert edge.send("GET", f"/v1/jobs/{job}/files/model.pt2").content == files["model.pt2"][::-1]
        assert not edge.store.sent(job).exists()  # private, and needed no longer
        assert edge.send("POST", f"/v1/jobs/{job}/start").json()["state"] == "done"  # again does no harm
        assert edge.send("DELETE", f"/v1/jobs/{job}").status_code == 204
        assert edge.send("GET", f"/v1/jobs/{job}").status_code == 404
        assert not edge.store.folder(job).exists()
    assert TOKEN not in caplog.text


def test_what_is_kept_is_nobody_elses_and_not_pickled(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        job = edge.started()
        edge.until(job, lambda status: status.state == "running")
        assert (tmp_path / "jobs").stat().st_mode & 0o077 == 0
        assert _queued(tmp_path) == [job]


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_truncated_file_is_refused_and_not_kept(tmp_path: Path, cut: int) -> None:
    files = sent_files()
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", files["clean.npz"][:cut])
        assert [answer.status_code, answer.json()["reason"]] == [422, "truncated"]
        assert list(edge.store.sent(job).iterdir()) == []
        assert "clean.npz" in edge.status(job).missing
        refused = edge.send("POST", f"/v1/jobs/{job}/start")
        assert [refused.status_code, refused.json()["reason"]] == [409, "files-missing"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    files = sent_files()
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", files["clean.npz"][:-1] + b"x")
        assert [answer.status_code, answer.json()["reason"]] == [422, "damaged"]
        assert list(edge.store.sent(job).iterdir()) == []


def test_more_than_was_declared_is_refused_whatever_content_length_says(tmp_path: Path) -> None:
    files = sent_files()
    size = len(files["clean.npz"])
    with edge_server(tmp_path) as edge:
        path = f"/v1/jobs/{edge.create(requested(files))}/files/clean.npz"
        token = [(b"authorization", AUTHORISED["authorization"].encode())]
        for headers in (token, [*token, (b"content-length", b"10")], [*token, (b"content-length", b"%d" % size)]):
            sent = drive(edge.app, [chunk(bytes(size), True), chunk(b"x", True)], path, headers, "PUT")
            assert sent[0]["status"] == 413
        assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("clean.npz")]


def test_a_client_that_falls_silent_is_cut_off(tmp_path: Path) -> None:
    with edge_server(tmp_path, seconds=0.05) as edge:
        path = f"/v1/jobs/{edge.create(requested(sent_files()))}/files/clean.npz"
        sent = drive(edge.app, [chunk(b"x", True)], path, [(b"authorization", AUTHORISED["authorization"].encode())], "PUT")
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    "name", ["../job.json", "/etc/passwd", "model.pkl", "clean.npz/../x", "", "model.PT2", "quarantine.npz\n"]
)
def test_only_known_names_are_taken(tmp_path: Path, name: str) -> None:
    files = sent_files()
    body = msgspec.json.encode(requested(files)).replace(b'"quarantine.npz"', json.dumps(name).encode())
    with edge_server(tmp_path) as edge:
        assert edge.send("POST", "/v1/jobs", body).status_code == 400
        job = edge.create(requested(files))
        assert edge.send("PUT", f"/v1/jobs/{job}/files/job.json", b"x").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        lambda body: b"[" * 50_000,
        lambda body: b"{}",
        lambda body: body.replace(b"codefend", b"../../x"),
        lambda body: body.replace(b'"size":', b'"size":-'),
        lambda body: body.replace(b'"method"', b'"secret":1,"method"'),
        lambda body: body.replace(b'"quarantine.npz"', b'"clean.npz"'),
        lambda body: body.replace(b'"model.pt2"', b'"model.safetensors"'),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(tmp_path: Path, change: object) -> None:
    assert callable(change)
    with edge_server(tmp_path) as edge:
        answer = edge.send("POST", "/v1/jobs", change(msgspec.json.encode(requested(sent_files()))))
        assert answer.status_code == 400
        assert "Traceback" not in answer.text
        assert list((tmp_path / "jobs").iterdir()) == []


def test_other_paths_lead_nowhere(tmp_path: Path) -> None:
    with edge_server(tmp_path) as edge:
        job = edge.started()
        edge.ended(job)
        for place in (tmp_path, tmp_path / "jobs"):  # where a path that leads out would find something
            (place / "job.json").write_bytes((edge.store.folder(job) / "job.json").read_bytes())
        for name in ("../job.json", "..%2fjob.json", "profile/../../job.json", "/etc/passwd", "log", "profile"):
            sent = drive(
                edge.app, [chunk(b"")], f"/v1/jobs/{job}/files/{name}", [(b"authorization", f"Bearer {TOKEN}".encode())], "GET"
            )
            assert sent[0]["status"] == 404, name
        for other in ("..", ".", "a" * 33, job.upper(), f"{job}\n"):
            sent = drive(edge.app, [chunk(b"")], f"/v1/jobs/{other}", [(b"authorization", f"Bearer {TOKEN}".encode())], "GET")
            assert sent[0]["status"] == 404, other
        assert edge.send("PATCH", f"/v1/jobs/{job}").status_code == 405


def test_a_factory_is_run_only_when_it_is_allowed(tmp_path: Path) -> None:
    files = sent_files()
    files["model.safetensors"] = files.pop("model.pt2")
    with edge_server(tmp_path, factories=("mine:net",)) as edge:
        refused = edge.send("POST", "/v1/jobs", msgspec.json.encode(requested(files, "os:abort")))
        assert [refused.status_code, "--allow-factory os:abort" in refused.text] == [403, True]
        assert edge.create(requested(files, "mine:net"))


def test_no_file_is_taken_once_a_job_was_started(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        job = edge.started()
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", sent_files()["clean.npz"])
        assert [answer.status_code, answer.json()["reason"]] == [409, "not-receiving"]


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


def test_an_upload_that_goes_on_is_never_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(edge_worker, "_LOOK_SECONDS", TIMEOUT)  # we look
    files = sent_files()
    with edge_server(tmp_path) as server:
        job = server.create(requested(files))

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(files["clean.npz"]), 200):
                server.store._write(msgspec.structs.replace(server.store.get(job), changed=0.0))  # hours go by
                yield files["clean.npz"][start : start + 200]
                server.store.expire()

        assert _put(server, job, "clean.npz", pieces()).status_code == 204
        assert "clean.npz" not in server.status(job).missing


@pytest.mark.parametrize("name", ["model.pt2", "clean.npz"])
def test_an_upload_to_a_job_that_goes_meanwhile_is_told_so(tmp_path: Path, name: str) -> None:
    """Also of an archive, which would seem to be none."""
    with edge_server(tmp_path) as server:
        job = server.create(requested(sent_files()))

        async def pieces() -> AsyncIterator[bytes]:
            yield sent_files()[name]
            server.store.delete(job)

        answer = _put(server, job, name, pieces())
        assert [answer.status_code, answer.json()["reason"]] == [404, "unknown-job"]
        server.store.expire()
        assert not server.store.folder(job).exists()


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


def test_a_command_may_succeed_by_other_codes_than_0(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import sys; sys.exit(1)"]
    told = [
        run_step(Step("the step", command, succeeds=codes), tmp_path, lambda _: None, lambda: False)
        for codes in (frozenset({0, 1}), frozenset({0}))
    ]
    assert told[0] is None
    assert told[1] is not None


def test_a_failing_command_is_told_in_one_line_without_our_paths(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(FAILS, REPAIR)) as edge:
        status = edge.ended(edge.started())
        assert (status.state, status.error) == ("failed", "expected more of sent/clean.npz, got less")


@pytest.mark.parametrize("name", [".result.checkpoint", ".result.draft", "result"])
def test_a_refused_repair_leaves_no_weights_behind(tmp_path: Path, name: str) -> None:
    """They hold the device's model and fill the disk, and nothing could go on from them."""
    writes = f"import pathlib, sys; p = pathlib.Path(sys.argv[2]).with_name({name!r}); p.mkdir(); (p / 'w').touch()"
    with edge_server(tmp_path, running(writes + "\n" + FAILS)) as edge:
        job = edge.started()
        assert edge.ended(job).state == "failed"
        edge.until(job, lambda _: {path.name for path in edge.store.folder(job).iterdir()} == {"job.json", "log"})


def test_a_crashing_command_tells_nothing_of_the_server(tmp_path: Path) -> None:
    for script, words in (
        ("raise RuntimeError('/secret')", "failed unexpectedly"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
    ):
        with edge_server(tmp_path, running(script)) as edge:
            error = edge.ended(edge.started()).error or ""
        assert words in error
        assert "secret" not in error


def test_a_step_that_is_not_required_leaves_a_note(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(REPAIR, FAILS, required=False)) as edge:
        status = edge.ended(edge.started())
        assert status.result is not None
        assert msgspec.json.decode(status.result.manifest, type=Manifest).note == "expected more of sent/clean.npz, got less"


def test_what_a_killed_step_leaves_half_written_costs_no_repair(tmp_path: Path) -> None:
    """The draft of a profile was taken for strange files, and the repair before it went, too."""
    draft = "import os, pathlib, sys; place = pathlib.Path(sys.argv[2], '.profile.x1'); place.mkdir()"
    draft += "; (place / 'guard.json').write_text('{'); os.kill(os.getpid(), 9)"
    with edge_server(tmp_path, running(REPAIR, draft, required=False)) as edge:
        status = edge.ended(edge.started())
        assert (status.state, status.error) == ("done", None)


@pytest.mark.parametrize("required", [False, True])
def test_a_command_that_does_not_end_is_ended(tmp_path: Path, required: bool) -> None:
    """And what was made before it is not lost, if it can be done without."""
    script = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{SLEEPS}"
    with edge_server(tmp_path, running(script, required=required), EdgeLimits(job_seconds=0.6)) as edge:
        first, second = edge.started(), edge.started()
        status = edge.ended(first)
        assert status.state == ("failed" if required else "done")
        told = msgspec.json.decode(status.result.manifest, type=Manifest).note if status.result is not None else status.error
        assert "expected the step to end within the 0.01 minutes that a job has, got no end" in str(told)
        assert edge.ended(second).state == status.state  # it has its turn
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_result_with_strange_files_is_not_given_out(tmp_path: Path) -> None:
    script = REPAIR + "\n(result / 'model.pkl').write_text('x')"
    with edge_server(tmp_path, running(script)) as edge:
        status = edge.ended(edge.started())
        assert status.state == "failed"
        assert "model.pkl" in (status.error or "")


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
    assert _queued(tmp_path) == [second]


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
        while _queued(tmp_path):
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
    assert _queued(tmp_path) == []


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
    assert _queued(tmp_path) == []


def test_one_server_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    with edge_server(tmp_path), pytest.raises(EdgeError, match="another edge server"), edge_server(tmp_path):
        pass
    with edge_server(tmp_path):
        pass


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


def _put(server: Edge, job: str, name: str, pieces: AsyncIterator[bytes]) -> httpx.Response:
    """Send a file piece by piece; what a piece's source does after it is done when it has arrived."""
    request = httpx.Request("PUT", f"http://test/v1/jobs/{job}/files/{name}", content=pieces, headers=AUTHORISED)
    return call(server.app, request)[0]


def _queued(folder: Path) -> list[str]:
    """Jobs in the queue, also those that are at work."""
    with contextlib.closing(sqlite3.connect(folder / "queue" / "data.db")) as database:
        return [json.loads(data) for (data,) in database.execute("SELECT data FROM ack_queue_default").fetchall()]


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
