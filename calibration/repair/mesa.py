"""The max-entropy staircase approximator (MESA): draws from all triggers that work, without one to learn from.

For each level beta of success a generator G_beta, whose triggers reach that success and are else as different as can be:

    minimise  max(0, beta - f_t(G(z) on x)) - alpha I(G(z); z)

f_t is the probability of the target label. The mutual information stands for the entropy of G's triggers; a statistics network
T bounds it from below (MINE), I >= E T(G(z), z) - log E exp T(G(z), z'), and is trained along with G. A little noise on the
triggers keeps it finite.

References: Qiao et al., Defending Neural Backdoors via Generative Distribution Modeling, NeurIPS 2019,
arXiv:1910.04749, and its public code; Belghazi et al., MINE, arXiv:1801.04062.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.repair.cases import Part, logits
from guard import Predictor
from guard.errors import ModelError, RepairError, one_line

Place = tuple[int, int, int, int]
"""Of a patch: top, left, height, width."""

_BETAS = (0.5, 0.999)
_SLOWLY = 0.01  # how far the running mean of exp T moves at a step
_BETWEEN = 20.0  # seconds from one checkpoint to the next


class Mesa(msgspec.Struct, frozen=True, kw_only=True):
    """How triggers are modelled.

    Attributes:
        levels: beta, one generator each.
        alpha: Weight of the mutual information.
        steps: Of each generator; the public code: 10 epochs, 630 steps.
        batch: Images and triggers a step; the public code: 128.
        rate: Of Adam, with a first beta of 0.5; the public code: 2e-4.
        noise: Numbers in z.
        hidden: Width of both networks; the public code: 512 for CIFAR-10, 2048 for CIFAR-100.
        blur: Standard deviation of the noise on a trigger.
        scattered: Put triggers at random places, as the paper does, not at the given one.
    """

    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    alpha: float = 0.1
    steps: int = 400
    batch: int = 64
    rate: float = 1e-3
    noise: int = 64
    hidden: int = 128
    blur: float = 0.1
    scattered: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not self.levels or not all(0.0 < level <= 1.0 for level in self.levels):
            raise RepairError(f"expected levels of success over 0 and up to 1, got {self.levels}")
        if self.steps < 1 or self.batch < 2:
            raise RepairError(f"expected at least one step of two images, got {self.steps} of {self.batch}")


@final
@dataclass(frozen=True)
class Stamp:
    """Puts patches on images.

    Attributes:
        shape: (C, H, W) of the images.
        place: Where, and how large.
        scattered: At random places instead.
    """

    shape: tuple[int, int, int]
    place: Place
    scattered: bool

    def __call__(self, images: Tensor, patches: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) with patches (B, C, h, w) in place of what was there; gradients pass to the patches."""
        top, left, height, width = self.place
        tops, lefts = torch.full((len(images),), top), torch.full((len(images),), left)
        if self.scattered:
            tops = torch.randint(0, self.shape[1] - height + 1, (len(images),), generator=generator)
            lefts = torch.randint(0, self.shape[2] - width + 1, (len(images),), generator=generator)
        which = torch.arange(len(images)).view(-1, 1, 1)
        rows = (tops.unsqueeze(1) + torch.arange(height)).unsqueeze(2)
        columns = (lefts.unsqueeze(1) + torch.arange(width)).unsqueeze(1)
        index = [value.to(images.device) for value in (which, rows, columns)]
        stamped = images.permute(0, 2, 3, 1).index_put(tuple(index), patches.permute(0, 2, 3, 1).to(images.dtype))
        return stamped.permute(0, 3, 1, 2).contiguous()


@final
class PatchGenerator(nn.Module):
    """G: (B, noise) in [0, 1] to patches (B, size) in [0, 1]."""

    def __init__(self, noise: int, hidden: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (noise, hidden):
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Linear(hidden, size), nn.Sigmoid())

    def forward(self, noise: Tensor) -> Tensor:
        """See the class."""
        patches: Tensor = self.body(2.0 * noise - 1.0)
        return patches


@final
class Statistics(nn.Module):
    """T: patches (B, size) and noise (B, noise) to (B,)."""

    def __init__(self, noise: int, hidden: int, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(size + noise, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, patches: Tensor, noise: Tensor) -> Tensor:
        """See the class."""
        values: Tensor = self.body(2.0 * torch.cat([patches, noise], dim=1) - 1.0)
        return values.squeeze(1)


@final
@dataclass(frozen=True)
class Staircase:
    """The trigger distribution: a generator for each level.

    Attributes:
        generators: In eval mode.
        shape: (C, h, w) of a patch.
        noise: Numbers in z.
        blur: Standard deviation of the noise on it.
    """

    generators: tuple[PatchGenerator, ...]
    shape: tuple[int, int, int]
    noise: int
    blur: float

    @torch.no_grad()
    def sample(self, count: int, level: int, generator: torch.Generator) -> Tensor:
        """Patches of one level, (B, C, h, w) in [0, 1], on the CPU."""
        net = self.generators[level]
        noise = torch.rand(count, self.noise, generator=generator)
        patches = net(noise.to(next(net.parameters()).device)).cpu()
        return _blurred(patches, self.blur, generator).view(-1, *self.shape)

    def stamped(self, images: Tensor, stamp: Stamp, generator: torch.Generator) -> Tensor:
        """Images, (B, C, H, W) in [0, 1], each with a patch of any level."""
        patches = torch.stack([self.sample(len(images), level, generator) for level in range(len(self.generators))])
        levels = torch.randint(0, len(self.generators), (len(images),), generator=generator)
        return stamp(images, patches[levels, torch.arange(len(images))], generator)

    def success(self, predictor: Predictor, part: Part, target_label: int, stamp: Stamp, seed: int) -> Tensor:
        """(L,), share of images of other labels to which a level's patches give the target."""
        images, generator = part.images[part.answers.argmax(dim=1) != target_label], generator_of(seed)
        found = []
        for level in range(len(self.generators)):
            stamped = stamp(images, self.sample(len(images), level, generator), generator)
            found.append((logits(predictor, stamped).argmax(dim=1) == target_label).float().mean())
        return torch.stack(found)


def model_triggers(
    answers: nn.Module,
    images: Tensor,
    target_label: int,
    stamp: Stamp,
    settings: Mesa,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
    name: str = "gdm",
) -> Staircase:
    """Learn the distribution of the triggers that send images to a label.

    Args:
        answers: The model, differentiable and on the engine's device: images (B, C, H, W) in [0, 1] to logits (B, M).
        images: (N, C, H, W), in [0, 1], clean, that don't get the label.
        target_label: Which.
        stamp: Where triggers lie, and how large they are.
        settings: How.
        engine: Where.
        seed: Of first weights and draws.
        checkpoints: Written now and then, and gone on from.
        progress: Told how far it is.
        name: Of the checkpoints.

    Raises:
        ModelError: The model has no gradients.
    """
    generators = tuple(
        _learn(answers, images, target_label, stamp, settings, number, engine, seed, checkpoints, progress, f"{name}-{number}")
        for number in range(len(settings.levels))
    )
    return Staircase(generators, (stamp.shape[0], *stamp.place[2:]), settings.noise, settings.blur)


@final
class _Level:
    """The networks of one level, and their steps."""

    def __init__(self, beta: float, size: int, settings: Mesa, engine: Engine, seed: int) -> None:
        self.beta, self.settings, self.engine = beta, settings, engine
        with torch.random.fork_rng(devices=[]):  # first weights draw from the global generator
            torch.manual_seed(seed)
            self.patches = engine.place(PatchGenerator(settings.noise, settings.hidden, size))
            self.statistics = engine.place(Statistics(settings.noise, settings.hidden, size))
        self.modules = {"patches": self.patches, "statistics": self.statistics}
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=settings.rate, betas=_BETAS) for name, module in self.modules.items()
        }
        self.usual = 0.0  # running mean of E exp T; 0 before the first step

    def step(self, answers: nn.Module, images: Tensor, target_label: int, stamp: Stamp, generator: torch.Generator) -> None:
        """One of both networks, on images (B, C, H, W)."""
        draws = torch.rand(2, len(images), self.settings.noise, generator=generator)
        noise, other = draws.to(self.engine.device)
        made = _blurred(self.patches(noise), self.settings.blur, generator)
        stamped = stamp(images.to(self.engine.device), made.view(-1, stamp.shape[0], *stamp.place[2:]), generator)
        reached = _probability(answers, stamped, target_label, self.engine)
        joint, apart = _expectations(self.statistics, made, noise, other)
        self._descend("patches", (self.beta - reached).clamp_min(0.0).mean() - self.settings.alpha * (joint - apart.log()))
        joint, apart = _expectations(self.statistics, made.detach(), noise, other)
        mean = float(apart.detach())
        self.usual = self.usual + _SLOWLY * (mean - self.usual) if self.usual else mean
        self._descend("statistics", apart / self.usual - joint)  # by its running mean: the gradient of log E exp T, less biased

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward(inputs=list(self.modules[name].parameters()))
        self.optimizers[name].step()


def _learn(
    answers: nn.Module,
    images: Tensor,
    target_label: int,
    stamp: Stamp,
    settings: Mesa,
    number: int,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None,
    progress: Progress,
    name: str,
) -> PatchGenerator:
    """The generator of one level."""
    size = stamp.shape[0] * stamp.place[2] * stamp.place[3]
    level = _Level(settings.levels[number], size, settings, engine, seed * 1_000_003 + number)
    first, saved = 0, time.monotonic()
    found = None if checkpoints is None else checkpoints.load(name, level.modules, level.optimizers)
    if found is not None:
        first, level.usual = found[0], found[2]["usual"]
    for step in range(first, settings.steps):
        generator = generator_of(seed, number * settings.steps + step + 1)
        rows = torch.randint(0, len(images), (settings.batch,), generator=generator)
        level.step(answers, images[rows], target_label, stamp, generator)
        last = step + 1 == settings.steps
        if checkpoints is not None and (last or time.monotonic() - saved > _BETWEEN):
            checkpoints.save(name, step + 1, level.modules, level.optimizers, facts={"usual": level.usual})
            saved = time.monotonic()
        progress("modelling triggers", number * settings.steps + step + 1, len(settings.levels) * settings.steps)
    return level.patches.eval().requires_grad_(False)


def _probability(answers: nn.Module, images: Tensor, target_label: int, engine: Engine) -> Tensor:
    """Of the target label, (B,), with gradients."""
    try:
        with engine.autocast():
            found: Tensor = answers(images)
    except ModelError:
        raise
    except Exception as error:  # foreign code
        raise ModelError(f"the model can't be run for gradients: {one_line(error)}") from error
    return found.float().softmax(dim=1)[:, target_label]


def _expectations(statistics: Statistics, patches: Tensor, noise: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """E T of patches with their noise, and E exp T of patches with other noise."""
    values = statistics(patches, other)
    return statistics(patches, noise).mean(), (values.logsumexp(dim=0) - math.log(len(values))).exp()


def _blurred(patches: Tensor, blur: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(patches.shape, generator=generator).to(patches.device)
    return (patches + blur * noise).clamp(0.0, 1.0)


def generator_of(seed: int, number: int = 0) -> torch.Generator:
    """For the draws of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
