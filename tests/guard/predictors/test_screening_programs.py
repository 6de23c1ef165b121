"""Programs of `torch.export` that would do something else than compute: each is refused before it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guard.errors import ModelError
from guard.predictors.exported import ExportedBackend
from tests.guard.models import rewrite_archive
from tests.guard.predictors.pickles import pickled

Edit = Callable[[dict[str, Any]], object]


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
