"""What a guard costs on this machine: how long an image takes, against the model alone, and how many passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from calibration.data import ImageSet, Progress, no_progress
from guard import Guard

_AT_ONCE = (1, 32)
_MOST = {1: 32, 32: 256}  # images in a round
_ROUNDS = 5
_SEED = 0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of some rounds, the model alone and the guard in turn.

    Attributes:
        at_once: Images in a batch; 1 is a server whose requests come one by one.
        images: Clean ones, in a round.
        model_ms: Of the model's own answer, milliseconds an image.
        guarded_ms: Of the guard's verdict and the answer, likewise.
        passes: Forward passes that its detectors spend on an image, mean.
    """

    at_once: int
    images: int
    model_ms: float
    guarded_ms: float
    passes: float

    @property
    def times(self) -> float:
        """How many times what the model takes."""
        return self.guarded_ms / self.model_ms


def measure_speed(guard: Guard, clean: ImageSet, progress: Progress = no_progress) -> tuple[Speed, ...]:
    """Time a guard, images one by one and in batches.

    The verdicts are the guard's own, its latency budget included. What is not of the guard, decoding or HTTP, is left out.

    Args:
        guard: The guard; without a quarantine, which would fill.
        clean: Clean images, of which some are drawn: passes differ from class to class, by which folders are sorted.
        progress: Told how far it is.
    """
    found = []
    drawn = torch.randperm(len(clean), generator=torch.Generator().manual_seed(_SEED))
    for number, at_once in enumerate(_AT_ONCE):
        images = clean.images(drawn[: _MOST[at_once]])
        batches = images.split(at_once)
        rounds = [_round(guard, batches) for _ in range(1 + _ROUNDS)][1:]
        found.append(
            Speed(
                at_once=min(at_once, len(images)),
                images=len(images),
                model_ms=statistics.median(model for model, _, _ in rounds) * 1000.0 / len(images),
                guarded_ms=statistics.median(guarded for _, guarded, _ in rounds) * 1000.0 / len(images),
                passes=rounds[0][2] / len(images),
            )
        )
        progress("timing", number + 1, len(_AT_ONCE))
    return tuple(found)


def _round(guard: Guard, batches: tuple[Tensor, ...]) -> tuple[float, float, int]:
    """Seconds of the model, of the guard, and passes."""
    alone = _seconds(lambda: [guard.predictor(batch.to(guard.device)).cpu() for batch in batches])
    passes: list[int] = []
    guarded = _seconds(lambda: passes.extend(verdict.passes for batch in batches for verdict in guard(batch)))
    return alone, guarded, sum(passes)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
