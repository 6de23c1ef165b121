"""Fine-pruning: silence channels that clean images leave dormant, then fine-tune what is left.

Channels of the last convolution go in increasing order of their mean activation on clean images, until one more would cost more
accuracy than a budget: a trigger's channels may lie dormant there. Fine-tuning on clean images then wins accuracy back; pruned
channels stay silent in it. Where a convolution has no activation function behind it, as before a shortcut is added, the mean is
that of absolute values (ours).

A trigger that shares its channels with clean images survives pruning, and a budget does not see that; what fine-tuning does
is another thing, see `plain_fine_tuning`.

References: Liu et al., Fine-Pruning, arXiv:1805.12185; the budget of 4 points as in Zeng et al., GYM, arXiv:2012.07006.
"""

from __future__ import annotations

import msgspec
import torch

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import Parts
from calibration.repair.plain_fine_tuning import FineTuning, repair_by_fine_tuning
from calibration.repair.prunable import Prunable, accuracy_of
from calibration.repair.pruning import Pruned, fewest
from guard import Predictor
from guard.errors import RepairError

_ROUNDING = 1e-9


class FinePruning(msgspec.Struct, frozen=True, kw_only=True):
    """How to prune and fine-tune.

    Attributes:
        budget: Points of accuracy on the stopping part that pruning may cost.
        fine_tuning: Afterwards.
    """

    budget: float = 4.0
    fine_tuning: FineTuning = FineTuning()

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 <= self.budget <= 100.0:
            raise RepairError(f"expected a budget of 0 to 100 points of accuracy, got {self.budget}")


def repair_by_fine_pruning(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    settings: FinePruning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Pruned:
    """Prune and fine-tune a copy in place.

    Args:
        copied: The copy.
        original: The model.
        clean: Cut.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after pruning and after each epoch, and gone on from.
        progress: Told how far it is.

    Returns:
        What was pruned; its figures are from before fine-tuning.

    Raises:
        ModelError: The model can't be trained, or its layers can't be watched or silenced.
    """
    copy = Prunable(copied, "last_convolution", clean.stopping.images, engine)
    pruned = _resumed(checkpoints, copy.total) or _prune(copy, clean, settings.budget, progress)
    if checkpoints is not None:
        accuracies = {"before": pruned.accuracy_before, "after": pruned.accuracy_after}
        checkpoints.save("pruned", 0, arrays={"channels": torch.tensor(pruned.channels, dtype=torch.int64)}, facts=accuracies)
    copy.silence(pruned.channels)
    repair_by_fine_tuning(
        copied,
        original,
        clean,
        settings.fine_tuning,
        engine,
        seed,
        checkpoints,
        progress,
        after_step=lambda: copy.keep_silent(pruned.channels),
    )
    return pruned


def _prune(copy: Prunable, clean: Parts, budget: float, progress: Progress) -> Pruned:
    order = copy.mean_activations(clean.tuning.images, absolute=True).argsort(stable=True).tolist()
    before = accuracy_of(copy.predictor, clean.stopping)

    def too_many(count: int) -> bool:
        copy.silence(order[:count])
        progress("pruning", count, copy.total)
        return before - accuracy_of(copy.predictor, clean.stopping) > budget / 100.0 + _ROUNDING

    count = (fewest(copy.total - 1, too_many) or copy.total) - 1
    copy.silence(order[:count])
    progress("pruning", copy.total, copy.total)
    return Pruned(tuple(order[:count]), copy.total, before, accuracy_of(copy.predictor, clean.stopping))


def _resumed(checkpoints: Checkpoints | None, total: int) -> Pruned | None:
    found = None if checkpoints is None else checkpoints.load("pruned")
    if found is None:
        return None
    _, arrays, facts = found
    return Pruned(tuple(arrays["channels"].tolist()), total, facts["before"], facts["after"])
