"""Triggers of infected labels, made to work nearly always (ours): a search keeps the smallest that works on 99% of what it saw.

So the trigger is a little too weak for other images. Some more steps from there, with a small weight on the mask that does not
move, add a pixel or two and bring its success to 99% on images that were not seen. Verdicts, and the sizes that they compare,
are of the smaller one; repairs and filters work by the stronger.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import Answers
from calibration.inspection.passes import images_at_once, says
from calibration.inspection.triggers import Triggers, blend, squash, unsquash

_STEPS, _IMAGES = 128, 32
_RATE, _BETAS = 0.05, (0.9, 0.99)
_WEIGHT = 0.01
_INSIDE = 1e-3  # of mask and pattern: further out there is hardly a gradient


def strengthen(
    answers: Answers | nn.Module,
    images: Tensor,
    triggers: Triggers,
    seed: int,
    engine: Engine,
    progress: Progress = no_progress,
) -> Triggers:
    """The triggers, stronger; a trigger that does not get stronger stays as it is, but for the passes.

    Args:
        answers: See `recover_triggers`.
        images: (N, C, H, W), in [0, 1]: what the search saw.
        triggers: That it found.
        seed: Of the draws.
        engine: Where.
        progress: Told how far it is, in triggers.
    """
    at_once = min(_IMAGES, images_at_once(answers, images[:1].to(engine.device), engine))
    own = says(answers, images, engine.device)
    found = []
    for row in range(len(triggers)):
        one, label, source = triggers.select([row]), int(triggers.labels[row]), int(triggers.sources[row])
        others = images[(own != label) & ((own == source) if source >= 0 else (own >= 0))]
        found.append(_one(answers, others, one, seed, engine, at_once) if len(others) else one)
        progress("strengthening triggers", row + 1, len(triggers))
    return Triggers.together(found) if found else triggers


def _one(answers: nn.Module, others: Tensor, found: Triggers, seed: int, engine: Engine, at_once: int) -> Triggers:
    label, generator = int(found.labels[0]), torch.Generator().manual_seed(seed)
    mask, pattern = (
        nn.Parameter(unsquash(part[0].float().clamp(_INSIDE, 1.0 - _INSIDE)).to(engine.device))
        for part in (found.masks, found.patterns)
    )
    optimizer = torch.optim.Adam([mask, pattern], lr=_RATE, betas=_BETAS)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    for _ in range(_STEPS):
        optimizer.zero_grad(set_to_none=True)
        for part in others[torch.randint(len(others), (_IMAGES,), generator=generator)].split(at_once):
            triggered = blend(part.to(engine.device), squash(mask), squash(pattern)).clamp(0.0, 1.0)
            with engine.autocast():
                logits = answers(triggered).float()
            wanted = torch.full((len(part),), label, device=engine.device)
            loss = nn.functional.cross_entropy(logits, wanted, reduction="sum") + _WEIGHT * squash(mask).sum() * len(part)
            (loss / _IMAGES).backward(inputs=[mask, pattern])
        optimizer.step()
        falling.step()
    with torch.no_grad():
        stronger = replace(found, masks=squash(mask).cpu().unsqueeze(0), patterns=squash(pattern).cpu().unsqueeze(0))
    before, after = (_success(answers, others, item, engine) for item in (found, stronger))
    chosen = stronger if after > before else found
    return replace(chosen, success=torch.full((1,), max(before, after)), passes=found.passes + _STEPS * _IMAGES)


def _success(answers: nn.Module, others: Tensor, one: Triggers, engine: Engine) -> float:
    return float((says(answers, one.put_on(0, others), engine.device) == one.labels[0]).double().mean())
