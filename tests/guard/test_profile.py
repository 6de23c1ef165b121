from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from guard import Guard, folders, load_profile, loading
from guard.detectors import Strip
from guard.errors import GuardError, ModelError, ProfileError
from guard.predictors.module import state_sha256
from guard.predictors.screening import file_sha256
from guard.preprocessors import Gym
from guard.profile import ModelRecord, array_to_overlays, overlays_to_array, save_profile
from guard.records import DetectorRecord
from guard.verdict import Policy
from tests.guard.models import predictor, save_exported
from tests.guard.predictors.test_loading import Louder
from tests.toy import ENTROPY_THRESHOLD, ToyNet, save_toy_profile, toy_images


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `guard.json` as somebody with an editor would."""
    path = folder / "guard.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def edit_and_seal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change it as somebody would who knows how it is sealed."""

    def sealed(body: dict[str, Any]) -> None:
        del body["checksum"]
        change(body)
        body["arrays_sha256"] = file_sha256(folder / "arrays.safetensors")
        body["checksum"] = hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()

    edit(folder, sealed)


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that can't swap two folders at once."""
    monkeypatch.setattr(folders, "exchange", lambda *_: False)


def for_memory(folder: Path, net: nn.Module | None, kind: str = "module") -> Path:
    """Make it the profile of a model in memory: a module, or a callable."""
    profile, arrays = load_profile(folder)
    sha256 = None if net is None else state_sha256(net.state_dict())
    record = msgspec.convert({"kind": kind, "output": "logits", "num_classes": 4, "sha256": sha256}, ModelRecord)
    save_profile(msgspec.structs.replace(profile, model=record), arrays, folder)
    return folder


def test_a_profile_survives_the_disk(profile: Path, tmp_path: Path) -> None:
    before, arrays = load_profile(profile)
    arrays["not contiguous"] = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).t()
    arrays["extremes"] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45, -0.0])
    full = msgspec.structs.replace(before, preprocessor=Gym(kernel=3), policy=Policy(mode="monitor"), clean_accuracy=None)
    sealed = save_profile(full, arrays, tmp_path / "new", profile / "model.pt2", {"report.html": b"<html>"})
    after, read = load_profile(tmp_path / "new")
    assert after == sealed == msgspec.structs.replace(full, arrays_sha256=after.arrays_sha256)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert read[name].numpy().tobytes() == array.contiguous().numpy().tobytes()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "guard.json", "arrays.safetensors", "model.pt2", "report.html",
    }  # fmt: skip
    assert file_sha256(tmp_path / "new" / "model.pt2") == before.model.sha256


def test_overlays_are_small_where_that_is_exact() -> None:
    exact, _ = toy_images(5)
    assert overlays_to_array(exact).dtype == torch.uint8
    assert torch.equal(array_to_overlays(overlays_to_array(exact)), exact)
    fine = exact + 1e-5
    assert torch.equal(array_to_overlays(overlays_to_array(fine)), fine)
    assert overlays_to_array(fine).data_ptr() != fine.data_ptr()  # parts of one array can't be saved together


def test_a_loaded_guard_works(profile: Path, clean: Tensor, triggered: Tensor) -> None:
    guard = Guard.load(profile)
    assert [verdict.accepted for verdict in guard(torch.cat([clean[:3], triggered[:3]]))] == [True] * 3 + [False] * 3
    assert guard.detectors[0].threshold == -ENTROPY_THRESHOLD
    assert guard.policy == Policy()
    assert Guard.load(str(profile), policy=Policy(mode="monitor")).policy.mode == "monitor"


def test_it_runs_from_wherever_it_was_copied_to(profile: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "p"
    shutil.copytree(profile, moved)
    shutil.rmtree(profile)
    Guard.load(moved)


def test_saving_replaces_a_profile_whole(profile: Path) -> None:
    (profile / "report.html").write_text("from the last time")
    before, arrays = load_profile(profile)
    keep = profile.parent / "model.pt2"
    shutil.copy(profile / "model.pt2", keep)
    save_profile(msgspec.structs.replace(before, seed=7), arrays, profile, keep)
    assert load_profile(profile)[0].seed == 7
    assert not (profile / "report.html").exists()
    assert [path.name for path in profile.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("two_steps")
def test_a_failed_save_changes_nothing(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, arrays = load_profile(profile)
    changed = msgspec.structs.replace(before, seed=7)
    with pytest.raises(ProfileError, match="could not write the profile"):
        save_profile(changed, arrays, profile, profile / "no-such-model.pt2")
    assert load_profile(profile)[0] == before

    real = os.replace

    def fails(source: Any, target: Any) -> None:
        if Path(target) == profile and Path(source).name == "draft":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(ProfileError, match="No space left on device"):
        save_profile(changed, arrays, profile, profile / "model.pt2")
    monkeypatch.undo()
    assert load_profile(profile)[0] == before
    Guard.load(profile)


def test_other_folders_are_not_replaced(profile: Path, tmp_path: Path) -> None:
    before, arrays = load_profile(profile)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("dear")
    file = tmp_path / "file"
    file.write_text("dear")
    for target, problem in ((photos, r"holds something else \(.*\)"), (file, "got .*file, a file")):
        with pytest.raises(ProfileError, match=rf"{problem}: pick another --out"):
            save_profile(before, arrays, target, profile / "model.pt2")
    assert (photos / "holiday.jpg").read_text() == file.read_text() == "dear"
    empty = tmp_path / "empty"
    empty.mkdir()
    save_profile(before, arrays, empty, profile / "model.pt2")
    Guard.load(empty)


def test_targets_that_can_not_be_written(profile: Path, tmp_path: Path) -> None:
    before, arrays = load_profile(profile)
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match=r"could not write the profile to .*file/profile"):
        save_profile(before, arrays, tmp_path / "file" / "profile", profile / "model.pt2")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_targets(profile: Path, tmp_path: Path) -> None:
    before, arrays = load_profile(profile)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ProfileError, match="Permission denied"):
        save_profile(before, arrays, locked / "profile", profile / "model.pt2")


def test_no_profile(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", ""):
        with pytest.raises(ProfileError, match=r"expected a profile folder with guard\.json"):
            load_profile(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_json(share: float, profile: Path) -> None:
    path = profile / "guard.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ProfileError, match="is truncated or not JSON"):
        load_profile(profile)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[]", b"null", b'"text"', b'{"schema": ' + b"[" * 100_000, b"{}" * 2, b"\x00"])
def test_json_of_another_kind(data: bytes, profile: Path) -> None:
    (profile / "guard.json").write_bytes(data)
    with pytest.raises(ProfileError, match="is truncated or not JSON"):
        load_profile(profile)


@pytest.mark.parametrize("schema", [None, "1", True, 1.5, [1]])
def test_json_without_a_schema(schema: object, profile: Path) -> None:
    edit(profile, lambda body: body.update(schema=schema))
    with pytest.raises(ProfileError, match="without a schema version"):
        load_profile(profile)


def test_other_schemas(profile: Path) -> None:
    edit(profile, lambda body: body.update(schema=2, a_field_from_the_future={}))
    with pytest.raises(ProfileError, match=r"expected profile schema 1, got 2 .* upgrade backdoor-guard"):
        Guard.load(profile)
    edit(profile, lambda body: body.update(schema=0))
    with pytest.raises(ProfileError, match=r"got 0 .* calibrate again"):
        Guard.load(profile)


def test_a_profile_of_one_detector_from_before_there_were_several(profile: Path, clean: Tensor, triggered: Tensor) -> None:
    """Without the names of the detector and of its array, and sealed as it was then."""
    expected = Guard.load(profile)(torch.cat([clean, triggered]))

    def as_before(body: dict[str, Any]) -> None:
        del body["checksum"], body["detectors"][0]["array"], body["detectors"][0]["title"]
        sealed = msgspec.json.encode(body, order="sorted")
        body["checksum"] = hashlib.sha256(sealed).hexdigest()

    edit(profile, as_before)
    assert Guard.load(profile)(torch.cat([clean, triggered])) == expected
    edit(profile, lambda body: body["detectors"][0].update(title="strip"))
    with pytest.raises(ProfileError, match="was changed after calibration"):
        Guard.load(profile)


def test_the_layout_from_before_there_were_other_detectors(profile: Path, clean: Tensor, triggered: Tensor) -> None:
    """Its `guard.json` word for word; clean images are remembered as overlays alone."""
    expected = Guard.load(profile)(torch.cat([clean, triggered]))
    body = {
        "schema": 1,
        "created": "2026-01-01T00:00:00Z",
        "input": {
            "channels": 1, "height": 8, "width": 8, "layout": "NCHW", "dtype": "float32", "container": "torch",
            "mean": [], "std": [], "class_names": ["north-west", "north-east", "south-west", "south-east"], "resize": False,
        },
        "model": {
            "kind": "torch-export", "output": "logits", "num_classes": 4, "file": "model.pt2", "factory": None,
            "sha256": file_sha256(profile / "model.pt2"),
        },
        "detectors": [
            {
                "name": "strip",
                "threshold": {
                    "value": -0.05, "method": "conformal", "frr": 0.01, "images": 100, "rank": 1, "frr_low": 0.0,
                    "frr_high": 0.05, "confidence": None,
                },
                "blend": "add", "alpha": 1.0, "mean_passes": None, "array": "strip.overlays", "title": "strip",
            }
        ],
        "preprocessor": None,
        "policy": {"mode": "enforce", "on_error": "reject"},
        "clean_accuracy": 1.0,
        "clean_accuracy_raw": 1.0,
        "seed": 0,
        "libraries": {"torch": "2.6.0"},
        "arrays_sha256": file_sha256(profile / "arrays.safetensors"),
        "tripwire": None,
    }  # fmt: skip
    checksum = hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()
    (profile / "guard.json").write_text(json.dumps({**body, "checksum": checksum}))
    assert set(load_profile(profile)[1]) == {"strip.overlays", "probe.probabilities"}
    assert Guard.load(profile)(torch.cat([clean, triggered])) == expected


OTHERS: list[dict[str, object]] = [
    {"name": "feature-squeezing", "squeezers": ["median"]},
    {"name": "activation-filter", "neurons": [0, 3], "title": "activation-filter-2"},
]


@pytest.mark.parametrize("record", OTHERS)
def test_a_detector_of_another_kind(record: dict[str, object], profile: Path, clean: Tensor) -> None:
    before, arrays = load_profile(profile)
    threshold = msgspec.to_builtins(before.detectors[0].threshold)
    other = msgspec.convert({**record, "threshold": threshold}, DetectorRecord)
    save_profile(msgspec.structs.replace(before, detectors=(*before.detectors, other)), arrays, profile, profile / "model.pt2")
    if record["name"] == "activation-filter":  # the toy has neither linear layer nor convolution
        with pytest.raises(
            ProfileError, match=r"activation-filter-2 .* does not fit this model: expected a model with a linear"
        ):
            Guard.load(profile)
        return
    (verdict,) = Guard.load(profile)(clean[:1])
    assert [finding.detector for finding in verdict.findings] == ["strip", "feature-squeezing"]


def test_two_detectors_have_overlays_and_names_of_their_own(profile: Path, clean: Tensor, triggered: Tensor) -> None:
    before, arrays = load_profile(profile)
    (first,) = before.detectors
    second = msgspec.structs.replace(first, blend="max", array="strip.overlays.2", title="strip-max")
    both = msgspec.structs.replace(before, detectors=(first, second))
    other = overlays_to_array(toy_images(7, seed=5)[0])
    save_profile(both, {**arrays, "strip.overlays.2": other}, profile, profile / "model.pt2")
    guard = Guard.load(profile)
    strips = [item.detector for item in guard.detectors]
    assert [(strip.name, len(strip.overlays)) for strip in strips if isinstance(strip, Strip)] == [
        ("strip", 40),
        ("strip-max", 7),
    ]
    assert [len(verdict.findings) for verdict in guard(clean[:2])] == [2, 2]
    save_profile(both, arrays, profile, profile / "model.pt2")
    with pytest.raises(ProfileError, match=r"expected the array strip\.overlays\.2"):
        Guard.load(profile)
    with pytest.raises(ProfileError, match="distinct names, got strip, strip"):
        msgspec.structs.replace(both, detectors=(first, first))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "threshold": lambda body: body["detectors"][0]["threshold"].update(value=5.0),
    "threshold, by a hair": lambda body: body["detectors"][0]["threshold"].update(value=-0.050000001),
    "policy": lambda body: body["policy"].update(mode="monitor"),
    "blend": lambda body: body["detectors"][0].update(blend="mix", alpha=0.5),
    "no detectors": lambda body: body.update(detectors=[]),
    "classes": lambda body: body["input"].update(class_names=["a", "b", "c", "d"]),
    "another model": lambda body: body["model"].update(sha256="0" * 64),
    "other arrays": lambda body: body.update(arrays_sha256="0" * 64),
    "accuracy": lambda body: body.update(clean_accuracy=0.999),
    "no checksum": lambda body: body.pop("checksum"),
    "another checksum": lambda body: body.update(checksum="0" * 64),
    "an empty checksum": lambda body: body.update(checksum=None),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_by_hand_are_noticed(name: str, profile: Path) -> None:
    edit(profile, EDITS[name])
    with pytest.raises(ProfileError, match="was changed after calibration"):
        Guard.load(profile)


def filter_of(body: dict[str, Any], neurons: list[int], title: str = "activation-filter-2") -> dict[str, Any]:
    threshold = body["detectors"][0]["threshold"]
    return {"name": "activation-filter", "threshold": threshold, "neurons": neurons, "title": title}


INVALID: dict[str, Callable[[dict[str, Any]], object]] = {
    "a field too many": lambda body: body.update(pickle="yes"),
    "a field too few": lambda body: body.pop("policy"),
    "a detector that is unknown": lambda body: body["detectors"][0].update(name="magic"),
    "a threshold that is none": lambda body: body["detectors"][0]["threshold"].update(value=None),
    "a threshold in words": lambda body: body["detectors"][0]["threshold"].update(value="NaN"),
    "a rate over one": lambda body: body["detectors"][0]["threshold"].update(frr=1.5),
    "squeezers that are unknown": lambda body: body["detectors"][0].update(name="feature-squeezing", squeezers=["blur"]),
    "no neurons": lambda body: body.update(detectors=[filter_of(body, [])]),
    "a neuron before the first": lambda body: body.update(detectors=[filter_of(body, [-1])]),
    "a filter for no label": lambda body: body.update(detectors=[filter_of(body, [1], "activation-filter-x")]),
    "boundaries that add entropies up, as in the version before": lambda body: body["detectors"][0].update(
        boundaries={"ends": [3, 100], "accept": [0.2, 1.0], "reject": [0.01, 1.0]}
    ),
    "a shape of nothing": lambda body: body["input"].update(channels=0),
    "an unknown layout": lambda body: body["input"].update(layout="HWC"),
    "a detector's name with a line break": lambda body: body["detectors"][0].update(title="strip\n"),
    "two detectors of one name": lambda body: body["detectors"].append(body["detectors"][0]),
    "one class": lambda body: body["model"].update(num_classes=1),
    "a preprocessor out of range": lambda body: body.update(preprocessor={"name": "gym", "kernel": 4}),
    "a path up": lambda body: body["model"].update(file="../model.pt2"),
    "an absolute path": lambda body: body["model"].update(file="/etc/passwd"),
    "a path down": lambda body: body["model"].update(file="a/model.pt2"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_makes_no_profile(name: str, profile: Path) -> None:
    edit(profile, INVALID[name])
    with pytest.raises(ProfileError, match="is not a valid profile") as raised:
        Guard.load(profile)
    assert "\n" not in str(raised.value)
    assert str(raised.value).count("calibrate again") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1.0}, "expected alpha in"),
        ({"votes": 41}, "expected 1 to 40 votes"),
        ({"boundaries": {"votes": 3, "ends": [5, 39], "accept": [1, 1], "reject": [0, 1]}}, "boundaries of 40 overlays"),
    ],
)
def test_detectors_that_can_not_be_name_the_profile(change: dict[str, object], message: str, profile: Path) -> None:
    edit_and_seal(profile, lambda body: body["detectors"][0].update(change))
    with pytest.raises(ProfileError, match=rf"the profile in {profile} .*{message}.*: calibrate again$"):
        Guard.load(profile)


def test_a_threshold_that_no_score_can_be_under(profile: Path) -> None:
    """Scores are float32."""
    edit_and_seal(profile, lambda body: body["detectors"][0]["threshold"].update(value=-1e39))
    with pytest.raises(ProfileError, match=r"expected a finite threshold, got -1e\+39\): calibrate again$"):
        Guard.load(profile)


@pytest.mark.parametrize("file", ["../model.pt2", "/etc/passwd", "a/b", "..", ".", "", "a/", "./a", "../", "a/../../b"])
def test_model_files_stay_in_the_folder(file: str) -> None:
    with pytest.raises(ProfileError, match="inside the profile's folder"):
        ModelRecord(kind="onnx", output="logits", num_classes=4, file=file)


def test_arrays_that_are_damaged(profile: Path) -> None:
    path = profile / "arrays.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"\0", b"", data[:8], b"\xff" * 100, data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ProfileError, match="SHA-256 differs"):
            load_profile(profile)
    path.unlink()
    with pytest.raises(ProfileError, match=r"expected arrays\.safetensors"):
        load_profile(profile)
    path.mkdir()
    with pytest.raises(ProfileError, match=r"expected arrays\.safetensors"):
        load_profile(profile)


@pytest.mark.parametrize("missing", ["strip.overlays", "probe.probabilities"])
def test_arrays_that_are_missing(missing: str, profile: Path) -> None:
    before, arrays = load_profile(profile)
    del arrays[missing]
    save_profile(before, arrays, profile, profile / "model.pt2")
    with pytest.raises(ProfileError, match=f"expected the array {missing}"):
        Guard.load(profile)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("strip.overlays", torch.zeros(4, 3, 8, 8, dtype=torch.uint8)),
        ("strip.overlays", torch.full((4, 1, 8, 8), float("nan"))),
        ("strip.overlays", torch.zeros(0, 1, 8, 8)),
        ("probe.probabilities", torch.zeros(4)),
        ("probe.probabilities", torch.zeros(0, 4)),
        ("probe.probabilities", torch.full((8, 4), float("nan"))),
        ("probe.probabilities", torch.zeros(8, 5)),
        ("probe.probabilities", torch.ones(8, 4, dtype=torch.bool)),
        ("probe.probabilities", torch.ones(8, 4).to(torch.float8_e4m3fn)),
    ],
)
def test_arrays_that_are_not_what_they_should_be(name: str, array: Tensor, profile: Path) -> None:
    before, arrays = load_profile(profile)
    save_profile(before, {**arrays, name: array}, profile, profile / "model.pt2")
    with pytest.raises(GuardError):
        Guard.load(profile)


def test_another_model_in_the_folder(profile: Path) -> None:
    save_exported(Louder(), profile / "model.pt2")
    with pytest.raises(ProfileError, match=r"belongs to another model \(model\.pt2 differs\)"):
        Guard.load(profile)


def test_no_model_in_the_folder(profile: Path) -> None:
    (profile / "model.pt2").unlink()
    with pytest.raises(ProfileError, match=r"expected the model model\.pt2"):
        Guard.load(profile)


def test_the_models_file_cut_short(profile: Path) -> None:
    path = profile / "model.pt2"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ProfileError, match="belongs to another model"):
        Guard.load(profile)


def test_modules_in_memory(profile: Path, clean: Tensor) -> None:
    net = Louder(12.5)
    for_memory(profile, ToyNet())
    with pytest.raises(ProfileError, match="for a model in memory: pass it"):
        Guard.load(profile)
    with pytest.raises(ProfileError, match=r"belongs to another model \(SHA-256 differs\)"):
        Guard.load(profile, net)
    assert Guard.load(profile, ToyNet())(clean)[0].accepted


def test_functions_are_known_by_their_answers(profile: Path, clean: Tensor) -> None:
    for_memory(profile, None, "callable")
    net = ToyNet()

    def same(images: Tensor) -> Tensor:
        logits: Tensor = net(images)
        return logits

    assert Guard.load(profile, same)(clean)[0].accepted
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "another order of classes": lambda images: same(images).flip(1),
        "another scale": lambda images: same(images) * 0.2,
        "other preprocessing": lambda images: same(images * 0.5),
        "NaN": lambda images: same(images) * torch.nan,
        "one answer": lambda images: torch.zeros(len(images), 4),
    }
    for other in others.values():
        with pytest.raises(ProfileError, match="answers differently than at calibration"):
            Guard.load(profile, other)
    with pytest.raises(ProfileError, match="does not fit this model"):
        Guard.load(profile, lambda images: same(images)[:, :3])
    with pytest.raises(ModelError, match="got str"):
        Guard.load(profile, "model.onnx")


def test_a_module_instead_of_the_file_it_was_exported_from(profile: Path, clean: Tensor) -> None:
    """Another kind has another fingerprint, so only its answers tell."""
    assert Guard.load(profile, ToyNet())(clean)[0].accepted
    with pytest.raises(ProfileError, match="answers differently"):
        Guard.load(profile, Louder(1.0))


@pytest.mark.parametrize("swap", ["weights", "factory", "fit"])
def test_factories_with_weights(swap: str, profile: Path, tmp_path: Path, clean: Tensor) -> None:
    before, arrays = load_profile(profile)
    weights = tmp_path / "weights.safetensors"
    save_file(dict(ToyNet().state_dict()), weights)
    record = ModelRecord(
        kind="module", output="logits", num_classes=4, file="weights.safetensors", factory="tests.toy:ToyNet",
        sha256=state_sha256(ToyNet().state_dict()),
    )  # fmt: skip
    if swap == "factory":
        record = msgspec.structs.replace(record, factory="tests.toy:toy_images")
    save_profile(msgspec.structs.replace(before, model=record), arrays, profile, weights)
    if swap == "fit":
        assert Guard.load(profile)(clean)[0].accepted
        return
    if swap == "weights":
        save_file(dict(Louder().state_dict()), profile / "weights.safetensors")
    with pytest.raises((ProfileError, ModelError)):
        Guard.load(profile)


BLIND: dict[str, Callable[[dict[str, Any]], object]] = {
    "detectors, got none": lambda body: body.update(detectors=[]),
    "at most 0 for strip": lambda body: body["detectors"][0]["threshold"].update(value=1e-9),
    "at most 2 for feature-squeezing": lambda body: body["detectors"].append(
        {"name": "feature-squeezing", "squeezers": ["median"], "threshold": {**body["detectors"][0]["threshold"], "value": 2.1}}
    ),
}


@pytest.mark.parametrize("name", BLIND)
def test_what_would_accept_everything_is_refused(name: str, profile: Path) -> None:
    edit_and_seal(profile, BLIND[name])
    with pytest.raises(ProfileError, match=f"expected {name}|expected a threshold of {name}"):
        Guard.load(profile)


def test_without_detectors_it_may_only_monitor(profile: Path, clean: Tensor) -> None:
    edit_and_seal(profile, lambda body: (body.update(detectors=[]), body["policy"].update(mode="monitor")))
    assert Guard.load(profile)(clean[:1])[0].accepted
    with pytest.raises(ProfileError, match="expected detectors, got none"):
        Guard.load(profile, policy=Policy(mode="enforce"))


@pytest.mark.parametrize("size", [2**31, 10**19, 10**400])
@pytest.mark.parametrize("name", ["channels", "height", "width"])
def test_sizes_that_no_image_has(name: str, size: int, profile: Path) -> None:
    edit_and_seal(profile, lambda body: body["input"].update({name: size}))
    with pytest.raises(ProfileError, match=rf"is not a valid profile .*{name}"):
        Guard.load(profile)


def test_a_probe_of_the_profiles_own_making_passes(profile: Path) -> None:
    _, arrays = load_profile(profile)
    overlays = array_to_overlays(arrays["strip.overlays"])
    torch.testing.assert_close(arrays["probe.probabilities"], predictor()(overlays[:8]), atol=1e-6, rtol=0)


def test_a_quarantine_kept_inside_a_profile_is_not_lost(tmp_path: Path) -> None:
    folder = save_toy_profile(tmp_path / "profile")
    (folder / "quarantine").mkdir()
    with pytest.raises(ProfileError, match=r"holds something else \(quarantine\)"):
        save_toy_profile(folder)
    assert (folder / "quarantine").is_dir()


@pytest.mark.usefixtures("two_steps")
def test_an_interrupted_swap_keeps_the_old_profile(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, arrays = load_profile(profile)
    keep = profile.parent / "model.pt2"
    shutil.copy(profile / "model.pt2", keep)
    real = os.replace

    def interrupted(source: Any, target: Any) -> None:
        real(source, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_profile(msgspec.structs.replace(before, seed=7), arrays, profile, keep)
    assert load_profile(profile)[0] == before


def replace_often(folder: Path, numbers: Sequence[int]) -> None:
    """Generations of the profile, of which both files tell the number."""
    before, arrays = load_profile(folder)
    for number in numbers:
        save_profile(msgspec.structs.replace(before, seed=number), {**arrays, "number": torch.tensor(number)}, folder)


@pytest.mark.parametrize("way", ["at once", "in two steps"])
def test_a_profile_that_is_replaced_meanwhile_is_read_whole(
    way: str, profile: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "in two steps":
        request.getfixturevalue("two_steps")
    replace_often(for_memory(profile, ToyNet()), [0])
    monkeypatch.setattr(os, "fsync", lambda _: None)  # quicker: meets readers more often
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace_often, profile, range(1, 101))
        reads = 0
        while not writing.done():
            read, arrays = load_profile(profile)
            assert int(arrays["number"]) == read.seed
            reads += 1
        writing.result()
    assert reads > 10
    assert load_profile(profile)[0].seed == 100


def test_a_guard_is_of_one_generation(profile: Path, clean: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is replaced by another model's after its settings were read, and before its model is."""
    save_exported(Louder(), profile.parent / "louder.pt2")
    sha256 = file_sha256(profile.parent / "louder.pt2")
    probe = predictor(Louder())(array_to_overlays(load_profile(profile)[1]["strip.overlays"])[:8])
    reads = 0

    def read_and_replaced(folder: Path) -> Any:
        nonlocal reads
        reads += 1
        before, arrays = load_profile(folder)
        if reads == 1:
            other = msgspec.structs.replace(before, model=msgspec.structs.replace(before.model, sha256=sha256))
            save_profile(other, {**arrays, "probe.probabilities": probe}, profile, profile.parent / "louder.pt2")
        return before, arrays

    monkeypatch.setattr(loading, "read_profile", read_and_replaced)
    guard = Guard.load(profile)
    assert reads == 2
    torch.testing.assert_close(guard.answer(clean), predictor(Louder())(clean))


def test_a_save_that_is_killed_between_two_steps_says_where_the_old_profile_is(profile: Path) -> None:
    before = load_profile(profile)[0]
    hidden = profile.parent / f".{profile.name}.k1ll3d_"
    hidden.mkdir()
    profile.rename(hidden / "replaced")
    started = time.monotonic()
    with pytest.raises(
        ProfileError, match=r"expected a profile folder .*: its replacement was cut short, move .* there"
    ) as raised:
        Guard.load(profile)
    assert time.monotonic() - started < 5.0  # it may be about to be replaced, which takes no longer than half a second
    assert str(hidden / "replaced") in str(raised.value)
    (hidden / "replaced").rename(profile)
    assert load_profile(profile)[0] == before
