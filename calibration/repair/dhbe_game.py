"""DHBE's players, and their turns; the idea stands in `calibration.repair.dhbe`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.fine_tuning import Answers, TrainableCopy, arrange
from calibration.frozen import frozen
from calibration.repair.dhbe_generators import SampleGenerator, TriggerGenerator, paste, total_variation
from calibration.repair.dhbe_settings import Dhbe
from guard import Predictor
from guard.errors import ModelError, one_line

_FRESH = 1024  # samples on which student and teacher are compared in the end
_PICTURES = 16
_WITHOUT = "expected a model whose {} gradients, got one without: pass its factory, or use gym"


@final
@dataclass(frozen=True)
class DhbeOutcome:
    """What the game came to.

    Attributes:
        samples: (K, C, H, W), a few samples, clipped to [0, 1]; they do not look like the images behind the model.
        triggers: (K, C, P, P), a few patches, in [-1, 1].
        compared: Fresh samples on which student and teacher were compared.
        agreement: Share of them to which both give the same label.
        steadiness: Share of them whose label from the student a patch does not change.
        labels: Different ones that the student gives them; a single one is what a student gives that has collapsed.
        said: What else must be told.
        foremost: Share of them to which the teacher gives its most frequent label; None where the samples were learnt.
    """

    samples: Tensor
    triggers: Tensor
    compared: int
    agreement: float
    steadiness: float
    labels: int
    said: tuple[str, ...] = ()
    foremost: float | None = None


def student_loss(student: Tensor, teacher: Tensor, patched: Tensor, weight: float) -> Tensor:
    """See `calibration.repair.dhbe`.

    Args:
        student: (B, M), s(x), logits.
        teacher: (B, M), t(x).
        patched: (B, M), s(x + p).
        weight: w.
    """
    return apart(student, teacher) + weight * apart(patched, student.detach())


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of logits, (B, M) each."""
    return (one - other).abs().mean()


@final
class _Batch:
    """What a student's step needs; Fabric would round tensors that it sees to bfloat16, and does not look into this."""

    def __init__(self, images: Tensor, patched: Tensor, wanted: Tensor) -> None:
        self.images, self.patched, self.wanted = images, patched, wanted


@final
class _StudentLoss(nn.Module):
    """All that the student does in one step of its own: with several devices, one call a step."""

    def __init__(self, answers: Answers, weight: float) -> None:
        super().__init__()
        self.answers, self._weight = answers, weight

    def forward(self, batch: _Batch) -> Tensor:
        return student_loss(self.answers(batch.images), batch.wanted, self.answers(batch.patched), self._weight)


@final
class Game:
    """The players, and their turns."""

    def __init__(self, copied: TrainableCopy, original: Predictor, settings: Dhbe, engine: Engine, seed: int) -> None:
        self._settings, self._engine = settings, engine
        self._mean, self._std = (values.to(engine.device) for values in settings.pixels(original.spec))
        with torch.random.fork_rng(devices=[]):  # first weights draw from the global generator
            torch.manual_seed(seed)
            probe = torch.rand(2, *original.spec.shape)
            samples = SampleGenerator(original.spec.shape, settings.latent, settings.width, settings.doublings)
            triggers = TriggerGenerator(original.spec.channels, settings.patch, settings.latent, settings.width)
        for module in (samples, triggers):
            arrange(engine.place(module), torch.channels_last)
        self._teacher = engine.place(frozen(original, probe))
        self._check_input(probe)
        self._parameters, self.student = copied.parameters, copied.faster(probe).answers()
        self.modules: dict[str, nn.Module] = {"student": self.student, "samples": samples, "triggers": triggers}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "student": torch.optim.SGD(copied.parameters, settings.rate, settings.momentum, weight_decay=settings.decay),
            "samples": torch.optim.Adam(samples.parameters(), settings.sample_rate),
            "triggers": torch.optim.Adam(triggers.parameters(), settings.trigger_rate),
        }
        self._rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        loss = _StudentLoss(self.student, settings.weight)
        self._loss, self._optimizer = engine.setup(loss, self.optimizers["student"])
        self._samples, self._samples_optimizer = engine.setup(samples, self.optimizers["samples"])
        self._triggers, self._triggers_optimizer = engine.setup(triggers, self.optimizers["triggers"])

    def play(self, epoch: int, generator: torch.Generator) -> Tensor:
        """One epoch; the student's last loss."""
        settings, loss = self._settings, torch.zeros(())
        for number in range(settings.iterations):
            share = settings.share_of_rates((epoch * settings.iterations + number) / (settings.epochs * settings.iterations))
            for name, optimizer in self.optimizers.items():
                optimizer.param_groups[0]["lr"] = self._rates[name] * share
            try:
                for _ in range(settings.student_steps):
                    loss = self._train_student(generator)
                with self._frozen_student():
                    self._train_samples(generator)
                    self._train_triggers(generator)
            except ModelError:
                raise
            except Exception as error:  # foreign code
                raise ModelError(f"the model can't be trained against generators: {one_line(error)}") from error
            if epoch == 0 and number == 0 and not self._student_learns():
                raise ModelError(_WITHOUT.format("weights get"))
        return loss

    def _train_student(self, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            images = self._to_pixels(self._samples(self._noise(generator)))
            patched = self._patched(images, generator)
            wanted = self._answers(self._teacher, images)
        self._optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self._loss(_Batch(images, patched, wanted))
        self._engine.backward(loss)
        self._optimizer.step()
        return loss.detach()

    def _train_samples(self, generator: torch.Generator) -> None:
        self._samples_optimizer.zero_grad(set_to_none=True)
        samples = self._samples(self._noise(generator))
        images = self._to_pixels(samples)
        loss = -apart(self._answers(self.student, images), self._answers(self._teacher, images))
        self._engine.backward(loss + self._settings.variation * total_variation(samples))
        self._samples_optimizer.step()

    def _train_triggers(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            images = self._to_pixels(self._samples(self._noise(generator)))
            before = self._answers(self.student, images)
        self._triggers_optimizer.zero_grad(set_to_none=True)
        after = self._answers(self.student, self._patched(images, generator))
        self._engine.backward(-apart(before, after))
        self._triggers_optimizer.step()

    def outcome(self, generator: torch.Generator) -> DhbeOutcome:
        """Compare student and teacher on fresh samples."""
        answers, alike, steady, shown, patches = [], [], [], [], []
        batches = -(-_FRESH // self._settings.batch)
        with torch.no_grad():
            for _ in range(batches):
                images = self._to_pixels(self._samples(self._noise(generator)))
                answer = self._answers(self.student, images).argmax(dim=1)
                answers.append(answer)
                alike.append(answer == self._answers(self._teacher, images).argmax(dim=1))
                steady.append(answer == self._answers(self.student, self._patched(images, generator)).argmax(dim=1))
                shown.append(images.cpu())
                patches.append(self._triggers(self._noise(generator)).float().cpu())
        return DhbeOutcome(
            torch.cat(shown)[:_PICTURES].clamp(0.0, 1.0),
            torch.cat(patches)[:_PICTURES],
            batches * self._settings.batch,
            self._engine.agree(float(torch.cat(alike).double().mean())),
            self._engine.agree(float(torch.cat(steady).double().mean())),
            len(torch.cat(answers).unique()),
        )

    def _noise(self, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(self._settings.batch, self._settings.latent, generator=generator)
        return self._engine.share(drawn).to(self._engine.device)

    def _to_pixels(self, samples: Tensor) -> Tensor:
        """Where patches are added; the model normalises again."""
        return samples.float() * self._std + self._mean

    def _patched(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """With fresh patches, at one place for the whole batch."""
        patches = self._triggers(self._noise(generator)).float()
        top, left = (int(torch.randint(side - self._settings.patch + 1, (), generator=generator)) for side in images.shape[2:])
        return paste(images, patches, top, left)

    def _answers(self, model: Answers, images: Tensor) -> Tensor:
        with self._engine.autocast():
            logits: Tensor = model(images)
        return logits.float()

    @contextlib.contextmanager
    def _frozen_student(self) -> Iterator[None]:
        """Spare the gradients of weights in the generators' turns."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def _student_learns(self) -> bool:
        return any(value.grad is not None and bool(value.grad.any()) for value in self._parameters)

    def _check_input(self, images: Tensor) -> None:
        """Before any step: afterwards a student that a high rate has carried off looks the same."""
        given = images.to(self._engine.device).clone().requires_grad_(True)
        try:
            found = torch.autograd.grad(self._answers(self._teacher, given).square().sum(), given, allow_unused=True)[0]
        except Exception as error:  # foreign code
            raise ModelError(f"the model can't be trained against generators: {one_line(error)}") from error
        if found is None or not bool(found.any()):
            raise ModelError(_WITHOUT.format("input gets"))
