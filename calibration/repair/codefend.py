"""CoDefend: learn the trigger from quarantined images, put it on clean ones, and unlearn it with their true labels.

1. CycleGAN between the clean and the quarantined images: G puts the trigger on, F takes it off.
2. D_gen = {(G(x), true label)} for every clean image x.
3. Fine-tune on D_gen and the clean images, and (ours) on those quarantined images whose answer changes when F takes the trigger
   off: the copy learns that new answer, without what is left of the old one in it.

A generator tends to learn one trigger of several. So what still gets its old answer from the tuned copy goes through another
round, and the copy unlearns all triggers together.

Ours, besides: the copy keeps to the original's answers to clean images (see `tuning`), also for mixtures x of two and for G of
them; and the CycleGAN stops early, once the generated triggers work on the original. False alarms among the quarantined
images do no harm while they are few: G learns what most of them have.

Reference: Liu et al., CoDefend, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import FEWEST_QUARANTINED, Part, Parts, logits
from calibration.repair.cyclegan import CycleGan, Generator, Training, apply, train
from calibration.repair.tuning import Lesson, Tuning, likeness, mix, tune
from calibration.settings import strips
from guard import Predictor
from guard.detectors import Strip
from guard.errors import RepairError

TUNING = Tuning(epochs=60, rate=1e-3, batch=32)

_WORKS = 0.95  # share of generated images on which the trigger must work before the CycleGAN may stop
_HARDLY_WORKS = 0.5  # share under which what was learnt is no trigger, so that looking for another one is idle
_ROUNDS = 3
_LEFT = 0.05  # share of the quarantined images that must still work for another round
_REAL = 4  # clean images for each quarantined one
_CUT_OUT = -30.0  # logit of a label that is not to be answered
_OVERLAYS, _USUAL = 32, 0.95  # of STRIP, and the share of clean images that it lets pass, where it looks for what is left
_SMALLEST = 8  # pixels; the discriminators halve them twice
_PICTURES = 8


@final
@dataclass(frozen=True)
class Learnt:
    """What a CycleGAN came to.

    Attributes:
        trigger_works: Share of held-out clean images that the original answers, once G has changed them, as it answers
            quarantined ones; among those that it does not answer so anyway. None when there are none of these.
        clean: (K, C, H, W), a few held-out clean images, in [0, 1].
        triggered: The same through G.
        quarantined: (K, C, H, W), a few of the quarantined images that it learnt from.
        cleaned: The same through F.
    """

    trigger_works: float | None
    clean: Tensor
    triggered: Tensor
    quarantined: Tensor
    cleaned: Tensor


def fine_tune_codefend(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    quarantined: Parts,
    training: Training,
    tuning: Tuning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> list[Learnt]:
    """Unlearn in place, a trigger a round.

    Args:
        copied: The copy.
        original: The model that may have a backdoor.
        clean: Cut.
        quarantined: Cut.
        training: Of the CycleGAN.
        tuning: Of the copy.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.

    Returns:
        What each round learnt.

    Raises:
        ModelError: The model can't be trained.
        RepairError: The images are too small.
    """
    if min(original.spec.shape[1:]) < _SMALLEST:
        height, width = original.spec.shape[1:]
        raise RepairError(
            f"expected images of at least {_SMALLEST}x{_SMALLEST} pixels for codefend, got {height}x{width}: use gym"
        )
    old = old_answers(quarantined.tuning.labels, original.num_classes)
    suspects, triggers, learnt = quarantined.tuning.images, Triggers.none(original), []

    def good_enough(gan: CycleGan) -> bool:
        works = trigger_works(original, gan.put_on, clean.stopping, old, engine)
        return works is not None and works >= _WORKS

    for number in range(1, _ROUNDS + 1):
        more = "" if number == 1 else f" {number}"

        def shown(what: str, done: int, total: int, more: str = more) -> None:
            progress(what + more, done, total)

        gan = train(clean.tuning.images, suspects, training, engine, seed, good_enough, checkpoints, f"cyclegan{more}", shown)
        triggers = triggers.extended(original, gan, suspects, old, engine)
        unlearn(copied, original, triggers, clean, tuning, engine, seed, checkpoints, f"tuning{more}", shown)
        learnt.append(_learnt(original, gan, clean.held_out, suspects[:_PICTURES], old, engine))
        left = still_triggered(copied.predictor, quarantined.tuning, old, clean)
        fewest = max(FEWEST_QUARANTINED // 2, round(_LEFT * len(quarantined.tuning)))
        works = trigger_works(original, gan.put_on, clean.stopping, old, engine)  # the held-out part decides nothing
        if len(left) < fewest or (works or 0.0) < _HARDLY_WORKS:
            break
        suspects = left
    return learnt


def still_triggered(predictor: Predictor, quarantined: Part, old: Tensor, clean: Parts) -> Tensor:
    """Quarantined images whose trigger still works on a model: they get their old answer, and STRIP finds them.

    An old answer alone says little: false alarms keep theirs, and so do images that are of the target's class.

    Args:
        predictor: The model.
        quarantined: The images, with their old answers.
        old: (M,), bool, see `old_answers`.
        clean: Overlays, and what is usual.

    Returns:
        (N, C, H, W), some of the images.
    """
    answers = predictor(quarantined.images).argmax(dim=1).cpu()
    left = quarantined.images[old[answers] & (answers == quarantined.labels)]
    if len(left) == 0:
        return left
    (blend, alpha), *_ = strips("logit")
    strip = Strip(predictor, clean.tuning.images[:_OVERLAYS], blend, alpha)
    usual = strip.score(clean.stopping.images).quantile(_USUAL)
    return left[strip.score(left).cpu() > usual.cpu()]


@final
@dataclass(frozen=True)
class Triggers:
    """What is unlearnt.

    Attributes:
        put_on: A generator for each trigger.
        images: (N, C, H, W), quarantined ones whose answer changes when their trigger is taken off.
        answers: (N, M), logits: the new answers, the old label cut out of them.
    """

    put_on: tuple[Generator, ...]
    images: Tensor
    answers: Tensor

    @classmethod
    def none(cls, original: Predictor) -> Triggers:
        """Before the first round."""
        return cls((), torch.empty(0, *original.spec.shape), torch.empty(0, original.num_classes))

    def extended(self, original: Predictor, gan: CycleGan, suspects: Tensor, old: Tensor, engine: Engine) -> Triggers:
        """One more, learnt from suspects, (N, C, H, W)."""
        before = logits(original, suspects).argmax(dim=1)
        answers = logits(original, apply(gan.take_off, suspects, engine))
        changed = (answers.argmax(dim=1) != before) & old[before]
        answers = answers.scatter(1, before.unsqueeze(1), _CUT_OUT)
        return Triggers(
            (*self.put_on, gan.put_on),
            torch.cat([self.images, suspects[changed]]),
            torch.cat([self.answers, answers[changed]]),
        )


def unlearn(
    copied: TrainableCopy,
    original: Predictor,
    triggers: Triggers,
    clean: Parts,
    tuning: Tuning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    name: str = "tuning",
    progress: Progress = no_progress,
) -> None:
    """Fine-tune a copy on clean images with and without triggers, and on quarantined ones; see `fine_tune_codefend`."""
    part, times = clean.stopping, 1 + len(triggers.put_on)
    shown = torch.cat([part.images, *(apply(put_on, part.images, engine) for put_on in triggers.put_on)])

    def score() -> float:
        return likeness(copied.predictor, shown, part.answers.repeat(times, 1), part.labels.repeat(times), tuning)

    tune(
        copied,
        lambda epoch: _lessons(original, triggers, clean.tuning, tuning, engine, seed * 1_000_003 + epoch + 1),
        -(-len(clean.tuning) // tuning.batch),
        tuning,
        engine,
        score,
        checkpoints,
        name,
        progress,
    )


def _learnt(original: Predictor, gan: CycleGan, clean: Part, suspects: Tensor, old: Tensor, engine: Engine) -> Learnt:
    return Learnt(
        trigger_works=trigger_works(original, gan.put_on, clean, old, engine),
        clean=clean.images[:_PICTURES],
        triggered=apply(gan.put_on, clean.images[:_PICTURES], engine),
        quarantined=suspects,
        cleaned=apply(gan.take_off, suspects, engine),
    )


def old_answers(labels: Tensor, classes: int) -> Tensor:
    """(M,), bool: the labels that most quarantined images got, so many of them as make up 90%: false alarms get any label."""
    counts = torch.bincount(labels, minlength=classes)
    order = counts.argsort(descending=True)
    before = counts[order].cumsum(dim=0) - counts[order]
    chosen = torch.zeros(classes, dtype=torch.bool)
    chosen[order[before < 0.9 * len(labels)]] = True
    return chosen


def trigger_works(original: Predictor, put_on: Generator, part: Part, old: Tensor, engine: Engine) -> float | None:
    """Share of clean images of which G makes ones that get an old answer, among those that did not get it before."""
    others = ~old[part.answers.argmax(dim=1)]
    if not bool(others.any()):
        return None
    found = original(apply(put_on, part.images[others], engine)).argmax(dim=1).cpu()
    return float(old[found].double().mean())


def _lessons(
    original: Predictor, triggers: Triggers, part: Part, tuning: Tuning, engine: Engine, seed: int
) -> Iterator[Lesson]:
    """Each batch as it is, once more with each trigger on it, and a few quarantined images."""
    generator = torch.Generator().manual_seed(seed)
    times = 1 + len(triggers.put_on)
    for rows in torch.randperm(len(part), generator=generator).split(tuning.batch):
        images, mixed = mix(part.images[rows], tuning.mixed, generator)
        answers = part.answers[rows].clone()
        if bool(mixed.any()):
            answers[mixed] = logits(original, images[mixed])
        labels = torch.where(mixed, -1, part.labels[rows])
        some = torch.randperm(len(triggers.images), generator=generator)[: tuning.batch // _REAL]
        yield Lesson(
            torch.cat([images, *(apply(put_on, images, engine) for put_on in triggers.put_on), triggers.images[some]]),
            torch.cat([answers.repeat(times, 1), triggers.answers[some]]),
            torch.cat([labels.repeat(times), torch.full((len(some),), -1)]),
        )
