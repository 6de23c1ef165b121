"""Neural Cleanse: the smallest trigger that sends clean images to a label, for all labels as one batched problem.

    minimise  CE(f((1 - m) x + m d), t) + w |m|_1     over the mask m in [0, 1]^(H, W) and the pattern d in [0, 1]^(C, H, W)

For a backdoor's target a small mask will do, because the model has a shortcut there. The weight w of each label moves up while
its trigger works on 99% of the images, and down while it does not, so that the mask shrinks as far as it can.

Images that get the label anyway don't count (ours): they say nothing of a trigger.

The labels don't interact: they share forward passes, not a loss, and what is found for a label is what it would be alone.
Labels whose mask has stopped shrinking leave the batch.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019; rate, weights and patience are those of its public code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.data import Progress, no_progress

_EDGE = 1e-4  # of mask and pattern at the start: tanh has no gradient at its ends
_BETAS = (0.5, 0.9)
_MOST_WEIGHT = 1e6
_NOW = 4  # steps over which success moves the weight


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """How a trigger is looked for.

    Attributes:
        steps: Of Adam, at most, for each label.
        images: A step sees so many of them, the same for each label.
        rate: Adam's.
        weight: w at the start.
        factor: w is multiplied by this when it rises, and divided by its 1.5th power when it falls.
        patience: Steps on one side of `success` until w moves.
        success: Share of images that must get the label.
        window: Steps over which that share is averaged. What is kept is the trigger at their beginning, as a rule the largest.
        still: Steps without a mask smaller by 1% after which a label is done.
        at_once: Images in a forward pass, at most: bounds memory.
    """

    steps: int = 1000
    images: int = 32
    rate: float = 0.1
    weight: float = 1e-3
    factor: float = 1.5
    patience: int = 5
    success: float = 0.99
    window: int = 16
    still: int = 100
    at_once: int = 1024


@final
@dataclass(frozen=True)
class Triggers:
    """What was found, a row for each label.

    Attributes:
        labels: (K,), int64.
        masks: (K, H, W), in [0, 1].
        patterns: (K, C, H, W), in [0, 1].
        success: (K,), share of images that got the label while the mask was found.
        passes: (K,), int64: images that went through the model for it.
    """

    labels: Tensor
    masks: Tensor
    patterns: Tensor
    success: Tensor
    passes: Tensor

    @property
    def sizes(self) -> Tensor:
        """(K,), L1 norms of the masks, in pixels."""
        return self.masks.sum(dim=(1, 2))

    def put_on(self, row: int, images: Tensor) -> Tensor:
        """One of the triggers on images, (B, C, H, W) in [0, 1]."""
        return blend(images, self.masks[row], self.patterns[row])


def blend(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """(1 - m) x + m d; masks (..., H, W), patterns (..., C, H, W), images broadcast to (..., C, H, W)."""
    masks = masks.unsqueeze(-3)
    return (1.0 - masks) * images + masks * patterns


def recover_triggers(
    answers: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    search: Search,
    seed: int,
    progress: Progress = no_progress,
    device: torch.device | None = None,
) -> Triggers:
    """Find a small trigger for each of some labels.

    Args:
        answers: The model, differentiable: images (B, C, H, W) in [0, 1] to logits (B, M).
        images: (N, C, H, W), in [0, 1], clean.
        labels: (K,), int64: the targets.
        search: How.
        seed: Of the draws; a label's start does not depend on which others there are.
        progress: Told how far it is, in labels.
        device: Of the model.
    """
    size = max(1, search.at_once // search.images)
    parts = [
        _Block(answers, images, block, search, seed, device).run(progress, number * size, len(labels))
        for number, block in enumerate(labels.split(size))
    ]
    return Triggers(*(torch.cat([getattr(part, name) for part in parts]) for name in Triggers.__dataclass_fields__))


class _Block:
    """Labels that share forward passes."""

    def __init__(
        self,
        answers: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        search: Search,
        seed: int,
        device: torch.device | None,
    ) -> None:
        self.answers, self.search, self.seed = answers, search, seed
        self.images = images.to(device or images.device)
        where = self.images.device
        starts = [_start(images.shape[1:], seed, int(label)) for label in labels]
        self.masks = nn.Parameter(torch.stack([mask for mask, _ in starts]).to(where))
        self.patterns = nn.Parameter(torch.stack([pattern for _, pattern in starts]).to(where))
        count = len(labels)
        self.labels = labels.to(where)
        with torch.inference_mode():
            self.own = torch.cat([answers(part).argmax(dim=1) for part in self.images.split(search.at_once)]).clone()
        self.rows = torch.arange(count, device=where)  # of the results, which a label keeps when others leave
        self.optimizer = torch.optim.Adam([self.masks, self.patterns], lr=search.rate, betas=_BETAS)
        self.weights = torch.zeros(count, device=where)
        self.over = torch.zeros(count, dtype=torch.int64, device=where)
        self.under = torch.zeros(count, dtype=torch.int64, device=where)
        self.recent = torch.zeros(count, search.window, device=where)
        self.past: list[tuple[Tensor, Tensor]] = []  # masks and patterns of the steps in the window
        self.since = torch.zeros(count, dtype=torch.int64, device=where)
        _, channels, height, width = images.shape
        self.best = torch.full((count,), float("inf"), device=where)
        self.found = Triggers(
            labels.cpu(),
            torch.ones(count, height, width),
            torch.zeros(count, channels, height, width),
            torch.zeros(count),
            torch.zeros(count, dtype=torch.int64),
        )

    def run(self, progress: Progress, before: int, total: int) -> Triggers:
        generator = torch.Generator().manual_seed(self.seed)
        count = len(self.rows)
        for step in range(self.search.steps):
            chosen = torch.randint(len(self.images), (self.search.images,), generator=generator)
            chosen = chosen.to(self.images.device)
            self._step(self.images[chosen], self.own[chosen], step)
            self._leave(self.since < self.search.still)
            left = len(self.rows)
            share = max((step + 1) / self.search.steps, 1.0 - left / count)
            progress("looking for triggers", before + int(share * count), total)
            if left == 0:
                break
        self._leave(torch.zeros_like(self.since, dtype=torch.bool))
        progress("looking for triggers", before + count, total)
        return self.found

    def _step(self, images: Tensor, own: Tensor, step: int) -> None:
        masks, patterns = _squash(self.masks), _squash(self.patterns)
        triggered = blend(images.unsqueeze(0), masks.unsqueeze(1), patterns.unsqueeze(1)).clamp(0.0, 1.0)
        logits = self.answers(triggered.flatten(0, 1))
        wanted = self.labels.repeat_interleave(len(images))
        others = (own.unsqueeze(0) != self.labels.unsqueeze(1)).float()  # (K, B)
        counts = others.sum(dim=1).clamp_min(1.0)
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none").view_as(others)
        self.optimizer.zero_grad(set_to_none=True)
        ((losses * others).sum(dim=1) / counts + self.weights * masks.sum(dim=(1, 2))).sum().backward()
        with torch.no_grad():
            right = ((logits.argmax(dim=1) == wanted).view_as(others) * others).sum(dim=1) / counts
            self.found.passes[self.rows.cpu()] += len(images)
            self._judge(right, masks, patterns, step)
        self.optimizer.step()

    def _judge(self, right: Tensor, masks: Tensor, patterns: Tensor, step: int) -> None:
        """Keep what is the best yet, and move the weights."""
        search = self.search
        self.recent[:, step % search.window] = right
        self.past = [*self.past[-search.window + 1 :], (masks.detach(), patterns.detach())]
        oldest_masks, oldest_patterns = self.past[0]
        sizes, success = oldest_masks.sum(dim=(1, 2)), self.recent.mean(dim=1)
        works = success >= search.success
        if step + 1 < search.window:
            works = torch.zeros_like(works)
        better = works & (sizes < self.best)
        much_better = works & (sizes < 0.99 * self.best)
        self.since = torch.where(much_better | self.best.isinf(), 0, self.since + 1)
        self.best = torch.where(better, sizes, self.best)
        if bool(better.any()):
            rows = self.rows[better].cpu()
            self.found.masks[rows] = oldest_masks[better].cpu()
            self.found.patterns[rows] = oldest_patterns[better].cpu()
            self.found.success[rows] = success[better].cpu()
        now = torch.stack([self.recent[:, (step - back) % search.window] for back in range(min(_NOW, step + 1))]).mean(dim=0)
        holds = now >= search.success
        self.over = torch.where(holds, self.over + 1, 0)
        self.under = torch.where(holds, 0, self.under + 1)
        up, down = self.over >= search.patience, self.under >= search.patience
        raised = torch.where(self.weights == 0.0, search.weight, self.weights * search.factor).clamp(max=_MOST_WEIGHT)
        self.weights = torch.where(up, raised, torch.where(down, self.weights / search.factor**1.5, self.weights))
        self.over[up], self.under[down] = 0, 0

    def _leave(self, stay: Tensor) -> None:
        """Take labels out of the batch, with the optimizer's state of them."""
        if bool(stay.all()):
            return
        rows = torch.nonzero(stay).squeeze(1)
        for name in ("labels", "rows", "weights", "over", "under", "recent", "since", "best"):
            setattr(self, name, getattr(self, name)[rows])
        self.past = [(masks[rows], patterns[rows]) for masks, patterns in self.past]
        states = [self.optimizer.state[value] for value in (self.masks, self.patterns)]
        self.masks, self.patterns = (nn.Parameter(value.detach()[rows]) for value in (self.masks, self.patterns))
        self.optimizer = torch.optim.Adam([self.masks, self.patterns], lr=self.search.rate, betas=_BETAS)
        for value, state in zip((self.masks, self.patterns), states, strict=True):
            self.optimizer.state[value] = {name: part if part.ndim == 0 else part[rows] for name, part in state.items()}


def _squash(free: Tensor) -> Tensor:
    return (free.tanh() + 1.0) / 2.0


def _unsquash(values: Tensor) -> Tensor:
    return ((values * 2.0 - 1.0) * (1.0 - _EDGE)).atanh()


def _start(shape: torch.Size, seed: int, label: int) -> tuple[Tensor, Tensor]:
    """Uniform mask and pattern, before `_squash`."""
    generator = torch.Generator().manual_seed(seed * 100_003 + label)
    mask = torch.rand(shape[1:], generator=generator)
    return _unsquash(mask), _unsquash(torch.rand(shape, generator=generator))
