"""Is a repaired model to be believed? What is asked of it after any method, with images that the repair did not learn from.

1. *Rescan*: is any label still infected? Where what the repair did not learn from is too little for a scan, all images.
2. *Recovered triggers*: do those that a scan found in the original still work, once, pasted four times and nine times?
3. *Red team*: a trigger that we know is planted in a copy of the original, the same repair is applied to that copy, and what is
   left of the trigger is counted. It says what the method does about a trigger, not about the attacker's.

A model that was tuned for a preprocessor is asked through it; it is not scanned, since a scan looks at the bare model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from calibration.attacks import Attack
from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress
from calibration.engine import Engine
from calibration.fine_tuning import weights_sha256
from calibration.inspection.scan import FEWEST_IMAGES, ScanSettings, scan
from calibration.inspection.triggers import Triggers
from calibration.planting import draw_plants, plant_trigger
from calibration.repair.cases import Part, Parts
from calibration.repair.record import Verification
from calibration.repair.recovered import most, successes_on
from guard import Predictor
from guard.preprocessors import Preprocessor, answer_through

LEFT = 0.1
"""Share of images that a recovered trigger may still send to its label."""

_AT_ONCE = 256


@final
@dataclass(frozen=True)
class Candidate:
    """A repaired model.

    Attributes:
        predictor: It.
        preprocessor: That it was tuned for.
    """

    predictor: Predictor
    preprocessor: Preprocessor | None


Repair = Callable[[Predictor, Tensor, Tensor], Candidate]
"""The repair that is verified, of another model: it, images that a guard would have rejected, and their true labels."""


def verify(
    candidate: Candidate,
    triggers: Triggers | None,
    clean: Parts,
    settings: ScanSettings,
    engine: Engine,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> Verification:
    """Ask a repaired model; the red team is asked apart, see `red_team`.

    Args:
        candidate: The repaired model.
        triggers: That a scan found in the original; None if it found none.
        clean: Cut as for the repair.
        settings: Of the rescan.
        engine: Where.
        progress: Told how far it is.
        checkpoints: Of this repair; None for a scan that starts anew.
    """
    infected = None
    if candidate.preprocessor is None:

        def shown(what: str, done: int, total: int) -> None:
            progress(f"verifying: {what}", done, total)

        own = None if checkpoints is None else checkpoints.within("rescan", weights_sha256(candidate.predictor))
        found = scan(candidate.predictor, _unseen(clean), settings, engine=engine, checkpoints=own, progress=shown)
        infected = tuple(item.label_index for item in found.figures.labels if item.infected)
    recovered = None
    if triggers is not None:
        generator = torch.Generator().manual_seed(settings.seed)
        once, four, nine = (_still_works(candidate, pasted(triggers, side), clean, generator) for side in (1, 2, 3))
        recovered = None if once is None or four is None or nine is None else (once, four, nine)
    return Verification(rescan_infected=infected, recovered_success=recovered)


def _unseen(clean: Parts) -> ImageSet:
    parts = [clean.held_out, clean.stopping]
    if sum(map(len, parts)) < FEWEST_IMAGES:
        parts.append(clean.tuning)
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def red_team(original: Predictor, clean: Parts, repair: Repair, seed: int, progress: Progress) -> tuple[str, float, float]:
    """What the same repair makes of a trigger that we planted: its name, ASR before and after, on held-out images.

    Args:
        original: The model.
        clean: Cut as for the repair.
        repair: The same method.
        seed: Of all draws.
        progress: Told how far it is.

    Raises:
        CalibrationError: The images are too small for a trigger.
        GuardError: The repair failed.
    """
    generator = torch.Generator().manual_seed(seed)
    plants = [item for item in draw_plants(original.spec.shape, original.num_classes, generator) if item.say == "decides"]
    plant = plants[int(torch.randint(len(plants), (1,), generator=generator))]
    progress("red team: planting a trigger", 0, 1)
    planted = plant_trigger(original, plant.attack, clean.tuning.images, clean.tuning.labels, generator)
    progress("red team: planting a trigger", 1, 1)
    wanted = plant.attack.targets(clean.tuning.images, clean.tuning.labels) >= 0
    caught = plant.attack.trigger(clean.tuning.images[wanted])
    repaired = repair(planted, caught, clean.tuning.labels[wanted])
    before = _attack_success(Candidate(planted, None), plant.attack, clean.held_out, generator)
    return plant.name, before, _attack_success(repaired, plant.attack, clean.held_out, generator)


def pasted(triggers: Triggers, side: int) -> Triggers:
    """The same triggers, there `side` times in each direction, evenly, where they were and round the edges.

    Of several copies on one pixel the one counts whose mask is larger there.
    """
    height, width = triggers.masks.shape[1:]
    shifts = [(row * height // side, column * width // side) for row in range(side) for column in range(side)]
    masks, which = torch.stack([triggers.masks.roll(shift, (1, 2)) for shift in shifts]).max(dim=0)
    patterns = torch.stack([triggers.patterns.roll(shift, (2, 3)) for shift in shifts])
    chosen = which.unsqueeze(1).expand(triggers.patterns.shape).unsqueeze(0)
    return replace(triggers, masks=masks, patterns=patterns.gather(0, chosen).squeeze(0))


def _still_works(candidate: Candidate, triggers: Triggers, clean: Parts, generator: torch.Generator) -> float | None:
    """The most that one of them does on held-out images; on all, where none of these can tell of one."""

    def success(parts: Sequence[Part]) -> tuple[float | None, ...]:
        return successes_on(
            lambda images: answer_through(candidate.predictor, candidate.preprocessor, images, generator),
            triggers,
            torch.cat([part.images for part in parts]),
            torch.cat([part.answers for part in parts]).argmax(dim=1),
        )

    found = success([clean.held_out])
    if None in found:
        everywhere = success([clean.held_out, clean.stopping, clean.tuning])
        found = tuple(other if own is None else own for own, other in zip(found, everywhere, strict=True))
    return None if None in found else most(found)


def _attack_success(candidate: Candidate, attack: Attack, part: Part, generator: torch.Generator) -> float:
    wanted = attack.targets(part.images, part.labels)
    rows = wanted >= 0
    got = _answers(candidate, attack.trigger(part.images[rows]), generator)
    return float((got == wanted[rows]).double().mean()) if bool(rows.any()) else 0.0


def _answers(candidate: Candidate, images: Tensor, generator: torch.Generator) -> Tensor:
    """(N,), int64."""
    parts = [
        answer_through(candidate.predictor, candidate.preprocessor, part, generator).argmax(dim=1).cpu()
        for part in images.split(_AT_ONCE)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
