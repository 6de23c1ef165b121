"""A scan of a model with a thousand labels stays within a few gibibytes, and can be interrupted and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.inspection.thousand_labels import LABELS

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux to measure memory")


def scanned(folder: Path, side: int, images: int, *more: str) -> dict[str, Any]:
    """What the scan says of itself, in a process of its own, on the CPU."""
    module = "tests.calibration.inspection.thousand_labels"
    command = [sys.executable, "-m", module, str(folder / "scan"), str(side), str(images), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    said: dict[str, Any] = json.loads(run.stdout)
    assert (said["labels"], said["found"]) == (LABELS, LABELS)
    assert said["first"] == "going on from .scan.checkpoint"
    assert said["done_again"] < (0.9 if more else 0.7)  # of all that there is to do
    assert said["left"] == ["scan"]
    return said


def test_a_thousand_labels_of_small_images(tmp_path: Path) -> None:
    assert scanned(tmp_path, side=32, images=2)["gibibytes"] < 2.0


@pytest.mark.slow
def test_a_thousand_labels_of_large_images(tmp_path: Path) -> None:
    said = scanned(tmp_path, 224, 2, "patches")
    assert said["patches"] == LABELS
    assert said["gibibytes"] < 4.0
