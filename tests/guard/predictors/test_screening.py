"""Model files that would do something else than compute: each is refused before it does."""

from __future__ import annotations

import contextlib
import io
import json
import os
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
from guard.predictors import load_backend
from guard.predictors.exported import ExportedBackend
from guard.predictors.screening import screen_exported, screen_torchscript
from guard.predictors.torchscript import TorchScriptBackend
from tests.guard.models import rewrite_archive, save_exported, save_torchscript
from tests.toy import ToyNet

Edit = Callable[[dict[str, Any]], object]


class CreatesFile:
    """Unpickling it creates a file: what an attacker would do worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """Exists only if an attack ran."""
    return tmp_path / "owned"


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(((CreatesFile(path),), {}), buffer)
    return buffer.getvalue()


def test_the_pickle_of_these_tests_works(owned: Path) -> None:
    torch.load(io.BytesIO(pickled(owned)), weights_only=False)
    assert owned.exists()


# --- torch.export ---


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A `.pt2` file with its program's JSON changed."""

    def change(data: bytes) -> bytes:
        program = json.loads(data)
        edit(program)
        return json.dumps(program).encode()

    return rewrite_archive(source, target, {"models/model.json": change})


def test_pickled_sample_inputs(model_files: dict[str, Path], tmp_path: Path, owned: Path) -> None:
    path = rewrite_archive(
        model_files["torch-export"], tmp_path / "evil.pt2", {"sample_inputs/model.pt": lambda _: pickled(owned)}
    )
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = ExportedBackend.load(path)
    assert not owned.exists()
    torch.testing.assert_close(loaded(images), ExportedBackend.load(model_files["torch-export"])(images), rtol=0.0, atol=0.0)


def test_nothing_is_unpickled(model_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def unpickled(*args: object, **settings: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", unpickled)
    ExportedBackend.load(model_files["torch-export"])


@pytest.mark.parametrize(
    "entry",
    [
        {"path_name": "weight_0", "is_param": False, "use_pickle": True, "tensor_meta": None},
        {"path_name": "weight_0", "is_param": False, "use_pickle": "yes", "tensor_meta": None},
        {"path_name": "weight_0", "is_param": False, "tensor_meta": None},
        {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None},
        {"path_name": "custom_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None},
        {"path_name": "../sample_inputs/model.pt", "is_param": False, "use_pickle": False, "tensor_meta": None},
        "weight_0",
    ],
)
@pytest.mark.parametrize("table", ["weights", "constants"])
def test_tables_that_ask_for_unpickling(
    entry: object, table: str, model_files: dict[str, Path], tmp_path: Path, owned: Path
) -> None:
    changed = json.dumps({"config": {"scale": entry}}).encode()
    edits = {f"{table}/model_{table}_config.json": lambda _: changed, "weights/weight_0": lambda _: pickled(owned)}
    path = rewrite_archive(model_files["torch-export"], tmp_path / "evil.pt2", edits)
    with pytest.raises(ModelError, match=r"asks for unpickling|is damaged"):
        ExportedBackend.load(path)
    assert not owned.exists()


@pytest.mark.parametrize(
    "name",
    ["data/aotinductor/model/wrapper.so", "data/weights/model.pt", "data/constants/model.pt", "data/constants/opaque_obj_0",
     "data/constants/custom_obj_0", "data/weights/weight_0.so", "serialized_state_dict.pt", "version", "models/model.py"],
)  # fmt: skip
def test_entries_that_are_native_code_or_pickles(name: str, model_files: dict[str, Path], tmp_path: Path, owned: Path) -> None:
    path = rewrite_archive(model_files["torch-export"], tmp_path / "evil.pt2", {}, {name: pickled(owned)})
    with pytest.raises(ModelError, match="is native code or a pickled object"):
        ExportedBackend.load(path)
    assert not owned.exists()


def first_node(program: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = program["graph_module"]["graph"]["nodes"][0]
    return node


def signature(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["module_call_graph"][0]["signature"]
    return found


def call(target: str, **arguments: dict[str, object]) -> Edit:
    """An edit that makes the program's first node call something else."""

    def edit(program: dict[str, Any]) -> None:
        inputs = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
        first_node(program).update(target=target, inputs=inputs)

    return edit


def expression(text: str) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        values["images"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    return edit


def tree(kind: str | None, context: str | None) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        signature(program)["out_spec"] = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])

    return edit


def guards(*code: str) -> Edit:
    return lambda program: program.update(guards_code=list(code))


def renamed(place: str, name: str) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        if place == "node":
            first_node(program)["name"] = name
        elif place == "argument":
            first_node(program)["inputs"][0]["name"] = name
        elif place == "placeholder":
            program["graph_module"]["graph"]["inputs"][2]["as_tensor"]["name"] = name
        elif place == "forward":
            signature(program)["forward_arg_names"] = [name]
        elif place == "key":
            values = program["graph_module"]["graph"]["tensor_values"]
            values[name] = values.pop("images")

    return edit


CODE = "__import__('os').system('touch {owned}')"
PROGRAMS: dict[str, Edit] = {
    "a function of os": call("torch.serialization.os.system", x={"as_string": "touch {owned}"}),
    "a function of the loader": call("torch.load", x={"as_string": "{owned}"}),
    "a hub download": call("torch.hub.load", x={"as_string": "evil/repo"}),
    "an operator that calls": call("_operator.methodcaller", x={"as_string": "system"}),
    "a file operator": call(
        "torch.ops.aten.from_file.default", x={"as_string": "{owned}"}, shared={"as_bool": True}, size={"as_int": 9}
    ),
    "an operator that prints": call("torch.ops.aten._print.default", s={"as_string": "[METRICS]"}),
    "an operator that warns": call("torch.ops.aten.warn.default", message={"as_string": "[METRICS]"}, stacklevel={"as_int": 2}),
    "another file operator": call("torch.ops.debugprims.load_tensor.default", x={"as_string": "{owned}"}),
    "a native library": call("torch.ops.load_library", x={"as_string": "{owned}"}),
    "a class by name": call("torch.ops.export._call_custom_autograd_function_in_pre_dispatch.default", x={"as_string": "a.b"}),
    "an attribute of an operator": call("torch.ops.aten.__class__.mro"),
    "an attribute of an overload": call("torch.ops.aten.add.__init_subclass__"),
    "a compiled kernel": call("torch.ops.higher_order.triton_kernel_wrapper_mutation"),
    "an extension": call("#evil.op"),
    "an operator as argument": call("torch.ops.higher_order.cond", x={"as_operator": "torch.serialization.os.system"}),
    "size: code": expression(CODE),
    "size: attributes": expression("().__class__.__base__.__subclasses__()"),
    "size: a builtin": expression("exec('open(1)')"),
    "size: an input": expression("input()"),
    "size: a lambda": expression("(lambda: 0)()"),
    "size: an attribute of a symbol": expression("Symbol('s1').func"),
    "size: a string of code": expression("S('__import__(1)')"),
    "guard: code": guards(CODE),
    "guard: two statements": guards("True)\n  __import__('os').abort("),
    "guard: an attribute": guards("L['images'].__class__ == 1"),
    "guard: a function": guards("open('{owned}', 'w') is None"),
    "guard: an escape": guards("L['images'].size()[0] == 1, 'a\"'"),
    "tree: a factory": tree(
        "collections.defaultdict",
        json.dumps({"default_factory_module": "os", "default_factory_name": "abort", "dict_context": "[]"}),
    ),
    "tree: an enumeration": tree("builtins.dict", json.dumps({"__enum__": True, "fqn": "antigravity:a", "name": "b"})),
    "tree: an escaped one": tree("builtins.dict", '{"__\\u0065num__": true, "fqn": "antigravity:a", "name": "b"}'),
    "tree: one in a list": tree("builtins.dict", '[{"__enum__": true, "fqn": "antigravity:a", "name": "b"}]'),
    "tree: a key of code": tree("builtins.dict", json.dumps(["a': " + CODE])),
    "tree: another type": tree("collections.deque", "null"),
    "name: a node": renamed("node", f"a = {CODE}"),
    "name: an argument": renamed("argument", f"self={CODE}, x"),
    "name: a placeholder": renamed("placeholder", f"images={CODE}"),
    "name: a parameter": renamed("forward", f"images={CODE}"),
    "name: a key": renamed("key", f"images\n  {CODE}"),
}


def fill(value: Any, owned: Path) -> Any:
    """Put the path of the file into every text."""
    if isinstance(value, dict):
        return {fill(name, owned): fill(item, owned) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item, owned) for item in value]
    return value.replace("{owned}", str(owned)) if isinstance(value, str) else value


@pytest.mark.parametrize("attack", PROGRAMS)
def test_programs_that_carry_code(attack: str, model_files: dict[str, Path], tmp_path: Path, owned: Path) -> None:
    """The loader looks targets up in `torch`, evaluates sizes, and pastes names and guards into source code."""

    def edit(program: dict[str, Any]) -> None:
        PROGRAMS[attack](program)
        filled = fill(program, owned)
        program.clear()
        program.update(filled)

    path = edited(model_files["torch-export"], tmp_path / "evil.pt2", edit)
    with pytest.raises(ModelError, match="is nothing that an image model needs"):
        ExportedBackend.load(path)
    assert not owned.exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"graph_module": ' + b"[" * 100_000, b"\xff\xfe"])
def test_damaged_programs(data: bytes, model_files: dict[str, Path], tmp_path: Path) -> None:
    path = rewrite_archive(model_files["torch-export"], tmp_path / "bad.pt2", {"models/model.json": lambda _: data})
    with pytest.raises(ModelError, match=r"^refused bad\.pt2: models/model\.json"):
        ExportedBackend.load(path)


def test_a_name_twice_in_json_means_what_was_looked_at(model_files: dict[str, Path], tmp_path: Path, owned: Path) -> None:
    def twice(data: bytes) -> bytes:
        return data[:-1] + b', "guards_code": ["' + CODE.format(owned=owned).encode() + b'"], "guards_code": []}'

    path = rewrite_archive(model_files["torch-export"], tmp_path / "twice.pt2", {"models/model.json": twice})
    ExportedBackend.load(path)(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert not owned.exists()


class Branchy(nn.Module):
    """What real exports hold: arithmetic on sizes, guards, a nested graph, buffers, an equation."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            bright = nn.functional.interpolate(images, scale_factor=1.5)[:, :, : images.shape[2] // 2 + 1].mean()
        features = self.layers(images).reshape(images.shape[0], -1)
        scores: Tensor = torch.einsum("bi,ji->bj", features, self.head.weight) + self.head.bias
        return scores + bright * images.shape[0]


@pytest.fixture(scope="module")
def branchy(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, Path]]:
    with torch.random.fork_rng():
        net = Branchy()
    folder = tmp_path_factory.mktemp("branchy")
    example = (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
    dimensions: dict[str, Any] = {
        "batch": ({0: torch.export.Dim("batch", min=1)},),
        "all": ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},),
        "none": None,
    }
    files = {name: folder / f"{name}.pt2" for name in dimensions}
    for name, dynamic in dimensions.items():
        torch.export.save(torch.export.export(net, example, dynamic_shapes=dynamic), files[name])
    return net, files


@pytest.mark.parametrize("name", ["batch", "all", "none"])
def test_ordinary_programs_pass(name: str, branchy: tuple[nn.Module, dict[str, Path]]) -> None:
    net, files = branchy
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    answer = ExportedBackend.load(files[name])(images)
    torch.testing.assert_close(answer, net(images))


def test_a_program_has_one_input(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    example = torch.zeros(2, 1, 8, 8)
    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Two(), (example, example)), path)
    with pytest.raises(ModelError, match=r"of one batch of images, got two\.pt2 with 2 inputs"):
        ExportedBackend.load(path)


# --- TorchScript ---


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


# --- both ---


def test_pickled_checkpoints(tmp_path: Path, owned: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(pickled(owned))
    with pytest.raises(ModelError, match="a pickled checkpoint: nothing is unpickled here"):
        load_backend(path)
    torch.save(ToyNet().state_dict(), path)
    with pytest.raises(ModelError, match="a pickled checkpoint"):
        load_backend(path)
    path.rename(tmp_path / "checkpoint.pt2")
    with pytest.raises(ModelError, match="refused"):
        load_backend(tmp_path / "checkpoint.pt2")
    assert not owned.exists()


def test_legacy_checkpoints(tmp_path: Path, owned: Path) -> None:
    path = tmp_path / "legacy.pt"
    torch.save(CreatesFile(owned), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="no such archive or is damaged"):
        load_backend(path)
    assert not owned.exists()


SCREENS: dict[str, Callable[[Path], object]] = {"torchscript": screen_torchscript, "torch-export": screen_exported}


@pytest.mark.parametrize("kind", SCREENS)
def test_damaged_archives(kind: str, model_files: dict[str, Path], tmp_path: Path) -> None:
    data = model_files[kind].read_bytes()
    path = tmp_path / "damaged"
    for size in (0, 1, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match="no such archive or is damaged"):
            SCREENS[kind](path)
    for place in range(0, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with contextlib.suppress(ModelError):  # and nothing else
            SCREENS[kind](path)


@pytest.mark.parametrize("kind", SCREENS)
def test_archives_that_unpack_to_gigabytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(3):
            archive.writestr(f"model/code/{number}.py", bytes(30_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ModelError, match="unpacks to far more than its size"):
        SCREENS[kind](path)


@pytest.mark.parametrize("kind", SCREENS)
def test_archives_of_another_shape(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    for names in (["a.py"], ["a/code/b.py", "c/code/d.py"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"")
        with pytest.raises(ModelError, match="without the one folder"):
            SCREENS[kind](path)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(ModelError):
        SCREENS[kind](path)


def test_fixed_batches_are_kept(tmp_path: Path) -> None:
    backend = ExportedBackend.load(save_exported(ToyNet(), tmp_path / "toy.pt2", batch=3))
    assert backend.batch_size == 3
