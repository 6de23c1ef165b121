"""DeepInspect: a backdoor sought without any data, for all labels at once.

1. Model inversion: images that the model gives each label, by gradient descent from noise; they stand in for clean ones.
2. A conditional generator G(z, t) of triggers, which are added to these images:

       minimise  CE(f(clip(x + G(z, t), 0, 1)), t) + w_t max(0, |G(z, t)|_1 - gamma)

3. The labels whose triggers are too small to be one of them: `calibration.inspection.anomaly.deviation_factors`.

The model itself is the discriminator of the paper, so that its adversarial loss asks for what the cross-entropy asks for.

Ours: images that say little besides their label (each near a grey level of its own, smooth, and no surer than clean images
are), because in noise that the model is very sure of not even a backdoor's trigger works; a weight w_t for each label that
follows the success of its triggers, as in Neural Cleanse, so that sizes of equal success are compared; and a part of G that
belongs to the label alone, without which triggers stay several times too large.

Reference: Chen et al., DeepInspect, IJCAI 2019; Fredrikson et al., Model Inversion Attacks, CCS 2015.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.inspection.anomaly import deviation_factors
from calibration.inspection.model_inversion import Inversion, Pool, generator_of, invert, labels_of
from calibration.inspection.passes import images_at_once
from guard.errors import CalibrationError

_NOISE = 16  # numbers in z, and of a label's embedding
_DRAWS = 2  # of z, for each label a step
_BETAS = (0.5, 0.9)
_LAST_RATE = 0.1  # of the first one
_FOLLOWS, _NOW = 0.08, 0.2  # how fast weights follow success, and success its last value
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6
_JUDGED = 128  # images on which a trigger's success is measured
_COPIES = 6  # of a trigger that a label needs at work: the generator's, its gradient, Adam's, the best
_BYTES = 1 << 30  # of triggers at work
_MAPS = 10  # as large as an image, of the generator's channels: what a trigger keeps for its gradient
_GENERATED = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes for these
_TINY = 1e-3  # pixels
CUTOFF = 2.0  # of deviation factors: 95%
_UNUSUAL = 0.45  # of the median size: on development models, backdoors need 0.16 to 0.39 of it, clean labels 0.50 at least
_FAR_TOO_SMALL = 0.3  # likewise; chosen later, on a digits net and on mnist-three-targets: infected whatever the factor
_BETWEEN = 20.0  # seconds from one checkpoint to the next


class DeepInspectSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to inspect.

    Attributes:
        inversion: How images are recovered.
        steps: Of the generator; whole windows.
        batch: Images a step, for each label.
        rate: Of the generator; it falls to a tenth.
        own_rate: Of the part that belongs to one label.
        weight: w at first.
        allowed: gamma, L1 size in pixels that costs nothing.
        success: Share of images that must get the label.
        window: Steps over which that share is averaged. What is kept is the trigger at their beginning.
        width: Channels of the generator.
    """

    inversion: Inversion = Inversion()
    steps: int = 400
    batch: int = 8
    rate: float = 2e-3
    own_rate: float = 0.05
    weight: float = 1e-3
    allowed: float = 0.0
    success: float = 0.95
    window: int = 16
    width: int = 16

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.steps < self.window:
            raise CalibrationError(f"expected at least {self.window} steps of the generator, got {self.steps}")
        if self.batch < _DRAWS:
            raise CalibrationError(f"expected at least {_DRAWS} images a step, got {self.batch}")


@final
@dataclass(frozen=True)
class DeepInspected:
    """What was found, a row for each label.

    Attributes:
        sizes: (K,), L1 sizes of the triggers, in pixels; all of C H W where none works.
        success: (K,), share of the recovered images of other labels that get the label when its trigger is added.
        triggers: (K, C, H, W), in [-1, 1], to be added to images.
        images: (K, n, C, H, W), in [0, 1], recovered from the model.
        agreement: Share of them that the model gives the label they were recovered for.
    """

    sizes: Tensor
    success: Tensor
    triggers: Tensor
    images: Tensor
    agreement: float

    @property
    def factors(self) -> Tensor:
        """(K,), deviation factors of the sizes' logarithms (ours): sizes differ by factors, and a small one stands out."""
        return deviation_factors(self.sizes.clamp_min(_TINY).log())

    @property
    def outliers(self) -> list[int]:
        """Labels whose triggers are too small to be one of them, and (ours) less than half as large as usual; or a third.

        The factor alone calls one of ten sizes an outlier in every third model, if they are normally distributed; and it misses
        those that hide one another, as several infected labels do: the deviations of all small sizes are its unit.
        """
        usual = self.sizes.quantile(0.5)
        small = (self.factors > CUTOFF) & (self.sizes < _UNUSUAL * usual)
        return [int(label) for label in torch.nonzero(small | (self.sizes < _FAR_TOO_SMALL * usual)).flatten()]

    def put_on(self, label: int, images: Tensor) -> Tensor:
        """A label's trigger on images, (B, C, H, W) in [0, 1]."""
        return (images + self.triggers[label].to(images.device)).clamp(0.0, 1.0)


def deep_inspect(
    answers: nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    settings: DeepInspectSettings,
    seed: int,
    engine: Engine,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> DeepInspected:
    """Look for a small trigger for each label, without any data.

    Args:
        answers: The model, differentiable and on the engine's device: images (B, C, H, W) in [0, 1] to logits (B, K).
        shape: (C, H, W) of its images.
        classes: K.
        settings: How.
        seed: Of the draws.
        engine: Where.
        checkpoints: Written now and then, and gone on from.
        progress: Told how far it is.

    Raises:
        CalibrationError: The model gives no second label.
        ModelError: It has no gradients.
    """
    if classes < 2:
        raise CalibrationError(f"expected a model with at least two labels, got {classes}: there is nothing to compare")
    at_once = images_at_once(answers, torch.rand(2, *shape, generator=generator_of(seed)).to(engine.device), engine)
    substitutes = invert(answers, shape, classes, settings.inversion, seed, engine, at_once, checkpoints, progress)
    own = labels_of(answers, substitutes.flatten(0, 1).to(engine.device), at_once)
    pool = Pool.of(substitutes.flatten(0, 1).to(engine.device), own)
    size = max(2, _BYTES // (4 * _COPIES * pool.images[0].numel()))
    found: list[tuple[Tensor, Tensor]] = []
    for number, labels in enumerate(torch.arange(classes).split(size)):
        search = _Search(answers, pool, labels, settings, seed, engine, at_once)

        def shown(done: int, first: int = int(labels[0])) -> None:
            progress("looking for triggers", first + done, classes)

        found.append(search.run(checkpoints, f"generator-{number}", shown))
    sizes, triggers = (torch.cat(parts) for parts in zip(*found, strict=True))
    success = torch.stack([_success(answers, pool, label, triggers[label], seed, at_once) for label in range(classes)])
    wanted = torch.arange(classes, device=own.device).repeat_interleave(substitutes.shape[1])
    return DeepInspected(sizes, success, triggers, substitutes, float((own == wanted).double().mean()))


@final
class TriggerGenerator(nn.Module):
    """G: noise (B, 16) and labels (B,) to triggers (B, C, H, W) in [-1, 1].

    Args:
        shape: (C, H, W).
        labels: How many.
        width: Channels.
    """

    def __init__(self, shape: tuple[int, int, int], labels: int, width: int) -> None:
        super().__init__()
        self._shape = shape
        self._start = (width, -(-shape[1] // 4), -(-shape[2] // 4))
        self.label = nn.Embedding(labels, _NOISE)
        self.first = nn.Linear(2 * _NOISE, self._start[0] * self._start[1] * self._start[2])
        layers: list[nn.Module] = [nn.LeakyReLU(0.2)]
        for _ in range(2):
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, shape[0], 3, padding=1))
        self.own = nn.Embedding(labels, shape[0] * shape[1] * shape[2])
        nn.init.zeros_(self.own.weight)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        first = self.first(torch.cat([noise, self.label(labels)], dim=1)).view(-1, *self._start)
        common = self.body(first)[..., : self._shape[1], : self._shape[2]]
        return torch.tanh(common + self.own(labels).view(-1, *self._shape))


class _Search:
    """One generator, of the triggers of labels that are in memory together."""

    def __init__(
        self,
        answers: nn.Module,
        pool: Pool,
        labels: Tensor,
        settings: DeepInspectSettings,
        seed: int,
        engine: Engine,
        at_once: int,
    ) -> None:
        self.answers, self.pool, self.settings, self.seed = answers, pool, settings, seed
        self.engine, self.at_once = engine, at_once
        where, (channels, height, width) = engine.device, pool.images.shape[1:]
        most = _GENERATED["cuda" if where.type == "cuda" else "cpu"] // (4 * _MAPS * settings.width * height * width)
        self.generated = max(_DRAWS, most)
        self.labels = labels.to(where)
        with torch.random.fork_rng(devices=[]):  # first weights draw from the global generator
            torch.manual_seed(seed)
            self.generator = TriggerGenerator((channels, height, width), len(labels), settings.width).to(where)
        own = [self.generator.own.weight]
        common = [value for name, value in self.generator.named_parameters() if not name.startswith("own.")]
        groups = [{"params": common, "lr": settings.rate}, {"params": own, "lr": settings.own_rate}]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)
        self.weights = torch.full((len(labels),), settings.weight, device=where)
        self.recent = torch.zeros(len(labels), device=where)
        self.best = torch.full((len(labels),), float("inf"), device=where)
        self.triggers = torch.zeros(len(labels), channels, height, width, device=where)

    def run(self, checkpoints: Checkpoints | None, name: str, progress: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """All steps, or those that are left; (K,) sizes and (K, C, H, W) triggers, on the CPU."""
        windows, saved = self.settings.steps // self.settings.window, time.monotonic()
        for number in range(self._resume(checkpoints, name), windows):
            self._window(number)
            progress((number + 1) * len(self.labels) // windows)
            last = number + 1 == windows
            if checkpoints is not None and (last or time.monotonic() - saved > _BETWEEN):
                arrays = {key: getattr(self, key) for key in _STATE}
                checkpoints.save(name, number + 1, {"generator": self.generator}, {"adam": self.optimizer}, arrays)
                saved = time.monotonic()
        none = self.best.isinf()
        sizes = torch.where(none, float(self.triggers[0].numel()), self.best)
        triggers = torch.where(none.view(-1, 1, 1, 1), self._typical(), self.triggers)
        return sizes.cpu(), triggers.cpu()

    def _resume(self, checkpoints: Checkpoints | None, name: str) -> int:
        """Go on from the last checkpoint; the window that comes next."""
        modules, optimizers = {"generator": self.generator}, {"adam": self.optimizer}
        found = None if checkpoints is None else checkpoints.load(name, modules, optimizers)
        if found is None:
            return 0
        for key in _STATE:
            setattr(self, key, found[1][key].to(self.engine.device))
        return found[0]

    def _window(self, number: int) -> None:
        """Some steps; then the triggers at their beginning are kept that work and are smaller than any before."""
        settings, triggers = self.settings, self._typical()
        reached = torch.zeros_like(self.best)
        for step in range(number * settings.window, (number + 1) * settings.window):
            reached += self._step(step) / settings.window
        sizes = triggers.abs().sum(dim=(1, 2, 3))
        better = (reached >= settings.success) & (sizes < self.best)
        self.best[better], self.triggers[better] = sizes[better], triggers[better]

    @torch.no_grad()
    def _typical(self) -> Tensor:
        """Each label's trigger without noise, (K, C, H, W)."""
        rows = torch.arange(len(self.labels), device=self.labels.device)
        noise = torch.zeros(len(rows), _NOISE, device=rows.device)
        parts = zip(noise.split(self.generated), rows.split(self.generated), strict=True)
        return torch.cat([self.generator(*part) for part in parts])

    def _step(self, step: int) -> Tensor:
        """One step of all labels; (K,), share of the images that got the label."""
        settings, generator = self.settings, generator_of(self.seed, step)
        left = 1.0 - (1.0 - _LAST_RATE) * step / settings.steps
        for group, rate in zip(self.optimizer.param_groups, (settings.rate, settings.own_rate), strict=True):
            group["lr"] = rate * left
        chosen = self.pool.draw(self.labels, torch.rand(len(self.labels), settings.batch, generator=generator))
        noise = torch.randn(len(self.labels), _DRAWS, _NOISE, generator=generator).to(self.labels.device)
        self.optimizer.zero_grad(set_to_none=True)
        rows = torch.arange(len(self.labels), device=self.labels.device)
        few = max(1, min(self.at_once // settings.batch, self.generated // _DRAWS))
        right = torch.cat([self._part(part, chosen[part], noise[part]) for part in rows.split(few)])
        self.optimizer.step()
        self.recent = right if step == 0 else (1.0 - _NOW) * self.recent + _NOW * right
        lead = (self.recent - settings.success) / (1.0 - settings.success)
        self.weights = (self.weights * (_FOLLOWS * lead.clamp(-2.0, 1.0)).exp()).clamp(_LEAST_WEIGHT, _MOST_WEIGHT)
        return right

    def _part(self, rows: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
        """Gradients of some labels; (R,), share of their images, (R, B), that got the label."""
        triggers = self.generator(noise.flatten(0, 1), rows.repeat_interleave(_DRAWS)).unflatten(0, (len(rows), _DRAWS))
        which = torch.arange(chosen.shape[1], device=rows.device) % _DRAWS
        triggered = (self.pool.images[chosen] + triggers[:, which]).clamp(0.0, 1.0)
        labels = self.labels[rows].repeat_interleave(chosen.shape[1])
        with self.engine.autocast():
            logits = self.answers(triggered.flatten(0, 1)).float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / chosen.shape[1]
        excess = (triggers.abs().sum(dim=(2, 3, 4)) - self.settings.allowed).clamp_min(0.0)
        loss = loss + (self.weights[rows] * excess.mean(dim=1)).sum()
        loss.backward(inputs=list(self.generator.parameters()))
        right: Tensor = (logits.argmax(dim=1) == labels).view(chosen.shape)
        return right.float().mean(dim=1)


_STATE = ("weights", "recent", "best", "triggers")


@torch.no_grad()
def _success(answers: nn.Module, pool: Pool, label: int, trigger: Tensor, seed: int, at_once: int) -> Tensor:
    """Share of images of other labels that a trigger gives this one."""
    draws = torch.rand(1, _JUDGED, generator=generator_of(seed, label))
    rows = pool.draw(torch.tensor([label], device=pool.own.device), draws)[0].unique()
    triggered = (pool.images[rows] + trigger.to(pool.images.device)).clamp(0.0, 1.0)
    return (labels_of(answers, triggered, at_once) == label).float().mean().cpu()
