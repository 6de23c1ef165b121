"""The commands that a job is made of: how they fail, and what they leave."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from handlers.edge_commands import Step, run_step
from handlers.edge_limits import EdgeLimits
from handlers.edge_protocol import Manifest
from tests.handlers.toy_edge import FAILS, REPAIR, SLEEPS, edge_server, running


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
