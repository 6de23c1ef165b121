"""The parts of a set never mix, and the committed split is the drawn one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.datasets import DEFAULT_FOLDER, FILES, SetName, draw_gtsrb_defender_rows, gtsrb_defender_rows, load_parts
from guard.errors import InputError


def test_the_committed_split_is_the_drawn_one() -> None:
    assert gtsrb_defender_rows().tolist() == draw_gtsrb_defender_rows()
    assert len(set(draw_gtsrb_defender_rows())) == 5_000


def test_a_missing_file_says_what_to_pass() -> None:
    with pytest.raises(InputError, match="--data"):
        load_parts("mnist", DEFAULT_FOLDER / "nowhere")


@pytest.mark.parametrize(("name", "sizes"), [("mnist", (50_000, 10_000, 10_000)), ("gtsrb", (13_070, 5_000, 7_630))])
def test_parts_do_not_share_images(name: SetName, sizes: tuple[int, int, int]) -> None:
    if not (DEFAULT_FOLDER / FILES[name]).is_file():
        pytest.skip(f"{FILES[name]} is not on this machine")
    parts = load_parts(name)
    assert (len(parts.attacker), len(parts.defender), len(parts.evaluation)) == sizes
    held = [{row.tobytes() for row in part.pixels.numpy()} for part in (parts.attacker, parts.defender, parts.evaluation)]
    shared = [len(held[0] & held[1]), len(held[0] & held[2]), len(held[1] & held[2])]
    assert shared == ([0, 0, 0] if name == "mnist" else shared)
    assert sum(shared) <= 20  # GTSRB holds 8 byte-equal copies of training images in its test set, see its sources
    assert torch.unique(parts.evaluation.known_labels).tolist() == list(range(parts.num_classes))
    assert np.asarray(parts.evaluation.pixels).dtype == np.uint8
