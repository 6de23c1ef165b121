"""What OpenML sends becomes the same arrays; scikit-learn's fetcher is stood in for, there is no network here."""

from __future__ import annotations

from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
from numpy.typing import NDArray

from benchmarks.datasets import SetName, load_parts, main, read_raw_set
from benchmarks.formats.openml import fetch_raw_set
from guard.errors import InputError


def serve(monkeypatch: pytest.MonkeyPatch, data: NDArray[np.generic], target: NDArray[np.generic]) -> list[dict[str, object]]:
    """Stand in for OpenML; gives the calls it got."""
    calls: list[dict[str, object]] = []

    def fetch_openml(**options: object) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(data=data, target=target)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    return calls


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fetch_openml(**options: object) -> SimpleNamespace:
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)


def balanced() -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    """As Fashion-MNIST: 70,000 rows, whose first bytes hold their number."""
    data = np.zeros((70_000, 784), dtype=np.uint8)
    data[:, :4] = np.arange(70_000, dtype="<u4")[:, None].view(np.uint8)
    return data, (np.arange(70_000) % 10).astype(str)


@pytest.mark.parametrize(
    ("name", "number"), [("mnist", 554), ("fashion_mnist", 40996), ("cifar10", 40927), ("cifar100", 41983)]
)
def test_rows_become_images(name: SetName, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 784 if "mnist" in name else 3072
    rows = np.zeros((10_002, size))
    rows[:, 5] = np.arange(10_002) % 256
    rows[:, -1] = 77.0
    calls = serve(monkeypatch, rows, np.array(["9", *["4"] * 10_001]))
    raw = fetch_raw_set(name)
    assert calls[0]["data_id"] == number
    assert (len(raw.train), len(raw.test)) == (2, 10_000)
    assert raw.train.y.tolist() == [9, 4]
    first, last = ((0, 5), (27, 27)) if size == 784 else ((0, 5, 0), (31, 31, 2))
    assert [int(raw.train.x[1][first]), int(raw.test.x[0][first])] == [1, 2]
    assert (raw.test.x[:, *last] == 77).all()


@pytest.mark.parametrize(
    "error", [URLError("no network"), ValueError("md5 of the\nfile differs"), IncompleteRead(b""), TimeoutError()]
)
def test_a_failed_download_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail(monkeypatch, error)
    with pytest.raises(InputError, match=r"expected OpenML's data set 554.*mnist's own files") as caught:
        load_parts("mnist", tmp_path, download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (np.zeros((10_001, 783)), np.zeros(10_001, dtype=np.int64)),
        (np.zeros((10_000, 784)), np.zeros(10_000, dtype=np.int64)),
        (np.zeros(5), np.zeros(5, dtype=np.int64)),
        (np.full((10_001, 784), 0.5), np.zeros(10_001, dtype=np.int64)),
        (np.full((10_001, 784), np.nan), np.zeros(10_001, dtype=np.int64)),
        (np.zeros((10_001, 784)), np.full(10_001, "seven")),
        (np.zeros((10_001, 784)), np.full(10_001, 10)),
        (np.zeros((10_001, 784)), np.zeros(10_000, dtype=np.int64)),
    ],
)
def test_other_rows_are_refused(
    rows: NDArray[np.generic], labels: NDArray[np.generic], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, rows, labels)
    with pytest.raises(InputError, match="OpenML's data set 554"):
        fetch_raw_set("mnist")


def test_the_network_is_asked_only_with_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = serve(monkeypatch, *balanced())
    with pytest.raises(InputError, match="--data"):
        load_parts("fashion_mnist", tmp_path)
    assert not calls
    assert len(load_parts("fashion_mnist", tmp_path, download=True).attacker) == 50_000


def test_the_command_keeps_what_later_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = serve(monkeypatch, *balanced())
    main(["fetch", "--set", "fashion_mnist", "--data", str(tmp_path / "sets")])
    assert str(tmp_path / "sets" / "fashion_mnist.npz") in capsys.readouterr().out
    parts = load_parts("fashion_mnist", tmp_path / "sets", download=True)
    assert len(calls) == 1
    numbers = [
        part.pixels[:, 0, 0, :4].numpy().copy().view("<u4")[:, 0] for part in (parts.attacker, parts.defender, parts.evaluation)
    ]
    assert np.array_equal(np.concatenate(numbers), np.arange(70_000))
    assert [len(part) for part in numbers] == [50_000, 10_000, 10_000]


def test_the_command_keeps_nothing_that_can_not_be_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, *balanced())
    with pytest.raises(InputError, match="official order"):
        main(["fetch", "--set", "mnist", "--data", str(tmp_path)])
    assert read_raw_set("mnist", tmp_path) is None


def test_gtsrb_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of mnist"):
        main(["fetch", "--set", "gtsrb", "--data", str(tmp_path)])
