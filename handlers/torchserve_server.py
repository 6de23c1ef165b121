"""A TorchServe of our own, on this machine only: for `guard serve --engine torchserve`, the demo and the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO, Self, final

from guard.errors import ServingError
from handlers.torchserve_api import Addresses
from handlers.torchserve_capacity import Capacity
from handlers.torchserve_rollout import RollOut, archive_config, archive_version, roll_out
from handlers.torchserve_setup import (
    HOST,
    STORE,
    ServerOptions,
    command,
    environment,
    find_java,
    pick_ports,
    stage_archive,
    stage_store,
    write_config,
)
from handlers.torchserve_store import Delivery
from handlers.torchserve_trial import archive_images

__all__ = ["ServerOptions", "TorchServeProcess"]

_LINES = 10_000
_TRACEBACK_SECONDS = 5.0  # until a crashed worker's is in the log, at most
_ERROR = re.compile(r"\b\w+(?:Error|Exception): ")
_CRASHED = ("Backend worker process died", "Failed to start workers", "Load model failed")


@final
class TorchServeProcess:
    """Starts TorchServe when entered, and stops it, with all its workers, when left.

    It listens on 127.0.0.1 alone and can't be told to load other models; its files lie in a private folder, which goes
    when it stops, so that several run side by side.

    Args:
        model_store: Folder of the archives.
        models: File names in there, by the name under which each is served.
        options: How it runs.
    """

    def __init__(self, model_store: Path, models: Mapping[str, str], options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        self.model_store = model_store.absolute()
        self.models = dict(models)
        self.ports: dict[str, int] = {}
        self._folder: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=_LINES)

    def __enter__(self) -> Self:
        """Start, and wait until every model answers.

        Raises:
            ServingError: A port is taken, Java is missing, a worker crashed, or it took too long.
            MissingExtraError: TorchServe is not installed.
        """
        java = find_java(self.options.environment)
        self.ports = pick_ports(self.options)
        try:
            self._launch(java)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop."""
        self.stop()

    @property
    def url(self) -> str:
        """Where clients go: `POST {url}/predictions/{model}`."""
        return f"http://{HOST}:{self.ports['inference']}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus goes."""
        return f"http://{HOST}:{self.ports['metrics']}/metrics"

    @property
    def pid(self) -> int:
        """Of the process group; 0 when it is not running."""
        return 0 if self._process is None else self._process.pid

    def token(self, api: str = "inference") -> str | None:
        """The token of an API (`inference`, `management`) for `Authorization: Bearer`; None without token_auth."""
        if self._folder is None or not self.options.token_auth:
            return None
        try:
            keys = json.loads((self._folder / "key_file.json").read_text())
            return str(keys[api]["key"])
        except (OSError, ValueError, KeyError):
            return None

    def log(self) -> str:
        """The last 10,000 lines that the frontend and the workers have written."""
        return "".join(self._lines.copy())

    @property
    def management_url(self) -> str:
        """Where versions are registered."""
        return f"http://{HOST}:{self.ports['management']}"

    @property
    def store(self) -> Path:
        """The private model store of the running server.

        Raises:
            ServingError: It is not running.
        """
        if self._folder is None:
            raise ServingError("expected a running TorchServe, got one that is stopped")
        return self._folder / STORE

    def roll_out(self, name: str, archive: Path, *, keep_old: bool = False, drain_timeout: float | None = None) -> RollOut:
        """Let a new version of a model take over, without a lost request; see `handlers.torchserve_rollout`.

        Workers, batch size and delay are those of this server's options, else of the archive's model-config, else of the
        version that is replaced.

        Args:
            name: Of the model.
            archive: Of the new version.
            keep_old: Leave the old version registered, without workers.
            drain_timeout: Seconds that the old version's workers get to finish what they have taken.

        Raises:
            ServingError: The server was not started with `model_api`, or the new version does not work; the old one serves on.
        """
        if not self.options.model_api:
            raise ServingError("expected a TorchServe started with model_api, got one whose models are fixed: start it so")
        version = archive_version(archive)

        def stage(target: Path) -> None:
            try:
                stage_archive(archive, target, self.options)
            except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
                raise ServingError(f"expected a model archive, got {archive}: make one with guard export") from error

        addresses = Addresses(
            management=self.management_url,
            inference=self.url,
            management_token=self.token("management"),
            inference_token=self.token(),
        )
        options = self.options
        given = Capacity(workers=options.workers, batch_size=options.batch_size, max_batch_delay=options.max_batch_delay_ms)
        return roll_out(
            name,
            f"{name}-{version}.mar",
            version,
            addresses,
            delivery=Delivery(self.store, stage),
            images=archive_images(archive),
            capacity=given.or_else(Capacity.read(archive_config(archive))),
            keep_old=keep_old,
            timeout=options.timeout,
            drain_timeout=drain_timeout,
        )

    def wait(self) -> None:
        """Block until the server ends by itself.

        Raises:
            ServingError: It did; the message carries its last words.
        """
        if self._process is not None:
            code = self._process.wait()
            raise ServingError(f"TorchServe ended by itself with exit code {code}: {self._last_words()}")

    def stop(self) -> None:
        """End every process that was started here and remove the private folder; a second call does nothing."""
        process, self._process = self._process, None
        folder, self._folder = self._folder, None
        try:
            if process is not None:
                _end_group(process, self.options.grace)
                _finish(process, self._reader)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _launch(self, java: str) -> None:
        folder = self._folder = Path(tempfile.mkdtemp(prefix="guard-ts-"))  # short: workers' sockets lie in here
        entries = stage_store(self.model_store, self.models, self.options, folder / STORE)
        write_config(folder, self.ports, entries, self.options)
        self._process = subprocess.Popen(
            command(folder, self.models, self.options),
            cwd=folder,  # TorchServe writes its tokens here
            env=environment(folder, java, self.options.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append(line)
            if self.options.echo is not None:
                with contextlib.suppress(OSError, ValueError):  # a closed terminal must not block the server
                    self.options.echo.write(line)
                    self.options.echo.flush()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.options.timeout
        waiting = list(self.models)
        while waiting:
            self._check_alive()
            if time.monotonic() > deadline:
                models, seconds = ", ".join(waiting), self.options.timeout
                raise ServingError(f"expected {models} to be ready within {seconds:g} s, got no answer: {self._last_words()}")
            waiting = [name for name in waiting if not (self._workers_ready(name) and self._answers(name))]
            if waiting:
                time.sleep(0.2)

    def _check_alive(self) -> None:
        process = self._process
        if process is not None and process.poll() is not None:
            raise ServingError(f"TorchServe ended with exit code {process.returncode}: {self._last_words()}")
        if any(sign in self.log() for sign in _CRASHED):
            deadline = time.monotonic() + _TRACEBACK_SECONDS
            while not _ERROR.search(self.log()) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(0.5)  # so that all of it is there
            raise ServingError(f"a TorchServe worker crashed while it loaded its model: {self._last_words()}")

    def _workers_ready(self, name: str) -> bool:
        status, body = self._request("GET", "management", f"/models/{name}")
        if status != 200:
            return False
        models = json.loads(body)
        return all(
            len(model["workers"]) >= max(1, model["minWorkers"]) and all(item["status"] == "READY" for item in model["workers"])
            for model in models
        )

    def _answers(self, name: str) -> bool:
        """Any answer of a worker will do; an empty body is the cheapest question."""
        status, _ = self._request("POST", "inference", f"/predictions/{name}")
        return status != 0

    def _request(self, method: str, api: str, path: str) -> tuple[int, bytes]:
        """Status 0 when nothing answers yet."""
        token = self.token(api)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection = HTTPConnection(HOST, self.ports[api], timeout=max(5.0, self.options.timeout / 4))
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _last_words(self, lines: int = 4) -> str:
        text = [line.strip() for line in self.log().splitlines() if line.strip()]
        errors = [line.split(" MODEL_LOG - ")[-1] for line in text if _ERROR.search(line)]
        return " | ".join((errors or text)[-lines:])[:600] or "it wrote no log"


def _end_group(process: subprocess.Popen[str], grace: float) -> None:
    """Ask, wait, insist: the launcher, Java and the workers are one process group, which we made."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            process.poll()
            if not _members(process.pid):
                break
            time.sleep(0.05)
        else:
            continue
        break
    process.wait()


def _members(group: int) -> list[int]:
    """Living processes of a group; those that only wait to be reaped don't count."""
    import psutil

    found = []
    for item in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(item.pid) == group and item.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(item.pid)
    return found


def _finish(process: subprocess.Popen[str], reader: threading.Thread | None) -> None:
    if reader is not None:
        reader.join(timeout=5.0)
    if process.stdout is not None and (reader is None or not reader.is_alive()):
        process.stdout.close()
