"""What a scan of this very model found infected is read back for filters and repairs; see also `test_filters`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from calibration.inspection.record import read_scan
from calibration.inspection.triggers_file import read_infected
from guard.errors import InspectionError
from guard.images import InputSpec
from guard.predictors import Backend, wrap
from tests.scans import corner, write_scan
from tests.toy import LearningToy


@pytest.fixture(scope="module")
def backend() -> Backend:
    return wrap(LearningToy())


def test_infected_labels_come_first_and_pairs_where_they_are_wanted(tmp_path: Path, backend: Backend) -> None:
    mask, pattern = corner(2)
    folder = write_scan(tmp_path / "scan", backend, {3: corner(), 2: (mask, pattern * 0.5)}, infected_pair=True, classes=4)
    labels = read_infected(str(folder), backend)
    assert labels.labels.tolist() == [2, 3]
    assert labels.sources.tolist() == [-1, -1]
    assert labels.sizes.tolist() == [4.0, 9.0]
    assert float(labels.patterns[0].max()) == 0.5
    both = read_infected(folder, backend, pairs=True, spec=InputSpec(channels=1, height=8, width=8))
    assert (both.labels.tolist(), both.sources.tolist()) == ([2, 3, 1], [-1, -1, 0])
    assert both.sizes.tolist() == [4.0, 9.0, 9.0]
    alone = write_scan(tmp_path / "alone", backend, {}, infected_pair=True, classes=4)
    assert read_infected(alone, backend, pairs=True).sources.tolist() == [0]
    with pytest.raises(InspectionError, match=r"no infected label, only pairs of labels, so there is no trigger"):
        read_infected(alone, backend)


def test_scans_of_something_else_are_refused(tmp_path: Path, backend: Backend) -> None:
    folder = write_scan(tmp_path / "scan", backend, {3: corner()}, classes=4)
    with pytest.raises(InspectionError, match=r"images of shape \(1, 9, 9\), got one with \(1, 8, 8\): scan again"):
        read_infected(folder, backend, spec=InputSpec(channels=1, height=9, width=9))
    with pytest.raises(InspectionError, match=r"got one with \(\) and \(\), .*: give both the same --mean and --std"):
        read_infected(folder, backend, spec=InputSpec(channels=1, height=8, width=8, std=(30.0,)))
    with pytest.raises(InspectionError, match="is of another model"):
        read_infected(folder, wrap(lambda batch: batch))  # a function has no fingerprint
    record = msgspec.structs.replace(read_scan(folder), method="deep-inspect")
    (folder / "scan.json").write_bytes(msgspec.json.encode(record))
    message = "expected a scan by neural-cleanse, .* got one by deep-inspect, .*: scan with --method neural-cleanse and --data"
    with pytest.raises(InspectionError, match=message) as raised:
        read_infected(folder, backend)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["no such pair", "over 1", "of another size", "no arrays at all"])
def test_damaged_pairs(damage: str, tmp_path: Path, backend: Backend) -> None:
    folder = write_scan(tmp_path / "scan", backend, {3: corner()}, infected_pair=True, classes=4)
    file = folder / "triggers.safetensors"
    arrays = load_file(file)
    if damage == "no such pair":
        arrays["pairs.sources"] += 1
    elif damage == "over 1":
        arrays["pairs.patterns"] = arrays["pairs.patterns"] * 1.5
    elif damage == "of another size":
        for name in ("labels", "pairs"):
            arrays[f"{name}.masks"] = torch.ones(len(arrays[f"{name}.labels"]), 9, 9)
    file.unlink()
    file.write_text("thesis") if damage == "no arrays at all" else save_file(arrays, file)
    with pytest.raises(InspectionError, match=r"triggers\.safetensors.*: scan again"):
        read_infected(folder, backend, pairs=True)
    if damage in ("no such pair", "over 1"):
        assert read_infected(folder, backend).labels.tolist() == [3]  # the labels' are whole


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labels.masks", lambda value: value.bool()),
        ("labels.masks", lambda value: value.double()),
        ("labels.masks", torch.zeros_like),
        ("labels.labels", lambda value: value.float()),
        ("further.labels", lambda value: value + 70),
        ("further.success", lambda value: value.repeat(2)),
    ],
)
def test_damaged_triggers(name: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, backend: Backend) -> None:
    folder = write_scan(tmp_path / "scan", backend, {3: corner()}, classes=4, further=[(3, corner(2))])
    assert read_infected(folder, backend).labels.tolist() == [3, 3]
    arrays = load_file(folder / "triggers.safetensors")
    (folder / "triggers.safetensors").write_bytes(save(arrays | {name: change(arrays[name])}))
    with pytest.raises(InspectionError, match=r"triggers\.safetensors.*: scan again"):
        read_infected(folder, backend)
