from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import cast

import anyio
import httpx
import pytest
import torch
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard import Guard, GuardError, Limits, Policy
from guard.preprocessors import Gym
from handlers.middleware import GuardMiddleware
from handlers.prometheus import PrometheusMetrics
from handlers.service import ImageService
from tests.handlers.toy_service import (
    GONE,
    TIMEOUT,
    bomb,
    call,
    chunk,
    clean,
    drive,
    nan_when_dark,
    post,
    toy_guard,
    toy_service,
    triggered,
)


class Users:
    """The user's application: remembers what reached it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.types: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.types.append(scope["type"])
        if scope["type"] == "http":
            self.bodies.append(await Request(scope, receive).body())
            await PlainTextResponse("the user's answer")(scope, receive, send)


def guarded(
    service: ImageService | None = None,
    paths: Sequence[str] = ("/predict",),
    methods: Sequence[str] = ("POST", "PUT", "PATCH"),
    form_fields: Sequence[str] = (),
    metrics: PrometheusMetrics | None = None,
) -> tuple[Users, GuardMiddleware]:
    users = Users()
    judge = service or toy_service()
    return users, GuardMiddleware(users, judge, paths=paths, methods=methods, form_fields=form_fields, metrics=metrics)


def form(*bodies: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{row}.png", body)) for row, body in enumerate(bodies)]


def test_an_accepted_image_reaches_the_application_byte_for_byte() -> None:
    users, app = guarded()
    answer = post(app, clean(), path="/predict")
    assert [answer.status_code, answer.text] == [200, "the user's answer"]
    assert users.bodies == [clean()]


def test_what_is_refused_never_reaches_the_application() -> None:
    users, app = guarded(toy_service(limits=Limits(max_bytes=100_000)))
    bodies = [triggered(), b"junk", b"", clean()[:50], bomb(), bytes(100_001)]
    answers = [post(app, body, path="/predict") for body in bodies]
    assert [answer.status_code for answer in answers] == [422, 400, 400, 400, 413, 413]
    assert answers[0].json()["request_id"] == answers[0].headers["x-request-id"]
    assert users.bodies == []


def test_a_failing_guard_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    users, app = guarded(toy_service(toy_guard(answers=lambda images: torch.full((len(images), 4), torch.nan))))
    assert post(app, clean(), path="/predict").status_code == 503
    for target in (Guard, ImageService):
        monkeypatch.setattr(target, "__call__", broken)
        answer = post(app, clean(), path="/predict")
        assert answer.status_code == 503
        assert "secret" not in answer.text
    assert users.bodies == []


def test_monitor_mode_lets_suspicious_images_through_and_counts_them() -> None:
    metrics = PrometheusMetrics()
    users, app = guarded(toy_service(toy_guard(Policy(mode="monitor"))), metrics=metrics)
    assert post(app, triggered(), path="/predict").text == "the user's answer"
    assert users.bodies == [triggered()]
    labels = {"model": "toy", "outcome": "suspicious"}
    assert metrics.registry.get_sample_value("guard_requests_total", labels) == 1


@pytest.mark.parametrize("path", ["/predict", "/predict/", "//predict", "/v1/images", "/v1/images/deep/er", "/v1//images/x/"])
def test_guarded_paths(path: str) -> None:
    users, app = guarded(paths=("/predict", "/v1/images", "/v1/images/*"))
    assert post(app, triggered(), path=path).status_code == 422
    assert users.bodies == []


@pytest.mark.parametrize("path", ["/", "/predictor", "/predict/other", "/v1/image", "/v1/imagesx", "/other"])
def test_other_paths_pass_untouched(path: str) -> None:
    users, app = guarded(paths=("/predict", "/v1/images/*"))
    assert post(app, b"anything", path=path).text == "the user's answer"
    assert users.bodies == [b"anything"]


def test_everything_can_be_guarded() -> None:
    _, app = guarded(paths=("/*",))
    assert [post(app, triggered(), path=path).status_code for path in ("/", "/a", "/a/b")] == [422, 422, 422]


def test_other_methods_pass_untouched_unless_named() -> None:
    users, app = guarded()
    call(app, *(httpx.Request(method, "http://test/predict", content=b"x") for method in ("GET", "DELETE", "OPTIONS")))
    assert users.bodies == [b"x"] * 3
    images = [httpx.Request(method, "http://test/predict", content=triggered()) for method in ("POST", "PUT", "PATCH")]
    assert [answer.status_code for answer in call(app, *images)] == [422] * 3
    _, strict = guarded(methods=("POST",))
    sent = drive(strict, [chunk(triggered())], "/predict", method="post")
    assert sent[0]["status"] == 422


def test_websockets_and_lifespan_pass_untouched() -> None:
    users, app = guarded()

    async def nothing() -> Message:
        return {}

    async def ignore(_: Message) -> None:
        return

    for kind in ("websocket", "lifespan"):
        asyncio.run(app({"type": kind, "path": "/predict"}, nothing, ignore))
    assert users.types == ["websocket", "lifespan"]


def test_a_mounted_application_is_guarded_with_its_root_path() -> None:
    users = Users()
    inner = GuardMiddleware(users, toy_service())
    app = Starlette(routes=[Mount("/api", app=inner)])
    assert post(app, triggered(), path="/api/predict").status_code == 422
    assert post(app, clean(), path="/api/predict").text == "the user's answer"


@pytest.mark.parametrize(
    "path",
    ["/predict%0A", "/predict%0D%0A/", "/x/predict%0A", "/one/a%0A", "/all/", "/all//", "/all", "/all/a/b", "/sub/", "/sub//a"],
)
def test_what_a_router_takes_for_a_guarded_path_is_guarded(path: str) -> None:
    """A triggered image is refused, or not routed: it is never answered."""

    async def answer(_: Request) -> PlainTextResponse:
        return PlainTextResponse("the user's answer")

    inner = [Route("/", answer, methods=["POST"]), Route("/{name}", answer, methods=["POST"])]
    wanted = ("/predict", "/x/predict", "/one/{name}", "/all/{rest:path}")
    routes = [*(Route(item, answer, methods=["POST"]) for item in wanted), Mount("/sub", routes=inner)]
    app = GuardMiddleware(
        Starlette(routes=routes), toy_service(), paths=("/predict", "/x/predict", "/one/*", "/all/*", "/sub/*")
    )
    assert post(app, triggered(), path=path).status_code == 422
    if not path.startswith("/sub//"):
        assert post(app, clean(), path=path).status_code in (200, 307, 404)


def test_a_root_path_that_an_application_tells_only_when_it_is_called_is_no_way_round() -> None:
    class Late:
        """As FastAPI does it."""

        def __init__(self, root_path: str) -> None:
            self.users, self.root_path = Users(), root_path

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope["root_path"] = self.root_path
            await self.users(scope, receive, send)

    class Around:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

    async def hidden(scope: Scope, receive: Receive, send: Send) -> None:
        await late(scope, receive, send)

    late = Late("/api/")
    mounted, apps = Starlette(routes=[Mount("/", app=late)]), list[ASGIApp]([late, Around(Around(late)), hidden])
    for inner in [*apps, cast(ASGIApp, mounted)]:
        for paths in (("/predict",), ("/", "/predict")):
            app = GuardMiddleware(inner, toy_service(), paths=paths)
            for path in ("/predict", "/api/predict", "/api//predict/", "/any/where/predict"):
                assert post(app, triggered(), path=path).status_code == 422
            assert post(app, b"else", path="/api/else").status_code == 200
    for inner in apps[:2]:
        app = GuardMiddleware(inner, toy_service(), paths=("/api/predict",))
        assert post(app, triggered(), path="/predict").status_code == 422  # as a proxy sends it that takes the prefix away
    assert late.users.bodies == [b"else"] * 8


@pytest.mark.parametrize("path", ["http://host/predict", "/a/../predict", "/predict;x/../../predict"])
def test_targets_in_other_forms_are_guarded(path: str) -> None:
    users, app = guarded()
    assert drive(app, [chunk(triggered())], path)[0]["status"] == 422
    assert users.bodies == []


def test_a_form_without_files_may_not_begin_with_an_image() -> None:
    """A PGM may go on after its pixels, for a parser of forms to read."""
    users, app = guarded()
    pgm = b"P5\n8 8\n255\n" + bytes(64)
    for content_type in (
        "application/x-www-form-urlencoded",
        "image/png, Application/X-WWW-Form-URLencoded; charset=utf-8",
        "x/url-encoded",
    ):
        refused = post(app, pgm + b"&image=aGVsbG8", path="/predict", headers={"content-type": content_type})
        assert refused.status_code == 400
        assert refused.json()["reason"] == "bad-input"
    assert users.bodies == []


def test_one_file_is_judged_and_the_form_replayed() -> None:
    async def upload(request: Request) -> PlainTextResponse:
        async with request.form() as fields:
            file = fields["file"]
            assert isinstance(file, UploadFile)
            return PlainTextResponse((await file.read()).hex())

    options = [Middleware(GuardMiddleware, toy_service())]
    app = Starlette(routes=[Route("/predict", upload, methods=["POST"])], middleware=options)
    assert post(app, files=form(clean()), path="/predict").text == clean().hex()
    assert post(app, files=form(triggered()), path="/predict").status_code == 422


def test_a_form_may_not_smuggle_an_unjudged_image() -> None:
    users, app = guarded(form_fields=("top_k",))
    assert post(app, files=form(clean()), data={"top_k": "3"}, path="/predict").status_code == 200
    assert len(users.bodies) == 1
    assert post(app, files=form(clean(), triggered()), path="/predict").status_code == 400
    assert post(app, files=form(clean(), triggered()), data={"top_k": "3"}, path="/predict").status_code == 400
    other = post(app, files=form(clean()), data={"other": "3"}, path="/predict")
    assert (other.status_code, "the form fields other, which this server" in other.json()["message"]) == (400, True)
    assert post(app, data={"top_k": "3"}, path="/predict").status_code == 400
    assert post(app, files=[("top_k", ("x.png", triggered()))], path="/predict").status_code == 422
    assert len(users.bodies) == 1


def test_one_body_may_not_have_two_readings() -> None:
    """An image in front of a form, or a form under two content types: parsers differ on which part is the image."""
    users, app = guarded()
    request = httpx.Request("POST", "http://test/", files=form(clean()))
    body, content_type = request.read(), request.headers["content-type"]
    preamble = post(app, triggered() + b"\r\n" + body, path="/predict", headers={"content-type": content_type})
    assert preamble.status_code == 400
    trailing = post(app, body + triggered(), path="/predict", headers={"content-type": content_type})
    assert trailing.status_code == 400
    twice = [(b"content-type", b"image/png"), (b"content-type", content_type.encode())]
    sent = drive(app, [chunk(clean() + b"\r\n" + body)], "/predict", twice)
    assert sent[0]["status"] == 400
    assert users.bodies == []


def test_the_disconnect_comes_after_the_replayed_body() -> None:
    seen: list[Message] = []

    async def users(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    messages = [chunk(clean()[:10], True), chunk(clean()[10:]), GONE]
    assert drive(GuardMiddleware(users, toy_service()), messages, "/predict") == []
    assert seen == [chunk(clean()), GONE]


def test_a_client_that_stays_is_not_taken_for_gone() -> None:
    async def users(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with anyio.move_on_after(0.05) as waited:
            await receive()
        await PlainTextResponse(str(waited.cancelled_caught))(scope, receive, send)

    sent = drive(GuardMiddleware(users, toy_service()), [chunk(clean())], "/predict")
    assert sent[1]["body"] == b"True"


def test_a_client_that_leaves_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    users, app = guarded()
    with caplog.at_level(logging.INFO):
        assert drive(app, [chunk(b"x", True), GONE], "/predict") == []
    assert caplog.records == []
    assert users.bodies == []


def test_the_applications_own_errors_stay_its_own() -> None:
    async def users(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        post(GuardMiddleware(users, toy_service()), clean(), path="/predict")


def test_neighbours_do_not_mix() -> None:
    users, app = guarded(toy_service(toy_guard(answers=nan_when_dark)))

    async def run() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            bodies = [triggered() if row % 2 else clean() for row in range(20)]
            answers = await asyncio.gather(*(client.post("/predict", content=body) for body in bodies))
            return [answer.status_code for answer in answers]

    assert asyncio.run(asyncio.wait_for(run(), TIMEOUT)) == [200, 422] * 10
    assert users.bodies == [clean()] * 10


def test_a_preprocessor_is_refused() -> None:
    plain = toy_guard()
    with_gym = ImageService(Guard(plain.predictor, plain.detectors, preprocessor=Gym()), "toy")
    with pytest.raises(GuardError, match="without a preprocessor"):
        GuardMiddleware(Users(), with_gym)


@pytest.mark.parametrize("paths", ["/predict", (), ("predict",)])
def test_paths_that_guard_nothing_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(GuardError, match="expected a list of paths"):
        GuardMiddleware(Users(), toy_service(), paths=paths)


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("/predict/{m}", "/predict/*"),
        ("/predict/{m}/", "/predict/*"),
        ("/v1/{m:path}/predict", "/v1/*"),
        ("/{m}", "/*"),
        ("/predict/<int:m>", "/predict/*"),
        ("/v1/pre{m}/image", "/v1/*"),
        ("/predict*", "/*"),
        ("/a/*/b", "/a/*"),
        ("/a/*/*", "/a/*"),
        ("/a/**", "/a/*"),
    ],
)
def test_a_routers_template_is_refused_with_what_to_write(path: str, instead: str) -> None:
    """Taken literally it would match nothing, and let everything through."""
    with pytest.raises(GuardError, match="which would guard nothing") as caught:
        GuardMiddleware(Users(), toy_service(), paths=("/predict", path))
    assert str(caught.value).endswith(f"write {instead!r}")
    assert "\n" not in str(caught.value)


def test_what_to_write_for_a_template_guards_it() -> None:
    async def users(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.path_params["m"])

    routes = [Route("/predict/{m}", users, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(GuardMiddleware, toy_service(), paths=("/predict/*",))])
    assert post(app, clean(), path="/predict/signs").text == "signs"
    assert post(app, triggered(), path="/predict/signs").status_code == 422


def test_a_middleware_wraps_a_middleware() -> None:
    app: ASGIApp = Users()
    for _ in range(2):
        app = GuardMiddleware(app, toy_service())
    assert post(app, clean(), path="/predict").text == "the user's answer"
    assert post(app, triggered(), path="/predict").status_code == 422
