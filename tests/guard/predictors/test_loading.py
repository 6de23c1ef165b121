from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from guard.errors import ModelError
from guard.predictors import load_backend, wrap
from guard.predictors.loading import load_factory
from guard.predictors.module import ModuleBackend, state_sha256
from guard.predictors.screening import file_sha256
from tests.guard.models import predictor
from tests.toy import ToyNet


class Louder(ToyNet):
    """Another toy of the same shape."""

    def __init__(self, scale: float = 24.0) -> None:
        super().__init__()
        self.scale.fill_(scale)


def answers(images: Tensor) -> Tensor:
    logits: Tensor = ToyNet()(images)
    return logits


def fails_to_make() -> nn.Module:
    raise RuntimeError("no CUDA\nhere")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that can be imported as `home_made`."""
    module = ModuleType("home_made")
    made: dict[str, Any] = {
        "Toy": ToyNet,
        "louder": Louder,
        "training": lambda: ToyNet().train(),
        "instance": ToyNet(),
        "answers": answers,
        "fails": fails_to_make,
        "number": 3,
        "makes_number": lambda: 3,
        "anything": lambda *arguments: arguments[0],
        "Nested": type("Nested", (), {"Toy": ToyNet}),
    }
    for name, value in made.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "home_made", module)
    return module


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", ["Toy", "instance", "answers", "Nested.Toy", "training"])
def test_factories_and_functions(name: str, clean: Tensor) -> None:
    backend = load_backend(f"home_made:{name}")
    assert backend.kind == ("callable" if name == "answers" else "module")
    assert backend(clean) is not None
    torch.testing.assert_close(torch.as_tensor(backend(clean)), ToyNet()(clean))


def test_a_file_has_its_own_weights(model_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"for --weights, got .*which has its own"):
        load_backend(model_files["torch-export"], tmp_path / "weights.safetensors")


@pytest.mark.usefixtures("importable")
def test_weights_are_filled_in(tmp_path: Path, clean: Tensor) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(dict(Louder(7.0).state_dict()), weights)
    backend = load_backend("home_made:louder", weights)
    torch.testing.assert_close(torch.as_tensor(backend(clean)), Louder(7.0)(clean))
    assert backend.fingerprint() == state_sha256(Louder(7.0).state_dict())


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"scale": torch.zeros(2)}, "don't fit the module"),
        ({"other": torch.zeros(1)}, "don't fit the module"),
        ({}, "don't fit the module"),
    ],
)
def test_weights_that_do_not_fit(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(state, weights)
    with pytest.raises(ModelError, match=message) as raised:
        load_backend("home_made:Toy", weights)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04", b"\xff" * 100, None])
def test_weights_that_are_none(data: bytes | None, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    if data is not None:
        weights.write_bytes(data)
    with pytest.raises(ModelError, match=r"weights in a \.safetensors file, got weights\.safetensors"):
        load_backend("home_made:Toy", weights)


@pytest.mark.usefixtures("importable")
def test_functions_take_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="drop --weights"):
        load_backend("home_made:answers", tmp_path / "weights.safetensors")


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    "name",
    [
        "home_made:missing", "no.such.package:thing", "home_made:", ":", ":x", ".relative:x", "home_made:Toy.missing", "a b:c",
        "home_made:Toy:Toy", "..:x",
    ],
)  # fmt: skip
def test_names_that_can_not_be_imported(name: str) -> None:
    with pytest.raises(ModelError):
        load_backend(name)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("home_made:fails", "home_made:fails failed to make a model: RuntimeError: no CUDA here"),
        ("home_made:anything", "failed to make a model"),
        ("home_made:number", "expected an nn.Module or a function of a batch, got int"),
        ("home_made:makes_number", "got int"),
    ],
)
def test_factories_that_make_no_model(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        load_backend(name)


@pytest.mark.parametrize("code", ["raise SystemError('broken')", "1 / 0", "def broken(:", "import no_such_package"])
def test_modules_that_fail_while_they_are_imported(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_on_import.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"expected an importable package\.module:factory, got breaks_on_import:model"):
        load_backend("breaks_on_import:model")


@pytest.mark.parametrize("name", ["missing.onnx", "missing.pt", "missing", "", "folder"])
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="no such file"):
        load_backend(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["model.pkl", "model.pth", "model.bin", "model.h5", "model", "model.safetensors", "model.onnx.pkl"]
)
def test_other_suffixes_are_not_loaded(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="nothing is unpickled"):
        load_backend(path)


def test_suffixes_in_capitals(model_files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "TOY.ONNX"
    path.write_bytes(model_files["onnx"].read_bytes())
    assert load_backend(path).kind == "onnx"


@pytest.mark.parametrize("kind", ["torchscript", "torch-export", "onnx"])
def test_files_are_known_by_their_bytes(kind: str, model_files: dict[str, Path]) -> None:
    assert load_backend(model_files[kind]).fingerprint() == file_sha256(model_files[kind])


@pytest.mark.parametrize("model", [None, 3, "text", {"model": ToyNet()}, torch.zeros(1), np.zeros(1)])
def test_what_is_no_model(model: object) -> None:
    with pytest.raises(ModelError, match=r"expected an nn\.Module or a function of a batch"):
        wrap(model)


def test_training_mode_is_refused_at_once_and_later(clean: Tensor) -> None:
    net = nn.Sequential(ToyNet(), nn.Dropout()).eval()
    backend = wrap(net)
    backend(clean)
    net[1].train()
    with pytest.raises(ModelError, match="got one in training mode"):
        backend(clean)
    with pytest.raises(ModelError, match="got one in training mode"):
        wrap(net)
    assert net[1].training, "its mode is the user's"


def test_an_instance_in_training_mode_is_not_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("home_made")
    module.__dict__["instance"] = ToyNet().train()
    monkeypatch.setitem(sys.modules, "home_made", module)
    assert isinstance(load_factory("home_made:instance"), ToyNet)
    with pytest.raises(ModelError, match="training mode"):
        load_backend("home_made:instance")


def test_fingerprints_see_every_part_of_the_state() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bool)}
    known = state_sha256(state)
    assert state_sha256(dict(reversed(list(state.items())))) == known
    for other in (
        {**state, "a": torch.zeros(3, 2)},
        {**state, "a": torch.zeros(2, 3, dtype=torch.float64)},
        {**state, "a": torch.zeros(2, 3).index_fill(0, torch.tensor([0]), -0.0)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
        {**state, "c": torch.zeros(0)},
    ):
        assert state_sha256(other) != known
    assert state_sha256({"a": torch.zeros(3, 2).t(), "b": state["b"]}) == known


class WithExtraState(ToyNet):
    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 3}

    def set_extra_state(self, state: object) -> None:
        """Nothing to set."""


def test_a_state_of_more_than_tensors_has_no_fingerprint() -> None:
    assert ModuleBackend(WithExtraState()).fingerprint() is None


def test_an_untouched_module_keeps_its_fingerprint(clean: Tensor) -> None:
    net = ToyNet()
    before = ModuleBackend(net).fingerprint()
    predictor(net)(clean)
    assert ModuleBackend(net).fingerprint() == before
    net.scale.add_(1)
    assert ModuleBackend(net).fingerprint() != before


def test_a_built_in_function_is_a_predict_function() -> None:
    backend = load_backend("torch:relu")
    assert backend.kind == "callable"
    assert torch.equal(torch.as_tensor(backend(torch.tensor([-1.0, 2.0]))), torch.tensor([0.0, 2.0]))
