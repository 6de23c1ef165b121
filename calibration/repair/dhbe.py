"""DHBE: erase backdoors without any data, in a game of the copy against two generators.

The student s starts as the teacher t, the model as it came. G draws samples x on which the two differ, G_p patches p that move
the student's answer, wherever they are added; the student learns to answer like the teacher, and not to mind the patches:

    student   |s(x) - t(x)| + w |s(x + p) - s(x)|      (s(x) is held fixed in the second term)
    G         -|s(x) - t(x)| + v TV2(x)
    G_p       -|s(x) - s(x + p)|

|.| is the mean over logits and batch. A trigger is what a small patch does to any image, so it goes; what the model knows of
clean images needs more than a patch to change, so it stays.

Defaults are the authors' code's, where it and the paper differ: 5 student steps an iteration (the paper says 3), batches of 256
(128), and TV2, of which the paper says nothing. The paper multiplies patches by a constant, the code by 1.

300 epochs of 50 iterations show the student 19 million samples; fewer `epochs` go with the same schedule. The student loses its
accuracy at first, and regains it as the rates fall: half a training is worse than none. It is slow where a trigger works at one
place only, which patches seldom hit, and G draws triggers too, to the student that has just unlearnt them.

References: Yan et al., DHBE, arXiv:2306.08009; their code, github.com/yanzhicong/DHBE; Fang et al., Data-free adversarial
distillation, arXiv:1912.11006.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import Answers, TrainableCopy, arrange
from calibration.repair.dhbe_generators import SampleGenerator, TriggerGenerator, paste, total_variation
from guard import Predictor
from guard.errors import ModelError, RepairError, one_line
from guard.images import InputSpec

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_USUAL_MEAN, _USUAL_STD = (0.5,), (0.25,)  # of images in [0, 1], where the model does not say
_FRESH = 1024  # samples on which student and teacher are compared in the end
_PICTURES = 16


class Dhbe(msgspec.Struct, frozen=True, kw_only=True):
    """How to erase.

    Attributes:
        epochs: Of `iterations` each.
        iterations: Of `student_steps` steps of the student, and one of each generator.
        student_steps: See above.
        batch: Samples a step.
        rate: Of the student's SGD; a model without batch norm may bear a tenth of the default only.
        momentum: Of it.
        decay: Its weight decay.
        sample_rate: Of G's Adam.
        trigger_rate: Of G_p's Adam.
        falls: Shares of the iterations after which all rates fall.
        fall: To this share of what they were.
        weight: w, of the student's indifference to patches.
        variation: v, of TV2.
        patch: Side of the patches, in pixels; triggers of other sizes go too.
        latent: Numbers that a sample or a patch is drawn from.
        width: Of the generators.
        doublings: Of G's first, small image; the authors' code takes 3 for images of 48 and 64 pixels, 2 for 28 and 32.
        batch_statistics: Let the student's batch norm, where the model has any that can be switched, take its statistics from
            the samples, as in the authors' code; without, it diverges at this rate.
        mean: Of images in [0, 1], for all channels or each: samples have it; empty for the model's own, else 0.5.
        std: The same of their standard deviation; empty for the model's own, else 0.25.
    """

    epochs: int = 300
    iterations: int = 50
    student_steps: int = 5
    batch: int = 256
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    sample_rate: float = 1e-3
    trigger_rate: float = 1e-3
    falls: tuple[float, ...] = (0.6, 0.8)
    fall: float = 0.1
    weight: float = 0.1
    variation: float = 1e-4
    patch: int = 5
    latent: int = 256
    width: int = 64
    doublings: int = 2
    batch_statistics: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name in ("epochs", "iterations", "student_steps", "patch", "latent", "width"):
            if getattr(self, name) < 1:
                raise RepairError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.batch < 2:
            raise RepairError(f"expected a batch of at least 2, whose statistics mean something, got {self.batch}")
        if self.doublings < 0:
            raise RepairError(f"expected doublings of at least 0, got {self.doublings}")
        if any(value <= 0.0 for value in self.std):
            raise RepairError(f"expected a positive std, got {self.std}")

    def share_of_rates(self, done: float) -> float:
        """Of the first rates, when such a share of the iterations is done."""
        return float(self.fall ** sum(done >= share for share in self.falls))

    def pixels(self, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of images in [0, 1], (1, C, 1, 1) each.

        Raises:
            RepairError: A value is missing for some channel.
        """
        found = []
        for name, values in (("mean", self.mean or spec.mean or _USUAL_MEAN), ("std", self.std or spec.std or _USUAL_STD)):
            if len(values) not in (1, spec.channels):
                raise RepairError(f"expected 1 or {spec.channels} values of {name}, one per channel, got {len(values)}")
            found.append(torch.tensor(values).view(1, -1, 1, 1).expand(1, spec.channels, 1, 1).clone())
        return found[0], found[1]


@final
@dataclass(frozen=True)
class DhbeOutcome:
    """What the game came to.

    Attributes:
        samples: (K, C, H, W), a few samples, clipped to [0, 1]; they do not look like the images behind the model.
        triggers: (K, C, P, P), a few patches, in [-1, 1].
        agreement: Share of fresh samples to which student and teacher give the same label.
        steadiness: Share of them whose label from the student a patch does not change.
    """

    samples: Tensor
    triggers: Tensor
    agreement: float
    steadiness: float


def student_loss(student: Tensor, teacher: Tensor, patched: Tensor, weight: float) -> Tensor:
    """See the top of this file.

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


def repair_by_dhbe(
    copied: TrainableCopy,
    original: Predictor,
    settings: Dhbe,
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
        seed: Of first weights and of all that is drawn.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.
        watch: Called after each epoch with how many are done; the copy answers as it stands.

    Returns:
        What the game came to.

    Raises:
        ModelError: The model can't be trained, or gives its input no gradients.
        RepairError: The settings do not fit its images, or the student's answers ceased to be numbers.
    """
    spec = original.spec
    if spec.dtype == "uint8":
        raise ModelError("expected a model that gives its input gradients, got one that takes uint8: use gym or codefend")
    if settings.patch > min(spec.height, spec.width):
        raise RepairError(f"expected a patch of at most {min(spec.height, spec.width)} pixels, got {settings.patch}")
    game = _Game(copied, original, settings, engine, seed)
    found = None if checkpoints is None else checkpoints.load("dhbe", game.modules, game.optimizers)
    for epoch in range(0 if found is None else found[0], settings.epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1)
        with _batch_statistics(game.student, settings.batch_statistics):
            loss = game.play(epoch, generator)
        if not torch.isfinite(loss):
            raise RepairError(
                f"the student's answers ceased to be numbers in epoch {epoch + 1}: lower the rate {settings.rate:g}"
            )
        if watch is not None:
            watch(epoch + 1)
        if checkpoints is not None:
            checkpoints.save("dhbe", epoch + 1, game.modules, game.optimizers)
        progress("erasing backdoors", epoch + 1, settings.epochs)
    return game.outcome(torch.Generator().manual_seed(seed * 1_000_003))


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
class _Game:
    """The players, and their turns."""

    def __init__(self, copied: TrainableCopy, original: Predictor, settings: Dhbe, engine: Engine, seed: int) -> None:
        self._settings, self._engine = settings, engine
        self._mean, self._std = (values.to(engine.device) for values in settings.pixels(original.spec))
        frozen = TrainableCopy.of(original)
        with torch.random.fork_rng(devices=[]):  # first weights draw from the global generator
            torch.manual_seed(seed)
            probe = torch.rand(2, *original.spec.shape)
            samples = SampleGenerator(original.spec.shape, settings.latent, settings.width, settings.doublings)
            triggers = TriggerGenerator(original.spec.channels, settings.patch, settings.latent, settings.width)
        for parameter in frozen.parameters:
            parameter.requires_grad_(False)
        for module in (samples, triggers):
            arrange(engine.place(module), torch.channels_last)
        self._teacher = engine.place(frozen.faster(probe).answers())
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
            if epoch == 0 and number == 0:
                self._check_gradients()
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
        alike, steady, shown, patches = [], [], [], []
        with torch.no_grad():
            for _ in range(-(-_FRESH // self._settings.batch)):
                images = self._to_pixels(self._samples(self._noise(generator)))
                answer = self._answers(self.student, images).argmax(dim=1)
                alike.append(answer == self._answers(self._teacher, images).argmax(dim=1))
                steady.append(answer == self._answers(self.student, self._patched(images, generator)).argmax(dim=1))
                shown.append(images.cpu())
                patches.append(self._triggers(self._noise(generator)).float().cpu())
        return DhbeOutcome(
            torch.cat(shown)[:_PICTURES].clamp(0.0, 1.0),
            torch.cat(patches)[:_PICTURES],
            self._engine.agree(float(torch.cat(alike).double().mean())),
            self._engine.agree(float(torch.cat(steady).double().mean())),
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

    def _check_gradients(self) -> None:
        """TV2 gives G some anyway."""
        for name, what in (("student", "weights"), ("triggers", "input")):
            if not any(value.grad is not None and bool(value.grad.any()) for value in self.modules[name].parameters()):
                raise ModelError(f"expected a model whose {what} gets gradients, got one without: pass its factory, or use gym")


@contextlib.contextmanager
def _batch_statistics(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Batch norm in training mode inside, in eval mode afterwards."""
    layers = [part for part in module.modules() if isinstance(part, _BATCH_NORM)] if wanted else []
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()
