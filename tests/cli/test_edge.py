"""`guard edge serve` and `guard repair --edge`: what they refuse before any work, and what crosses."""

from __future__ import annotations

import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from calibration.data import ImageSet, load_npz
from calibration.repair.record import is_repaired, read_record
from calibration.sources import open_model
from cli.edge import edge_steps
from cli.edge_repair import _check
from cli.edge_sending import declared, write_images, write_model
from cli.edge_token import made_token, read_token
from guard.errors import EdgeError
from guard.predictors import load_backend
from guard.predictors.screening import file_sha256
from handlers.edge_commands import Step
from handlers.edge_jobs import JobStore
from handlers.edge_protocol import FileInfo, JobRequest, RepairOptions
from tests.cli.conftest import Command, Files

TOKEN = "a-token-of-some-length"


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
