"""A thin device's side of an edge server: send a job, wait for it, fetch what came of it, and believe none of it unverified."""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, final

import msgspec

from guard.errors import UNREADABLE, EdgeError, MissingExtraError, one_line
from handlers.edge_protocol import FileInfo, JobRequest, JobStatus, Manifest, Progress, check_job_id, check_token, open_sealed

try:
    import httpx
except ImportError as error:
    raise MissingExtraError("httpx", "device") from error

ProgressReport = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""

_CHUNK = 256 * 1024
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_FIRST_WAIT = 0.25
_LONGEST_WAIT = 5.0
_PASSING = (502, 503, 504)  # what a proxy says while the server behind it restarts
_Value = TypeVar("_Value")


@final
class EdgeClient:
    """Talks to an edge server, as a context manager.

    Args:
        url: Of the server, such as https://edge.example:8443; a proxy may add a path.
        token: That the server knows.
        insecure: Allow plain HTTP to other machines: whoever listens learns token, model and images.
        patience: Seconds for which a server that does not answer is waited for, once it has answered.
        poll_seconds: Between looks at a job.
        transport: How requests travel; for tests.

    Raises:
        EdgeError: A URL or a token that can't be used.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        insecure: bool = False,
        patience: float = 300.0,
        poll_seconds: float = 1.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._token = check_token(token)
        base = _checked_url(url, insecure)
        self.url = str(base)
        self._patience, self._poll_seconds = patience, poll_seconds
        self._http = httpx.Client(
            base_url=base,
            headers={"authorization": f"Bearer {self._token}", "accept-encoding": "identity"},
            timeout=_TIMEOUT,
            transport=transport,
            trust_env=not _is_loopback(base.host),  # a proxy has no part in what stays on this machine
        )

    def __enter__(self) -> Self:
        """Nothing is sent yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        self._http.close()

    def create(self, request: JobRequest) -> str:
        """Announce a job.

        Returns:
            Its id.

        Raises:
            EdgeError: The server refuses it, or can't be reached.
        """
        body = msgspec.json.encode(request)
        return check_job_id(self._once(lambda: self._status(self._http.post("v1/jobs", content=body))).id)

    def upload(self, job_id: str, files: Mapping[str, Path], progress: ProgressReport) -> None:
        """Send a job's files; those that are there already are not sent again.

        Args:
            job_id: Of the job.
            files: By the name that was declared.
            progress: Told the bytes.

        Raises:
            EdgeError: The server refuses one, or stays away.
        """
        total = sum(path.stat().st_size for path in files.values())
        done = 0
        for name, path in files.items():
            self._patiently(functools.partial(self._send, job_id, name, path, done, total, progress))
            done += path.stat().st_size

    def start(self, job_id: str) -> None:
        """Have a job run; once is enough, and twice does no harm.

        Raises:
            EdgeError: The server refuses, or stays away.
        """
        self._patiently(lambda: self._status(self._http.post(f"v1/jobs/{job_id}/start")))

    def status(self, job_id: str) -> JobStatus:
        """How a job is; its texts are the server's.

        Raises:
            EdgeError: There is none of this id, or the server stays away.
        """
        path = f"v1/jobs/{check_job_id(job_id)}"
        status = self._patiently(lambda: self._status(self._http.get(path)))
        if status.id != job_id:
            raise EdgeError("expected the job that was asked for, got another: check the URL")
        return status

    def wait(self, job_id: str, progress: ProgressReport) -> JobStatus:
        """Wait until a job is done, also across restarts of the server.

        Args:
            job_id: Of the job.
            progress: Told the job's own.

        Raises:
            EdgeError: It failed, or the server stays away.
        """
        shown: Progress | None = None
        while True:
            status = self.status(job_id)
            if status.state == "done":
                return status
            if status.state == "failed":
                raise EdgeError(
                    f"the edge server could not do it: {printable(status.error or 'it does not say why')}", code="job-failed"
                )
            if status.state == "receiving":
                missing = ", ".join(status.missing) or "the start"
                raise EdgeError(f"expected a job that runs, got one that waits for {missing}: repair again without --edge-job")
            now = Progress(what="waiting for other jobs", done=0, total=status.ahead) if status.ahead else status.progress
            if now is not None and now != shown:
                progress(f"{printable(now.what)} (edge)", now.done, now.total)
                shown = now
            time.sleep(self._poll_seconds)

    def manifest(self, status: JobStatus, sent: tuple[FileInfo, ...]) -> Manifest:
        """What came of a job that is done, verified to be its own.

        Args:
            status: Of the job.
            sent: What it must have been made of.

        Raises:
            EdgeError: It was changed, or is another job's.
        """
        if status.result is None:
            raise EdgeError(f"expected a job that is done, got one that is {status.state}: wait for it")
        manifest = open_sealed(self._token, status.result)
        if manifest.job != status.id:
            raise EdgeError("refused the edge server's result: it is another job's")
        strange = [item.name for item in sent if item not in manifest.sent]
        if strange:
            raise EdgeError(f"refused the edge server's result: it was made of another {strange[0]} than ours")
        return manifest

    def fetch(self, manifest: Manifest, folder: Path, progress: ProgressReport) -> None:
        """Bring a result's files into a folder, each verified.

        Args:
            manifest: From `manifest`.
            folder: An existing one.
            progress: Told the bytes.

        Raises:
            EdgeError: A file differs from the manifest, does not fit on the disk, or the server stays away.
        """
        total = sum(item.size for item in manifest.files)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise EdgeError(f"expected room for the result's {total} bytes beside {folder.parent}, got {free}: make room")
        done = 0
        for item in manifest.files:
            path = folder / item.name
            path.parent.mkdir(exist_ok=True)
            self._patiently(functools.partial(self._receive, manifest.job, item, path, done, total, progress))
            done += item.size

    def delete(self, job_id: str) -> None:
        """Have the server forget a job, and all that it was sent.

        Raises:
            EdgeError: It refuses, or can't be reached.
        """

        def ask() -> None:
            answer = self._http.delete(f"v1/jobs/{job_id}")
            if answer.status_code != 404:
                _check(answer)

        self._once(ask)

    def _send(self, job_id: str, name: str, path: Path, before: int, total: int, progress: ProgressReport) -> None:
        if name not in self._status(self._http.get(f"v1/jobs/{job_id}")).missing:
            return
        headers = {"content-length": str(path.stat().st_size), "content-type": "application/octet-stream"}
        _check(
            self._http.put(f"v1/jobs/{job_id}/files/{name}", content=_pieces(path, before, total, progress), headers=headers)
        )

    def _receive(self, job_id: str, item: FileInfo, path: Path, before: int, total: int, progress: ProgressReport) -> None:
        size, digest = 0, hashlib.sha256()
        with self._http.stream("GET", f"v1/jobs/{job_id}/files/{item.name}") as answer, path.open("wb") as file:
            if not answer.is_success:
                answer.read()
                _check(answer)
            for chunk in answer.iter_raw(_CHUNK):
                size += len(chunk)
                if size > item.size:
                    break
                digest.update(chunk)
                file.write(chunk)
                progress("fetching the result", before + size, total)
        if size != item.size or not hmac.compare_digest(digest.hexdigest(), item.sha256):
            raise EdgeError(
                f"refused the edge server's result: {item.name} differs from its checksum (SHA-256): it was changed on the way "
                "or on the server; repair again"
            )

    def _status(self, answer: httpx.Response) -> JobStatus:
        _check(answer)
        try:
            return msgspec.json.decode(answer.content, type=JobStatus)
        except UNREADABLE as error:
            raise EdgeError(
                f"expected an edge server of this version at {self.url}, got another answer: check the URL"
            ) from error

    def _once(self, request: Callable[[], _Value]) -> _Value:
        """A request that may not be repeated, or need not."""
        try:
            return request()
        except (httpx.RequestError, _PassingError) as error:
            raise EdgeError(f"can't reach the edge server at {self.url} ({one_line(error)}): is it running?") from error

    def _patiently(self, request: Callable[[], _Value]) -> _Value:
        """A request that may be repeated, and is, while the server is away."""
        deadline, wait = None, _FIRST_WAIT
        while True:
            try:
                return request()
            except (httpx.TransportError, _PassingError) as error:
                deadline = deadline or time.monotonic() + self._patience
                if time.monotonic() + wait > deadline:
                    raise EdgeError(
                        f"the edge server at {self.url} has not answered for {self._patience:g} s ({one_line(error)}): start "
                        "it again, and it goes on where it was"
                    ) from error
            except httpx.RequestError as error:  # a body that can't be decoded, which is not the next time either
                raise EdgeError(
                    f"expected an edge server's answer from {self.url}, got another ({one_line(error)}): check the URL"
                ) from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)


class _PassingError(Exception):
    """A refusal that is worth another try."""


def _check(answer: httpx.Response) -> None:
    """Raise what the server refuses with."""
    if answer.is_success:
        return
    message, code = _reason(answer)
    if answer.status_code == 401:
        raise EdgeError("the edge server refuses the token: pass its own with --edge-token-file", 401, "unauthorized")
    if answer.status_code in _PASSING and code is None:  # not our server's own words
        raise _PassingError(f"HTTP {answer.status_code}")
    raise EdgeError(f"the edge server refuses: {message}", answer.status_code, code)


def printable(text: str) -> str:
    """A server's text on one line, without what would steer a terminal."""
    return one_line(EdgeError(text), 500)


def _reason(answer: httpx.Response) -> tuple[str, str | None]:
    """A refusal's message and code; foreign text is not repeated at length."""
    try:
        body: Any = msgspec.json.decode(answer.content)
        message, code = body["message"], body["reason"]
    except (*UNREADABLE, KeyError, TypeError):
        return f"HTTP {answer.status_code}, which is no edge server's answer: check the URL", None
    return printable(str(message)), printable(str(code))


def _pieces(path: Path, before: int, total: int, progress: ProgressReport) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
            before += len(chunk)
            progress("sending", before, total)


def _checked_url(url: str, insecure: bool) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        parsed.host.encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise EdgeError(f"expected a URL like https://edge.example:8443, got {url!r}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise EdgeError("expected a URL like https://edge.example:8443, without a user or a query, got another")
    if parsed.scheme == "http" and not _is_loopback(parsed.host) and not insecure:
        raise EdgeError(
            f"expected https for {parsed.host}, got http, which shows token and images to whoever listens: put TLS in front, "
            "or pass --insecure-edge on a network that you trust"
        )
    return parsed


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
