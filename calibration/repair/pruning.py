"""Pruning by a recovered trigger: silence the neurons that it excites until it no longer works.

Neurons go in order of the gap between their mean activation on triggered and on clean images, the largest first, and no more of
them than it takes: the trigger succeeds on no more images than a limit, or than get its label anyway. Of several triggers one
after the other is pruned, on what the ones before have left.

The paper prunes the second-to-last layer, and found that the last convolution costs less accuracy. Pruning is as good as the
recovered trigger is like the true one: Trojan's neurons mostly stay, while unlearning removes it. Where a model passes the last
convolution by, as residual networks do, all of its channels may not be enough.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor

from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy, trainable
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import Part, Parts
from guard import Predictor
from guard.errors import RepairError
from guard.predictors.activations import Layer, activations, silence
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend

_AT_ONCE = 256
_STRIDES = 32  # of a layer's channels, in which it is searched; then within one of them


class Pruning(msgspec.Struct, frozen=True, kw_only=True):
    """How to prune.

    Attributes:
        layer: Whose neurons: `last_convolution`, or the paper's `penultimate`.
        limit: Share of images on which a trigger may still work; where more of them get its label without it, so many.
    """

    layer: Layer = "last_convolution"
    limit: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 <= self.limit < 1.0:
            raise RepairError(f"expected a limit of 0 or more and less than 1, a share of the images, got {self.limit}")


@final
@dataclass(frozen=True)
class Pruned:
    """What was silenced; shares are of the stopping part.

    Attributes:
        channels: Neurons or channels, in the order in which they were chosen.
        total: How many the layer has.
        accuracy_before: Of the copy as it came.
        accuracy_after: Right after pruning.
        success_before: Of each trigger, images on which it worked.
        success_after: Of each trigger, images on which it still works.
    """

    channels: tuple[int, ...]
    total: int
    accuracy_before: float
    accuracy_after: float
    success_before: tuple[float, ...] = ()
    success_after: tuple[float, ...] = ()


def repair_by_pruning(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    triggers: Triggers,
    settings: Pruning,
    engine: Engine,
    progress: Progress = no_progress,
) -> Pruned:
    """Silence a copy's neurons in place until no trigger works; nothing is drawn, and nothing takes long.

    Args:
        copied: The copy.
        original: The model.
        clean: Cut; the tuning part says which neurons, the stopping part how many.
        triggers: Those that were recovered, to be unlearnt.
        settings: How.
        engine: Where.
        progress: Told how far it is.

    Raises:
        ModelError: The model's layers can't be watched or silenced.
        RepairError: No trigger to prune by, no image to put it on, or one that works with the whole layer silent.
    """
    if len(triggers) == 0:
        raise RepairError("expected a recovered trigger to prune by, got none: inspect the model first")
    copy = Prunable(copied, settings.layer, clean.stopping.images, engine)
    tests = [_Test.of(original, clean.stopping, triggers, row) for row in range(len(triggers))]
    accuracy, before = accuracy_of(copied.predictor, clean.stopping), tuple(test.success(copied.predictor) for test in tests)
    chosen: list[int] = []
    for row, test in enumerate(tests):
        chosen += _prune(copy, chosen, clean.tuning, triggers, row, test, settings, progress)
    return Pruned(
        tuple(chosen),
        copy.total,
        accuracy,
        accuracy_of(copied.predictor, clean.stopping),
        before,
        tuple(test.success(copied.predictor) for test in tests),
    )


def _prune(
    copy: Prunable,
    chosen: list[int],
    part: Part,
    triggers: Triggers,
    row: int,
    test: _Test,
    settings: Pruning,
    progress: Progress,
) -> list[int]:
    """Silence what one trigger needs, besides what was chosen before; what it needs."""
    images = part.images[_others(part, triggers, row)]
    if len(images) == 0:
        raise _none_to_put_it_on(triggers, row)
    gaps = copy.mean_activations(triggers.put_on(row, images)) - copy.mean_activations(images)
    order = [channel for channel in gaps.argsort(descending=True, stable=True).tolist() if channel not in chosen]
    limit = max(settings.limit, test.chance)

    def enough(count: int) -> bool:
        copy.silence(chosen + order[:count])
        progress("pruning", len(chosen) + count, copy.total)
        return test.success(copy.predictor) <= limit

    count = fewest(len(order), enough)
    if count is None:
        raise RepairError(
            f"expected a trigger that pruning can stop, got one (to label {int(triggers.labels[row])}) that works on "
            f"{test.success(copy.predictor):.0%} of the images with all {copy.total} channels of the {settings.layer} layer "
            "silent: unlearn it instead, or prune another layer"
        )
    copy.silence(chosen + order[:count])
    progress("pruning", copy.total, copy.total)
    return order[:count]


@final
@dataclass(frozen=True)
class _Test:
    """A trigger on images that it should not work on.

    Attributes:
        images: (N, C, H, W), triggered.
        label: That the trigger is for.
        chance: Share of these images to which the original gives that label without a trigger.
    """

    images: Tensor
    label: int
    chance: float

    @classmethod
    def of(cls, original: Predictor, part: Part, triggers: Triggers, row: int) -> _Test:
        """A row of the triggers on a part."""
        label, images = int(triggers.labels[row]), part.images[_others(part, triggers, row)]
        if len(images) == 0:
            raise _none_to_put_it_on(triggers, row)
        return cls(triggers.put_on(row, images), label, _share(original, images, label))

    def success(self, predictor: Predictor) -> float:
        """Share of the images that get the label."""
        return _share(predictor, self.images, self.label)


@final
class Prunable:
    """A copy whose channels can be silenced, and heard again.

    Args:
        copied: The copy.
        layer: Whose channels.
        images: (B, C, H, W), a few to see the model's layers by.
        engine: Where.

    Raises:
        ModelError: The model's layers can't be watched.
    """

    def __init__(self, copied: TrainableCopy, layer: Layer, images: Tensor, engine: Engine) -> None:
        backend = copied.predictor.backend
        self.predictor, self._layer, self._module = copied.predictor, layer, trainable(backend)
        rows = (backend.batch_size or 1) if isinstance(backend, ExportedBackend) else 1
        batch = torch.as_tensor(copied.predictor.spec.to_model(images[:1].expand(rows, -1, -1, -1)))
        if isinstance(backend, ModuleBackend):
            engine.place(self._module)
        self._batch = batch.to(copied.parameters[0].device)
        self.total = activations(self.predictor, images[:1], layer).shape[1]
        self._before = {name: value.detach().clone() for name, value in self._module.state_dict().items()}

    def silence(self, channels: Sequence[int]) -> None:
        """Silence these, and no others, in the copy as it came."""
        self._module.load_state_dict(self._before)
        self.keep_silent(channels)

    def keep_silent(self, channels: Sequence[int]) -> None:
        """Silence these in the copy as it is now."""
        silence(self._module, self._layer, torch.tensor(channels, dtype=torch.int64), self._batch)

    def mean_activations(self, images: Tensor, absolute: bool = False) -> Tensor:
        """(K,), of each channel, over images and places; of absolute values where that is asked for."""
        found = torch.zeros(self.total, dtype=torch.float64)
        for part in images.split(_AT_ONCE):
            values = activations(self.predictor, part, self._layer).double()
            values = values.abs() if absolute else values
            found += values.flatten(2).mean(dim=2).sum(dim=0) if values.ndim > 2 else values.sum(dim=0)
        return found / len(images)


def fewest(total: int, enough: Callable[[int], bool]) -> int | None:
    """How many of an order's first channels are enough, found by strides, then by halving; None where all are not.

    Args:
        total: Of the order.
        enough: Whether so many are.
    """
    stride, below = max(1, total // _STRIDES), 0
    if enough(0):
        return 0
    while below < total:
        above = min(below + stride, total)
        if enough(above):
            while above - below > 1:
                middle = (below + above) // 2
                below, above = (below, middle) if enough(middle) else (middle, above)
            return above
        below = above
    return None


def accuracy_of(predictor: Predictor, part: Part) -> float:
    """Share of a part's images that a model answers with their label."""
    answers = torch.cat([predictor(images).argmax(dim=1).cpu() for images in part.images.split(_AT_ONCE)])
    return float((answers == part.labels).double().mean())


def _share(predictor: Predictor, images: Tensor, label: int) -> float:
    answers = torch.cat([predictor(part).argmax(dim=1).cpu() for part in images.split(_AT_ONCE)])
    return float((answers == label).double().mean())


def _others(part: Part, triggers: Triggers, row: int) -> Tensor:
    """(N,), bool: the images that a trigger is for."""
    label, source = int(triggers.labels[row]), int(triggers.sources[row])
    return part.labels != label if source < 0 else part.labels == source


def _none_to_put_it_on(triggers: Triggers, row: int) -> RepairError:
    return RepairError(
        f"expected clean images of other labels to put the trigger to label {int(triggers.labels[row])} on, got none: "
        "add images of every class"
    )
