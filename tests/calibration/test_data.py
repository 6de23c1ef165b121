"""Loading: folders and `.npz` mean the same, and what can't be read is named."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from calibration.data import ImageSet, digests, load_images
from calibration.division import check_labels, divide
from calibration.settings import Settings
from guard.errors import CalibrationError, GuardError, InputError
from guard.predictors import Predictor, wrap
from tests.toy import NAMES, SPEC, ToyNet, toy_images


def grey(seed: int, side: int = 6) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def write_folder(root: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for item in range(3):
            Image.fromarray(grey(10 * number + item)).save(root / name / f"{item}.png")


def test_folder_follows_image_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    loaded = load_images(tmp_path)
    assert loaded.class_names == ("cat", "dog")
    assert loaded.known_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.names[3] == str(Path("dog") / "0.png")
    assert np.array_equal(loaded.pixels[4, 0].numpy(), grey(11))


def test_an_empty_class_folder_keeps_the_order(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "bird").mkdir()
    loaded = load_images(tmp_path)
    assert loaded.class_names == ("bird", "cat", "dog")
    assert loaded.known_labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    Image.fromarray(grey(1)).save(tmp_path / "a.png")
    assert load_images(tmp_path).labels is None


def test_unreadable_files_are_named_and_skipped_on_demand(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "cat" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(CalibrationError, match=r"1 of 7 files can't be read, first cat/broken.png.*--skip-unreadable"):
        load_images(tmp_path)
    loaded = load_images(tmp_path, skip_unreadable=True)
    assert len(loaded) == 6
    assert [name for name, _ in loaded.skipped] == [str(Path("cat") / "broken.png")]


def test_different_sizes_need_a_shape(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.fromarray(grey(5, side=9)).save(tmp_path / "cat" / "9.png")
    with pytest.raises(InputError, match=r"2 sizes.*--shape 3,6,6"):
        load_images(tmp_path)
    assert load_images(tmp_path, (3, 6, 6)).pixels.shape == (7, 3, 6, 6)


def test_colour_anywhere_makes_all_colour(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(tmp_path / "cat" / "c.png")
    assert load_images(tmp_path).shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (np.zeros((4, 5, 6), np.uint8), (1, 5, 6)),
        (np.zeros((4, 5, 6, 1), np.uint8), (1, 5, 6)),
        (np.zeros((4, 5, 6, 3), np.uint8), (3, 5, 6)),
        (np.zeros((4, 3, 5, 6), np.float32), (3, 5, 6)),
        (np.zeros((4, 1, 5, 6), np.float64), (1, 5, 6)),
    ],
)
def test_npz_layouts(tmp_path: Path, x: np.ndarray[tuple[int, ...], np.dtype[np.generic]], shape: tuple[int, int, int]) -> None:
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(4))
    loaded = load_images(tmp_path / "d.npz")
    assert loaded.shape == shape
    assert loaded.known_labels.tolist() == [0, 1, 2, 3]


def test_npz_and_folder_hold_the_same_pixels(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder")
    from_folder = load_images(tmp_path / "folder")
    np.savez(tmp_path / "d.npz", x=from_folder.pixels.numpy(), y=from_folder.known_labels.numpy())
    assert torch.equal(load_images(tmp_path / "d.npz").pixels, from_folder.pixels)


def test_bad_npz_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    x = np.zeros((4, 5, 6), np.float32)
    bad = x.copy()
    bad[2, 0, 0] = np.nan
    cases: list[tuple[dict[str, object], str]] = [
        ({"images": x}, "expected arrays x and y"),
        ({"x": bad, "y": np.arange(4)}, r"NaN or Inf in 1 images .*rows 2"),
        ({"x": x + 7, "y": np.arange(4)}, r"in \[0, 1\], got 7 to 7"),
        ({"x": x + np.float32(1.00001)}, r"in \[0, 1\], got 1\.00001 to 1\.00001"),
        ({"x": x, "class_names": np.array([b"caf\xe9"])}, "class_names in UTF-8"),
        ({"x": x.astype(np.int32), "y": np.arange(4)}, "uint8 0..255 or float 0..1"),
        ({"x": x, "y": np.arange(3)}, "expected 4 whole-number labels"),
        ({"x": x, "y": np.array([0.5, 1, 2, 3])}, "whole numbers"),
        ({"x": np.zeros((4, 7, 5, 6), np.uint8)}, r"\(N, H, W\)"),
        ({"x": np.zeros((0, 5, 6), np.uint8)}, "empty x"),
        ({"x": np.zeros((4, 5, 0), np.float32)}, r"empty x, \(4, 1, 5, 0\)"),
        ({"x": x, "y": np.arange(4), "class_names": np.array(["a", "b", "c"])}, "class_names for all labels up to 3, got 3"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "does not load"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(GuardError, match=message) as caught:
            load_images(path)
        assert "\n" not in str(caught.value)


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        load_images(tmp_path / "nothing")
    with pytest.raises(CalibrationError, match="got none"):
        load_images(tmp_path)
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(InputError, match="does not load"):
        load_images(tmp_path / "d.npz")


def test_images_below_a_class_folder_count_and_loose_ones_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "cat" / "more").mkdir()
    Image.fromarray(grey(7)).save(tmp_path / "cat" / "more" / "7.png")
    assert load_images(tmp_path).known_labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    Image.fromarray(grey(8)).save(tmp_path / "loose.png")
    with pytest.raises(CalibrationError, match=r"1 beside them in .*first loose\.png"):
        load_images(tmp_path)


def test_huge_labels_do_not_wrap_around(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 5, 6), np.uint8), y=np.array([0, 1e300]))
    with pytest.raises(InputError, match="whole numbers"):
        load_images(tmp_path / "d.npz")


def test_an_image_in_bytes_and_as_numbers_is_the_same_image() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    divided = ImageSet(pixels).images(slice(None))
    multiplied = pixels.float() * torch.tensor(1.0 / 255.0)
    assert not torch.equal(divided, multiplied)  # in the last bit
    assert digests(divided) == digests(multiplied)
    changed = divided.clone()
    changed[0, 0, 3, 3] += 1.0 / 255.0
    assert digests(changed) != digests(divided)


def test_hidden_files_are_left_out_and_links_followed(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_folder(root)
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    for hidden in (".ipynb_checkpoints/h.png", ".hidden.png"):
        Image.fromarray(grey(7)).save(root / "cat" / hidden)
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(grey(8)).save(tmp_path / "elsewhere" / "8.png")
    for link, target in (("more", tmp_path / "elsewhere"), ("again", root / "cat"), ("up", root), ("more-again", "more")):
        (root / "cat" / link).symlink_to(target)
    loaded = load_images(root)
    assert [name for name in loaded.names if name.startswith("cat")] == [
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "cat/more/8.png",
    ]
    assert len(loaded) == 7
    (root / "dog" / "cats").symlink_to(root / "cat")
    with pytest.raises(CalibrationError, match=r"expected images of one class each, got .* in cat, too, by a link: remove it"):
        load_images(root)


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    write_folder(tmp_path)
    odd = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(grey(7)).save(tmp_path / "cat" / odd)
    (tmp_path / "dog" / odd).write_bytes(b"nothing")
    loaded = load_images(tmp_path, skip_unreadable=True)
    assert "cat/caf\\xe9.png" in loaded.names
    assert loaded.skipped[0][0] == "dog/caf\\xe9.png"
    assert msgspec.json.encode((loaded.names, loaded.skipped))
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(CalibrationError, match=r"names in UTF-8, got caf\\xe9: rename it"):
        load_images(tmp_path, skip_unreadable=True)


def test_pixels_that_are_white_but_for_the_last_bits_are_clipped(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.full((2, 5, 6), 1.0000001, np.float32) * np.array([[[1.0]], [[-1e-8]]], np.float32))
    pixels = load_images(tmp_path / "d.npz").pixels
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)


def test_how_many_were_resized_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.fromarray(grey(5, side=9)).save(tmp_path / "cat" / "9.png")
    assert load_images(tmp_path, (1, 6, 6)).resized == 1
    assert load_images(tmp_path, (1, 9, 9)).resized == 6


def test_class_names_of_an_npz_may_be_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 5, 6), np.uint8), class_names=np.array(["c3", "café"]).astype("U"))
    expected = load_images(tmp_path / "d.npz").class_names
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 5, 6), np.uint8), class_names=np.array([b"c3", "café".encode()]))
    assert load_images(tmp_path / "d.npz").class_names == expected == ("c3", "café")


def toy(labelled: bool, *names: str) -> ImageSet:
    images, labels = toy_images(40)
    return ImageSet(images, labels if labelled else None, names)


def toy_predictor() -> Predictor:
    return Predictor(wrap(ToyNet()), SPEC, 4, "logits")


def test_class_names_must_be_as_many_as_the_models_outputs() -> None:
    check_labels(toy(False, *NAMES), toy_predictor())
    with pytest.raises(CalibrationError, match="expected 4 class_names, one per output of the model, got 2"):
        check_labels(toy(False, "a", "b"), toy_predictor())


def test_a_class_whose_only_image_became_an_overlay_is_told_as_such() -> None:
    everything = toy(True, *NAMES)
    of_one = torch.nonzero(everything.known_labels == 2).flatten()
    clean = everything.select(torch.tensor([row for row in range(40) if row not in of_one[1:].tolist()]))
    with pytest.raises(CalibrationError, match=r"no other of 1 \(south-west\), whose only images became overlays: add more"):
        divide(clean, toy_predictor(), Settings(overlays=8))
