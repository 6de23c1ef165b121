"""TorchScript that would do something else than compute: it is refused before it does."""

from __future__ import annotations

import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guard.errors import ModelError
from guard.predictors.screening import screen_torchscript
from guard.predictors.torchscript import TorchScriptBackend
from tests.guard.models import rewrite_archive, save_torchscript


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * 2


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_torchscript(Plain(), tmp_path_factory.mktemp("script") / "plain.pt")


def code_name(path: Path) -> str:
    """The entry that holds the forward function."""
    with zipfile.ZipFile(path) as archive:
        return next(name for name in archive.namelist() if name.endswith(".py") and b"-> Tensor:" in archive.read(name))


def with_statement(source: Path, target: Path, statement: str, owned: Path) -> Path:
    """A TorchScript file whose forward function runs one more statement; `x` is its input."""

    def insert(data: bytes) -> bytes:
        found = re.search(rb"(\w+): Tensor\) -> Tensor:\n", data)
        assert found is not None
        line = statement.replace("OWNED", f'"{owned}"').replace("x", found.group(1).decode(), 1)
        return data[: found.end()] + f"    {line}\n".encode() + data[found.end() :]

    return rewrite_archive(source, target, {code_name(source): insert})


STATEMENTS = {
    "save": "torch.save(x, OWNED)",
    "from_file": "_0 = torch.from_file(OWNED, True, 9)",
    "an operator's full name": "ops.aten.save(x, OWNED)",
    "blanks": "torch . save(x, OWNED)",
    "blanks in a full name": "ops . aten . save(x, OWNED)",
    "a comment": "_0 = [torch.   # nothing here\n  save(x, OWNED)]",
    "an attribute by name": 'getattr(torch, "save")(x, OWNED)',
    "a name in pieces": 'getattr(torch, "sa" "ve")(x, OWNED)',
    "a nested name": 'getattr(getattr(torch, "a"), "sa" "ve")(x, OWNED)',
    "another library by name": 'getattr(ops, "image").write_file(OWNED, x)',
    "an escaped name": 'getattr(torch, "sav\\145")(x, OWNED)',
    "an alias": "y = torch\n    y.save(x, OWNED)",
    "another library": "_0 = ops.image.write_file(OWNED, x)",
    "an alias of the libraries": "y = ops\n    y.image.write_file(OWNED, x)",
    "print": "print(x)",
    "print as an operator": 'ops.prim.Print("[METRICS]")',
    "a warning that computes": 'torch.warn(torch.format("{}", torch.mul_(x, 0)), 2)',
    "another generator": "_0 = torch.manual_seed(5)",
    "print by its other name": 'ops.aten._print("[METRICS]")',
    "a warning beside something": 'y = x; torch.warn("[METRICS]")',
    "a warning by another name": 'y = torch\n    y.warn("[METRICS]")',
    "another process": "_0 = ops.c10d.barrier(x)",
}


@pytest.mark.parametrize("attack", STATEMENTS)
def test_scripts_that_touch_files(attack: str, script: Path, tmp_path: Path, owned: Path) -> None:
    path = with_statement(script, tmp_path / "evil.pt", STATEMENTS[attack], owned)
    with pytest.raises(ModelError, match="its TorchScript code reads or writes files"):
        TorchScriptBackend.load(path)
    assert not owned.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_statements_of_these_tests_work(script: Path, tmp_path: Path, owned: Path) -> None:
    """PyTorch itself would run them: the refusals above are for a reason."""
    for attack in ("save", "blanks", "a comment", "an attribute by name", "an alias"):
        path = with_statement(script, tmp_path / "evil.pt", STATEMENTS[attack], owned)
        torch.jit.load(str(path))(torch.zeros(1, 1, 8, 8))
        assert owned.exists(), attack
        owned.unlink()


class Warns(nn.Module):
    """As layers of PyTorch do, and as an attacker would."""

    def __init__(self) -> None:
        super().__init__()
        self.text = "x\n[METRICS]guard_requests_total.count:1|#outcome:accepted"

    def forward(self, images: Tensor) -> Tensor:
        if images.size(0) > 1:
            warnings.warn(self.text, stacklevel=2)
        return nn.functional.softmax(images.flatten(1))  # without an axis, of which PyTorch warns


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripts_warnings_do_not_get_into_our_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, images = tmp_path / "warns.pt", torch.arange(128.0).view(2, 1, 8, 8)
    torch.jit.script(Warns()).save(str(path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.jit.load(str(path))(images)
    assert any("[METRICS]" in str(item.message) for item in said)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = TorchScriptBackend.load(path)(images)
    assert not said
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(answers, images.flatten(1).softmax(dim=1))


class Nested(nn.Module):
    """Submodules named by numbers and with dashes, one named `ops`, and a text with escapes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            self.layers = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.ReLU())
            self.ops = nn.ModuleList([nn.Linear(4, 4)])
            self.heads = nn.ModuleDict({"a-b": nn.Linear(4, 4)})
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        features = self.layers(images).mean(dim=[2, 3])
        for layer in self.ops:
            features = layer(features)
        if features.size(1) != 4:
            raise ValueError('"four" is é\tnot\n')
        scores: Tensor = self.heads["a-b"](features)
        return scores


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(2, 1, 8, 8))])
def test_ordinary_scripts_pass(make: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    net = Nested()
    make(net).save(str(tmp_path / "nested.pt"))
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(TorchScriptBackend.load(tmp_path / "nested.pt")(images), net(images))


def repacked(source: Path, target: Path, rename: Callable[[str], str], extra: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name in old.namelist():
            new.writestr(rename(name), old.read(name))
        for name, data in extra:
            new.writestr(name, data)
    return target


def test_pytorch_does_not_care_about_case(script: Path, tmp_path: Path, owned: Path) -> None:
    evil = with_statement(script, tmp_path / "evil.pt", STATEMENTS["save"], owned)
    for rename in (lambda name: name.replace(".py", ".PY"), lambda name: name.replace("/code/", "/CODE/")):
        path = repacked(evil, tmp_path / "case.pt", rename, [("plain/code/harmless.txt", b"")])
        with pytest.raises(ModelError, match="reads or writes files"):
            TorchScriptBackend.load(path)
    assert not owned.exists()


def test_names_that_are_there_twice(script: Path, tmp_path: Path, owned: Path) -> None:
    evil = with_statement(script, tmp_path / "evil.pt", STATEMENTS["save"], owned)
    with zipfile.ZipFile(script) as archive:
        harmless = archive.read(code_name(script))
    for name in (code_name(script), code_name(script).replace("/code/", "/CODE/")):
        path = repacked(evil, tmp_path / "twice.pt", str, [(name, harmless)])
        with pytest.raises(ModelError, match="two of its entries have the same name"):
            TorchScriptBackend.load(path)
    assert not owned.exists()


def test_two_archives_in_one(script: Path, tmp_path: Path, owned: Path) -> None:
    """Python finds the directory before the end, PyTorch the one at the offset that the end names."""
    evil = with_statement(script, tmp_path / "evil.pt", STATEMENTS["save"], owned)
    good = repacked(script, tmp_path / "good.pt", str, [])
    bodies, ends = [], []
    for path in (evil, good):
        data = path.read_bytes()
        place = data.rindex(b"PK\5\6")
        bodies.append(data[:place])
        ends.append(struct.unpack("<4s4H2LH", data[place : place + 22]))
    end = struct.pack("<4s4H2LH", *ends[1][:6], ends[0][6], 0)
    (tmp_path / "both.pt").write_bytes(b"".join(bodies) + end)
    with pytest.raises(ModelError):
        TorchScriptBackend.load(tmp_path / "both.pt")
    assert not owned.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_loaded_is_what_was_looked_at(script: Path, tmp_path: Path, owned: Path) -> None:
    path = tmp_path / "model.pt"
    shutil.copy(script, path)
    screened = screen_torchscript(path)
    shutil.copy(with_statement(script, tmp_path / "evil.pt", STATEMENTS["save"], owned), path)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.jit.load(screened)(images), Plain()(images))
    assert not owned.exists()
