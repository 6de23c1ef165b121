"""Pruning by a recovered trigger: silence the neurons that it excites until it no longer works.

The paper silences neurons in the order of the gap between their mean activation on triggered and on clean images, and found
that those of the last convolution cost less accuracy than those of the second-to-last layer. Ours are those of the last
convolution, too, one by one as the next layer takes them (`features`): where a patch has its place, it has neurons of its own,
which clean images hardly need, while whole channels serve everything. Their order is by what they add to the trigger's success
for what they add on clean images: the gap times the gradient of the target's lead, over the same of the clean activation.

The recovered trigger is weaker than the attacker's. So, beyond the fewest neurons that stop it, up to four times as many go,
as long as that costs no more than half a point of accuracy on all images at hand: those that stop are too few to tell. Of
several triggers one after the other is pruned, on what the ones before have left.

A model that is often wrong gives the trigger's label to an image here and there, trigger or not. To be rid of the last of them
may take most of the layer. Where that costs clearly more accuracy than a repair may, fewer neurons go, if they nearly stop the
trigger.

Where a model passes the last convolution by, all of its neurons may not be enough.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor

from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import Part, Parts
from calibration.repair.prunable import AT_ONCE, Prunable, accuracy_of
from guard import Predictor
from guard.errors import RepairError
from guard.predictors.activations import Layer

_STRIDES = 32  # of a layer's neurons, in which it is searched; then within one of them
_MORE = (4.0, 3.5, 3.0, 2.5, 2.0, 1.5)  # times the fewest
_COST = 0.005  # of accuracy, that these may cost
_NEARLY = 0.05  # of the images beyond the limit: a trigger that works on more of them is not stopped
_SURE = 1.64  # standard errors


class Pruning(msgspec.Struct, frozen=True, kw_only=True):
    """How to prune.

    Attributes:
        layer: Whose neurons: `features`, whole channels of the `last_convolution`, or the paper's `penultimate`.
        limit: Share of images on which a trigger may still work; where more of them get its label without it, so many.
        budget: Points of accuracy that all triggers together may cost, of neurons one by one: where stopping one takes clearly
            more on the images at hand, fewer that nearly stop it are looked for.
    """

    layer: Layer = "features"
    limit: float = 0.01
    budget: float = 3.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 <= self.limit < 1.0:
            raise RepairError(f"expected a limit of 0 or more and less than 1, a share of the images, got {self.limit}")
        if not 0.0 <= self.budget <= 100.0:
            raise RepairError(f"expected a budget of 0 to 100 points of accuracy, got {self.budget}")


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
    untouched = accuracy_of(copied.predictor, clean.tuning, clean.stopping)
    chosen: list[int] = []
    for row, test in enumerate(tests):
        chosen += _prune(copy, chosen, clean, triggers, row, test, settings, untouched, progress)
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
    clean: Parts,
    triggers: Triggers,
    row: int,
    test: _Test,
    settings: Pruning,
    untouched: float,
    progress: Progress,
) -> list[int]:
    """Silence what one trigger needs, besides what was chosen before; what it needs."""
    images = clean.tuning.images[_others(clean.tuning, triggers, row)]
    if len(images) == 0:
        raise _none_to_put_it_on(triggers, row)
    triggered = triggers.put_on(row, images)
    copy.silence(chosen)
    if settings.layer == "features":
        scores = copy.scores(images, triggered, int(triggers.labels[row]))
    else:  # as in the paper
        scores = copy.mean_activations(triggered) - copy.mean_activations(images)
    order = [neuron for neuron in scores.argsort(descending=True, stable=True).tolist() if neuron not in chosen]
    useful = sum(float(scores[neuron]) > 0.0 for neuron in order)
    limit = max(settings.limit, test.chance)

    def works(count: int) -> float:
        copy.silence(chosen + order[:count])
        progress("pruning", len(chosen) + count, copy.total)
        return test.success(copy.predictor)

    def enough(count: int) -> bool:
        return works(count) <= limit

    def right(count: int) -> float:
        copy.silence(chosen + order[:count])
        return accuracy_of(copy.predictor, clean.tuning, clean.stopping)

    count = fewest(len(order), enough)
    if count is None:
        raise RepairError(
            f"expected a trigger that pruning can stop, got one (to label {int(triggers.labels[row])}) that works on "
            f"{test.success(copy.predictor):.0%} of the images with all {copy.total} neurons of {settings.layer} "
            "silent: unlearn it instead, or prune another layer"
        )
    if settings.layer == "features":
        budget, kept = settings.budget / 100.0, right(count)
        lost = untouched - kept
        if lost - _SURE * math.sqrt(max(0.0, lost) / (len(clean.tuning.labels) + len(clean.stopping.labels))) > budget:
            count = cheaper(count, works, lambda fewer: untouched - right(fewer) <= budget, limit + _NEARLY)
        else:
            count = _more(count, useful, enough, lambda more: right(more) >= kept - _COST)
    copy.silence(chosen + order[:count])
    progress("pruning", copy.total, copy.total)
    return order[:count]


def _more(count: int, useful: int, enough: Callable[[int], bool], affordable: Callable[[int], bool]) -> int:
    """More neurons, as many times the fewest as cost next to nothing: the attacker's trigger is stronger."""
    for times in _MORE:
        more = min(int(times * count), useful)
        if more > count and enough(more) and affordable(more):
            return more
    return count


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


def cheaper(count: int, works: Callable[[int], float], affordable: Callable[[int], bool], most: float) -> int:
    """Fewer of an order's channels, that nearly stop a trigger at a bearable price; all of them where none do.

    Args:
        count: All of them.
        works: Share of the images on which the trigger works without so many.
        affordable: Whether so many may go.
        most: Of that share.
    """
    stride = max(1, count // _STRIDES)
    shares = {fewer: works(fewer) for fewer in range(stride, count, stride)}
    nearly = sorted((share, fewer) for fewer, share in shares.items() if share <= most)
    return next((fewer for _, fewer in nearly if affordable(fewer)), count)


def _share(predictor: Predictor, images: Tensor, label: int) -> float:
    answers = torch.cat([predictor(part).argmax(dim=1).cpu() for part in images.split(AT_ONCE)])
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
