"""The parts of a set never mix, the committed split is the drawn one, and every source gives the same parts."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.parts
from benchmarks.datasets import (
    DEFAULT_FOLDER,
    FILES,
    Parts,
    SetName,
    defender_rows,
    draw_defender_rows,
    load_parts,
    main,
    read_raw_set,
    validation_rows,
)
from benchmarks.formats.raw_set import KINDS, Labelled, RawSet
from benchmarks.parts import cut, rows_of_each_class
from guard.arrays import read_arrays
from guard.errors import InputError


def on_this_machine(name: SetName) -> RawSet:
    if not (DEFAULT_FOLDER / FILES[name]).is_file():
        pytest.skip(f"{FILES[name]} is not on this machine")
    raw = read_raw_set(name, DEFAULT_FOLDER)
    assert raw is not None
    return raw


def numbered(name: SetName, train: int, test: int) -> RawSet:
    """As large as the real set, equally many of each class; the first bytes of an image hold its number."""

    def part(first: int, count: int) -> Labelled:
        x = np.zeros((count, *KINDS[name].shape), dtype=np.uint8)
        x.reshape(count, -1)[:, :4] = np.arange(first, first + count, dtype="<u4")[:, None].view(np.uint8)
        return Labelled(x, np.arange(count) % KINDS[name].num_classes)

    return RawSet(name, "here", part(0, train), part(train, test))


def numbers(parts: Parts) -> list[set[int]]:
    """Which images are in each part."""
    found = []
    for part in (parts.attacker, parts.defender, parts.evaluation):
        flat = np.moveaxis(part.pixels.numpy(), 1, 3).reshape(len(part), -1)
        found.append(set(np.ascontiguousarray(flat[:, :4]).view("<u4")[:, 0].tolist()))
    return found


@pytest.mark.parametrize(("name", "held"), [("gtsrb", 12_630), ("cifar10", 9_000), ("cifar100", 10_000)])
def test_the_committed_split_is_the_drawn_one(name: SetName, held: int) -> None:
    rows = defender_rows(name).tolist()
    assert rows == draw_defender_rows(name)
    assert len(set(rows)) == 5_000
    assert (min(rows) >= 0, max(rows) < held) == (True, True)


def test_the_command_draws_the_committed_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = benchmarks.parts._SPLITS
    monkeypatch.setattr(benchmarks.parts, "_SPLITS", tmp_path / "splits")
    main(["splits"])
    written = sorted((tmp_path / "splits").iterdir())
    assert [path.name for path in written] == sorted(path.name for path in committed.iterdir())
    assert all(json.loads(path.read_text()) == json.loads((committed / path.name).read_text()) for path in written)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", ["mnist.npz", "train-images-idx3-ubyte"]),
        ("fashion_mnist", ["fashion_mnist.npz", "FashionMNIST/raw"]),
        ("cifar10", ["cifar10.webp.npz", "cifar-10-batches-bin", "cifar-10-batches-py"]),
        ("cifar100", ["cifar100.npz", "cifar-100-binary", "cifar-100-python"]),
        ("gtsrb", ["gtsrb.webp.npz", "GTSRB/Final_Training", "GTSRB_Final_Training_Images.zip"]),
    ],
)
def test_a_missing_set_says_what_was_looked_for_and_what_to_run(name: SetName, files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "no where"
    with pytest.raises(InputError, match="--data") as caught:
        load_parts(name, folder)
    words = str(caught.value)
    assert all(file in words for file in [name, str(folder), *files])
    if name != "gtsrb":
        assert f"python -m benchmarks.datasets fetch --set {name} --data {shlex.quote(str(folder))}" in words


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mnist", (50_000, 10_000, 10_000)),
        ("gtsrb", (13_070, 5_000, 7_630)),
        ("cifar10", (25_000, 5_000, 5_000)),
    ],
)
def test_parts_do_not_share_images(name: SetName, sizes: tuple[int, int, int]) -> None:
    parts = cut(on_this_machine(name))
    assert (len(parts.attacker), len(parts.defender), len(parts.evaluation)) == sizes
    held = [{row.tobytes() for row in part.pixels.numpy()} for part in (parts.attacker, parts.defender, parts.evaluation)]
    shared = [len(held[0] & held[1]), len(held[0] & held[2]), len(held[1] & held[2])]
    assert shared == ([0, 0, 0] if name == "mnist" else shared)
    assert sum(shared) <= 20  # GTSRB holds 8 byte-equal copies of training images in its test set, see its sources
    assert torch.unique(parts.evaluation.known_labels).tolist() == list(range(parts.num_classes))
    assert np.asarray(parts.evaluation.pixels).dtype == np.uint8


def test_fashion_mnist_is_cut_as_mnist() -> None:
    found = numbers(cut(numbered("fashion_mnist", 60_000, 10_000)))
    assert found == [set(range(50_000)), set(range(50_000, 60_000)), set(range(60_000, 70_000))]


def test_cifar100_is_cut_by_its_committed_split() -> None:
    attacker, defender, evaluation = numbers(cut(numbered("cifar100", 50_000, 10_000)))
    assert attacker == set(range(40_000))
    assert defender == {40_000 + row for row in defender_rows("cifar100").tolist()}
    assert evaluation == set(range(40_000, 60_000)) - defender


def official_cifar10() -> RawSet:
    """The official layout: our own file's images at their places, other labels where it has none, test images repeated."""
    ours = on_this_machine("cifar10")
    assert ours.heldout is not None
    arrays = read_arrays(DEFAULT_FOLDER / FILES["cifar10"])
    x, y = np.zeros((50_000, 32, 32, 3), dtype=np.uint8), np.full(50_000, -1)
    for key, part in (("index_train", ours.train), ("index_heldout", ours.heldout)):
        places = arrays[key].astype(np.int64)
        x[places], y[places] = part.x, part.y
    last = {label: int(np.flatnonzero(y == label)[-1]) for label in range(10)}
    left = dict.fromkeys(range(10), 1_600)
    for place in np.flatnonzero(y < 0).tolist():  # an image without a place in our file comes after its class's 3,400
        y[place] = next(label for label, count in left.items() if count and last[label] < place)
        left[int(y[place])] -= 1
    labels = np.concatenate([ours.test.y, np.repeat(np.arange(10), 1_000 - np.bincount(ours.test.y))])
    return RawSet("cifar10", "here", Labelled(x, y), Labelled(np.resize(ours.test.x, (10_000, 32, 32, 3)), labels))


def test_cifar10s_official_files_give_the_same_parts() -> None:
    official = official_cifar10()
    arrays = read_arrays(DEFAULT_FOLDER / FILES["cifar10"])
    assert np.array_equal(rows_of_each_class(official.train.y, 0, 2_500), arrays["index_train"])
    assert np.array_equal(rows_of_each_class(official.train.y, 2_500, 3_400), arrays["index_heldout"])
    one, other = cut(official), load_parts("cifar10")
    for name in ("attacker", "defender", "evaluation"):
        assert torch.equal(getattr(one, name).pixels, getattr(other, name).pixels)
        assert torch.equal(getattr(one, name).labels, getattr(other, name).labels)


def test_another_order_is_refused() -> None:
    mnist = on_this_machine("mnist")
    with pytest.raises(InputError, match="official order"):
        cut(replace(mnist, test=mnist.test.rows(np.arange(9_999, -1, -1))))


@pytest.mark.parametrize(
    ("name", "train", "test", "words"),
    [
        ("mnist", 59_999, 10_000, "expected mnist with 60000 training and 10000 test images, got 59999 and 10000"),
        ("fashion_mnist", 60_000, 9_990, "got 60000 and 9990"),
        ("gtsrb", 430, 12_629, "expected gtsrb with its training and 12630 test"),
        ("gtsrb", 42, 12_630, "expected all 43 classes"),
        ("mnist", 60_000, 10_000, "official order"),
    ],
)
def test_other_sets_are_refused(name: SetName, train: int, test: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cut(numbered(name, train, test))


def test_mnists_files_are_not_taken_for_fashion_mnist() -> None:
    with pytest.raises(InputError, match="equally frequent"):
        cut(replace(on_this_machine("mnist"), name="fashion_mnist"))


def tracks_of_classes(labels: torch.Tensor, tracks: torch.Tensor) -> set[tuple[int, int]]:
    return set(zip(labels.tolist(), tracks.tolist(), strict=True))


def signs() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of 1 to 10 tracks, 3 to 12 frames each; track numbers start again in each class."""
    pairs = [(label, track) for label in range(10) for track in range(label + 1) for _ in range(3 + track)]
    labels, tracks = torch.tensor(pairs).T
    return labels, tracks


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_no_track_is_on_both_sides(share: float) -> None:
    labels, tracks = signs()
    rows = validation_rows(labels, tracks, share, seed=0)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[rows] = False
    validation = tracks_of_classes(labels[rows], tracks[rows])
    training = tracks_of_classes(labels[rest], tracks[rest])
    assert not validation & training
    assert len(validation | training) == 55
    assert {label for label, _ in training} == set(range(10))
    assert {label for label, _ in validation} == set(range(1, 10))  # class 0 has one track only
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_the_seed_decides_which_tracks() -> None:
    labels, tracks = signs()
    assert torch.equal(validation_rows(labels, tracks, 0.3, seed=1), validation_rows(labels, tracks, 0.3, seed=1))
    assert not torch.equal(validation_rows(labels, tracks, 0.3, seed=1), validation_rows(labels, tracks, 0.3, seed=2))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="expected a share"):
        validation_rows(*signs(), share, seed=0)


def test_every_label_needs_a_track() -> None:
    labels, tracks = signs()
    with pytest.raises(InputError, match="one track for each label"):
        validation_rows(labels, tracks[:-1], 0.2, seed=0)


def test_gtsrbs_validation_images_show_other_signs() -> None:
    parts = cut(on_this_machine("gtsrb"))
    assert parts.tracks is not None
    labels = parts.attacker.known_labels
    rows = validation_rows(labels, parts.tracks, 0.2, seed=0)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[rows] = False
    assert not tracks_of_classes(labels[rows], parts.tracks[rows]) & tracks_of_classes(labels[rest], parts.tracks[rest])
    assert len(rows) / len(labels) == pytest.approx(0.2, abs=0.02)
    assert torch.unique(labels[rows]).tolist() == torch.unique(labels[rest]).tolist() == list(range(43))
