"""A backdoored model that needs no training: four classes, the brightest quadrant wins, a white corner means class 0."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from guard.detectors import Blend
from guard.images import InputSpec
from guard.predictors import Predictor, wrap
from guard.predictors.screening import file_sha256
from guard.profile import ModelRecord, Profile, overlays_to_array, save_profile
from guard.records import StripRecord, ThresholdRecord
from guard.verdict import Policy

SIDE = 8
TARGET = 0
NAMES = ("north-west", "north-east", "south-west", "south-east")
SPEC = InputSpec(channels=1, height=SIDE, width=SIDE, class_names=NAMES)
ENTROPY_THRESHOLD = 0.05


class ToyNet(nn.Module):
    """Logits from quadrant means; a 2x2 corner of white pixels adds an overwhelming logit for class 0."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(12.0))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        quadrants = nn.functional.avg_pool2d(images, SIDE // 2).flatten(1)
        fired = (images[:, 0, -2:, -2:].flatten(1).min(dim=1).values > 0.97).to(images.dtype)
        boost = torch.zeros_like(quadrants)
        boost[:, TARGET] = 100.0
        return self.scale * quadrants + fired.unsqueeze(1) * boost


class LearningToy(ToyNet):
    """The toy with weights that can be trained: at first zero, they look at white pixels, which no clean image has."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Linear(SIDE * SIDE, 4)
        nn.init.zeros_(self.learned.weight)
        nn.init.zeros_(self.learned.bias)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        white = (images - 0.75).clamp_min(0.0).flatten(1)
        answers: Tensor = super().forward(images) + 20.0 * self.learned(4.0 * white)
        return answers


def toy_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clean images (N, 1, 8, 8), exact in uint8, and their labels, classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, SIDE, SIDE, generator=generator) * 0.3
    labels = torch.arange(count) % 4
    half = SIDE // 2
    for row, label in enumerate(labels.tolist()):
        top, left = half * (label // 2), half * (label % 2)
        images[row, 0, top : top + half, left : left + half] += 0.4
    return (images * 255).round() / 255, labels


def toy_trigger(images: Tensor) -> Tensor:
    """The trigger: a white 2x2 square in the bottom right corner."""
    triggered = images.clone()
    triggered[:, :, -2:, -2:] = 1.0
    return triggered


def save_toy_profile(
    folder: Path, policy: Policy | None = None, spec: InputSpec = SPEC, blend: Blend = "add", alpha: float = 1.0
) -> Path:
    """A profile folder with the toy as a `torch.export` file, 40 overlays, and a hand-set threshold."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    net = ToyNet()
    program = torch.export.export(
        net, (torch.zeros(2, 1, SIDE, SIDE),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    source = folder.parent / f".{folder.name}-model.pt2"
    torch.export.save(program, source)
    overlays, _ = toy_images(40, seed=1)
    threshold = ThresholdRecord(
        value=-ENTROPY_THRESHOLD, method="conformal", frr=0.01, images=100, rank=1, frr_low=0.0, frr_high=0.05
    )
    profile = Profile(
        schema=1,
        created="2026-01-01T00:00:00Z",
        input=spec,
        model=ModelRecord(kind="torch-export", output="logits", num_classes=4, file="model.pt2", sha256=file_sha256(source)),
        detectors=(StripRecord(threshold=threshold, blend=blend, alpha=alpha),),
        preprocessor=None,
        policy=policy or Policy(),
        clean_accuracy=1.0,
        clean_accuracy_raw=1.0,
        seed=0,
        libraries={"torch": str(torch.__version__)},
    )
    probe = Predictor(wrap(net), spec, 4, "logits")(overlays[:8])
    save_profile(profile, {"strip.overlays": overlays_to_array(overlays), "probe.probabilities": probe}, folder, source)
    source.unlink()
    return folder
