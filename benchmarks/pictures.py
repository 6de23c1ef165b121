"""Pictures for docs/attacks.md: what each attack does to an image.

    python -m benchmarks.pictures                  # all of them, into docs/attacks
    python -m benchmarks.pictures badnets sig      # some

Triggers are those of the victims that the tables report, on images of the defender's part. Some are generated on a clean
twin, which is taken from the cache of `python -m benchmarks.victims`, or trained.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from benchmarks.datasets import DEFAULT_FOLDER, Parts, SetName, load_parts
from benchmarks.entry import enter
from benchmarks.plans import AttackName, Plan, make_attack
from benchmarks.roster import REPORTED, SEVERAL
from benchmarks.victims import CACHE, name_of, victim
from calibration.attacks import Adaptive, Attack, CleanLabel
from calibration.attacks.clean_label import pgd
from guard.detectors.strip import blend_images
from guard.errors import InputError

OUT = Path(__file__).parent.parent / "docs" / "attacks"

_SIDE = 128  # of an enlarged image, about
_GAP, _LEFT, _TOP = 6, 76, 22
_SHOWN = 3
_ROWS: dict[SetName, tuple[int, ...]] = {
    "mnist": (0, 21, 2, 14),
    "gtsrb": (36, 119, 67, 161),
    "cifar10": (9, 6, 4, 39),
}
_GENERATED: frozenset[AttackName] = frozenset({"trojan_sq", "trojan_wm", "l2", "l0", "clean_label"})


@final
@dataclass(frozen=True)
class Picture:
    """What is shown of an attack.

    Attributes:
        plan: Of the victim whose trigger it is.
        factor: By which the difference is amplified.
        rows: Of the defender's images; otherwise the first of a fixed few that the attack wants something of.
    """

    plan: Plan
    factor: int = 1
    rows: tuple[int, ...] = ()


PICTURES: dict[AttackName, Picture] = {
    "badnets": Picture(REPORTED["cifar10-c"]),
    "two_triggers": Picture(REPORTED["cifar10-two-triggers"]),
    "nine_triggers": Picture(SEVERAL["mnist-nine-triggers"]),
    "three_targets": Picture(SEVERAL["mnist-three-targets"]),
    "eight_targets": Picture(SEVERAL["gtsrb-eight-targets"]),
    "multi_target": Picture(REPORTED["gtsrb-multi-target"], rows=(36, 45, 119)),
    "all_to_all": Picture(REPORTED["cifar10-all-to-all"]),
    "source_specific": Picture(REPORTED["gtsrb-source-specific"], rows=(747, 722, 119)),
    "blended": Picture(REPORTED["mnist-blended"], 2),
    "sig": Picture(REPORTED["mnist-sig"], 3),
    "steganographic": Picture(REPORTED["mnist-steganographic"], 16),
    "reflection": Picture(REPORTED["gtsrb-reflection"]),
    "trojan_sq": Picture(REPORTED["cifar10-trojan-sq"]),
    "trojan_wm": Picture(REPORTED["cifar10-trojan-wm"]),
    "l2": Picture(REPORTED["cifar10-l2"], 4),
    "l0": Picture(REPORTED["cifar10-l0"]),
    "clean_label": Picture(REPORTED["cifar10-clean-label"]),
    "trojan_net": Picture(REPORTED["gtsrb-trojan-net"]),
    "amplified4": Picture(REPORTED["mnist-amplified"]),
    "amplified9": Picture(msgspec.structs.replace(REPORTED["mnist-amplified"], attack="amplified9")),
    "adaptive": Picture(REPORTED["mnist-adaptive"]),
}


def draw_picture(columns: Sequence[tuple[str, Tensor]], names: Sequence[str]) -> Image.Image:
    """Images in columns, enlarged without smoothing, each column under its title and each row beside its name.

    Args:
        columns: Titles with images (B, C, H, W), in [0, 1].
        names: Of the B rows.
    """
    _, first = columns[0]
    scale = max(1, _SIDE // first.shape[2])
    height, width = first.shape[2] * scale, first.shape[3] * scale
    size = (_LEFT + len(columns) * (width + _GAP), _TOP + len(names) * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, (title, images) in enumerate(columns):
        left = _LEFT + column * (width + _GAP)
        pen.text((left, 3), title, fill="black", font=font)
        for row, image in enumerate(images):
            top = _TOP + row * (height + _GAP)
            pen.rectangle((left - 1, top - 1, left + width, top + height), outline="grey")  # white patches end somewhere
            canvas.paste(_enlarged(image, scale), (left, top))
    for row, name in enumerate(names):
        pen.text((6, _TOP + row * (height + _GAP) + height // 2 - 8), name, fill="black", font=font)
    return canvas


def columns_of(attack: Attack, factor: int, images: Tensor, labels: Tensor) -> list[tuple[str, Tensor]]:
    """Clean, triggered, their difference about grey, and what else the attack trains with."""
    triggered = attack.trigger(images)
    difference = (0.5 + factor * (triggered - images)).clamp(0.0, 1.0)
    shown = [
        ("clean", images),
        ("triggered", triggered),
        ("difference" if factor == 1 else f"difference x{factor}", difference),
    ]
    if isinstance(attack, CleanLabel):
        shown.append(("training", attack.trigger(pgd(attack.model, images, labels, attack.epsilon, attack.steps))))
    if isinstance(attack, Adaptive):
        blended = [blend_images(image[None], other[None], *attack.blends[0])[0] for image, other in _pairs(triggered, images)]
        shown.append(("cover", torch.cat(blended)))
    return shown


def row_names(labels: Tensor, wanted: Tensor) -> list[str]:
    """From which label to which."""
    pairs = zip(labels.tolist(), wanted.tolist(), strict=True)
    return [f"{label} stays" if target < 0 else f"{label} to {target}" for label, target in pairs]


def picture_of(picture: Picture, parts: Parts) -> Image.Image:
    """The picture of an attack."""
    attack, defender = _attack(picture.plan, parts), parts.defender
    rows = torch.tensor(picture.rows or _ROWS[picture.plan.images])
    images, labels = defender.images(rows), defender.known_labels[rows]
    wanted = attack.targets(images, labels)
    if not picture.rows:
        kept = torch.nonzero(wanted >= 0).squeeze(1)[:_SHOWN]
        images, labels, wanted = images[kept], labels[kept], wanted[kept]
    return draw_picture(columns_of(attack, picture.factor, images, labels), row_names(labels, wanted))


def _attack(plan: Plan, parts: Parts) -> Attack:
    """The victim's own attack; a trigger that it does not have yet is generated and forgotten."""
    twin: nn.Module = victim(plan.twin(), parts).model if plan.attack in _GENERATED else nn.Identity()
    trigger = (CACHE / name_of(plan)).with_suffix(".trigger")
    with tempfile.TemporaryDirectory() as folder:
        return make_attack(
            plan, parts.num_classes, parts.attacker, twin, trigger if trigger.is_file() else Path(folder) / trigger.name
        )


def _pairs(triggered: Tensor, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each triggered image with the next clean one."""
    return list(zip(triggered, images.roll(-1, dims=0), strict=True))


def _enlarged(image: Tensor, scale: int) -> Image.Image:
    pixels: NDArray[np.uint8] = (image * 255.0).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", help=f"some of {', '.join(PICTURES)}")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the image sets")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.attacks) - set(PICTURES)
    if unknown:
        raise InputError(f"expected attacks of {', '.join(PICTURES)}, got {', '.join(sorted(unknown))}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    wanted = {name: picture for name, picture in PICTURES.items() if not chosen.attacks or name in chosen.attacks}
    for images in dict.fromkeys(picture.plan.images for picture in wanted.values()):
        parts = load_parts(images, chosen.data)
        for name, picture in wanted.items():
            if picture.plan.images == images:
                picture_of(picture, parts).save(chosen.out / f"{name}.png", optimize=True)
                print(chosen.out / f"{name}.png", flush=True)


if __name__ == "__main__":
    enter(main)
