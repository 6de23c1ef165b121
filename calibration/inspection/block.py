"""Triggers of several goals, optimised as one batch; see `neural_cleanse`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress
from calibration.engine import Engine
from calibration.inspection.pools import Pools
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers, blend, squash, unsquash

_BETAS = (0.5, 0.9)
_MOST_WEIGHT = 1e6
_NOW = 4  # steps over which success moves the weight
_SMALLER = 0.98  # a mask that shrinks by less stands still
_BETWEEN, _WORTH = 3.0, 20.0  # seconds from one checkpoint to the next, and at least so many times what one takes


@final
@dataclass(frozen=True)
class Work:
    """What all goals of a search have in common; see `recover_triggers`.

    Attributes:
        images: In the order of the model's answers.
        own: (N,), int64, these answers.
        at_once: Images in a forward pass.
    """

    answers: nn.Module
    images: Tensor
    own: Tensor
    search: Search
    seed: int
    engine: Engine
    at_once: int
    checkpoints: Checkpoints | None
    progress: Progress


@final
class Block:
    """Goals whose masks are in memory together."""

    def __init__(self, work: Work, goals: Goals, pools: Pools, draws: Sequence[int]) -> None:
        self.answers, self.images, self.search, self.seed = work.answers, work.images, work.search, work.seed
        self.engine, self.at_once, self.goals, self.again = work.engine, work.at_once, goals, any(draws)
        where, count = work.engine.device, len(goals)
        _, channels, height, width = work.images.shape
        starts = [
            _start(work.images.shape[1:], work.search.start, work.seed, *goal)
            for goal in zip(*_lists(goals), draws, strict=True)
        ]
        self.masks = nn.Parameter(torch.stack([mask for mask, _ in starts]).to(where))
        self.patterns = nn.Parameter(torch.stack([pattern for _, pattern in starts]).to(where))
        self.optimizer = torch.optim.Adam([self.masks, self.patterns], lr=work.search.rate, betas=_BETAS)
        self.labels, self.pools = goals.labels.to(where), pools
        self.rows = torch.arange(count, device=where)  # of the results, which a label keeps when others leave
        self.weights = torch.zeros(count, device=where)
        self.over = torch.zeros(count, dtype=torch.int64, device=where)
        self.under = torch.zeros(count, dtype=torch.int64, device=where)
        self.recent = torch.zeros(count, _NOW, device=where)
        self.since = torch.zeros(count, dtype=torch.int64, device=where)
        self.best_masks = torch.ones(count, height, width)
        self.best_patterns = torch.zeros(count, channels, height, width)
        self.best = torch.full((count,), float("inf"))
        self.success = torch.zeros(count)
        self.passes = torch.zeros(count, dtype=torch.int64)

    def run(self, checkpoints: Checkpoints | None, name: str, progress: Callable[[int], None]) -> Triggers:
        """All steps, or those that are left."""
        step, search, count = self._resume(checkpoints, name), self.search, len(self.goals)
        saved, took = time.monotonic(), 0.0
        windows = search.steps // search.window
        for number in range(step // search.window, windows):
            if len(self.rows) == 0:
                break
            self._window(number)
            progress(int(max((number + 1) / windows, 1.0 - len(self.rows) / count) * count))
            if checkpoints is not None and (now := time.monotonic()) - saved > max(_BETWEEN, _WORTH * took):
                self._save(checkpoints, name, (number + 1) * search.window)
                saved = time.monotonic()
                took = saved - now
        if checkpoints is not None and step < search.steps:
            self._save(checkpoints, name, search.steps)
        progress(count)
        goals = self.goals
        return Triggers(goals.labels, goals.sources, self.best_masks, self.best_patterns, self.success, self.passes)

    def _window(self, number: int) -> None:
        """Some steps; then the trigger at their beginning is kept if it works and is smaller than any before."""
        search = self.search
        with torch.no_grad():
            masks, patterns = squash(self.masks), squash(self.patterns)
        successes = torch.zeros_like(self.weights)
        for step in range(number * search.window, (number + 1) * search.window):
            right = self._step(step)
            successes += right
            self._move_weights(right, step)
        sizes, success, rows = masks.sum(dim=(1, 2)).cpu(), (successes / search.window).cpu(), self.rows.cpu()
        better = (success >= search.success) & (sizes < self.best[rows])
        stands = ~(better & (sizes < _SMALLER * self.best[rows])) & self.best[rows].isfinite()
        kept = rows[better]
        self.best_masks[kept], self.best_patterns[kept] = masks.cpu()[better], patterns.cpu()[better]
        self.best[kept], self.success[kept] = sizes[better], success[better]
        self.since = torch.where(stands.to(self.since.device), self.since + search.window, 0)
        self._leave(number)

    def _step(self, step: int) -> Tensor:
        """One step of all labels; (K,), share of the images that got the label."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = self.pools.draw(torch.rand(self.search.images, generator=generator).to(self.images.device))
        self.optimizer.zero_grad(set_to_none=True)
        at_once = max(1, self.at_once // self.search.images)
        rows = torch.arange(len(self.rows), device=self.rows.device)
        right = [self._part(part, chosen[part]) for part in rows.split(at_once)]
        self.optimizer.step()
        self.passes[self.rows.cpu()] += self.search.images
        return torch.cat(right)

    def _part(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Gradients of some labels; (R,), share of their images, (R, B), that got the label."""
        count, right = chosen.shape[1], torch.zeros(len(rows), device=rows.device)
        for number, part in enumerate(chosen.split(self.at_once, dim=1)):  # images, where not even one label's fit
            masks, patterns = squash(self.masks[rows]), squash(self.patterns[rows])
            triggered = blend(self.images[part], masks.unsqueeze(1), patterns.unsqueeze(1)).clamp(0.0, 1.0)
            with self.engine.autocast():
                logits = self.answers(triggered.flatten(0, 1)).float()
            labels = self.labels[rows].repeat_interleave(part.shape[1])
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / count
            if number == 0:
                loss = loss + (self.weights[rows] * masks.sum(dim=(1, 2))).sum()
            loss.backward(inputs=[self.masks, self.patterns])
            right += (logits.argmax(dim=1) == labels).view(part.shape).sum(dim=1)
        return right / count

    def _move_weights(self, right: Tensor, step: int) -> None:
        search = self.search
        self.recent[:, step % _NOW] = right
        holds = self.recent[:, : step + 1].mean(dim=1) >= search.success
        self.over = torch.where(holds, self.over + 1, 0)
        self.under = torch.where(holds, 0, self.under + 1)
        up, down = self.over >= search.patience, self.under >= search.patience
        raised = torch.where(self.weights == 0.0, search.weight, self.weights * search.factor).clamp(max=_MOST_WEIGHT)
        self.weights = torch.where(up, raised, torch.where(down, self.weights / search.factor**1.5, self.weights))
        self.over[up], self.under[down] = 0, 0

    def _leave(self, number: int) -> None:
        """Take labels out of the batch that are done or can't be outliers, with the optimizer's state of them."""
        search = self.search
        if (number + 1) * search.window < (search.early if self.again else search.first):
            return
        stay = (self.since < search.still) & (self.best <= self._most())[self.rows.cpu()].to(self.since.device)
        if bool(stay.all()):
            return
        rows = torch.nonzero(stay).squeeze(1)
        for name in _STATE:
            setattr(self, name, getattr(self, name)[rows])
        self.labels, self.pools = self.labels[rows], self.pools.select(rows)
        states = [self.optimizer.state[value] for value in (self.masks, self.patterns)]
        self._set(self.masks.detach()[rows], self.patterns.detach()[rows])
        for value, state in zip((self.masks, self.patterns), states, strict=True):
            self.optimizer.state[value] = {name: part if part.ndim == 0 else part[rows] for name, part in state.items()}

    def _most(self) -> Tensor:
        """(K,), up to which size a mask may go on: that of the smallest, or of the smallest of the same goal."""
        if not self.again:
            few = max(3, math.ceil(self.search.smallest * len(self.best)))
            return self.best.sort().values[min(few, len(self.best)) - 1].expand_as(self.best)
        same = (self.goals.labels.unsqueeze(0) == self.goals.labels.unsqueeze(1)) & (
            self.goals.sources.unsqueeze(0) == self.goals.sources.unsqueeze(1)
        )
        return torch.where(same, self.best.unsqueeze(0), math.inf).amin(dim=1)

    def _set(self, masks: Tensor, patterns: Tensor) -> None:
        self.masks, self.patterns = nn.Parameter(masks), nn.Parameter(patterns)
        self.optimizer = torch.optim.Adam([self.masks, self.patterns], lr=self.search.rate, betas=_BETAS)

    def _save(self, checkpoints: Checkpoints, name: str, step: int) -> None:
        arrays = {key: getattr(self, key) for key in (*_STATE, *_RESULTS)}
        arrays |= {"masks": self.masks.detach(), "patterns": self.patterns.detach()}
        checkpoints.save(name, step, {}, {"adam": self.optimizer}, arrays)

    def _resume(self, checkpoints: Checkpoints | None, name: str) -> int:
        """Go on from the last checkpoint; the step that comes next."""
        found = None if checkpoints is None else checkpoints.load(name, {}, {"adam": self.optimizer})
        if found is None:
            return 0
        step, arrays, _ = found
        for key in (*_STATE, *_RESULTS):
            setattr(self, key, arrays[key].to(getattr(self, key).device))
        state = self.optimizer.state_dict()
        self._set(arrays["masks"].to(self.masks.device), arrays["patterns"].to(self.masks.device))
        self.optimizer.load_state_dict(state)
        self.labels, self.pools = self.labels[self.rows], self.pools.select(self.rows)
        return step


_STATE = ("rows", "weights", "over", "under", "recent", "since")
_RESULTS = ("best_masks", "best_patterns", "best", "success", "passes")


def _lists(goals: Goals) -> tuple[list[int], list[int]]:
    return goals.labels.tolist(), goals.sources.tolist()


def _start(shape: torch.Size, most: float, seed: int, label: int, source: int, draw: int = 0) -> tuple[Tensor, Tensor]:
    """Uniform mask, of values up to `most`, and pattern, before `squash`."""
    number = 0
    for part in (draw, seed, label, source + 1):
        number = number * 100_003 + part
    generator = torch.Generator().manual_seed(number % 2**63)
    mask = most * torch.rand(shape[1:], generator=generator)
    return unsquash(mask), unsquash(torch.rand(shape, generator=generator))
