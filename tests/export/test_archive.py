from __future__ import annotations

import ast
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import torch

import export.archive
from export import export_mar, export_onnx, export_pt2
from guard import Guard, Predictor, load_profile
from guard.detectors import Blend, Strip
from guard.errors import ExportError, MissingExtraError, ProfileError
from guard.predictors.exported import ExportedBackend
from tests.export.profiles import (
    Branches,
    Drifts,
    answers,
    callable_profile,
    module_profile,
    onnx_profile,
    torchscript_profile,
)
from tests.toy import SPEC, save_toy_profile, toy_images, toy_trigger

FILES = {"guard.json", "arrays.safetensors", "guard_handler.py", "MAR-INF/MANIFEST.json"}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_profile(tmp_path_factory.mktemp("archive") / "profile")


def unpack(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def works(folder: Path) -> bool:
    """Whether the guard in a folder accepts a clean and rejects a triggered image."""
    clean, _ = toy_images(1, seed=3)
    verdicts = Guard.load(folder)(torch.cat([clean, toy_trigger(clean)]))
    return [verdict.accepted for verdict in verdicts] == [True, False]


@pytest.mark.parametrize("blend", get_args(Blend))
def test_every_blend_is_exported(tmp_path: Path, blend: Blend) -> None:
    profile = save_toy_profile(tmp_path / "profile", blend=blend, alpha=0.5)
    guard = Guard.load(unpack(export_mar(profile, tmp_path / "store", "toy"), tmp_path / "unpacked"))
    (strip,) = [item.detector for item in guard.detectors]
    assert isinstance(strip, Strip)
    assert (strip.blend, strip.alpha) == (blend, 0.5)
    clean, _ = toy_images(4, seed=3)
    images = torch.cat([clean, toy_trigger(clean)])
    assert guard(images) == Guard.load(profile)(images)


def test_an_archive_holds_the_profile_and_one_small_handler(profile: Path, tmp_path: Path) -> None:
    (profile / "report.html").write_text("not for serving")
    store = tmp_path / "store"
    path = export_mar(profile, store, "toy-1.a_b", "2.1", {"batchSize": 8, "guard": {"mode": "monitor"}})
    assert path == store / "toy-1.a_b.mar"
    assert list(store.iterdir()) == [path]
    folder = unpack(path, tmp_path / "unpacked")
    names = {str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()}
    assert names == {*FILES, "model.pt2", "model-config.yaml"}
    manifest = json.loads((folder / "MAR-INF/MANIFEST.json").read_text())["model"]
    assert (manifest["modelName"], manifest["modelVersion"]) == ("toy-1.a_b", "2.1")
    assert json.loads((folder / "model-config.yaml").read_text())["guard"] == {"mode": "monitor"}
    tree = ast.parse((folder / manifest["handler"]).read_text())
    assert sum(isinstance(node, ast.ClassDef) for node in tree.body) == 1
    assert works(folder)


def test_an_existing_archive_is_replaced_and_a_failure_keeps_it(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_mar(str(profile), str(tmp_path), "toy")
    before = export_mar(profile, tmp_path, "toy", "3.0").read_bytes()
    monkeypatch.setattr(export.archive, "_HANDLER", None)
    with pytest.raises(TypeError):
        export_mar(profile, tmp_path, "toy")
    assert (tmp_path / "toy.mar").read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["toy.mar"]


def test_a_factorys_model_becomes_a_program(tmp_path: Path) -> None:
    folder = unpack(export_mar(module_profile(tmp_path / "p"), tmp_path / "store", "toy"), tmp_path / "unpacked")
    model = load_profile(folder)[0].model
    assert (model.kind, model.factory, model.file) == ("torch-export", None, "model.pt2")
    assert not (folder / "weights.safetensors").exists()
    assert works(folder)


def test_other_model_files_go_in_as_they_are(profile: Path, tmp_path: Path) -> None:
    script = torchscript_profile(tmp_path / "script")
    onnx = onnx_profile(tmp_path / "onnx", export_onnx(profile, tmp_path / "model.onnx"))
    for folder in (script, onnx):
        assert works(unpack(export_mar(folder, tmp_path / "store", folder.name), tmp_path / f"{folder.name}-unpacked"))


def test_a_handler_of_the_users(profile: Path, tmp_path: Path) -> None:
    handler = tmp_path / "my_handler.py"
    handler.write_text("class Handler:\n    pass\n")
    folder = unpack(export_mar(profile, tmp_path / "store", "toy", handler=handler), tmp_path / "unpacked")
    assert (folder / "my_handler.py").read_text() == handler.read_text()
    assert not (folder / "guard_handler.py").exists()
    for name in ("guard.py", "json.py", "torch.py", "yaml.py", "__main__.py", "no-module.py", "handler.txt", "missing.py"):
        with pytest.raises(ExportError, match="handler file"):
            export_mar(profile, tmp_path / "store", "toy", handler=tmp_path / name)


def test_it_is_tried_with_the_memory_that_it_will_have(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.archive, "DEFAULT_MEMORY_LIMIT", 256)  # as if its images were large
    with pytest.raises(ExportError, match="expected a memory limit of at least 20480 bytes"):
        export_mar(profile, tmp_path / "store", "toy", model_config={"minWorkers": 1})
    assert export_mar(profile, tmp_path / "store", "toy", model_config={"guard": {"memory_limit": 20480}}).exists()


def test_a_handler_may_lie_where_python_looks(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_own_handler").mkdir()  # no package
    handler = tmp_path / "my_own_handler.py"
    handler.write_text("class Handler:\n    pass\n")
    assert export_mar(profile, tmp_path / "store", "toy", handler=handler).exists()


@pytest.mark.parametrize("name", ["", "-f", ".hidden", "a/b", "a b", "../a", "ä", "a\n"])
def test_model_names_are_checked(profile: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="model name"):
        export_mar(profile, tmp_path / "store", name)
    assert not (tmp_path / "store").exists()


def test_what_can_not_be_archived_is_refused(profile: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(ExportError, match="calibrate that file"):
        export_mar(callable_profile(tmp_path / "function"), store, "toy")
    with pytest.raises(ProfileError):
        export_mar(tmp_path / "missing", store, "toy")
    with pytest.raises(ExportError, match="version"):
        export_mar(profile, store, "toy", "latest")
    with pytest.raises(ExportError, match="model-config"):
        export_mar(profile, store, "toy", model_config={"guard": {1, 2}})
    assert list(store.iterdir()) == []


def test_a_missing_archiver_is_named(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"torch-model-archiver.*backdoor-guard\[torchserve\]"):
        export_mar(profile, tmp_path, "toy")


def test_a_program_answers_like_the_original_for_any_batch(tmp_path: Path) -> None:
    folder = module_profile(tmp_path / "p")
    backend = ExportedBackend.load(export_pt2(folder, tmp_path / "out" / "model.pt2"))
    assert backend.batch_size is None
    expected, found = answers(folder, Predictor(backend, SPEC, 4, "logits"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("net", [Branches(), Drifts()])
def test_a_failed_program_leaves_nothing_behind(tmp_path: Path, net: torch.nn.Module) -> None:
    folder = module_profile(tmp_path / "p", net)
    with pytest.raises(ExportError, match=r"can't trace|differ by"):
        export_pt2(folder, tmp_path / "out" / "model.pt2")
    assert list((tmp_path / "out").iterdir()) == []
