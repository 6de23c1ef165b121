"""Erasing backdoors without any data, on drawings (ours, after DHBE).

DHBE's generator of samples seeks where copy and original differ. On a processor's budget the copy runs after it in circles, and
loses its accuracy on the way. Drawings (`drawings`) are samples that stay as they are: the copy learns to answer them like the
original, which it does from the start, so that accuracy holds.

DHBE's generator of patches puts each batch's at one random place, and has to be lucky to hit on that of a trigger that works
nowhere else. Ours (`patches`) look everywhere, for every label, and in two models: in the original, whose backdoor stays to be
found, and in the copy, for what is left. Where the original stands out, the copy's are tried as well, however little they do
there: a backdoor answers to more patterns than one search finds, and comes back by those. `drawn_loss` says what the copy is
asked for.

References: Yan et al., DHBE, arXiv:2306.08009; Baradad et al., arXiv:2106.05963.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Self, final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import Answers, TrainableCopy
from calibration.frozen import frozen
from calibration.repair.dhbe_game import DhbeOutcome
from calibration.repair.dhbe_settings import ALIKE, check_counts, check_size
from calibration.repair.drawings import Drawings
from calibration.repair.drawn_loss import Batch, Loss, patched_answers
from calibration.repair.epochs import check_gradients, play_epochs, share_of_rates
from calibration.repair.patches import Pasted, Patches, exchange
from guard import InputSpec, Predictor
from guard.errors import GuardError, ModelError, RepairError, one_line

SEARCHING = "looking for patches"
_FRESH, _SHOWN = 1024, 16
_LAST = 1_000_002  # draws, after those of all epochs
_FALLS, _FALL = (0.6, 0.8), 0.1  # DHBE's: shares of the training after which the rate falls, and to which share
_SORE = 0.5  # of the most that patches raise any label by: of a label over it, drawings may hold a trigger by chance
_SUSPECT = 0.25  # of the same: patches of a label over it are to be overlooked; several backdoors need not be equally strong
_CANVAS_RATE, _FOCUS = 0.1, 0.7
_SIDES, _FEWEST = (3.0 / 32.0, 1.0 / 4.0), (2, 3)  # smallest and largest patches: shares of an image's side, and pixels
_MORE = 6  # further windows of a canvas, where they are only learnt
_COPIES = 9  # of a patch and itself, at most, in every other step
_LEAST = 0.01  # units: where patches raise the other labels by nothing
_WIDER = 3  # pixels: what a label hangs on may lie a little beside where patches were tried
_RENEWED, _EVERY = 0.2, 50  # canvases, and iterations


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """How to erase.

    Attributes:
        epochs: Of `iterations` each.
        iterations: Of `student_steps` steps of the copy, and two of each model's patches.
        student_steps: See above.
        batch: Drawings a step.
        rate: Of AdamW.
        weight: w.
        drawings: In stock.
        search: Steps of the original's patches before all others.
    """

    epochs: int = 8
    iterations: int = 50
    student_steps: int = 5
    batch: int = 64
    rate: float = 1e-3
    weight: float = 1.0
    drawings: int = 4000
    search: int = 400

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_counts(self, "epochs", "iterations", "student_steps", "drawings")
        if self.batch < 2:
            raise RepairError(f"expected a batch of at least 2, got {self.batch}")

    @classmethod
    def suited(cls, spec: InputSpec) -> Self:
        """The defaults.

        Raises:
            RepairError: Images are smaller or larger than any that the method was tried on, or made for.
        """
        check_size(spec)
        return cls()


def repair_by_drawings(
    copied: TrainableCopy,
    original: Predictor,
    settings: Drawn,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
    watch: Callable[[int], None] | None = None,
) -> DhbeOutcome:
    """Erase backdoors from a copy in place, without any data.

    Args:
        copied: The copy; it ends on the engine's device, see `TrainableCopy.settle`.
        original: The model that may have a backdoor.
        settings: How.
        engine: Where.
        seed: Of all that is drawn.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.
        watch: Called after each epoch with how many are done; the copy answers as it stands.

    Returns:
        What it came to, on fresh drawings.

    Raises:
        ModelError: The model can't be trained, or gives its input no gradients.
        RepairError: The copy's answers ceased to be numbers.
    """
    check_gradients(original.spec)
    game = _Game(copied, original, settings, engine, seed)
    begin, advice = functools.partial(game.search, progress), "use another method"
    try:
        play_epochs(game, game.play, "drawn", settings.epochs, advice, checkpoints, progress, watch, begin)
        return game.outcome()
    except GuardError:
        raise
    except Exception as error:  # foreign code
        raise ModelError(f"the model can't be trained on drawings: {one_line(error)}") from error


@final
class _Game:
    """Copy, original and their patches."""

    def __init__(self, copied: TrainableCopy, original: Predictor, settings: Drawn, engine: Engine, seed: int) -> None:
        spec = original.spec
        self._settings, self._engine, self._seed = settings, engine, seed
        probe = torch.rand(2, *spec.shape, generator=torch.Generator().manual_seed(seed))
        self._teacher = engine.place(frozen(original, probe))
        self._drawings = Drawings.suited(self._alike, spec.shape, settings.drawings, seed)
        self.student = copied.faster(probe).answers()
        side = min(spec.height, spec.width)
        sides = [min(side, max(fewest, round(share * side))) for share, fewest in zip(_SIDES, _FEWEST, strict=True)]
        self._largest = sides[1]
        how = (original.num_classes, spec.shape, _CANVAS_RATE, _FOCUS, (sides[0], sides[1]))
        self._of_teacher, self._of_student = (engine.place(Patches(*how, seed + number)) for number in (1, 2))
        optimizer = torch.optim.AdamW(copied.parameters, settings.rate, weight_decay=0.0)
        self.modules: dict[str, nn.Module] = {
            "student": self.student,
            "of_teacher": self._of_teacher,
            "of_student": self._of_student,
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "student": optimizer,
            "of_teacher": self._of_teacher.optimizer,
            "of_student": self._of_student.optimizer,
        }
        self._parameters = copied.parameters
        self._loss, self._optimizer = engine.setup(Loss(self.student, settings.weight), optimizer)

    def search(self, progress: Progress) -> None:
        """Look for the original's patches alone."""
        generator, steps = self._generator(0), self._settings.search
        for step in range(steps):
            self._ascend(self._of_teacher, self._teacher, generator, step)
            if (step + 1) % 10 == 0 or step + 1 == steps:
                progress(SEARCHING, step + 1, steps)
            if not step and not bool(self._gradients().any()):
                raise ModelError(
                    "expected a model that gives its input gradients, got one without: pass its factory, or use gym"
                )
        self._of_student.unit.copy_(self._of_teacher.unit)

    def _gradients(self) -> Tensor:
        found = self._of_teacher.canvases.grad
        return torch.zeros(1) if found is None else found

    def play(self, epoch: int) -> Tensor:
        """One epoch; the copy's last loss."""
        settings, loss, generator = self._settings, torch.zeros(()), self._generator(epoch + 1)
        for number in range(settings.iterations):
            done = (epoch * settings.iterations + number) / (settings.epochs * settings.iterations)
            for group in self._optimizer.param_groups:
                group["lr"] = settings.rate * share_of_rates(done, _FALLS, _FALL)
            for step in range(settings.student_steps):
                loss = self._train(generator, step)
            if (epoch * settings.iterations + number + 1) % _EVERY == 0:
                for patches in (self._of_teacher, self._of_student):
                    patches.renew(_RENEWED, generator)
            for parameter in self._parameters:
                parameter.requires_grad_(False)
            for step in (0, 1):
                self._ascend(self._of_student, self.student, generator, step)
                self._ascend(self._of_teacher, self._teacher, generator, step)
            for parameter in self._parameters:
                parameter.requires_grad_(True)
        return loss

    def _train(self, generator: torch.Generator, step: int) -> Tensor:
        images = self._draw(generator)
        half = len(images) // 2
        copies = int(torch.randint(_COPIES, (), generator=generator)) if step % 2 else 0
        with torch.no_grad():
            parts = (
                self._of_teacher.paste(images[:half], generator, copies=copies),
                self._of_student.paste(images[half:], generator, copies=copies, also=self._of_teacher.map),
            )
            most, rows, columns = self._of_teacher.sorest()
            wanted = self._wanted(images, most >= _SORE * most.max(), rows, columns)
            patched = torch.cat([part.images for part in parts])
            own = self._answers(self._teacher, patched)
            labels = torch.cat([part.labels for part in parts])
            wanted_patched = patched_answers(own, wanted, labels, most >= _SUSPECT * most.max())
        batch = Batch(images, patched, wanted, wanted_patched)
        self._optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self._loss(batch)
        self._engine.backward(loss)
        self._optimizer.step()
        if not copies:
            moved = batch.answers - wanted
            _note(self._of_teacher, parts[0], own[:half] - wanted[:half])
            _note(self._of_student, parts[0], moved[:half])
            _note(self._of_student, parts[1], moved[half:])
        return loss.detach()

    def _wanted(self, images: Tensor, sore: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """t'(x)."""
        answers = self._answers(self._teacher, images)
        labels = answers.argmax(dim=1)
        without = self._answers(self._teacher, exchange(images, rows[labels], columns[labels], self._largest + _WIDER))
        hangs = (without.argmax(dim=1) != labels) & sore[labels]
        return torch.where(hangs.unsqueeze(1), without, answers)

    def _ascend(self, patches: Patches, model: Answers | nn.Module, generator: torch.Generator, step: int) -> None:
        """With further windows, but at every fourth step, and the first of any round."""
        of_student, more = patches is self._of_student, _MORE if step % 4 else 0
        also = self._of_teacher.map if of_student else None
        images = self._draw(generator)
        patches.ascend(lambda some: self._answers(model, some), images, generator, more, also=also, plain=not of_student)

    def _draw(self, generator: torch.Generator) -> Tensor:
        drawn = self._drawings.draw(self._settings.batch, generator)
        return self._engine.share(drawn).to(self._engine.device)

    def _answers(self, model: Answers | nn.Module, images: Tensor) -> Tensor:
        with self._engine.autocast():
            logits: Tensor = model(images)
        return logits.float()

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed * 1_000_003 + number)

    def outcome(self) -> DhbeOutcome:
        """Compare copy and original on fresh drawings."""
        generator, answers, theirs, steady = self._generator(_LAST), [], [], []
        batches = -(-_FRESH // self._settings.batch)
        with torch.no_grad():
            for _ in range(batches):
                images = self._draw(generator)
                answer = self._answers(self.student, images).argmax(dim=1)
                pasted = self._of_teacher.paste(images, generator)
                answers.append(answer)
                theirs.append(self._answers(self._teacher, images).argmax(dim=1))
                steady.append(answer == self._answers(self.student, pasted.images).argmax(dim=1))
            shown = self._of_teacher.paste(self._draw(generator), generator).images[:_SHOWN].cpu()
        return DhbeOutcome(
            self._drawings.stock[:_SHOWN].clone(),
            shown,
            batches * self._settings.batch,
            self._engine.agree(float((torch.cat(answers) == torch.cat(theirs)).double().mean())),
            self._engine.agree(float(torch.cat(steady).double().mean())),
            len(torch.cat(answers).unique()),
            (self._sorest(), *self._of_drawings(torch.cat(theirs))),
            self._foremost(torch.cat(theirs))[1],
        )

    def _alike(self, images: Tensor) -> float:
        with torch.no_grad():
            return self._foremost(self._answers(self._teacher, images.to(self._engine.device)).argmax(dim=1))[1]

    def _foremost(self, labels: Tensor) -> tuple[int, float]:
        """The most frequent of some labels, and its share of them."""
        label = int(labels.mode().values)
        return label, self._engine.agree(float((labels == label).double().mean()))

    def _of_drawings(self, labels: Tensor) -> list[str]:
        """What they were, and where the original, with these labels for them, can't tell them apart: they then teach little."""
        said = []
        if self._drawings.kind == "figures":
            said.append("Drawings are figures on black: among scenes the original gives most the same label.")
        label, share = self._foremost(labels)
        if share >= ALIKE:
            said.append(
                f"The original gives {share:.0%} of the drawings label {label}: they hardly resemble the images that it was "
                "made for, and a backdoor may be left. Don't rely on this repair before you have measured it."
            )
        return said

    def _sorest(self) -> str:
        """Which label patches move the original to most, and where from."""
        most, rows, columns = (values.cpu() for values in self._of_teacher.sorest())
        label = int(most.argmax())
        others = torch.cat([most[:label], most[label + 1 :]]).quantile(0.5).clamp_min(_LEAST)
        return (
            f"Small patches move the original most to label {label}, {float(most[label] / others):.1f} times as far as to most "
            f"others, and most around row {int(rows[label])}, column {int(columns[label])}. A backdoor would explain a label "
            "that stands out; this is no scan."
        )


def _note(patches: Patches, pasted: Pasted, moved: Tensor) -> None:
    """The label that was raised most, whether it was meant or not."""
    raised = moved.max(dim=1)
    patches.note(pasted, raised.indices, raised.values)
