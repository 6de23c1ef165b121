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

from collections.abc import Callable

import torch
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.batch_norm import batch_statistics
from calibration.repair.dhbe_game import DhbeOutcome, Game
from calibration.repair.dhbe_settings import Dhbe
from calibration.repair.epochs import check_gradients, play_epochs
from guard import Predictor
from guard.errors import RepairError


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
    check_gradients(spec)
    if settings.patch > min(spec.height, spec.width):
        raise RepairError(f"expected a patch of at most {min(spec.height, spec.width)} pixels, got {settings.patch}")
    game = Game(copied, original, settings, engine, seed)

    def play(epoch: int) -> Tensor:
        with batch_statistics(game.student, settings.batch_statistics):
            return game.play(epoch, torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1))

    advice = f"lower the rate {settings.rate:g}, or use another method"
    play_epochs(game, play, "dhbe", settings.epochs, advice, checkpoints, progress, watch)
    return game.outcome(torch.Generator().manual_seed(seed * 1_000_003))
