from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from guard.errors import EdgeError
from handlers.asgi_server import AsgiServer
from handlers.edge_client import EdgeClient
from handlers.edge_protocol import FileInfo, JobStatus, Manifest, Sealed, seal
from handlers.edge_worker import Plan
from tests.handlers.toy_edge import FAILS, REPAIR, SLEEPS, TOKEN, Edge, edge_server, requested, running, sent_files

POLL = 0.05


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Served:
    """An edge server with a socket, and a device's files."""

    edge: Edge
    url: str
    files: dict[str, Path]

    def client(self, token: str = TOKEN, patience: float = 20.0) -> EdgeClient:
        return EdgeClient(self.url, token, patience=patience, poll_seconds=POLL)

    def run(self, client: EdgeClient) -> JobStatus:
        """A job, from its announcement to its end."""
        job = client.create(requested({name: path.read_bytes() for name, path in self.files.items()}))
        client.upload(job, self.files, silent)
        client.start(job)
        return client.wait(job, silent)


@contextmanager
def served(folder: Path, plan: Plan | None = None, port: int = 0) -> Iterator[Served]:
    sent = folder / "device"
    sent.mkdir(exist_ok=True)
    for name, data in sent_files().items():
        (sent / name).write_bytes(data)
    with edge_server(folder / "edge", plan) as edge, AsgiServer(edge.app, port=port) as server:
        yield Served(edge, server.url, {name: sent / name for name in sent_files()})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def own(files: dict[str, Path]) -> tuple[FileInfo, ...]:
    return requested({name: path.read_bytes() for name, path in files.items()}).files


def fetched(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_result_arrives_as_it_was_made(tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    (tmp_path / "out").mkdir()
    with served(tmp_path) as server, server.client() as client:
        status = server.run(client)
        client.fetch(client.manifest(status, own(server.files)), tmp_path / "out", lambda *step: shown.append(step))
        found = fetched(tmp_path / "out")
        client.delete(status.id)
        client.delete(status.id)  # gone already
        assert list(server.edge.store.jobs()) == []
    assert found["model.pt2"] == sent_files()["model.pt2"][::-1]
    assert set(found) == {"model.pt2", "repair.json", "profile/guard.json"}
    assert shown[-1][1] == shown[-1][2] == sum(map(len, found.values()))


def test_a_wrong_token_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server, server.client("another-token-of-some-length") as client:
        with pytest.raises(EdgeError, match="refuses the token") as caught:
            server.run(client)
        assert caught.value.status == 401
        assert list(server.edge.store.jobs()) == []


def test_a_failed_job_is_told(tmp_path: Path) -> None:
    with (
        served(tmp_path, running(FAILS)) as server,
        server.client() as client,
        pytest.raises(EdgeError, match=r"more of sent/clean\.npz"),
    ):
        server.run(client)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with served(tmp_path) as server, server.client() as client:
        status = server.run(client)
        manifest = client.manifest(status, own(server.files))
        path = server.edge.store.result(status.id) / "model.pt2"
        good = path.read_bytes()
        for bad in (b"x" + good[1:], good[:-1], good + b"x"):
            path.write_bytes(bad)
            with pytest.raises(EdgeError, match=r"model\.pt2 differs from its checksum"):
                client.fetch(manifest, tmp_path / "out", silent)


def test_a_changed_file_is_refused_also_where_its_checksum_was_changed(tmp_path: Path) -> None:
    with served(tmp_path) as server, server.client() as client:
        status = server.run(client)
        assert status.result is not None
        manifest = msgspec.json.decode(status.result.manifest, type=Manifest)
        changed = msgspec.structs.replace(manifest.files[0], sha256="0" * 64)
        forged = msgspec.structs.replace(manifest, files=(changed, *manifest.files[1:]))
        text = msgspec.json.encode(forged).decode()
        for key in (status.result.seal, seal("a-token-that-an-attacker-has", text)):
            server.edge.store.update(status.id, result=Sealed(manifest=text, seal=key))
            with pytest.raises(EdgeError, match="manifest was changed"):
                client.manifest(client.status(status.id), own(server.files))


def test_the_result_of_another_job_or_model_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server, server.client() as client:
        first, second = server.run(client), server.run(client)
        swapped = msgspec.structs.replace(second, result=first.result)
        with pytest.raises(EdgeError, match="another job's"):
            client.manifest(swapped, own(server.files))
        server.files["model.pt2"].write_bytes(b"another model")
        with pytest.raises(EdgeError, match=r"another model\.pt2"):
            client.manifest(second, own(server.files))


@pytest.mark.parametrize(
    "name", ["../model.pt2", "/model.pt2", "profile/../../x.json", "model.pkl", ".bashrc", "a/b.json", "MODEL.pt2"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    info = FileInfo(name=name, size=1, sha256="0" * 64)
    text = msgspec.json.encode(Manifest(job="0" * 32, sent=(), files=(info,))).decode()
    status = JobStatus(id="0" * 32, state="done", result=Sealed(manifest=text, seal=seal(TOKEN, text)))
    with EdgeClient("http://127.0.0.1:1", TOKEN) as client, pytest.raises(EdgeError, match="names files"):
        client.manifest(status, ())


def test_a_restart_of_the_server_is_waited_out(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as first, ExitStack() as second:
        server = first.enter_context(served(tmp_path, running(SLEEPS), port))
        restarted = threading.Event()

        def restart(what: str, done: int, total: int) -> None:
            if not restarted.is_set():
                restarted.set()
                first.close()
                threading.Timer(1.0, lambda: second.enter_context(served(tmp_path, running(REPAIR), port))).start()

        with server.client() as client:
            job = client.create(requested(sent_files()))
            client.upload(job, server.files, silent)
            client.start(job)
            assert client.wait(job, restart).state == "done"
        assert restarted.is_set()


def test_a_server_that_stays_away_is_given_up() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with EdgeClient(url, TOKEN, patience=0.3) as client:
        with pytest.raises(EdgeError, match="can't reach the edge server"):
            client.create(requested(sent_files()))
        with pytest.raises(EdgeError, match=r"not answered for 0\.3 s"):
            client.status("0" * 32)


def test_an_upload_that_breaks_off_is_sent_again_and_only_what_is_missing(tmp_path: Path) -> None:
    sent: list[str] = []
    with served(tmp_path) as server:
        real = httpx.HTTPTransport()

        def unreliable(request: httpx.Request) -> httpx.Response:
            if request.method == "PUT":
                sent.append(request.url.path.rpartition("/")[2])
                if len(sent) == 2:
                    raise httpx.WriteError("broken pipe")
                if len(sent) == 3:  # it arrived, and the answer was lost
                    real.handle_request(request).read()
                    raise httpx.ReadError("connection reset")
            if request.url.path.endswith("/start") and sent[-1] != "start":
                sent.append("start")
                return httpx.Response(502, text="Bad Gateway")
            return real.handle_request(request)

        with real, EdgeClient(server.url, TOKEN, poll_seconds=POLL, transport=httpx.MockTransport(unreliable)) as client:
            assert server.run(client).state == "done"
    assert sent == ["model.pt2", "clean.npz", "clean.npz", "quarantine.npz", "start"]


def test_a_refused_file_is_not_sent_again(tmp_path: Path) -> None:
    with served(tmp_path) as server, server.client() as client:
        job = client.create(requested(sent_files()))
        server.files["clean.npz"].write_bytes(server.files["clean.npz"].read_bytes()[:-9])  # since it was declared
        with pytest.raises(EdgeError, match="got"):
            client.upload(job, server.files, silent)


@pytest.mark.parametrize(
    ("url", "insecure", "problem"),
    [
        ("http://edge.example", False, "expected https for edge.example"),
        ("http://192.0.2.7:8090", False, "expected https"),
        ("http://localhost.example", False, "expected https"),
        ("ftp://127.0.0.1", True, "expected a URL"),
        ("edge.example:8090", False, "expected a URL"),
        ("http://user:secret@127.0.0.1", False, "without a user"),
        ("https://edge.example/?token=x", False, "without a user or a query"),
        ("http://[::1", False, "expected a URL"),
        ("https://edge..example", False, "expected a URL"),
    ],
)
def test_urls_that_would_give_the_token_away_are_refused(url: str, insecure: bool, problem: str) -> None:
    with pytest.raises(EdgeError, match=problem) as caught:
        EdgeClient(url, TOKEN, insecure=insecure)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "insecure"),
    [
        ("http://127.0.0.1:1", False),
        ("http://[::1]:1", False),
        ("http://localhost", False),
        ("https://e.example/edge", False),
        ("http://e.example", True),
    ],
)
def test_other_urls_are_fine(url: str, insecure: bool) -> None:
    with EdgeClient(url, TOKEN, insecure=insecure) as client:
        assert client.url.startswith(url.rstrip("/"))


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> EdgeClient:
    return EdgeClient(
        "https://edge.example/below", TOKEN, patience=0.0, poll_seconds=POLL, transport=httpx.MockTransport(respond)
    )


def test_paths_are_below_the_url_and_redirects_are_not_followed() -> None:
    asked: list[str] = []

    def elsewhere(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(307, headers={"location": "https://attacker.example/"})

    with answering(elsewhere) as client, pytest.raises(EdgeError, match="HTTP 307"):
        client.status("0" * 32)
    assert asked == ["https://edge.example/below/v1/jobs/" + "0" * 32]


def test_a_servers_text_cannot_steer_a_terminal() -> None:
    body = {"reason": "x\x1b[2J", "message": "\x1b[31mred\nlines"}
    with answering(lambda _: httpx.Response(409, json=body)) as client, pytest.raises(EdgeError) as caught:
        client.status("0" * 32)
    assert str(caught.value) == "the edge server refuses: [31mred lines"


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b'{"id":"../x","state":"done"}', b'{"id":1}', b'{"id":"\xff"}', b"[" * 100_000]
)
def test_what_is_no_edge_server_is_told(content: bytes) -> None:
    with answering(lambda _: httpx.Response(200, content=content)) as client:
        with pytest.raises(EdgeError, match="check the URL"):
            client.status("0" * 32)
        with pytest.raises(EdgeError):
            client.create(requested(sent_files()))


@pytest.mark.parametrize("code", [502, 503, 504])
def test_a_proxy_without_its_server_is_an_error_of_ours(code: int) -> None:
    with answering(lambda _: httpx.Response(code)) as client:
        for ask in (lambda: client.create(requested(sent_files())), lambda: client.delete("0" * 32)):
            with pytest.raises(EdgeError, match=f"can't reach the edge server .*HTTP {code}"):
                ask()


def test_a_body_that_cannot_be_decoded_is_an_error_of_ours() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip"))

    with answering(broken) as client:
        for ask in (lambda: client.create(requested(sent_files())), lambda: client.status("0" * 32)):
            with pytest.raises(EdgeError, match="edge server"):
                ask()
