"""STRIP: a trigger keeps a prediction constant when clean images are superimposed on the input.

    H(x) = (1/N) sum_n h_n,   h_n = -sum_j y_nj log2 y_nj,   y_n = f(blend(x, o_n))

in bits, entropy over the classes. The score is -H: low entropy is suspicious. Every h_n is >= 0 and floating-point
addition of non-negative numbers never decreases a sum, so once the running mean (sum so far / N) is over the threshold
in bits, the full mean is too: `inspect` stops there and accepts with the verdict that all N passes would give. With `votes`, it
stops as soon as so many h_n are over the threshold; with `boundaries`, sooner still, and at triggered inputs as well. The score
is then another one, see `guard.detectors.votes` and `guard.detectors.boundaries`.

Blind to: source-specific and all-to-all backdoors, triggers that a blend destroys (faint or spread over the image), and
attackers who train against it. Which triggers survive depends on the blend: a guard may run several, each with overlays and a
threshold of its own, and reject what any of them finds. A model that returns only labels is tested by the entropy of the
histogram of its N labels, which needs all N passes.

Reference: Gao et al., STRIP, arXiv:1902.06531; clamped addition as in CoDefend, Algorithm 1; `demeaned`, `max`, `logit`: ours.
"""

from __future__ import annotations

import bisect
import functools
import math
import time
from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from guard.detectors.boundaries import Boundaries, SoftVotes, soft_vote_scores
from guard.detectors.detector import Detector, Inspection, at_or_over
from guard.detectors.evidence import Evidence, Mean, mean_scores
from guard.detectors.votes import Votes, vote_scores
from guard.errors import CalibrationError
from guard.predictors.predictor import Predictor

Blend = Literal["add", "mix", "demeaned", "max", "logit"]
"""`add`: x + a*o. `mix`: (1-a)*x + a*o. `demeaned`: x + a*(o - mean(o)). `max`: max(x, a*o). Each clamped to [0, 1].

`logit`: sigmoid(logit(x) + a*z), x within [0.001, 0.999] and z = (o - mean(o)) / std(o): mid-tones move a lot, every overlay
moves them as much, and pixels near black or white, such as a sticker's, hardly do.
"""

STAGE_ROWS = 4
"""Blends in a first stage's batch, at least, where no calibration says otherwise."""

_LOGIT_EDGE = 0.001
_MOST_LOGIT = 30.0  # beyond it a pixel is black or white, and float32 overflows
_FULL = 200_000  # numbers in a batch, 64 images of 32x32 pixels: a forward pass of more is hardly faster an image
_LEAST_CONTRAST = 0.02  # of an overlay, so that noise in a flat one is not blown up


def blend_images(images: Tensor, overlays: Tensor, blend: Blend = "add", alpha: float = 1.0) -> Tensor:
    """Superimpose each overlay on each image.

    Args:
        images: (B, C, H, W), in [0, 1].
        overlays: (N, C, H, W), in [0, 1].
        blend: How.
        alpha: The overlay's weight.

    Returns:
        (B, N, C, H, W), in [0, 1].
    """
    return superimpose(image_bases(images, blend, alpha), overlay_layers(overlays, blend, alpha), blend)


def overlay_layers(overlays: Tensor, blend: Blend, alpha: float) -> Tensor:
    """The part of a blend that depends on the overlays alone: what is added, compared or, for `logit`, multiplied.

    Args:
        overlays: (N, C, H, W), in [0, 1].
        blend: How they will be superimposed.
        alpha: Their weight.

    Returns:
        (N, C, H, W), float32.
    """
    if blend not in ("demeaned", "logit"):
        return alpha * overlays
    layers = overlays - overlays.mean(dim=(1, 2, 3), keepdim=True)
    if blend == "demeaned":
        return alpha * layers
    contrast = layers.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(_LEAST_CONTRAST)
    # in float64 and rounded: the bits of a float32 exponential depend on where in a batch a pixel is
    return (-alpha * (layers / contrast).to(torch.float64)).clamp(-_MOST_LOGIT, _MOST_LOGIT).exp().to(torch.float32)


def image_bases(images: Tensor, blend: Blend, alpha: float) -> Tensor:
    """The part of a blend that depends on the images alone; (B, C, H, W).

    For `logit`, the odds against: sigmoid(logit(x) + a*z) is 1 / (1 + e * (1 - x) / x), with e = exp(-a*z), the layer.
    """
    if blend == "logit":
        inside = images.clamp(_LOGIT_EDGE, 1.0 - _LOGIT_EDGE)
        return (1.0 - inside).div_(inside)
    return images * (1.0 - alpha) if blend == "mix" else images


def superimpose(bases: Tensor, layers: Tensor, blend: Blend) -> Tensor:
    """The rest of a blend; (B, N, C, H, W), in [0, 1], the same bits whatever the batch."""
    bases, layers = bases.unsqueeze(1), layers.unsqueeze(0)
    if blend == "logit":
        return (bases * layers).add_(1.0).reciprocal_()
    return (torch.maximum(bases, layers) if blend == "max" else bases + layers).clamp_(0.0, 1.0)


def entropy_bits(probabilities: Tensor) -> Tensor:
    """Shannon entropy over the classes, in bits, clamped at 0 from below.

    Args:
        probabilities: (..., M), rows summing to one.

    Returns:
        (...), float64; NaN where a row is NaN.
    """
    nats: Tensor = torch.special.entr(probabilities.to(torch.float64)).sum(dim=-1)
    return nats.div_(math.log(2.0)).clamp_min_(0.0)


@final
@dataclass(frozen=True)
class Strip(Detector):
    """STRIP over a predictor.

    Args:
        predictor: The suspicious model.
        overlays: (N, C, H, W), float32, clean images in [0, 1], in the order in which they are tried.
        blend: How they are superimposed.
        alpha: The overlay's weight, in (0, 1] for `mix` and over 0 otherwise.
        stage_rows: Blends in the first stage's batch, at least, and twice as many in later ones', as a call of the model is
            worth; without boundaries, stages also grow, to half of what went before, until they fill a processor.
        name: `strip`, or `strip-BLEND` where a guard has several.
        boundaries: Where it may stop; None for exact early acceptance.
        votes: Overlays that must have made the model unsure; None for the mean entropy, or what boundaries make of it.

    Raises:
        CalibrationError: No overlays, an alpha out of range, boundaries of another number of overlays, more votes than
            overlays, or both.
        InputError: The overlays are not images.
    """

    predictor: Predictor
    overlays: Tensor
    blend: Blend = "add"
    alpha: float = 1.0
    stage_rows: int = STAGE_ROWS
    name: str = "strip"
    boundaries: Boundaries | None = None
    votes: int | None = None

    def __post_init__(self) -> None:
        """Validate once."""
        if self.overlays.ndim == 4 and self.overlays.shape[0] == 0:
            raise CalibrationError("expected at least one overlay, got none: calibrate with more clean images")
        self.predictor.spec.check(self.overlays)
        if self.blend not in get_args(Blend):
            raise CalibrationError(f"expected a blend of {', '.join(get_args(Blend))}, got {self.blend!r}")
        if not (math.isfinite(self.alpha) and 0.0 < self.alpha <= (1.0 if self.blend == "mix" else math.inf)):
            raise CalibrationError(f"expected alpha in (0, 1] for mix and over 0 otherwise, got {self.alpha} for {self.blend}")
        if self.passes != "exact" and self.predictor.labels_only:
            raise CalibrationError(
                f"expected a model with probabilities for --passes {self.passes}, got one with labels: take --passes exact"
            )
        total = len(self.overlays)
        if self.boundaries is not None and self.votes is not None:
            raise CalibrationError("expected boundaries or votes, got both: pass one of them")
        if self.votes is not None and not 1 <= self.votes <= total:
            raise CalibrationError(f"expected 1 to {total} votes of as many overlays, got {self.votes}")
        if self.boundaries is not None and self.boundaries.ends[-1] != total:
            raise CalibrationError(f"expected boundaries of {total} overlays, got {self.boundaries.ends[-1]}")

    @property
    def passes(self) -> Literal["exact", "votes", "sequential"]:
        """What lets it stop before all overlays are tried."""
        return "votes" if self.votes is not None else "exact" if self.boundaries is None else "sequential"

    @functools.cached_property
    def layers(self) -> Tensor:
        """(N, C, H, W): the overlays, prepared once for the blend."""
        return overlay_layers(self.overlays, self.blend, self.alpha)

    @functools.cached_property
    def _accepting_ends(self) -> tuple[int, ...]:
        """Ends of the stages at which an input can be accepted before it is certain."""
        return () if self.boundaries is None else self.boundaries.accepting_ends

    def pass_entropies(self, images: Tensor) -> Tensor:
        """Each overlay's entropy, for models that give probabilities.

        Args:
            images: (B, C, H, W), in [0, 1].

        Returns:
            (B, N), float64, bits.
        """
        return entropy_bits(self._every_answer(images))

    def score(self, images: Tensor) -> Tensor:
        """Minus the mean entropy of all N passes, or what boundaries or votes make of them, in bits; (B,), float32."""
        if self.predictor.labels_only:
            return -entropy_bits(self._every_answer(images).mean(dim=1)).to(torch.float32)
        return self.score_passes(self.pass_entropies(images))

    def score_passes(self, entropies: Tensor) -> Tensor:
        """The score that follows from every overlay's entropy; (B, N), float64, to (B,), float32."""
        if self.boundaries is not None:
            return soft_vote_scores(entropies, self.boundaries)
        return mean_scores(entropies) if self.votes is None else vote_scores(entropies, self.votes)

    def evidence(self, images: int, threshold: float) -> Evidence:
        """Nothing yet, of so many images."""
        total = len(self.overlays)
        if self.boundaries is not None:
            return SoftVotes(images, self.boundaries, threshold)
        return Mean(images, total, threshold) if self.votes is None else Votes(images, total, self.votes, threshold)

    def inspect(self, images: Tensor, threshold: float) -> Inspection:
        """Compare `score(images)` with a threshold, stopping for each image as soon as the verdict is certain.

        That is exact as far as the model is: a pass that is never run can't reveal that the model would have answered NaN
        there, and a model whose answers depend on the batch they ride in differs by as much.

        Args:
            images: (B, C, H, W), in [0, 1].
            threshold: On the score: minus bits.
        """
        return self._inspect(images, threshold, _Clock(math.inf))

    def inspect_by(self, images: Tensor, threshold: float, deadline: float) -> Inspection:
        """See `Detector`; how long a stage takes is told by those before."""
        if self.predictor.labels_only:
            return super().inspect_by(images, threshold, deadline)
        return self._inspect(images, threshold, _Clock(deadline))

    def inspect_and_answer(self, images: Tensor, threshold: float, deadline: float = math.inf) -> Inspection:
        """`inspect_by`; the images themselves ride in the first stage's batch, for their `answers`, which are no passes."""
        if self.predictor.labels_only:
            return self.inspect_by(images, threshold, deadline)
        return self._inspect(images, threshold, _Clock(deadline), riding=True)

    def _inspect(self, images: Tensor, threshold: float, clock: _Clock, *, riding: bool = False) -> Inspection:
        total = len(self.overlays)
        batch = len(images)
        if self.predictor.labels_only:
            scores, yes = self.score(images), torch.ones(batch, dtype=torch.bool)
            return Inspection(at_or_over(scores, threshold), scores, yes, torch.full((batch,), total))
        evidence = self.evidence(batch, threshold)
        bases, passes = image_bases(images, self.blend, self.alpha), np.zeros(batch, dtype=np.int64)
        done, own = 0, None
        while done < total and len(evidence.rows):
            active = evidence.rows
            end = self._end_of_stage(done, len(active))
            if not clock.allows((end - done) * len(active)):
                break
            chosen = bases if len(active) == batch else bases[torch.from_numpy(active).to(bases.device)]
            answers = self._answers(chosen, self.layers[done:end], images if riding and not done else None)
            if riding and not done:
                own, answers = answers[:, 0], answers[:, 1:]
            evidence.add(entropy_bits(answers))
            passes[active] = done = end
        scores, late = evidence.scores, torch.zeros(batch, dtype=torch.bool)
        if done < total and len(evidence.rows):
            late[torch.from_numpy(evidence.rows)] = True
            late &= ~scores.isnan()  # without an answer it has failed, in time
            scores = scores.masked_fill(late, torch.nan)
        return Inspection(at_or_over(scores, threshold), scores, evidence.exact & ~late, torch.from_numpy(passes), late, own)

    def _end_of_stage(self, done: int, active: int) -> int:
        """Overlays tried after the next stage: rows that are worth a call, and where any end will do, till it is full."""
        least = 2 * self.stage_rows if done else self.stage_rows  # what is not decided by the first takes many
        rows, total = max(1, -(-least // active)), len(self.overlays)
        if self.boundaries is not None:  # where nothing can be accepted, a call is not worth what it may reject
            number = bisect.bisect_left(self._accepting_ends, done + rows)
            return self._accepting_ends[number] if number < len(self._accepting_ends) else total
        full = _FULL // math.prod(self.predictor.spec.shape)
        return min(total, max(self.votes or 0, done + max(rows, min(done // 2, full // active))))

    def stage_ends(self, active: int = 1) -> list[int]:
        """How many overlays have been tried after each stage, while so many images remain."""
        ends = [0]
        while ends[-1] < len(self.overlays):
            ends.append(self._end_of_stage(ends[-1], active))
        return ends[1:]

    def _every_answer(self, images: Tensor) -> Tensor:
        return self._answers(image_bases(images, self.blend, self.alpha), self.layers)

    def _answers(self, bases: Tensor, layers: Tensor, riders: Tensor | None = None) -> Tensor:
        """(B, n, M) on the CPU: answers to every blend, in forward passes of at most the predictor's `max_rows`.

        With the images themselves as `riders`, (B, 1 + n, M), theirs first.
        """
        layers, riding, most = layers.to(bases.device), riders is not None, self.predictor.max_rows
        columns = len(layers) + riding
        if len(bases) * columns <= most:
            return self._answer(bases, layers, riders).cpu()
        parts, size = [], max(1, most // columns)
        for number, part in enumerate(bases.split(size)):
            own = None if riders is None else riders[number * size :][: len(part)]
            answers = [
                self._answer(part, some, None if later else own)
                for later, some in enumerate(layers.split(max(1, most - riding)))
            ]
            parts.append(torch.cat(answers, dim=1))
        return torch.cat(parts).cpu()

    def _answer(self, bases: Tensor, layers: Tensor, riders: Tensor | None) -> Tensor:
        blends = superimpose(bases, layers, self.blend)
        if riders is not None:
            blends = torch.cat([riders.unsqueeze(1), blends], dim=1)
        answers = self.predictor(blends.flatten(0, 1), keep=False)
        return answers.reshape(*blends.shape[:2], answers.shape[1])


class _Clock:
    """Whether there is time for so many rows, by what those before took."""

    def __init__(self, deadline: float) -> None:
        self._deadline, self._began, self._rows = deadline, time.monotonic(), 0

    def allows(self, rows: int) -> bool:
        """Ask before a stage."""
        now, before = time.monotonic(), self._rows
        self._rows += rows
        return now + (rows * (now - self._began) / before if before else 0.0) < self._deadline
