"""`guard check`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
import typer
from torch import Tensor

from cli import options
from cli.inputs import read_images
from cli.threads import settle_threads
from guard import Finding, Guard, GuardError, Limits, Policy, Quarantine, Verdict
from guard.files import as_text, printable
from guard.readings import reading_of
from guard.verdict import FAILURES, method_of

_BATCH = 32


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What one detector found: STRIP an entropy in bits, the others a `score`."""

    detector: str
    entropy: float | None
    exact: bool
    threshold: float
    suspicious: bool
    passes: int
    score: float | msgspec.UnsetType = msgspec.UNSET


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One image's verdict, as `--json` prints it; `reason` and `message` tell why there is none.

    `detector`, `entropy` and `threshold` are those of the finding that decided, the first suspicious one, else the first.
    `entropy` is null where that is not STRIP's.
    """

    image: str
    verdict: Literal["accepted", "rejected"]
    label: str | None = None
    label_index: int | None = None
    probability: float | None = None
    detector: str | None = None
    entropy: float | None = None
    entropy_exact: bool | None = None
    threshold: float | None = None
    passes: int = 0
    reason: str | None = None
    message: str | None = None
    quarantined: str | None = None
    findings: tuple[Found, ...] = ()


def check(
    profile: options.ProfileArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, folders, or .npz with x.")],
    quarantine: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep copies of rejected images there.")] = None,
    mode: Annotated[Literal["enforce", "monitor"], typer.Option(help="monitor accepts all, and tells.")] = "enforce",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: options.JsonOption = False,
) -> None:
    """Judge images: one line each, accepted with a label, or rejected.

    Exit code 0 when every image was judged, whatever the verdicts; 2 when some could not be read, or not judged.

    Example: guard check profile photo.png --json
    """
    store = None if quarantine is None else Quarantine(quarantine)
    guard = Guard.load(profile, policy=Policy(mode=mode), quarantine=store, device=device)
    settle_threads(guard.predictor)
    stream = read_images(images, guard.predictor.spec, Limits())
    unreadable = unjudged = total = 0
    while batch := list(itertools.islice(stream, _BATCH)):
        lines = _judge(guard, batch)
        total += len(lines)
        unreadable += sum(line.message is not None for line in lines)
        unjudged += sum(line.reason in FAILURES for line in lines)
        _print(lines, as_json)
    if store is not None and store.failures:
        raise GuardError(
            f"{store.failures} rejected images could not be written to {quarantine}: is the disk full or read-only?"
        )
    if unreadable:
        raise GuardError(f"{unreadable} of {total} inputs could not be read and were rejected: see reason and message")
    if unjudged:
        raise GuardError(f"{unjudged} of {total} inputs could not be judged: the model or a detector failed, see reason")


def _judge(guard: Guard, batch: list[tuple[str, Tensor | GuardError]]) -> list[Line]:
    readable = [item for _, item in batch if isinstance(item, Tensor)]
    verdicts = iter(guard(torch.stack(readable)) if readable else ())
    return [
        _line(name, next(verdicts))
        if isinstance(item, Tensor)
        else Line(image=name, verdict="rejected", reason=item.code, message=as_text(str(item)))
        for name, item in batch
    ]


def _line(name: str, verdict: Verdict) -> Line:
    findings = tuple(_found(item) for item in verdict.findings)
    first = next((item for item in findings if item.suspicious), findings[0] if findings else None)
    return Line(
        image=name,
        verdict=verdict.verdict,
        label=verdict.label,
        label_index=verdict.label_index,
        probability=verdict.probability,
        detector=None if first is None else first.detector,
        entropy=None if first is None else first.entropy,
        entropy_exact=None if first is None or first.entropy is None else first.exact,
        threshold=None if first is None else first.threshold,
        passes=verdict.passes,
        reason="backdoor-suspected" if verdict.suspicious else verdict.reason,
        quarantined=verdict.quarantined,
        findings=findings,
    )


def _found(item: Finding) -> Found:
    reading, strip = reading_of(item.detector), method_of(item.detector) == "strip"
    return Found(
        detector=item.detector,
        entropy=reading.value(item.score) if strip else None,
        exact=item.exact,
        threshold=reading.value(item.threshold),
        suspicious=item.suspicious,
        passes=item.passes,
        score=msgspec.UNSET if strip else item.score,
    )


def _print(lines: list[Line], as_json: bool) -> None:
    for line in lines:
        typer.echo(msgspec.json.encode(line).decode() if as_json else printable(_for_people(line)))


def _for_people(line: Line) -> str:
    if line.message is not None:
        return f"{line.image}: {line.verdict} as unreadable, {line.message}"
    sure = "" if line.probability is None else f" ({line.probability:.3f})"
    says = f"{line.label}{sure}" if line.reason not in FAILURES else f"{line.reason}"
    found = "".join(f", {_in_words(item, len(line.findings) > 1)}" for item in line.findings if _known(item))
    return f"{line.image}: {line.verdict}, {says}{found}, {line.passes} {'pass' if line.passes == 1 else 'passes'}"


def _known(item: Found) -> bool:
    """Whether the detector came to anything."""
    value = item.score if isinstance(item.score, float) else item.entropy
    return value is not None and math.isfinite(value)


def _in_words(item: Found, several: bool) -> str:
    """`entropy at least 0.0814 bits`; of several, `strip-logit 0.0103 bits (suspicious)`. Only STRIP stops early."""
    reading = reading_of(item.detector)
    value = reading.value(item.score) if isinstance(item.score, float) else item.entropy
    bound = "" if item.exact else "at most " if item.suspicious else "at least "
    text = f"{bound}{value:.4f}{reading.unit}"
    return f"{item.detector} {text}{' (suspicious)' if item.suspicious else ''}" if several else f"{reading.quantity} {text}"
