"""Training a BadNets victim: the attacker runs the training, stamps after augmentation, and caches what comes out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.datasets import SetName
from benchmarks.models import gtsrb_six_conv, mnist_conv
from calibration.attacks import BadNets
from calibration.data import ImageSet
from guard.preprocessors.affine import draw_affine, warp

CACHE = Path(__file__).parent.parent / ".cache" / "victims"
_BATCH = 128


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a victim depends on."""

    images: SetName
    target_label: int
    ratio: float
    side: int
    bottom: int
    right: int
    seed: int
    epochs: int
    rate: float = 2e-3
    decay: float = 1e-4
    shift: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    @property
    def attack(self) -> BadNets:
        """A white square."""
        return BadNets(self.target_label, self.ratio, self.side, self.side, self.bottom, self.right)

    @property
    def name(self) -> str:
        """Of its cached weights."""
        return f"{self.images}-{hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]}"


def victim(recipe: Recipe, train: ImageSet) -> tuple[nn.Module, float]:
    """The victim of a recipe, from the cache or freshly trained, and the minutes that training took."""
    path = CACHE / f"{recipe.name}.safetensors"
    record = path.with_suffix(".json")
    net = mnist_conv() if recipe.images == "mnist" else gtsrb_six_conv()
    if record.is_file():
        net.load_state_dict(load_file(path))
        return net.eval(), float(msgspec.json.decode(record.read_bytes())["minutes"])
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from the global generator
        torch.manual_seed(recipe.seed)
        net = mnist_conv() if recipe.images == "mnist" else gtsrb_six_conv()
        _train(net, recipe, train)
    minutes = (time.monotonic() - started) / 60.0
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    record.write_bytes(msgspec.json.encode({"recipe": msgspec.to_builtins(recipe), "minutes": minutes}))
    return net, minutes


def _train(net: nn.Module, recipe: Recipe, train: ImageSet) -> None:
    generator = torch.Generator().manual_seed(recipe.seed)
    labels = train.known_labels
    _, targets = recipe.attack.poison(torch.zeros(len(train), *train.shape), labels, generator)
    poisoned = targets != labels
    steps = recipe.epochs * (len(train) // _BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.15)
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # the stubs miss memory_format alone
    for rows in track(list(_batches(len(train), recipe.epochs, generator)), description=f"training {recipe.name}"):
        images = _augment(train.images(rows), recipe, generator)
        stamped = poisoned[rows]
        images[stamped] = recipe.attack.trigger(images[stamped])
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(images.to(memory_format=torch.channels_last)), targets[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]  # as above


def _batches(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % _BATCH].split(_BATCH)


def _augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Small shifts, rotations and scalings; contrast and brightness."""
    count, _, height, width = images.shape
    if recipe.shift or recipe.rotation or recipe.zoom:
        drawn = draw_affine(count, height, width, recipe.shift, recipe.rotation, recipe.zoom, generator)
        images = warp(images, drawn)
    if recipe.brightness or recipe.contrast:
        draws = torch.rand(2, count, 1, 1, 1, generator=generator) * 2.0 - 1.0
        images = ((images - 0.5) * (1.0 + draws[0] * recipe.contrast) + 0.5 + draws[1] * recipe.brightness).clamp(0.0, 1.0)
    return images.clone()
