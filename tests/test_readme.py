"""The README's examples run, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.discovery import discover
from cli.demonstration.digits import Digits
from guard.predictors import load_backend

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Digits, backdoored: nn.Module) -> None:
    code = examples()[0]
    np.savez(tmp_path / "clean.npz", x=digits.clean.pixels[:, 0].numpy(), y=digits.clean.known_labels.numpy())
    monkeypatch.chdir(tmp_path)

    def predict(batch: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        if batch.dtype != np.uint8 or batch.shape[1:] != (8, 8, 1):
            raise TypeError("expected uint8 NHWC")
        with torch.inference_mode():
            images = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
            answer: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = backdoored(images).softmax(dim=1).numpy()
        return answer

    pixels = torch.cat([digits.test.pixels[:20], digits.triggered.pixels[:20]])
    names: dict[str, object] = {"predict": predict, "batch": pixels.permute(0, 2, 3, 1).numpy()}
    exec(compile(code, "README.md", "exec"), names)
    answers = names["answers"]
    assert isinstance(answers, np.ndarray)
    assert np.isfinite(answers[:20]).all(axis=1).sum() >= 18
    assert np.isnan(answers[20:]).all(axis=1).sum() >= 19


def test_the_exported_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Digits, backdoored: nn.Module
) -> None:
    monkeypatch.chdir(tmp_path)
    images = digits.test.images(slice(0, 5))
    exec(compile(examples()[1], "README.md", "exec"), {"torch": torch, "model": backdoored, "images": images[:2]})
    predictor = discover(load_backend("model.pt2"), digits.clean)
    with torch.inference_mode():
        assert torch.allclose(predictor(images), backdoored(images).softmax(dim=1), atol=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_documents_names_what_exists(page: Path) -> None:
    for module, names in re.findall(
        r"^from ((?:guard|calibration|handlers|export)[\w.]*) import (.+)$", page.read_text(), flags=re.M
    ):
        imported = __import__(module, fromlist=["x"])
        for name in names.split(","):
            assert hasattr(imported, name.strip()), f"{module}.{name}"
