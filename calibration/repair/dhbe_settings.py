"""How DHBE erases: the defaults of its paper and code, and what a model needs instead."""

from __future__ import annotations

from typing import Self

import msgspec
import torch
from torch import Tensor

from calibration.repair.epochs import share_of_rates
from guard.errors import RepairError
from guard.images import InputSpec

ALIKE = 0.4
"""Share of drawings with one answer from which on they can't stand for a model's images. Of scenes, models of photographs gave
0.2 to 0.3 one label (one model, 0.5), those of digits 0.5 to 0.8; of figures 0.2 (one, 0.45)."""

_USUAL_MEAN, _USUAL_STD = (0.5,), (0.25,)  # of images in [0, 1], where the model does not say
_SMALLEST, _LARGEST = 28, 64  # pixels a side, of the images that the authors' code has generators for
_MORE_DOUBLINGS, _FROM = 3, 48  # pixels
_RATE_WITHOUT_BATCH_NORM = 0.01


class Dhbe(msgspec.Struct, frozen=True, kw_only=True):
    """How to erase.

    Attributes:
        epochs: Of `iterations` each.
        iterations: Of `student_steps` steps of the student, and one of each generator.
        student_steps: See above.
        batch: Samples a step.
        rate: Of the student's SGD; a model without batch norm may bear a tenth of the default only, see `suited`.
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
        check_counts(self, "epochs", "iterations", "student_steps", "patch", "latent", "width")
        if self.batch < 2:
            raise RepairError(f"expected a batch of at least 2, whose statistics mean something, got {self.batch}")
        if self.doublings < 0:
            raise RepairError(f"expected doublings of at least 0, got {self.doublings}")
        if any(value <= 0.0 for value in self.std):
            raise RepairError(f"expected a positive std, got {self.std}")

    @classmethod
    def suited(cls, spec: InputSpec, batch_norm: bool) -> Self:
        """The defaults, or what a model needs instead.

        Args:
            spec: Of its images, which choose `doublings`.
            batch_norm: Whether it has any that can be switched, which chooses `rate`.

        Raises:
            RepairError: Its images are smaller or larger than any that the method was made for.
        """
        usual, sides = cls(), (spec.height, spec.width)
        check_size(spec)
        return msgspec.structs.replace(
            usual,
            rate=usual.rate if batch_norm else _RATE_WITHOUT_BATCH_NORM,
            doublings=_MORE_DOUBLINGS if max(sides) >= _FROM else usual.doublings,
        )

    def share_of_rates(self, done: float) -> float:
        """Of the first rates, when such a share of the iterations is done."""
        return share_of_rates(done, self.falls, self.fall)

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


def check_counts(settings: msgspec.Struct, *names: str) -> None:
    """Refuse settings that count something and are not positive.

    Raises:
        RepairError: It names the first one.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise RepairError(f"expected {name} of at least 1, got {getattr(settings, name)}")


def is_of_a_size(spec: InputSpec) -> bool:
    """Whether images are neither smaller nor larger than any that the method was made for."""
    return min(spec.height, spec.width) >= _SMALLEST and max(spec.height, spec.width) <= _LARGEST


def check_size(spec: InputSpec) -> None:
    """Refuse images of another size.

    Raises:
        RepairError: They are.
    """
    if not is_of_a_size(spec):
        raise RepairError(
            f"expected images of {_SMALLEST} to {_LARGEST} pixels a side for dhbe, got {spec.height}x{spec.width}: "
            "use another method, like gym, with --data"
        )
