"""CycleGAN between clean and quarantined images: G puts the trigger on, F takes it off, without a pair to learn from.

    L = lambda L_cyc(G, F) + L_GAN(G, D_Y) + L_GAN(F, D_X),   L_cyc = E|F(G(x)) - x|_1 + E|G(F(y)) - y|_1

The adversarial losses are least squares, as in CycleGAN's own code. Generators start as the identity and learn a change to the
image; they and the discriminators see each pixel's coordinates (CoordConv), because a trigger has its place.

References: Zhu et al., CycleGAN, arXiv:1703.10593; Liu et al., CoDefend, equations (5) to (7); Liu et al., CoordConv,
arXiv:1807.03247.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import arrange

_LARGE = 64  # pixels; larger images get networks that look at them from further away
_HISTORY = 50  # generated images that the discriminators see again
_LOOK = 5  # epochs between looks at whether the generators are good enough
_AT_ONCE = 64

Watch = Callable[["CycleGan"], bool]
"""Asked now and then whether the generators are good enough for the rate to fall."""


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """How to train.

    Attributes:
        epochs: Passes over the larger of the two sets, at most. The rate is constant for the first half, and falls to 0 in the
            second; where the generators are good enough before the middle, it falls at once, over as many epochs again.
        rate: Of Adam, with a first beta of 0.5.
        batch: Images of each kind a step.
        cycle: lambda, the weight of the cycle loss.
        width: Channels of the first layers.
        blocks: Residual blocks of a generator.
    """

    epochs: int = 200
    rate: float = 2e-4
    batch: int = 10
    cycle: float = 10.0
    width: int = 24
    blocks: int = 3


@final
@dataclass(frozen=True)
class CycleGan:
    """Both generators.

    Attributes:
        put_on: G, clean images to triggered ones.
        take_off: F, triggered images to clean ones.
    """

    put_on: Generator
    take_off: Generator

    @classmethod
    def untrained(cls, shape: tuple[int, int, int], training: Training) -> CycleGan:
        """Generators for images of this (C, H, W), which change nothing yet."""
        halvings = 2 if max(shape[1:]) > _LARGE else 1
        return cls(*(Generator(shape[0], training.width, training.blocks, halvings) for _ in range(2)))


def apply(generator: Generator, images: Tensor, engine: Engine | None = None) -> Tensor:
    """Change images, in batches and without gradients; (B, C, H, W) in [0, 1]."""
    device = torch.device("cpu") if engine is None else engine.device
    with torch.inference_mode():
        parts = [generator(part.to(device)).float().cpu() for part in images.split(_AT_ONCE)]
    return torch.cat(parts).clone()


def train(
    clean: Tensor,
    quarantined: Tensor,
    training: Training,
    engine: Engine,
    seed: int,
    watch: Watch = lambda _: False,
    checkpoints: Checkpoints | None = None,
    name: str = "cyclegan",
    progress: Progress = no_progress,
) -> CycleGan:
    """Learn what tells two sets of images apart, and how to change one into the other.

    Args:
        clean: (N, C, H, W), in [0, 1].
        quarantined: (M, C, H, W); that some of them are clean does no harm.
        training: How.
        engine: Where.
        seed: Of first weights and batches.
        watch: Asked now and then whether the generators are good enough.
        checkpoints: Written after each epoch, and gone on from.
        name: Of the checkpoint.
        progress: Told how far it is.

    Returns:
        The generators, on the engine's device, in eval mode.
    """
    shape = (int(clean.shape[1]), int(clean.shape[2]), int(clean.shape[3]))
    with torch.random.fork_rng(devices=[]):  # first weights draw from the global generator
        torch.manual_seed(seed)
        gan = CycleGan.untrained(shape, training)
        critics = Critics(shape, training.width)
    cycles = Cycles(gan)
    for module in (cycles, critics):
        arrange(engine.place(module), torch.channels_last)
    step = _Step(cycles, critics, training, engine)
    modules, optimizers = {"cycles": cycles, "critics": critics}, step.optimizers
    found = None if checkpoints is None else checkpoints.load(name, modules, optimizers)
    epoch, turned = 0, 0  # turned: after which epoch the rate began to fall
    if found is not None:
        epoch, arrays, facts = found
        turned = int(facts["turned"])
        step.history = {name: list(images) for name, images in arrays.items()}
    half = (training.epochs + 1) // 2

    def last() -> int:
        """The rate falls for as long as it stayed, but not for longer than was asked for."""
        return min(2 * turned, training.epochs) if turned else training.epochs

    while epoch < last():
        rate = training.rate * (1.0 if not turned else 1.0 - (epoch - turned) / (last() - turned))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1)
        for x, y in _batches(clean, quarantined, training.batch, generator):
            step(x, y, rate, generator)
        epoch += 1
        if not turned and (epoch >= half or (epoch % _LOOK == 0 and engine.agree(float(watch(gan))) >= 0.5)):
            turned = epoch
        if checkpoints is not None:
            arrays = {name: torch.stack(images) for name, images in step.history.items() if images}
            checkpoints.save(name, epoch, modules, optimizers, arrays, {"turned": turned})
        progress("learning the trigger", epoch, last())
    cycles.eval().requires_grad_(False)
    return gan


def _batches(clean: Tensor, quarantined: Tensor, batch: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """One epoch: every image of the larger set once, those of the smaller one as often as it takes."""
    steps = -(-max(len(clean), len(quarantined)) // batch)

    def rows(count: int) -> Tensor:
        rounds = -(-steps * batch // count)
        return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[: steps * batch]

    pairs = zip(rows(len(clean)).split(batch), rows(len(quarantined)).split(batch), strict=True)
    return [(clean[first], quarantined[second]) for first, second in pairs]


@final
class _Step:
    """One step of both games."""

    def __init__(self, cycles: Cycles, critics: Critics, training: Training, engine: Engine) -> None:
        self._training, self._engine, self._own_critics = training, engine, critics

        def adam(module: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(module.parameters(), lr=training.rate, betas=(0.5, 0.999))

        self.optimizers = {"cycles": adam(cycles), "critics": adam(critics)}
        self._cycles, self._cycles_optimizer = engine.setup(cycles, self.optimizers["cycles"])
        self._critics, self._critics_optimizer = engine.setup(critics, self.optimizers["critics"])
        self.history: dict[str, list[Tensor]] = {"x": [], "y": []}

    def __call__(self, x: Tensor, y: Tensor, rate: float, generator: torch.Generator) -> None:
        """Train the generators on a batch of each kind, then the discriminators.

        Args:
            x: (B, C, H, W), clean.
            y: (B, C, H, W), quarantined.
            rate: Learning rate.
            generator: Draws from the history.
        """
        x, y = self._place(x), self._place(y)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        self._own_critics.requires_grad_(False)
        self._cycles_optimizer.zero_grad(set_to_none=True)
        fake_y, fake_x, back_x, back_y = self._cycles(x, y)
        with self._engine.autocast():
            fooled = self._own_critics.fooled(fake_x, fake_y)
        cycle = (back_x.float() - x).abs().mean() + (back_y.float() - y).abs().mean()
        self._engine.backward(fooled + self._training.cycle * cycle)
        self._cycles_optimizer.step()
        self._own_critics.requires_grad_(True)
        self._critics_optimizer.zero_grad(set_to_none=True)
        seen = (self._seen("x", fake_x, generator), self._seen("y", fake_y, generator))
        self._engine.backward(self._critics(x, seen[0], y, seen[1]) / 2.0)
        self._critics_optimizer.step()

    def _place(self, images: Tensor) -> Tensor:
        share = self._engine.share(images)
        return share.to(self._engine.device).contiguous(memory_format=torch.channels_last)

    def _seen(self, name: str, images: Tensor, generator: torch.Generator) -> Tensor:
        """Half of the images are exchanged for earlier ones, so that the discriminators don't forget (Shrivastava et al.)."""
        kept, shown = self.history[name], []
        for image in images.detach().float().cpu():  # the history stays there, as a checkpoint has it
            if len(kept) < _HISTORY:
                kept.append(image)
                shown.append(image)
            elif float(torch.rand((), generator=generator)) < 0.5:
                place = int(torch.randint(0, _HISTORY, (), generator=generator))
                shown.append(kept[place])
                kept[place] = image
            else:
                shown.append(image)
        return torch.stack([image.to(images.device) for image in shown]).contiguous(memory_format=torch.channels_last)


@final
class Cycles(nn.Module):
    """Both generators, there and back."""

    def __init__(self, gan: CycleGan) -> None:
        super().__init__()
        self.put_on, self.take_off = gan.put_on, gan.take_off

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """G(x), F(y), F(G(x)), G(F(y))."""
        fake_y, fake_x = self.put_on(x), self.take_off(y)
        return fake_y, fake_x, self.take_off(fake_y), self.put_on(fake_x)


@final
class Critics(nn.Module):
    """Both discriminators, with the least-squares loss."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        halvings = 3 if max(shape[1:]) > _LARGE else 2
        self.of_x, self.of_y = discriminator(shape[0], width, halvings), discriminator(shape[0], width, halvings)

    def forward(self, x: Tensor, fake_x: Tensor, y: Tensor, fake_y: Tensor) -> Tensor:
        """Their own loss."""
        opinions = [(self.of_x, x, 1.0), (self.of_x, fake_x, 0.0), (self.of_y, y, 1.0), (self.of_y, fake_y, 0.0)]
        return torch.stack([_distance(critic, images, wanted) for critic, images, wanted in opinions]).sum()

    def fooled(self, fake_x: Tensor, fake_y: Tensor) -> Tensor:
        """The generators' adversarial loss."""
        return _distance(self.of_x, fake_x, 1.0) + _distance(self.of_y, fake_y, 1.0)


def _distance(critic: nn.Module, images: Tensor, wanted: float) -> Tensor:
    opinion: Tensor = critic(with_coordinates(2.0 * images - 1.0))
    return (opinion.float() - wanted).square().mean()


@final
class Generator(nn.Module):
    """Images to changed images, (B, C, H, W) in [0, 1]; the identity before any training.

    Args:
        channels: C.
        width: Channels of the first layer.
        blocks: Residual blocks.
        halvings: How often the size is halved on the way in: 1 for images of up to 64 pixels, 2 for larger ones.
    """

    def __init__(self, channels: int, width: int, blocks: int, halvings: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels + 2, width, 5, padding=2), _norm(width), nn.ReLU()]
        for _ in range(halvings):
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), _norm(2 * width), nn.ReLU()]
            width *= 2
        layers += [_Residual(width) for _ in range(blocks)]
        for _ in range(halvings):
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width // 2, 3, padding=1), _norm(width // 2), nn.ReLU()]
            width //= 2
        self.body = nn.Sequential(*layers)
        self.last = nn.Conv2d(width, channels, 5, padding=2)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Change images, (B, C, H, W) in [0, 1]."""
        height, width = images.shape[-2:]
        change = 2.0 * torch.tanh(self.last(self.body(with_coordinates(2.0 * images - 1.0))))
        return (images + change[..., :height, :width]).clamp(0.0, 1.0)


@final
class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), _norm(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), _norm(width)
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = features + self.body(features)
        return out


def discriminator(channels: int, width: int, halvings: int = 2) -> nn.Sequential:
    """A PatchGAN: (B, C + 2, H, W) with coordinates to (B, 1, h, w), one opinion a patch; 1 is real.

    Args:
        channels: C.
        width: Channels of the first layer.
        halvings: 2 for images of up to 64 pixels, 3 for larger ones.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels + 2, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for _ in range(halvings - 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), _norm(2 * width), nn.LeakyReLU(0.2)]
        width *= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))


def with_coordinates(images: Tensor) -> Tensor:
    """Two more channels: each pixel's x and y, from -1 to 1."""
    count, _, height, width = images.shape
    y = torch.linspace(-1.0, 1.0, height, device=images.device, dtype=images.dtype).view(1, 1, -1, 1)
    x = torch.linspace(-1.0, 1.0, width, device=images.device, dtype=images.dtype).view(1, 1, 1, -1)
    return torch.cat([images, x.expand(count, 1, height, width), y.expand(count, 1, height, width)], dim=1)


def _norm(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, affine=True)
