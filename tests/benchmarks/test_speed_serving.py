"""The load that servers are compared under, and the bare server's handler."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks.speed.bare_handler import BareHandler
from benchmarks.speed.serving import ask, encoded
from guard import InputSpec, decode_image
from guard.errors import ServingError
from guard.predictors.onnx import OnnxBackend


class _Counting(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200
    fails_at = 0  # the request that gets a 500
    bodies: list[bytes]
    connections: set[int]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.connections.add(self.client_address[1])
        self.send_response(500 if len(self.bodies) == self.fails_at else self.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def counting() -> Iterator[tuple[str, type[_Counting]]]:
    class Handler(_Counting):
        bodies, connections = [], set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/predictions/toy", Handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_request_is_sent_once_over_one_connection_a_client(counting: tuple[str, type[_Counting]]) -> None:
    url, handler = counting
    rate, waited = ask(url, [b"one", b"two", b"three"], clients=4, requests=30)
    assert sorted(handler.bodies) == [b"one"] * 10 + [b"three"] * 10 + [b"two"] * 10
    assert 1 <= len(handler.connections) <= 4
    assert len(waited) == 30
    assert sum(waited) / 4 <= 30 / rate * 1.5


def test_the_others_stop_where_one_fails(counting: tuple[str, type[_Counting]]) -> None:
    url, handler = counting
    handler.fails_at = 20
    with pytest.raises(ServingError, match="got status 500"):
        ask(url, [b"one"], clients=3, requests=5_000)
    assert len(handler.bodies) < 1_000


def test_rejections_are_answers_and_failures_are_not(counting: tuple[str, type[_Counting]]) -> None:
    url, handler = counting
    handler.status = 422
    assert len(ask(url, [b"one"], clients=2, requests=5)[1]) == 5
    handler.status = 503
    with pytest.raises(ServingError, match="status 503"):
        ask(url, [b"one"], clients=2, requests=5)


def test_the_bare_server_answers_as_the_guarded_model(tmp_path: Path) -> None:
    spec = InputSpec(channels=3, height=8, width=8)
    nodes = [helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4])]
    nodes += [helper.make_node("Flatten", ["pooled"], ["logits"])]
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *spec.shape])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12])
    graph = helper.make_graph(nodes, "quadrants", [taken], [given])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    handler = BareHandler()
    handler.initialize(SimpleNamespace(system_properties={"model_dir": str(tmp_path)}))
    rows: list[Mapping[str, bytes]] = [{"body": body} for body in encoded(torch.rand(6, *spec.shape))]
    answers = handler.handle(rows, None)
    decoded = torch.stack([decode_image(row["body"], spec) for row in rows])
    raw = OnnxBackend.load(tmp_path / "model.onnx")(decoded)
    likeliest = torch.as_tensor(raw).softmax(dim=1).max(dim=1)
    assert [answer["label"] for answer in answers] == likeliest.indices.tolist()
    assert [answer["probability"] for answer in answers] == pytest.approx(likeliest.values.tolist(), abs=1e-5)
