"""Where GDM models triggers: around those that a scan recovered.

A scan finds some trigger that works, which lies near the attacker's rather than on it. So its box is widened: where triggers
are modelled in a box beside the true one, the true one goes on working. A stray pixel of the mask, far from the others, would
make a box of the whole image, and is left out.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from calibration.inspection.triggers import Triggers
from calibration.repair.gdm import Backdoor
from calibration.repair.mesa import Place
from guard.errors import RepairError

_HALF = 0.5  # of a mask's largest value: what belongs to the patch
_STRAY = 0.25  # of the largest piece: what weighs less is none


def backdoors_of(triggers: Triggers, margin: float) -> list[Backdoor]:
    """Labels and places, in the order of the triggers; a place within an earlier one of the same label is none of its own.

    Args:
        triggers: As a scan recovered them; of pairs of labels, only the target counts.
        margin: See `Gdm`.

    Raises:
        RepairError: A mask is empty.
    """
    found: list[Backdoor] = []
    for label, mask in zip(triggers.labels.tolist(), triggers.masks, strict=True):
        place = widened(bounding_box(mask), margin, (mask.shape[0], mask.shape[1]))
        if not any(label == other.target_label and _within(place, other.place) for other in found):
            found.append(Backdoor(label, place))
    return found


def bounding_box(mask: Tensor) -> Place:
    """The smallest box around what is at least half of a mask's largest value, without pieces that weigh next to nothing.

    Pixels with one pixel or less between them are of one piece.

    Args:
        mask: (H, W), in [0, 1].

    Raises:
        RepairError: It is empty.
    """
    if not float(mask.max()) > 0.0:
        raise RepairError("expected the mask of a trigger, got an empty one: scan the model again")
    patch = (mask >= _HALF * mask.max()).cpu()
    near = cv2.dilate(patch.numpy().astype(np.uint8), np.ones((3, 3), np.uint8))
    count, pieces = cv2.connectedComponents(near, connectivity=8)
    found = torch.from_numpy(pieces)
    weights = torch.stack([(mask.cpu() * patch * (found == piece)).sum() for piece in range(1, count)])
    kept = torch.nonzero(weights >= _STRAY * weights.max()).flatten() + 1
    rows, columns = torch.nonzero(patch & torch.isin(found, kept)).unbind(dim=1)
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1


def widened(place: Place, margin: float, size: tuple[int, int]) -> Place:
    """A place with a share of its sides added all round, a pixel at least, as far as the image, (H, W), goes."""
    (top, height), (left, width) = (_stretch(place[side], place[side + 2], margin, size[side]) for side in (0, 1))
    return top, left, height, width


def _stretch(first: int, length: int, margin: float, limit: int) -> tuple[int, int]:
    more = max(1, round(margin * length)) if margin > 0.0 else 0
    begin, end = max(0, first - more), min(limit, first + length + more)
    return begin, end - begin


def _within(place: Place, other: Place) -> bool:
    """Whether a place lies in another, or is the same."""
    return all(other[side] <= place[side] and place[side] + place[side + 2] <= other[side] + other[side + 2] for side in (0, 1))
