"""Patches: for each label the best square of a few pixels, from places all over the image.

The search for a small mask finds triggers of which a part will do. One that must be there nearly whole, as TrojanNN's square of
neurons' favourite pixels, has no small mask: what the mask shrinks to is a faint pattern over much of the image, as for any
other label. So (ours) this search turns the question round. Every label gets the same few pixels, opaque and in one place, and
it is asked how often the best such patch works. In a clean model the best ones move some images; a backdoor's moves nearly all.

Places lie half a patch's side apart. All are tried with a few steps of a few images, and the best go on.

Blind to: triggers between these places of which 9/16 don't do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import Answers
from calibration.inspection.passes import images_at_once, says
from calibration.inspection.pools import Pools
from calibration.inspection.triggers import Goals, Triggers, squash, unsquash

_BETAS = (0.5, 0.9)
_SMALLEST = 2  # pixels
_BETWEEN, _WORTH = 3.0, 20.0  # seconds from one checkpoint to the next, and at least so many times what one takes


class PatchSearch(msgspec.Struct, frozen=True, kw_only=True):
    """How a patch is looked for.

    Attributes:
        share: Side of the patch, over the image's shorter one; in whole pixels, two at least. Places lie half of that apart.
        rate: Adam's.
        steps: At every place.
        images: That each of these sees.
        kept: So many places, where the patch works best, go on.
        further_steps: These get.
        further_images: That each of these sees.
    """

    share: float = 1.0 / 8.0
    rate: float = 0.3
    steps: int = 8
    images: int = 2
    kept: int = 4
    further_steps: int = 60
    further_images: int = 12

    def side(self, height: int, width: int) -> int:
        """Of the patch, in pixels."""
        return max(_SMALLEST, round(self.share * min(height, width)))


@final
@dataclass(frozen=True)
class _Patches:
    """Patches of some labels at some places, R in all.

    Attributes:
        rows: (R,), int64: of the goals.
        tops: (R,), int64: their first row of pixels.
        lefts: (R,), int64: their first column.
        free: (R, C, S, S): their pixels, before `squash`.
    """

    rows: Tensor
    tops: Tensor
    lefts: Tensor
    free: Tensor

    def select(self, rows: Tensor) -> _Patches:
        return _Patches(self.rows[rows], self.tops[rows], self.lefts[rows], self.free[rows])

    def on_canvas(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Masks (R, 1, H, W), bool, and patterns (R, C, H, W) in [0, 1]."""
        count, channels, side, _ = self.free.shape
        reach = torch.arange(side, device=self.free.device)
        where = (
            torch.arange(count, device=self.free.device)[:, None, None],
            (self.tops[:, None] + reach)[:, :, None],
            (self.lefts[:, None] + reach)[:, None, :],
        )
        masks = torch.zeros(count, height, width, dtype=torch.bool, device=self.free.device)
        masks[where] = True
        patterns = self.free.new_zeros(count, height, width, channels)
        patterns = patterns.index_put(where, squash(self.free).permute(0, 2, 3, 1))
        return masks.unsqueeze(1), patterns.permute(0, 3, 1, 2)


def recover_patches(
    answers: Answers | nn.Module,
    images: Tensor,
    goals: Goals,
    search: PatchSearch,
    seed: int,
    engine: Engine,
    checkpoints: Checkpoints | None = None,
    name: str = "patches",
    progress: Progress = no_progress,
) -> Triggers:
    """Find the patch that works best for each goal.

    Args:
        answers: See `recover_triggers`.
        images: (N, C, H, W), in [0, 1], clean.
        goals: Which.
        search: How.
        seed: Of the draws; what is found for a goal does not depend on which others there are.
        engine: Where.
        checkpoints: Written now and then, and gone on from.
        name: Of the checkpoints.
        progress: Told how far it is, in goals.

    Returns:
        Triggers whose masks are 1 in a square and 0 elsewhere; their success is of the last half of the steps.

    Raises:
        CalibrationError: There is no image to send somewhere.
        ModelError: The model has no gradients.
    """
    images = images.to(engine.device)
    at_once = images_at_once(answers, images, engine)
    own = says(answers, images, engine.device)
    order = own.argsort(stable=True)
    work = _Work(answers, images[order], Pools.of(own[order].to(engine.device), goals), goals, search, seed, engine, at_once)
    return work.run(checkpoints, name, progress)


@final
@dataclass(frozen=True)
class _Work:
    answers: nn.Module
    images: Tensor
    pools: Pools
    goals: Goals
    search: PatchSearch
    seed: int
    engine: Engine
    at_once: int

    def run(self, checkpoints: Checkpoints | None, name: str, progress: Progress) -> Triggers:
        """Goals one after the other, as many together as fit into a forward pass."""
        count, (channels, height, width) = len(self.goals), self.images.shape[1:]
        places = self._places()
        together = max(1, self.at_once // (len(places) * self.search.images))
        masks, patterns = torch.zeros(count, height, width), torch.zeros(count, channels, height, width)
        success = torch.zeros(count)
        done = 0
        if checkpoints is not None:
            checkpoints = checkpoints.within(name, self.goals.labels.tolist())  # which earlier verdicts have chosen
        found = None if checkpoints is None else checkpoints.load(name)
        if found is not None:
            done, arrays, _ = found
            masks[:done], patterns[:done], success[:done] = (arrays[key] for key in ("masks", "patterns", "success"))
        saved, took = time.monotonic(), 0.0
        while done < count:
            part = slice(done, min(done + together, count))
            masks[part], patterns[part], success[part] = self._best(torch.arange(count)[part], places)
            done = part.stop
            progress("looking for patches", done, count)
            now = time.monotonic()
            if checkpoints is not None and (done == count or now - saved > max(_BETWEEN, _WORTH * took)):
                arrays = {"masks": masks[:done], "patterns": patterns[:done], "success": success[:done]}
                checkpoints.save(name, done, arrays=arrays)
                saved = time.monotonic()
                took = saved - now
        passes = self._passes(len(places))
        return Triggers(self.goals.labels, self.goals.sources, masks, patterns, success, torch.full((count,), passes))

    def _passes(self, places: int) -> int:
        """Of a goal."""
        search = self.search
        kept = min(search.kept, places)
        return places * search.steps * search.images + kept * search.further_steps * search.further_images

    def _places(self) -> Tensor:
        """(P, 2), int64, on the processor: tops and lefts, half a patch's side apart, the image's edges among them."""
        height, width = self.images.shape[2:]
        side = self.search.side(height, width)
        tops, lefts = (sorted({*range(0, size - side + 1, side // 2), size - side}) for size in (height, width))
        return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts))

    def _best(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some goals: masks (L, H, W), patterns (L, C, H, W), and their success (L,)."""
        search, where, (height, width) = self.search, self.engine.device, self.images.shape[2:]
        each = places.repeat(len(rows), 1).to(where)
        start = torch.cat([self._start(int(row), len(places)) for row in rows]).to(where)
        patches = _Patches(rows.repeat_interleave(len(places)).to(where), each[:, 0], each[:, 1], start)
        patches, success = self._fit(patches, search.steps, search.images, 0)
        best = _best_of_each(success, len(rows), min(search.kept, len(places)))
        patches, success = self._fit(patches.select(best), search.further_steps, search.further_images, 1)
        best = _best_of_each(success, len(rows), 1)
        with torch.no_grad():
            masks, patterns = patches.select(best).on_canvas(height, width)
        return masks.squeeze(1).float().cpu(), patterns.cpu(), success[best].cpu()

    def _start(self, row: int, places: int) -> Tensor:
        """(P, C, S, S): uniform pixels, before `squash`."""
        channels, height, width = self.images.shape[1:]
        side, label, source = self.search.side(height, width), int(self.goals.labels[row]), int(self.goals.sources[row])
        generator = torch.Generator().manual_seed(((self.seed * 100_003 + label) * 100_003 + source + 1) % 2**63)
        return unsquash(torch.rand(places, channels, side, side, generator=generator))

    def _fit(self, patches: _Patches, steps: int, images: int, stage: int) -> tuple[_Patches, Tensor]:
        """Some steps of all patches; (R,), how often each worked in the last half of them."""
        free = nn.Parameter(patches.free)
        patches = _Patches(patches.rows, patches.tops, patches.lefts, free)
        optimizer = torch.optim.Adam([free], lr=self.search.rate, betas=_BETAS)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + stage)
        works = torch.zeros(len(free), device=free.device)
        for step in range(steps):
            chosen = self.pools.draw(torch.rand(images, generator=generator).to(free.device))
            optimizer.zero_grad(set_to_none=True)
            for part in torch.arange(len(free), device=free.device).split(max(1, self.at_once // images)):
                right = self._part(patches, part, free, chosen)
                if step >= steps // 2:
                    works[part] += right
            optimizer.step()
        return _Patches(patches.rows, patches.tops, patches.lefts, free.detach()), works / (steps - steps // 2)

    def _part(self, patches: _Patches, part: Tensor, free: nn.Parameter, chosen: Tensor) -> Tensor:
        """Gradients of some patches, (Q,); (Q,), share of their images that got the label."""
        height, width = self.images.shape[2:]
        rows, right = chosen[patches.rows[part]], torch.zeros(len(part), device=free.device)
        labels = self.goals.labels.to(free.device)[patches.rows[part]]
        for few in rows.split(self.at_once, dim=1):  # images, where not even one patch's fit
            masks, patterns = patches.select(part).on_canvas(height, width)
            triggered = torch.where(masks.unsqueeze(1), patterns.unsqueeze(1), self.images[few])
            wanted = labels.repeat_interleave(few.shape[1])
            with self.engine.autocast():
                logits = self.answers(triggered.flatten(0, 1)).float()
            (nn.functional.cross_entropy(logits, wanted, reduction="sum") / rows.shape[1]).backward(inputs=[free])
            right += (logits.detach().argmax(dim=1) == wanted).view(few.shape).sum(dim=1)
        return right / rows.shape[1]


def _best_of_each(success: Tensor, goals: int, kept: int) -> Tensor:
    """(goals * kept,), int64: of each goal's patches, (goals * P,), those that work best."""
    best = success.view(goals, -1).topk(kept, dim=1).indices
    first = torch.arange(goals, device=success.device).unsqueeze(1) * (len(success) // goals)
    return (first + best).flatten()
