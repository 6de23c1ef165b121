"""Unlearning: fine-tune on clean images of which some carry a recovered trigger and keep their true labels.

Neural Cleanse tunes for one epoch on 10% of the training images and puts the trigger on 20% of these. Ours has fewer images and
goes over them more often, keeps to the original's answers to clean images (see `tuning`), and shows each batch both ways: as it
is, and with a trigger on it, drawn from all that were recovered.

A recovered trigger is not the attacker's, only near it, and a copy that learnt to ignore it may still obey the other. So (ours)
it is unlearnt in turns, as in adversarial training: after a few epochs the trigger grows a little and is strengthened against
the copy, and what works there is unlearnt together with it, until next to nothing works any more.

A backdoor may have several triggers for one label, of which a search finds one. So after that the copy is searched again for
the labels that were infected, and what is found there is unlearnt, too.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.strengthening import strengthen
from calibration.inspection.triggers import Triggers, blend
from calibration.repair.cases import Part, Parts, logits
from calibration.repair.tuning import Lesson, Tuning, likeness, mix, tune
from guard import Predictor

TUNING = Tuning(epochs=5, rate=1e-3, batch=32)
"""Of one turn."""

ROUNDS, TURNS = 3, 4
_OBEYED = 0.1  # of the images: a trigger that works on fewer is not worth another turn
_GROWN = 0.3  # of a mask's values, around it

Search = Callable[[TrainableCopy, Triggers, int], Triggers]
"""Looks for triggers of a copy: the copy, those that were found before, and the round; returns those that still stand out."""


def repair_by_unlearning(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    triggers: Triggers,
    tuning: Tuning,
    engine: Engine,
    seed: int,
    again: Search | None = None,
    rounds: int = ROUNDS,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Triggers:
    """Unlearn in place.

    Args:
        copied: The copy.
        original: Answers clean images.
        clean: Cut.
        triggers: Of the infected labels, at least one.
        tuning: How.
        engine: Where.
        seed: Of what is drawn.
        again: Finds what is left after a round; None for a single round.
        rounds: At most.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.

    Returns:
        The triggers, and those that later rounds found.

    Raises:
        ModelError: The model can't be trained.
    """
    found, learnt = triggers, triggers
    for number in range(1, rounds + 1):
        learnt = _in_turns(copied, original, clean, found, learnt, tuning, engine, seed, number, checkpoints, progress)
        if again is None or number == rounds:
            break
        left = again(copied, found, number)
        if len(left) == 0:
            break
        found, learnt = (Triggers.together([some, left]) for some in (found, learnt))
    return found


def _in_turns(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    found: Triggers,
    learnt: Triggers,
    tuning: Tuning,
    engine: Engine,
    seed: int,
    number: int,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> Triggers:
    """Unlearn until triggers like those that were found don't work any more; all that were unlearnt."""
    for turn in range(1, TURNS + 1):
        when = f"turn {turn}" if number == 1 else f"round {number}, turn {turn}"

        def shown(what: str, done: int, total: int, when: str = when) -> None:
            progress(f"{what}, {when}", done, total)

        draws, name = seed + turn - 1, f"unlearning-{number}-{turn}"
        unlearn_triggers(copied, original, clean, learnt, tuning, engine, draws, checkpoints, name, shown)
        if turn == TURNS:
            break
        harder = strengthen(copied.answers(), clean.tuning.images, _grown(found), seed + turn, engine)
        rows = torch.nonzero(harder.success >= _OBEYED).flatten()
        if len(rows) == 0:
            break
        learnt = Triggers.together([learnt, harder.select(rows)])
    return learnt


def _grown(triggers: Triggers) -> Triggers:
    """With a thin margin of a pixel around each mask, so that it may spread."""
    around = nn.functional.max_pool2d(triggers.masks.unsqueeze(1), 3, 1, 1).squeeze(1)
    return replace(triggers, masks=torch.maximum(triggers.masks, _GROWN * around))


def unlearn_triggers(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    triggers: Triggers,
    tuning: Tuning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    name: str = "unlearning",
    progress: Progress = no_progress,
) -> None:
    """One turn; see `repair_by_unlearning`."""
    part, times = clean.stopping, 1 + len(triggers)
    shown = torch.cat([part.images, *(triggers.put_on(row, part.images) for row in range(len(triggers)))])

    def score() -> float:
        return likeness(copied.predictor, shown, part.answers.repeat(times, 1), part.labels.repeat(times), tuning)

    tune(
        copied,
        lambda epoch: _lessons(original, triggers, clean.tuning, tuning, seed * 1_000_003 + epoch + 1),
        -(-len(clean.tuning) // tuning.batch),
        tuning,
        engine,
        score,
        checkpoints,
        name,
        progress,
    )


def put_drawn(triggers: Triggers, images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image, (B, C, H, W), with one of the triggers on it."""
    rows = torch.randint(len(triggers), (len(images),), generator=generator)
    return blend(images, triggers.masks[rows], triggers.patterns[rows])


def _lessons(original: Predictor, triggers: Triggers, part: Part, tuning: Tuning, seed: int) -> Iterator[Lesson]:
    """Each batch as it is, and once more with triggers on it."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(len(part), generator=generator).split(tuning.batch):
        images, mixed = mix(part.images[rows], tuning.mixed, generator)
        answers = part.answers[rows].clone()
        if bool(mixed.any()):
            answers[mixed] = logits(original, images[mixed])
        labels = torch.where(mixed, -1, part.labels[rows])
        yield Lesson(torch.cat([images, put_drawn(triggers, images, generator)]), answers.repeat(2, 1), labels.repeat(2))
