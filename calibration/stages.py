"""How many blends STRIP's stages should hold, from what a call takes on this machine.

A stage takes as long as its forward passes and, besides, as a call does: the model's own set-up, blending, bookkeeping. Where
an image stops somewhere among the next T overlays, stages of n take T / n calls, and half of the last one's passes too many.
With a call that takes as long as k passes, that is least at n = sqrt(2 T k). The first stage, before which nothing is known, is
half as long; see `guard.detectors.strip`. No stage changes a verdict, but of a model that answers NaN: a pass that is run and
has no answer rejects, one that is not run can't.

T is coarse: an exact verdict takes some 20 passes, boundaries decide most images in the first stage.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from guard.detectors import Strip
from guard.detectors.strip import STAGE_ROWS

_EXPECTED, _BY_BOUNDARIES = 20, 4  # T
_MOST = 64  # blends; fewer than the default leave a processor idle
_FEW, _MANY = 16, 64
_FIRST = 6  # of `_FEW`; the next stage holds the rest
_ROUNDS = 7
_NOISE = 400  # a pass is no less than such a part of a call of `_FEW`: where a call takes as long whatever it holds, too
_SLOW = 0.05  # seconds, of `_FEW` passes: beside such a model a call takes nothing


def stage_rows(strip: Strip, image: Tensor) -> int:
    """How many blends the first stage should hold; a power of two, so that it hardly hangs on how a clock ticks.

    Args:
        strip: As it was calibrated.
        image: (1, C, H, W), in [0, 1]; any.
    """
    expected = _EXPECTED if strip.boundaries is None else _BY_BOUNDARIES
    best = math.sqrt(expected * _call_in_passes(strip, image) / 2.0)
    return STAGE_ROWS if best < STAGE_ROWS else min(_MOST, 2 ** round(math.log2(best)))


def _call_in_passes(strip: Strip, image: Tensor) -> float:
    """k: as many passes as a further call takes."""
    bare = replace(strip, boundaries=None, votes=None, overlays=_so_many(strip.overlays, _FEW))
    once, twice = replace(bare, stage_rows=_FEW), replace(bare, stage_rows=_FIRST)
    if _seconds(once, image) > _SLOW:
        return 0.0
    ways = [once, twice, replace(bare, overlays=_so_many(strip.overlays, _MANY), stage_rows=_MANY)]
    rounds = [tuple(map(partial(_seconds, image=image), ways)) for _ in range(_ROUNDS + 1)][1:]
    call = statistics.median(in_two - in_one for in_one, in_two, _ in rounds)
    one = statistics.median(more - few for few, _, more in rounds) / (_MANY - _FEW)
    return max(call, 0.0) / max(one, statistics.median(few for few, _, _ in rounds) / _NOISE)


def _so_many(overlays: Tensor, count: int) -> Tensor:
    return overlays[torch.arange(count) % len(overlays)]


def _seconds(strip: Strip, image: Tensor) -> float:
    """Of all its passes."""
    started = time.perf_counter()
    strip.inspect(image, -math.inf)  # a threshold that no mean entropy is over: nothing is certain before the end
    return time.perf_counter() - started
