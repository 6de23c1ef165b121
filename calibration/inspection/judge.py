"""What verdicts on triggers rest on: do they work on images that the search has not seen, and on a clean model of the task?

The rules are in `mask_verdicts` and `patch_verdicts`. A reference that has not learnt the task speaks for nothing: then nothing
is said of the model.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from calibration.accuracy import near_chance
from calibration.checkpoints import Checkpoints
from calibration.data import Progress
from calibration.engine import Engine
from calibration.inspection.passes import says
from calibration.inspection.reference import train_reference
from calibration.inspection.strengthening import strengthen
from calibration.inspection.triggers import Triggers
from guard.errors import InspectionError

TRANSFERS = 0.3
"""Success on the reference, by which a trigger is natural."""

MORE_IMAGES = "add images of every class"
"""What to do where too few can tell."""

_FEWEST_JUDGED = 10  # images
_COMPARING = "a label stands out: a clean model of the task is searched, too"


@final
class Judge:
    """Asks a model what triggers do, and a clean reference of its task, which is trained when it is first asked for.

    Args:
        answers: The model, see `recover_triggers`.
        classes: M.
        searched: (N, C, H, W), in [0, 1], clean: what searches see.
        labels: (N,), int64, of these; None where they are unknown.
        held_out: (K, C, H, W), likewise, what they do not see.
        seed: Of all draws.
        engine: Where.
        checkpoints: Of the searches.
        progress: Told how far it is.
    """

    def __init__(
        self,
        answers: nn.Module,
        classes: int,
        searched: Tensor,
        labels: Tensor | None,
        held_out: Tensor,
        seed: int,
        engine: Engine,
        checkpoints: Checkpoints | None,
        progress: Progress,
    ) -> None:
        self.answers, self.classes, self.searched, self.held_out = answers, classes, searched, held_out
        self.seed, self.engine, self.checkpoints, self.progress = seed, engine, checkpoints, progress
        self.own, self.own_searched = (says(answers, images, engine.device) for images in (held_out, searched))
        self.known = self.own_searched if labels is None else labels
        self.few: list[str] = []
        self._trained: nn.Module | None = None
        self.agreement: float | None = None

    def success(self, triggers: Triggers, row: int) -> float:
        """Share of images that one of them sends to its label, of those that the search has not seen."""
        return self._share(self.answers, triggers, row, self._others(triggers, row))

    def success_on_reference(self, triggers: Triggers, row: int) -> float:
        """The same in the clean reference, of images that it does not give that label anyway.

        Raises:
            InspectionError: It knows too little of the task.
        """
        reference, images = self.reference(), self._others(triggers, row)
        images = images[says(reference, images, self.engine.device) != triggers.labels[row]]
        if not len(images):
            raise InspectionError(
                f"expected a clean reference that tells images from those of label {int(triggers.labels[row])}, got one that "
                f"gives it to all: {MORE_IMAGES}"
            )
        return self._share(reference, triggers, row, images)

    def reference(self) -> nn.Module:
        """A clean model of the task, trained when it is first asked for.

        Raises:
            InspectionError: It has not learnt the task.
        """
        if self._trained is None:
            self.progress(_COMPARING, 1, 1)
            self._trained = train_reference(
                self.searched, self.known, self.classes, self.seed, self.engine, self.progress, self.checkpoints
            )
            answers = says(self._trained, self.held_out, self.engine.device)
            self.agreement = float((answers == self.own).double().mean())
        if self.agreement is not None and near_chance(self.agreement, self.classes):
            raise InspectionError(
                "a label stands out, but whether that is natural can't be told: the clean reference gives "
                f"{self.agreement:.0%} of images that it has not learnt the model's answer, near chance: {MORE_IMAGES}"
            )
        return self._trained

    def strengthened(self, triggers: Triggers, rows: list[int]) -> Triggers:
        """The triggers, of which some are made to work better."""
        if not rows:
            return triggers
        chosen = triggers.select(rows)
        return triggers.replace(rows, strengthen(self.answers, self.searched, chosen, self.seed, self.engine, self.progress))

    def thinly(self) -> str:
        """What was judged by few images, in words."""
        if not self.few:
            return ""
        return (
            f"Fewer than {_FEWEST_JUDGED} images that the search had not seen could tell whether the triggers of "
            f"{', '.join(dict.fromkeys(self.few))} work, so that those it had seen were asked, too: add images of every class."
        )

    def _others(self, triggers: Triggers, row: int) -> Tensor:
        """Images that the search has not seen; where these are too few to judge by, those that it has seen, too."""
        label, source = int(triggers.labels[row]), int(triggers.sources[row])

        def wanted(own: Tensor) -> Tensor:
            return (own != label) & ((own == source) if source >= 0 else (own >= 0))

        found = self.held_out[wanted(self.own)]
        if len(found) >= _FEWEST_JUDGED:
            return found
        self.few.append(str(label) if source < 0 else f"{source} to {label}")
        return torch.cat([found, self.searched[wanted(self.own_searched)]])

    def _share(self, answers: nn.Module, triggers: Triggers, row: int, images: Tensor) -> float:
        found = says(answers, triggers.put_on(row, images), self.engine.device)
        return float((found == triggers.labels[row]).double().mean())
