"""Victims: models that really carry a backdoor, and their clean twins, trained once and cached.

    python -m benchmarks.victims train --set gtsrb --attack badnets    # one, or from the cache
    python -m benchmarks.victims train --all                           # every victim that the tables report
    python -m benchmarks.victims list                                  # what is cached, with CA, ASR and floors

A victim is cached in `.cache/victims` under the hash of its configuration: weights and trigger as safetensors, the rest as
JSON. Training resumes after an interruption at the last whole epoch. CA and ASR in that JSON are of the defender's images, so
that recipes can be mended without a look at the evaluation part; `python -m benchmarks.strip` reports on that.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.datasets import DEFAULT_FOLDER, Parts, SetName, load_parts
from benchmarks.entry import enter
from benchmarks.models import ARCHITECTURES
from benchmarks.plans import ATTACK_NAMES, Plan, make_attack, plan
from benchmarks.roster import DEVELOPMENT, REPORTED, SCANNED
from benchmarks.trainer import fit
from calibration.attacks import Attack, TrojanNet
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import bfloat16_is_fast
from guard.errors import InputError

CACHE = Path(__file__).parent.parent / ".cache" / "victims"
_BATCH = 500


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a trained victim.

    Attributes:
        plan: Its configuration.
        clean_accuracy: On the defender's images.
        attack_success: On the defender's images of which the attack wants something; None for a clean twin.
        missed: The floors that it misses, in words.
        minutes: That training took since it was last resumed, on the machine that it took place on.
        weights_sha256: Of the weights' file.
        libraries: Versions.
        precision: That it was trained in, which is the machine's choice.
    """

    plan: Plan
    clean_accuracy: float
    attack_success: float | None
    missed: list[str]
    minutes: float
    weights_sha256: str
    libraries: dict[str, str]
    precision: Literal["bfloat16", "float32"] = "bfloat16"


@final
@dataclass(frozen=True)
class Victim:
    """A trained model, the attack that it carries unless it is a clean twin, and its record."""

    model: nn.Module
    attack: Attack | None
    record: Record


def name_of(plan: Plan) -> str:
    """Of a cached victim."""
    return f"{plan.images}-{plan.attack}-{hashlib.sha256(msgspec.json.encode(plan)).hexdigest()[:12]}"


def victim(plan: Plan, parts: Parts, cache: Path = CACHE, progress: Progress = no_progress) -> Victim:
    """The victim of a plan, from the cache or freshly trained.

    Raises:
        InputError: The plan does not fit the images, or what is cached is damaged.
    """
    _check_fit(plan, parts)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name_of(plan)}.safetensors"
    twin = None if plan.attack == "none" else victim(plan.twin(), parts, cache, progress)
    if path.with_suffix(".json").is_file():
        record = _read_record(path.with_suffix(".json"))
        model, attack = _untrained(plan, parts, twin, path)
        if not path.is_file() or _sha256(path) != record.weights_sha256:
            raise InputError(f"expected the weights of {path.with_suffix('.json').name}, got others: delete both")
        model.load_state_dict(load_file(path))
        return Victim(model, attack, record)
    started = time.monotonic()
    model, attack = _train(plan, parts, twin, path, progress)
    accuracy = share_right(model, parts.defender)
    success = None if attack is None else attack_success(model, attack, parts.defender)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    record = Record(
        plan=plan,
        clean_accuracy=accuracy,
        attack_success=success,
        missed=_missed(plan, accuracy, success, None if twin is None else twin.record.clean_accuracy),
        minutes=(time.monotonic() - started) / 60.0,
        weights_sha256=_sha256(path),
        libraries={name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        precision="bfloat16" if bfloat16_is_fast() else "float32",
    )
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    _checkpoint(path).unlink(missing_ok=True)
    return Victim(model, attack, record)


def _check_fit(plan: Plan, parts: Parts) -> None:
    if plan.target_label >= parts.num_classes:
        raise InputError(f"expected a target from 0 to {parts.num_classes - 1} for {plan.images}, got {plan.target_label}")
    try:
        answers(_fresh(plan, parts), parts.evaluation, torch.arange(1))
    except RuntimeError as error:
        shape = tuple(parts.evaluation.shape)
        raise InputError(f"expected an architecture for images of shape {shape}, got {plan.architecture}") from error


def _read_record(path: Path) -> Record:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except msgspec.DecodeError as error:
        raise InputError(f"expected the record of a victim in {path}, got another: {error}; delete it") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def share_right(model: nn.Module, images: ImageSet) -> float:
    """Clean accuracy."""
    right = [answers(model, images, rows) == images.known_labels[rows] for rows in torch.arange(len(images)).split(_BATCH)]
    return float(torch.cat(right).double().mean())


def attack_success(model: nn.Module, attack: Attack, images: ImageSet) -> float:
    """ASR, among the images that the attack wants something of."""
    hits, total = 0, 0
    for rows in torch.arange(len(images)).split(_BATCH):
        wanted = attack.targets(images.images(rows), images.known_labels[rows])
        triggered = triggered_images(attack, images.select(rows))
        found = answers(model, triggered, torch.arange(len(rows)))
        hits, total = hits + int(((found == wanted) & (wanted >= 0)).sum()), total + int((wanted >= 0).sum())
    return hits / max(1, total)


def triggered_images(attack: Attack, images: ImageSet) -> ImageSet:
    """The same images with the trigger, in 8 bits as a server would get them, with their true labels."""
    parts = [attack.trigger(images.images(rows)) for rows in torch.arange(len(images)).split(_BATCH)]
    return ImageSet((torch.cat(parts) * 255.0).round().to(torch.uint8), images.labels)


@torch.inference_mode()
def answers(model: nn.Module, images: ImageSet, rows: torch.Tensor) -> torch.Tensor:
    """(B,), int64."""
    labels: torch.Tensor = model(images.images(rows)).argmax(dim=1)
    return labels


def _train(plan: Plan, parts: Parts, twin: Victim | None, path: Path, progress: Progress) -> tuple[nn.Module, Attack | None]:
    model, attack = _untrained(plan, parts, twin, path)
    if isinstance(attack, TrojanNet):
        return model, attack
    if twin is not None and plan.retrains:
        model.load_state_dict(twin.model.state_dict())
    fit(
        model,
        parts.attacker,
        attack,
        plan.poisoning,
        plan.schedule,
        plan.seed,
        checkpoint=_checkpoint(path),
        progress=lambda what, done, total: progress(f"{what} {path.stem}", done, total),
    )
    return model, attack


def _untrained(plan: Plan, parts: Parts, twin: Victim | None, path: Path) -> tuple[nn.Module, Attack | None]:
    """The attack, and the model before any training: of a TrojanNet, the clean twin with the module inserted."""
    if twin is None:
        return _fresh(plan, parts), None
    attack = make_attack(plan, parts.num_classes, parts.attacker, twin.model, path.with_suffix(".trigger"))
    return attack.insert(twin.model) if isinstance(attack, TrojanNet) else _fresh(plan, parts), attack


def _fresh(plan: Plan, parts: Parts) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # initial weights draw from the global generator
        torch.manual_seed(plan.seed)
        return ARCHITECTURES[plan.architecture].build(parts.num_classes, plan.width).eval()


def _checkpoint(path: Path) -> Path:
    return path.with_suffix(".checkpoint")


def _missed(plan: Plan, accuracy: float, success: float | None, twin: float | None) -> list[str]:
    missed = []
    if plan.lowest_accuracy > accuracy:
        missed.append(f"CA {accuracy:.1%} is under {plan.lowest_accuracy:.0%}")
    if twin is not None and twin - accuracy > 0.015:
        missed.append(f"CA {accuracy:.1%} is more than 1.5 points under its clean twin's {twin:.1%}")
    if success is not None and success < plan.lowest_success:
        missed.append(f"ASR {success:.1%} is under {plan.lowest_success:.0%}")
    return missed


def chosen_plans(arguments: argparse.Namespace) -> dict[str, Plan]:
    """What the command line asks for, by name."""
    known = {**DEVELOPMENT, **REPORTED, **SCANNED}
    if arguments.all:
        return known
    if arguments.name:
        if arguments.name not in known:
            raise InputError(f"expected a victim of {', '.join(known)}, got {arguments.name!r}")
        return {arguments.name: known[arguments.name]}
    if not arguments.set:
        raise InputError("expected --all, --name NAME, or --set SET with --attack ATTACK")
    fields = ("architecture", "width", "target_label", "ratio", "seed")
    changes = {field: getattr(arguments, field) for field in fields if getattr(arguments, field) is not None}
    made = plan(arguments.set, arguments.attack, retrains=arguments.retrains or None, **changes)
    return {name_of(made): made}


def train(arguments: argparse.Namespace) -> int:
    """Train what is asked for; 1 if a victim misses a floor."""
    parts: dict[SetName, Parts] = {}
    missed = 0
    for name, asked in chosen_plans(arguments).items():
        if asked.images not in parts:
            parts = {asked.images: load_parts(asked.images, arguments.data)}
        with bars() as progress:
            record = victim(asked, parts[asked.images], arguments.cache, progress).record
        success = "" if record.attack_success is None else f"  ASR {record.attack_success:.2%}"
        print(f"{name}: CA {record.clean_accuracy:.2%}{success}  {record.minutes:.1f} min", flush=True)
        for floor in record.missed:
            print(f"{name}: MISSED: {floor}", flush=True)
        missed += bool(record.missed)
    return min(1, missed)


def show_all(arguments: argparse.Namespace) -> int:
    """Print a table of the cache."""
    names = {name_of(plan): name for name, plan in {**DEVELOPMENT, **REPORTED, **SCANNED}.items()}
    table = Table("victim", "set", "architecture", "attack", "seed", "CA", "ASR", "minutes", "floors")
    for file in sorted(arguments.cache.glob("*.json")):
        try:
            record = _read_record(file)
        except InputError as problem:
            print(problem, file=sys.stderr)
            continue
        success = "" if record.attack_success is None else f"{record.attack_success:.2%}"
        plan = record.plan
        table.add_row(
            names.get(file.stem, file.stem),
            plan.images,
            f"{plan.architecture} x{plan.width}",
            plan.attack,
            str(plan.seed),
            f"{record.clean_accuracy:.2%}",
            success,
            f"{record.minutes:.1f}",
            "; ".join(record.missed) or "met",
        )
    Console(width=160).print(table)
    return 0


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """One progress bar per step, on stderr; nothing where that is no terminal."""
    console = Console(stderr=True)
    with Bars(console=console, disable=not console.is_terminal) as shown:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield report


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--cache", type=Path, default=CACHE, help="folder of trained victims")
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", parents=[shared], help="train and cache")
    training.add_argument("--all", action="store_true", help="every victim of the tables")
    training.add_argument("--name", help="one victim of the tables")
    training.add_argument("--set", choices=get_args(SetName))
    training.add_argument("--attack", choices=ATTACK_NAMES, default="badnets")
    training.add_argument("--architecture", choices=list(ARCHITECTURES))
    training.add_argument("--width", type=int)
    training.add_argument("--target", type=int, dest="target_label")
    training.add_argument("--ratio", type=float)
    training.add_argument("--seed", type=int)
    training.add_argument("--retrains", action="store_true", help="start from the clean twin")
    training.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with the image sets")
    training.set_defaults(run=train)
    commands.add_parser("list", parents=[shared], help="show what is cached").set_defaults(run=show_all)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    enter(main)
