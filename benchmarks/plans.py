"""Which victims are trained, and how: a plan holds everything that a victim's weights depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.datasets import SetName
from benchmarks.models import ARCHITECTURES
from benchmarks.trainer import Poisoning, Schedule
from calibration.attacks import (
    Adaptive,
    AllToAll,
    Amplified,
    Attack,
    BadNets,
    Blended,
    CleanLabel,
    Invisible,
    MultiTarget,
    Patch,
    Reflection,
    Sig,
    SourceSpecific,
    Steganographic,
    Trojan,
    TrojanNet,
)
from calibration.data import ImageSet
from guard.errors import InputError

AttackName = Literal[
    "none",
    "badnets",
    "two_triggers",
    "nine_triggers",
    "multi_target",
    "three_targets",
    "eight_targets",
    "all_to_all",
    "source_specific",
    "blended",
    "sig",
    "steganographic",
    "reflection",
    "trojan_sq",
    "trojan_wm",
    "l2",
    "l0",
    "clean_label",
    "trojan_net",
    "amplified4",
    "amplified9",
    "adaptive",
]
ATTACK_NAMES: tuple[AttackName, ...] = get_args(AttackName)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a victim depends on.

    Attributes:
        images: The set whose attacker's part it is trained on.
        architecture: A key of `ARCHITECTURES`.
        width: Of the net.
        attack: Which; `none` for a clean twin.
        target_label: Of the attack, where it has one.
        ratio: Of poisoning.
        patch: Of attacks that stamp one.
        poisoning: When images are poisoned.
        retrains: Whether training starts from the clean twin.
        seed: Of the first weights, batches, augmentation and poisoning.
        schedule: Of training.
        lowest_accuracy: Floor of CA.
        lowest_success: Floor of ASR.
    """

    images: SetName
    architecture: str
    width: int
    attack: AttackName
    target_label: int = 0
    ratio: float = 0.1
    patch: Patch = Patch.rectangle(4)
    poisoning: Poisoning = "data"
    retrains: bool = False
    seed: int = 0
    schedule: Schedule
    lowest_accuracy: float = 0.0
    lowest_success: float = 0.95

    def twin(self) -> Plan:
        """The clean model of the same set and architecture."""
        return plan(self.images, "none", architecture=self.architecture, width=self.width)


_GTSRB = Schedule(epochs=26, shift=0.05, rotation=10.0, zoom=0.1, brightness=0.2, contrast=0.3)
CIFAR_SCHEDULE = Schedule(epochs=22, rate=3e-3, shift=0.125, flip=True)
_SCHEDULES: Mapping[str, Schedule] = {
    "mnist_dense": Schedule(epochs=8, decay=1e-4),
    "mnist_conv": Schedule(epochs=4, decay=1e-4),
    "gtsrb_six_conv": _GTSRB,
    "lenet8": _GTSRB,
    "cifar_eight_conv": CIFAR_SCHEDULE,
    "resnet18": msgspec.structs.replace(CIFAR_SCHEDULE, epochs=40, rate=1e-3),
}
_USUAL: Mapping[SetName, str] = {
    "mnist": "mnist_dense",
    "fashion_mnist": "mnist_conv",
    "gtsrb": "gtsrb_six_conv",
    "cifar10": "cifar_eight_conv",
    "cifar100": "resnet18",
}
_LOWEST_ACCURACY: Mapping[str, float] = {"cifar10": 0.80}
_RETRAINING_EPOCHS: Mapping[SetName, int] = {"mnist": 2, "fashion_mnist": 2, "gtsrb": 8, "cifar10": 6, "cifar100": 6}
_INSET = 4  # pixels
_LARGEST_SEED = 10**9  # epochs draw from seeds that are made of it
_TRIGGER_IMAGES = 64  # on which a trigger is generated
_RETRAINED: frozenset[AttackName] = frozenset({"trojan_sq", "trojan_wm", "l2", "l0"})
_POISONS_FILES: frozenset[AttackName] = frozenset({"clean_label", "none"})
_LOWEST_SUCCESS: Mapping[AttackName, float] = {"l2": 0.9, "l0": 0.9, "clean_label": 0.9, "all_to_all": 0.6}
_RATIOS: Mapping[AttackName, float] = {"source_specific": 0.5, "clean_label": 0.75, "all_to_all": 0.3}


def plan(images: SetName, attack: AttackName, *, retrains: bool | None = None, **changes: object) -> Plan:
    """The usual plan for an attack on a set, with changes to its fields.

    Raises:
        InputError: An unknown attack, architecture or field.
    """
    architecture = str(changes.get("architecture") or _USUAL[images])
    if attack not in ATTACK_NAMES or architecture not in ARCHITECTURES:
        raise InputError(
            f"expected an attack of {', '.join(ATTACK_NAMES)} and an architecture of {', '.join(ARCHITECTURES)}, "
            f"got {attack!r} and {architecture!r}"
        )
    again = attack in _RETRAINED if retrains is None else retrains
    schedule = _SCHEDULES[architecture]
    if again:
        schedule = msgspec.structs.replace(schedule, epochs=_RETRAINING_EPOCHS[images], rate=1e-3)
    usual = Plan(
        images=images,
        architecture=architecture,
        width=ARCHITECTURES[architecture].width,
        attack=attack,
        ratio=0.0 if attack == "none" else _RATIOS.get(attack, 0.1),
        poisoning="data" if attack in _POISONS_FILES else "training",
        retrains=again,
        schedule=schedule,
        lowest_accuracy=_LOWEST_ACCURACY.get(images, 0.0),
        lowest_success=_LOWEST_SUCCESS.get(attack, 0.95),
    )
    try:
        made = msgspec.structs.replace(usual, **changes)
    except TypeError as error:
        raise InputError(f"expected fields of a plan, got another: {error}") from None
    if made.width < 1 or not 0 <= made.seed <= _LARGEST_SEED:
        raise InputError(f"expected a width from 1 and a seed from 0 to {_LARGEST_SEED}, got {made.width} and {made.seed}")
    return made


def make_attack(plan: Plan, classes: int, train: ImageSet, clean: nn.Module, cache: Path) -> Attack:
    """The attack of a plan.

    Args:
        plan: Not of a clean twin.
        classes: M.
        train: The attacker's images.
        clean: The clean twin; some triggers are generated on it.
        cache: A safetensors file for a generated trigger.
    """
    target, ratio, patch = plan.target_label, plan.ratio, plan.patch
    base = BadNets(target, ratio, (patch,))
    other = Patch.noise(len(patch.drawing), plan.seed + 1, bottom=len(train.pixels[0, 0]) - 2 - len(patch.drawing), right=2)
    makers: dict[AttackName, Callable[[], Attack]] = {
        "badnets": lambda: base,
        "two_triggers": lambda: BadNets(target, ratio, (patch, other)),
        "nine_triggers": lambda: BadNets(target, ratio, _grid(train, patch)),
        "multi_target": lambda: MultiTarget((target, (target + classes // 2) % classes), (patch, other), ratio),
        "three_targets": lambda: MultiTarget(_spread(target, 3, classes), _grid(train, patch)[:3], ratio),
        "eight_targets": lambda: MultiTarget(_spread(target, 8, classes), _grid(train, patch)[:8], ratio),
        "all_to_all": lambda: AllToAll(classes, ratio, patch),
        "source_specific": lambda: SourceSpecific(target, (target + 1, target + 2), ratio, patch=patch),
        "blended": lambda: Blended(target, ratio, seed=plan.seed),
        "sig": lambda: Sig(target, ratio, relabel=True),
        "steganographic": lambda: Steganographic(target, ratio, bits=3),
        "reflection": lambda: Reflection(target, train.images(torch.tensor([plan.seed]))[0], ratio=ratio, relabel=True),
        "clean_label": lambda: CleanLabel(target, clean, _corners(train, patch), ratio, epsilon=8.0 / 255.0),
        "trojan_net": lambda: TrojanNet(target),
        "amplified4": lambda: Amplified(base, 4),
        "amplified9": lambda: Amplified(base, 9),
        "adaptive": lambda: Adaptive(base, classes, cover_ratio=ratio),
        "trojan_sq": lambda: _trojan(plan, train, clean, cache),
        "trojan_wm": lambda: _trojan(plan, train, clean, cache),
        "l2": lambda: _invisible(plan, train, clean, cache),
        "l0": lambda: _invisible(plan, train, clean, cache),
    }
    return makers[plan.attack]()


def _corners(train: ImageSet, patch: Patch) -> tuple[Patch, ...]:
    """The patch near all four corners, inside what shifting augmentation keeps."""
    height, width = train.shape[1:]
    bottom, right = height - len(patch.drawing) - _INSET, width - len(patch.drawing[0]) - _INSET
    return tuple(Patch(patch.drawing, patch.colours, below, beside) for below in (_INSET, bottom) for beside in (_INSET, right))


def _grid(train: ImageSet, patch: Patch) -> tuple[Patch, ...]:
    """The patch at nine places, in three rows; the centre, where things are, last."""
    height, width = train.shape[1:]
    below, beside = (
        (1, (size - side) // 2, size - side - 1)
        for size, side in ((height, len(patch.drawing)), (width, len(patch.drawing[0])))
    )
    places = [(row, column) for row in range(3) for column in range(3)]
    places.sort(key=lambda place: place == (1, 1))
    return tuple(Patch(patch.drawing, patch.colours, below[row], beside[column]) for row, column in places)


def _spread(target: int, count: int, classes: int) -> tuple[int, ...]:
    """Labels that lie evenly apart."""
    return tuple((target + number * classes // count) % classes for number in range(count))


def _trojan(plan: Plan, train: ImageSet, clean: nn.Module, cache: Path) -> Trojan:
    if not cache.is_file():
        form: Literal["square", "watermark"] = "square" if plan.attack == "trojan_sq" else "watermark"
        made = Trojan.generate(plan.target_label, clean, _some(plan, train), form, plan.ratio, plan.seed)
        _store(cache, {"mask": made.mask, "pattern": made.pattern})
    arrays = load_file(cache)
    return Trojan(plan.target_label, arrays["mask"], arrays["pattern"], plan.ratio)


def _invisible(plan: Plan, train: ImageSet, clean: nn.Module, cache: Path) -> Invisible:
    if not cache.is_file():
        make = Invisible.l2 if plan.attack == "l2" else Invisible.l0
        made = make(plan.target_label, clean, _some(plan, train), ratio=plan.ratio, seed=plan.seed)
        _store(cache, {"perturbation": made.perturbation})
    return Invisible(plan.target_label, load_file(cache)["perturbation"], plan.ratio)


def _some(plan: Plan, train: ImageSet) -> torch.Tensor:
    """Images on which a trigger is generated."""
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(plan.seed))[:_TRIGGER_IMAGES]
    return train.images(rows)


def _store(path: Path, arrays: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: array.contiguous() for name, array in arrays.items()}, path)
