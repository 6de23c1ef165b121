"""One command of an edge server's job, in a session of its own: its progress, its end, and the end of what it left behind.

Commands that outlived a server that was killed are known by a variable in their environment, which no other process has: none
is missed that was started just before, and none is hit that got its number since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from guard.errors import MissingExtraError
from handlers.edge_protocol import Progress

try:
    import psutil
except ImportError as error:
    raise MissingExtraError("psutil", "edge") from error

logger = logging.getLogger("guard.edge")

MARK = "GUARD_EDGE_JOB"
"""Environment variable of a job's processes: the job's folder."""

LOG = "log"
"""File in the job's folder with what its commands wrote to stderr."""

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
_RECORD_SECONDS = 0.5  # between reports of progress
_TAIL_BYTES = 16 * 1024
_PROGRESS = re.compile(r"([A-Za-z][^\n]{0,79}?) (\d{1,9})/(\d{1,9})")


class Stopped(Exception):  # noqa: N818 - no error
    """The command was told to stop."""


@final
@dataclass(frozen=True)
class Step:
    """A command of a job.

    Attributes:
        what: For messages.
        command: Program and arguments.
        required: Whether the job fails when the command does; otherwise the result says so.
        succeeds: Exit codes that are no failure.
    """

    what: str
    command: list[str]
    required: bool = True
    succeeds: frozenset[int] = frozenset({0})


def run_step(step: Step, folder: Path, report: Callable[[Progress], None], stopped: Callable[[], bool]) -> str | None:
    """Run one command.

    Args:
        step: The command.
        folder: Of the job.
        report: Told its progress, not too often: the lines `what done/total` that it writes to stderr.
        stopped: Asked now and then whether to stop it.

    Returns:
        Its problem in one line; None when it succeeded.

    Raises:
        Stopped: It was stopped, and all that it had started.
    """
    log = folder / LOG
    with log.open("ab") as stream:
        start = stream.tell()
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,  # a file, not a pipe: it is still there for a command that outlives this server
            start_new_session=True,
            env={**os.environ, MARK: str(folder), "GUARD_PROGRESS": "lines"},
        )
    try:
        code = _watch(process, log, start, report, stopped)
    finally:
        if process.poll() is None:
            _end_child(process)
            end_processes(folder)
    if code in step.succeeds:
        return None
    text = _last_words(log, start)
    logger.warning("job %s: %s ended with code %d: %s", folder.name, step.what, code, text or "nothing said")
    return _problem(step.what, code, text, folder)


def end_processes(folder: Path) -> None:
    """End every process of a job, and wait until it is gone."""
    found = [process for process in psutil.process_iter() if _belongs(process, folder)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    alive = _wait(found)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait(alive)
    if found:
        logger.info("job %s: ended %d processes of an earlier run", folder.name, len(found))


def _watch(
    process: subprocess.Popen[bytes], log: Path, start: int, report: Callable[[Progress], None], stopped: Callable[[], bool]
) -> int:
    seen: Progress | None = None
    reported: tuple[Progress | None, float] = None, 0.0
    with log.open("rb") as lines:
        lines.seek(start)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
            seen = _latest_progress(lines) or seen
            if seen is not None and seen != reported[0] and time.monotonic() - reported[1] >= _RECORD_SECONDS:
                report(seen)
                reported = seen, time.monotonic()
            if process.returncode is not None:
                return process.returncode
            if stopped():
                raise Stopped


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return bool(process.environ().get(MARK) == str(folder))
    except (psutil.Error, OSError):  # gone, or somebody else's
        return False


def _wait(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there in the end; what nobody reaps is dead all the same."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while alive := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _end_child(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _latest_progress(lines: IO[bytes]) -> Progress | None:
    """The last line of the form `what done/total` among those that were written meanwhile."""
    found = None
    while True:
        position = lines.tell()
        line = lines.readline(_TAIL_BYTES)
        if not line.endswith(b"\n") and len(line) < _TAIL_BYTES:
            lines.seek(position)  # half a line: again next time
            return found
        match = _PROGRESS.fullmatch(line.decode("utf-8", "replace").strip())
        if match is not None:
            found = Progress(what=match[1], done=int(match[2]), total=int(match[3]))


def _last_words(log: Path, start: int) -> str:
    """The last line that a command wrote."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _problem(what: str, code: int, text: str, folder: Path) -> str:
    """Why a command failed, for the device: our own one-line errors as they are, without the server's paths."""
    if code < 0:
        return f"{what} was ended by signal {-code}: the edge server may be short of memory"
    if code == 2 and text.startswith("guard: "):
        return text.removeprefix("guard: ").replace(f"{folder}{os.sep}", "")[:500]
    return f"{what} failed unexpectedly: see the edge server's log"
