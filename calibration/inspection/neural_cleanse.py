"""Neural Cleanse: the smallest trigger that sends clean images to a label, for all labels as one batched problem.

    minimise  CE(f((1 - m) x + m d), t) + w |m|_1     over the mask m in [0, 1]^(H, W) and the pattern d in [0, 1]^(C, H, W)

For a backdoor's target a small mask will do, because the model has a shortcut there. The weight w of each label moves up while
its trigger works on 99% of the images, and down while it does not, so that the mask shrinks as far as it can.

Images that get the label anyway don't count (ours): they say nothing of a trigger.

The labels don't interact: they share forward passes, not a loss, and what is found for a label is what it would be alone. So
(ours) a label leaves the batch, after the first steps, once its mask has stopped shrinking, and unless its mask is among the
smallest: only these can be outliers, and the sizes of the others, which say what is usual, hardly change any more. That is the
low-cost mode of the paper, at work in every scan.

Where a search ends depends on where it began: from one draw the mask of a backdoor's target may end twice as large as from
another, and look like any other label's. So (ours) the smallest are searched again from other draws, and the smallest counts.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019; rate, weights and patience are those of its public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import Answers
from calibration.inspection.block import Block, Work
from calibration.inspection.passes import images_at_once
from calibration.inspection.pools import Pools
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers

_COPIES = 12  # of mask and pattern that a label needs at work: Adam's, gradients, the window's, the best
_PER_LABEL = 1 << 30  # bytes for these


def recover_triggers(
    answers: Answers | nn.Module,
    images: Tensor,
    goals: Goals,
    search: Search,
    seed: int,
    engine: Engine,
    checkpoints: Checkpoints | None = None,
    name: str = "search",
    progress: Progress = no_progress,
    doubtful: Sequence[int] = (),
) -> Triggers:
    """Find a small trigger for each goal.

    Args:
        answers: The model, differentiable and on the engine's device: images (B, C, H, W) in [0, 1] to logits (B, M).
        images: (N, C, H, W), in [0, 1], clean.
        goals: Which.
        search: How.
        seed: Of the draws; a label's start does not depend on which others there are.
        engine: Where.
        checkpoints: Written now and then, and gone on from.
        name: Of the checkpoints.
        progress: Told how far it is, in labels.
        doubtful: Rows of goals that are searched again, whatever their size.

    Raises:
        CalibrationError: There is no image to send somewhere.
        ModelError: The model has no gradients.
    """
    images = images.to(engine.device)
    at_once = images_at_once(answers, images, engine)
    with torch.no_grad():
        own = torch.cat([answers(part).argmax(dim=1) for part in images.split(at_once)]).clone()
    order = own.argsort(stable=True)
    work = Work(answers, images[order], own[order], search, seed, engine, at_once, checkpoints, progress)
    found = _in_blocks(work, goals, [0] * len(goals), name, "looking for triggers")
    rows = sorted({*doubtful, *found.sizes.argsort()[: search.again].tolist()})
    if not search.draws or not rows:
        return found
    repeated = torch.tensor(rows).repeat_interleave(search.draws)
    draws = list(range(1, 1 + search.draws)) * len(rows)
    others = _in_blocks(work, goals.select(repeated), draws, f"{name}-again", "looking again")
    return _smallest(found, others, repeated)


def _in_blocks(work: Work, goals: Goals, draws: Sequence[int], name: str, what: str) -> Triggers:
    """One trigger for each goal, from that draw, in as many blocks as memory asks for.

    Of several draws for the same goal only the best goes on after a while.
    """
    pools, (channels, height, width) = Pools.of(work.own, goals), work.images.shape[1:]
    count, size = len(goals), max(8, _PER_LABEL // (4 * _COPIES * (channels + 1) * height * width))
    found = []
    for number, first in enumerate(range(0, count, size)):
        part = slice(first, first + size)
        block = Block(work, goals.select(part), pools.select(part), draws[part])

        def shown(done: int, first: int = first) -> None:
            work.progress(what, first + done, count)

        found.append(block.run(work.checkpoints, f"{name}-{number}", shown))
    return Triggers.together(found)


def _smallest(found: Triggers, others: Triggers, rows: Tensor) -> Triggers:
    """Of what was found for the same goal the smallest, with the passes of all.

    Args:
        found: K triggers.
        others: R triggers, for some of their goals again.
        rows: (R,), int64: which goals those are.
    """
    everything = Triggers.together([found, others])
    sizes = everything.sizes
    goals, best = torch.cat([torch.arange(len(found)), rows]), torch.arange(len(found))
    for row in range(len(found), len(everything)):
        if sizes[row] < sizes[best[goals[row]]]:
            best[goals[row]] = row
    return replace(everything.select(best), passes=torch.zeros_like(found.passes).index_add(0, goals, everything.passes))
