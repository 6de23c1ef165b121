"""`guard edge serve` and `guard repair --edge`: what they refuse before any work, and what crosses."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from calibration.data import ImageSet, load_npz
from calibration.repair.record import JSON, RepairRecord, is_repaired, read_record
from calibration.repair.settings import RepairSettings
from calibration.sources import open_model
from cli.edge import edge_steps
from cli.edge_repair import _check
from cli.edge_sending import check_same, declared, write_images, write_model
from cli.edge_token import made_token, read_token
from guard import InputSpec
from guard.errors import EdgeError, InputError
from guard.predictors import load_backend
from guard.predictors.screening import file_sha256
from guard.profile import ModelRecord
from handlers.asgi_server import AsgiServer
from handlers.edge_client import EdgeClient
from handlers.edge_commands import Step
from handlers.edge_jobs import Job, JobStore
from handlers.edge_limits import EdgeLimits
from handlers.edge_protocol import FileInfo, JobRequest, RepairOptions
from tests.cli.conftest import Command, Files
from tests.cli.test_json_documented import DOCS
from tests.handlers.toy_edge import FAILS, Edge, edge_server, running

TOKEN = "a-token-of-some-length"
SPEC = InputSpec(channels=1, height=8, width=8)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARD_EDGE_TOKEN", raising=False)


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}-file\n")
    assert read_token(None) is None
    monkeypatch.setenv("GUARD_EDGE_TOKEN", TOKEN)
    assert [read_token(None), read_token(tmp_path / "token")] == [TOKEN, f"{TOKEN}-file"]


def test_a_server_keeps_the_token_that_it_made_to_itself(tmp_path: Path) -> None:
    token, path = made_token(tmp_path / "edge")
    assert len(token) > 40
    assert path.stat().st_mode & 0o777 == 0o600
    assert made_token(tmp_path / "edge") == (token, path)
    assert made_token(tmp_path / "other")[0] != token


def test_tokens_that_cannot_be_used_are_one_line(tmp_path: Path, guard: Command) -> None:
    (tmp_path / "short").write_text("short")
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    for name in ("short", "binary", "missing"):
        problem = guard("edge", "serve", "--folder", tmp_path / "edge", "--token-file", tmp_path / name).problem
        assert "expected a" in problem
        assert "xff" not in problem
    assert not (tmp_path / "edge").exists()


def test_what_cannot_work_is_refused_before_anything_is_sent(tmp_path: Path, guard: Command, files: Files) -> None:
    (tmp_path / "token").write_text(TOKEN)
    asked = ["repair", files.model, "--method", "gym", "--data", files.clean, "--out", tmp_path / "out"]
    token = ["--edge-token-file", tmp_path / "token"]
    assert "GUARD_EDGE_TOKEN" in guard(*asked, "--edge", "http://127.0.0.1:1").problem
    assert "https" in guard(*asked, "--edge", "http://edge.example", *token).problem
    assert "hexadecimal" in guard(*asked, "--edge", "http://127.0.0.1:1", *token, "--edge-job", "../x").problem
    assert "can't reach the edge server" in guard(*asked, "--edge", "http://127.0.0.1:1", *token).problem
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert "mine.txt" in guard(*asked, "--edge", "http://127.0.0.1:1", *token).problem


def test_a_pt2_file_is_sent_without_its_pickles_and_answers_the_same(tmp_path: Path, files: Files) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    source = open_model(str(files.model), None, tmp_path)
    sent = write_model(source, tmp_path / "first")
    with zipfile.ZipFile(sent) as archive:
        assert [entry.file_size for entry in archive.infolist() if "sample_inputs" in entry.filename] == [0]
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(torch.as_tensor(load_backend(sent)(images)), torch.as_tensor(source.backend(images)))
    assert declared(sent) == declared(write_model(source, tmp_path / "second"))  # the same bytes each time
    again = open_model(str(sent), None, tmp_path)
    assert file_sha256(write_model(again, tmp_path / "third")) == file_sha256(sent)  # nothing to be taken out


def test_of_a_factory_the_weights_are_sent(tmp_path: Path) -> None:
    source = open_model("cli.demonstration.digits:digit_net", None, tmp_path)
    (tmp_path / "sent").mkdir()
    sent = write_model(source, tmp_path / "sent")
    assert sent.name == "model.safetensors"
    assert load_backend("cli.demonstration.digits:digit_net", sent).fingerprint() == source.backend.fingerprint()


def test_a_predict_function_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="can't be sent"):
        write_model(open_model("torch.nn.functional:softsign", None, tmp_path), tmp_path)


def test_images_cross_as_they_are(tmp_path: Path) -> None:
    exact = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4).div(255.0)
    for pixels, kind in ((exact, torch.uint8), (torch.rand(2, 3, 4, 4), torch.float32)):
        write_images(ImageSet(pixels, torch.tensor([1, 0]), ("no", "yes")), tmp_path / "x.npz")
        found = load_npz(tmp_path / "x.npz")
        assert found.pixels.dtype == kind
        assert torch.allclose(found.images(slice(None)), pixels, atol=1e-6)
        assert (found.known_labels.tolist(), found.class_names) == ([1, 0], ("no", "yes"))
        with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
            assert not [name for name in archive.files if archive[name].dtype.hasobject]


def test_the_commands_of_a_job_are_its_options_and_our_paths(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    names = ("model.safetensors", "clean.npz", "quarantine.npz")
    request = JobRequest(
        options=RepairOptions(method="codefend", gan_epochs=7, seed=3, mean=(0.5,), std=(-0.25,), output="logits"),
        files=tuple(FileInfo(name=name, size=1, sha256="0" * 64) for name in names),
        factory="mine:net",
    )
    job = store.create(request)
    step: Step = next(edge_steps(job, store))
    assert step.required
    assert step.succeeds == {0, 1}
    assert step.command[3:6] == ["cli.main", "repair", "mine:net"]
    assert step.command[-4:] == [
        "--weights", str(store.sent(job.id) / names[0]), "--quarantine", str(store.sent(job.id) / names[2]),
    ]  # fmt: skip
    for given in ("--method=codefend", "--gan-epochs=7", "--seed=3", "--mean=0.5", "--std=-0.25", "--output=logits"):
        assert given in step.command
    assert not any(text.startswith(("--epochs", "--recipe", "--views", "--layout")) for text in step.command)
    assert not is_repaired(store.result(job.id))
    assert "--allow-missing-classes" not in step.command
    options = RepairOptions(  # as a device sends them
        method="gym", recipe="distilled", views=1, epochs=2, gan_epochs=200, allow_missing_classes=True
    )
    step = next(edge_steps(store.create(msgspec.structs.replace(request, options=options)), store))
    for given in ("--method=gym", "--recipe=distilled", "--views=1", "--epochs=2", "--allow-missing-classes"):
        assert given in step.command
    assert not any(text.startswith("--gan-epochs") for text in step.command)  # which guard repair refuses with gym


def test_a_repair_that_crashed_is_none(tmp_path: Path) -> None:
    """Python ends with 1, as a repair does that was written all the same."""
    files = (FileInfo(name=name, size=1, sha256="0" * 64) for name in ("model.pt2", "clean.npz"))
    store = JobStore(tmp_path)
    steps = edge_steps(store.create(JobRequest(options=RepairOptions(method="gym"), files=tuple(files))), store)
    assert next(steps).succeeds == {0, 1}
    with pytest.raises(EdgeError, match="repair failed unexpectedly: see the edge server's log"):
        next(steps)


def test_how_long_a_job_may_run_is_an_option(tmp_path: Path, guard: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[EdgeLimits | None] = []

    def store(folder: Path, given: EdgeLimits | None = None) -> JobStore:
        limits.append(given)
        return JobStore(folder, given)

    monkeypatch.setattr("handlers.edge_jobs.JobStore", store)
    monkeypatch.setattr("handlers.asgi_server.serve_asgi", lambda *_, **__: None)
    monkeypatch.setattr("handlers.request_log.configure_logging", lambda: None)
    for options in ((), ("--max-job-minutes", 90)):
        assert guard("edge", "serve", "--folder", tmp_path / "edge", *options).code == 0
    assert [given.job_seconds for given in limits if given is not None] == [24 * 3600, 90 * 60]


def test_a_profile_of_other_models_is_refused(tmp_path: Path, guard: Command, files: Files) -> None:
    """An edge server holds the key of its results, so what it sends may be anything."""
    draft, source = tmp_path / "repaired", open_model(str(files.model), None, tmp_path)
    run = guard(
        "repair", files.model, "--method", "gym", "--data", files.clean, "--out", draft, "--epochs", 1,
        "--max-accuracy-drop", 100,
    )  # fmt: skip
    assert run.code == int(bool(read_record(draft).forgotten_labels)), run.err  # as it may after one epoch
    sent = declared(files.model)

    def profile(model: Path, *options: object) -> None:
        run = guard("calibrate", model, "--data", files.clean, "--out", draft / "profile", "--overlays", 20, *options)
        assert run.code == 0, run.err

    profile(draft, "--tripwire", files.model)
    assert _check(draft, source, sent).method == "gym"
    for wrong in ((draft, "--frr", 0.02), (files.model,)):  # no tripwire; a model that was not repaired
        profile(*wrong)
        with pytest.raises(EdgeError, match="its profile is not of our model and the repaired one"):
            _check(draft, source, sent)


def write_repaired(folder: Path, model: Path, settings: RepairSettings, spec: InputSpec = SPEC) -> None:
    """What `guard repair` could have written, of a model that it left as it was."""
    folder.mkdir(exist_ok=True)
    shutil.copy(model, folder / "model.pt2")
    sha256 = file_sha256(model)
    record = RepairRecord(
        clean_accuracy_before=None, clean_accuracy_after=None, agreement=1.0, attack_success_seen_before=None,
        attack_success_seen_after=None, generated_triggers_work=None, rounds=1, clean_images=100, quarantined_images=0,
        held_out_clean=20, held_out_quarantined=0, seconds=1.0, schema=1, created="2026-01-01T00:00:00Z", method="gym",
        model=ModelRecord(kind="torch-export", output="logits", num_classes=10, file="model.pt2", sha256=sha256),
        original_sha256=sha256, input=spec, preprocessor=None,
        settings=msgspec.to_builtins(settings), max_accuracy_drop=settings.allowed_drop, libraries={},
    )  # fmt: skip
    (folder / JSON).write_bytes(msgspec.json.encode(record))


def test_a_repaired_model_is_refused_before_anything_is_sent(tmp_path: Path, guard: Command, files: Files) -> None:
    (tmp_path / "token").write_text(TOKEN)
    write_repaired(tmp_path / "repaired", files.model, RepairSettings(method="gym"))
    run = guard(
        "repair", tmp_path / "repaired", "--method", "gym", "--data", files.clean, "--out", tmp_path / "again",
        "--edge", "http://127.0.0.1:1", "--edge-token-file", tmp_path / "token",
    )  # fmt: skip
    assert "expected a model that was not repaired yet, got one that was: repair its original" in run.problem


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("--max-accuracy-drop", "nan"), "expected --max-accuracy-drop that an edge server takes (finite numbers), got nan"),
        (("--max-accuracy-drop", 101), "expected --max-accuracy-drop that an edge server takes (float <= 100.0), got 101"),
        (("--max-accuracy-drop", -1), "expected --max-accuracy-drop that an edge server takes (float >= 0.0), got -1"),
        (("--views", 5000), "expected --views that an edge server takes (int <= 1000), got 5000"),
        (("--epochs", 200_000), "expected --epochs that an edge server takes (int <= 100000), got 200000"),
        (("--mean", "inf", "--std", 1), "expected --mean that an edge server takes (finite numbers), got inf"),
        (("--mean", 0, "--std", "1,1,1,1"), "expected --std that an edge server takes (array of length <= 3), got 1,1,1,1"),
        (("--data", "nowhere.npz"), "expected a folder of images or an .npz, got nowhere.npz, which does not exist"),
        (("--quarantine", "nowhere"), "expected a folder of images or an .npz, got nowhere, which does not exist"),
        (("--edge-job", ""), "expected a job's id of 32 hexadecimal digits"),
        (("--edge-job", "0" * 32, "--data", "nowhere.npz"), "got nowhere.npz, which does not exist"),
    ],
)
def test_options_that_cannot_be_sent_are_named_before_the_model_is_read(
    tmp_path: Path, guard: Command, files: Files, given: tuple[object, ...], problem: str
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    run = guard(
        "repair", "no-such-model.pt2", "--method", "gym", "--data", files.clean, "--out", tmp_path / "out",
        "--edge", "http://127.0.0.1:1", "--edge-token-file", tmp_path / "token", *given,
    )  # fmt: skip
    assert problem in run.problem


@dataclass(frozen=True)
class Sent:
    """A job that was sent before, and the command that fetches it."""

    edge: Edge
    job: str
    command: tuple[object, ...]


@pytest.fixture
def sent_before(tmp_path: Path, files: Files) -> Iterator[Sent]:
    """A gym job whose server could not make a profile."""
    settings = RepairSettings(method="gym", epochs=4, seed=3, views=2, max_accuracy_drop=7.5)
    spec = msgspec.structs.replace(SPEC, mean=(0.5,), std=(0.25,))

    def plan(job: Job, store: JobStore) -> Iterator[Step]:
        write_repaired(store.result(job.id), store.sent(job.id) / "model.pt2", settings, spec)
        yield from running(FAILS, required=False)(job, store)

    (tmp_path / "device").mkdir()
    (tmp_path / "token").write_text(TOKEN)
    model = write_model(open_model(str(files.model), None, tmp_path), tmp_path / "device")
    sent = {"model.pt2": model, "clean.npz": files.clean}
    infos = tuple(msgspec.structs.replace(declared(path), name=name) for name, path in sent.items())
    with (
        edge_server(tmp_path / "edge", plan) as edge,
        AsgiServer(edge.app, port=0) as server,
        EdgeClient(server.url, TOKEN) as client,
    ):
        job = client.create(JobRequest(options=RepairOptions(method="gym"), files=infos))
        client.upload(job, sent, lambda *_: None)
        client.start(job)
        assert edge.ended(job).state == "done"
        command = (
            "repair", files.model, "--data", files.clean, "--out", tmp_path / "out", "--edge", server.url,
            "--edge-token-file", tmp_path / "token", "--edge-job", job,
        )  # fmt: skip
        yield Sent(edge, job, command)


def test_a_job_is_fetched_with_its_own_options_alone(tmp_path: Path, guard: Command, sent_before: Sent, files: Files) -> None:
    gym = ("--method", "gym")
    for given, problem in (
        (("--method", "codefend", "--gan-epochs", 7), "expected --method gym, which job {} at http://127.0.0.1"),
        ((*gym, "--seed", 5), "expected --seed 3, which"),
        ((*gym, "--seed", 5), "got --seed 5: give the job's, or repair again without --edge-job; the job stays there"),
        ((*gym, "--epochs", 5), "expected --epochs 4, which"),
        ((*gym, "--views", 1), "expected --views 2, which"),
        ((*gym, "--recipe", "paper"), "expected --recipe distilled, which"),
        ((*gym, "--max-accuracy-drop", 8), "expected --max-accuracy-drop 7.5, which"),
        ((*gym, "--allow-missing-classes"), "expected no --allow-missing-classes, which"),
        ((*gym, "--mean", "0.4", "--std", "0.25"), "expected --mean 0.5, which"),
        ((*gym, "--output", "probabilities"), "expected --output logits, which"),
        ((*gym, "--layout", "NHW"), "expected --layout NCHW, which"),
        ((*gym, "--shape", "1,9,9"), "expected --shape 1,8,8, which"),
        ((*gym, "--quarantine", files.clean), "expected no --quarantine, which"),
    ):
        assert problem.format(sent_before.job) in guard(*sent_before.command, *given).problem
        assert not (tmp_path / "out").exists()
        assert sent_before.edge.status(sent_before.job).state == "done"  # nothing is lost
    own = ("--seed", 3, "--epochs", 4, "--views", 2, "--max-accuracy-drop", 7.5, "--mean", "0.5", "--std", "0.25")
    run = guard(*sent_before.command, *gym, *own, "--json")
    assert run.code == 0, run.err
    assert read_record(tmp_path / "out").method == "gym"
    assert list(sent_before.edge.store.jobs()) == []


def test_a_records_text_cannot_steer_a_terminal(tmp_path: Path, files: Files) -> None:
    write_repaired(tmp_path, files.model, RepairSettings(method="gym"))
    record = msgspec.structs.replace(read_record(tmp_path), settings={"recipe": "\x1b[31mred\nlines"})
    check_same(record, {"--method": "gym", "--seed": 5}, "it")  # of the seed nothing is told
    with pytest.raises(InputError, match=r"^expected --recipe \[31mred lines, which it was sent with, got --recipe paper: "):
        check_same(record, {"--recipe": "paper"}, "it")


def test_what_is_printed_of_an_edge_servers_repair_is_documented(guard: Command, sent_before: Sent) -> None:
    (printed,) = guard(*sent_before.command, "--method", "gym", "--json").lines
    assert (printed["profile"], printed["note"]) == (None, "expected more of sent/clean.npz, got less")
    section = DOCS.read_text(encoding="utf-8").split("## guard repair\n")[1].split("\n## ")[0]
    assert not [name for name in printed if f"`{name}`" not in section]
