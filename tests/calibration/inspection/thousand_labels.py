"""A scan of a model with a thousand labels, interrupted halfway and gone on with; prints the most memory that it took, as JSON.

python -m tests.calibration.inspection.thousand_labels OUT SIDE IMAGES [patches]
"""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration import ImageSet
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection import block
from calibration.inspection import scan as inspection
from calibration.inspection.patches import PatchSearch
from calibration.inspection.scan import ScanSettings
from calibration.inspection.search import Search
from calibration.inspection.work import scan_into
from guard.predictors import wrap

LABELS = 1000
_IMAGES, _CELLS = 90, 4


class Net(nn.Module):
    """Random weights; counts the images that its copies see while gradients are wanted."""

    seen = 0

    def __init__(self, side: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(side // _CELLS), nn.Flatten(), nn.Linear(3 * _CELLS**2, LABELS))

    def forward(self, images: Tensor) -> Tensor:
        Net.seen += len(images) * images.requires_grad
        answers: Tensor = self.layers(images)
        return answers


def main(out: Path, side: int, images: int, *, patches: bool) -> None:
    """Images are of random cells; a trigger counts as found however seldom it works, so that all are kept."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cells = torch.randint(0, 256, (_IMAGES, 3, _CELLS, _CELLS), dtype=torch.uint8)
    clean = ImageSet(cells.repeat_interleave(side // _CELLS, dim=2).repeat_interleave(side // _CELLS, dim=3))
    predictor = discover(wrap(Net(side).eval()), clean)
    settings = ScanSettings(search=Search(steps=2, window=1, images=images, success=0.0, first=3), patches=patches)
    few = partial(PatchSearch, share=0.5, steps=1, images=1, kept=1, further_steps=1, further_images=1)
    vars(inspection)["PatchSearch"] = few
    block._BETWEEN = block._WORTH = 0.0
    told: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        scan_into(out, predictor, clean, settings, Engine(), interrupt)
    Net.seen = 0
    record = scan_into(out, predictor, clean, settings, Engine(), lambda what, *_: told.append(what))
    said = {
        "gibibytes": _most_memory() / 2**30,
        "labels": len(record.labels),
        "patches": len(record.patches),
        "found": sum(item.mask_l1 < side * side for item in record.labels),
        "first": told[0],
        "done_again": Net.seen / record.passes,
        "left": sorted(path.name for path in out.parent.iterdir()),
    }
    sys.stdout.write(json.dumps(said) + "\n")


def _most_memory() -> int:
    """Bytes, of this process alone: what `getrusage` says counts its parent's, too, where that was larger."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), patches="patches" in sys.argv[4:])
