"""What erasing on drawings asks of the copy: which answers, and how far it is from them.

It learns by DHBE's distance, of answers to drawings as they are and with a patch:

    |s(x) - t'(x)| + w |s(x + p) - t'(x + p)|

t'(x) is the original's answer, unless that is a label which patches reach far more easily than most, and hangs on what the
drawing happens to hold where they do so: then it is the answer without that window. So drawings that resemble the trigger don't
teach it once more, but teach to forget it.

t'(x + p) is t'(x), as DHBE has it, only where the patch is of such a label. A copy that is to overlook patches of every label
learns to overlook what is natural about them, and its accuracy suffers. So to any other patch it goes on to answer as the
original does, except that no label which may be a backdoor's gets more than in t'(x).

Reference: Yan et al., DHBE, arXiv:2306.08009.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from calibration.fine_tuning import Answers
from calibration.repair.dhbe_game import apart


@final
class Batch:
    """What a step needs; Fabric would round tensors that it sees to bfloat16, and does not look into this."""

    def __init__(self, images: Tensor, patched: Tensor, wanted: Tensor, wanted_patched: Tensor) -> None:
        self.images, self.patched, self.wanted, self.wanted_patched = images, patched, wanted, wanted_patched
        self.answers = wanted_patched  # of the patched ones, once they are known


@final
class Loss(nn.Module):
    """Of a copy's answers, (B, M) logits, with this w."""

    def __init__(self, answers: Answers, weight: float) -> None:
        super().__init__()
        self.answers, self._weight = answers, weight

    def forward(self, batch: Batch) -> Tensor:
        """`drawn_loss` of a batch, which is told the answers to what is patched."""
        count = len(batch.images)
        clean, patched = self.answers(torch.cat([batch.images, batch.patched])).float().split(count)
        batch.answers = patched.detach()
        return drawn_loss(clean, patched, batch.wanted, batch.wanted_patched, self._weight)


def drawn_loss(clean: Tensor, patched: Tensor, wanted: Tensor, wanted_patched: Tensor, weight: float) -> Tensor:
    """|s(x) - t'(x)| + w |s(x + p) - t'(x + p)|.

    Args:
        clean: (B, M), s(x), logits.
        patched: (B, M), s(x + p).
        wanted: (B, M), t'(x).
        wanted_patched: (B, M), t'(x + p).
        weight: w.
    """
    return apart(clean, wanted) + weight * apart(patched, wanted_patched)


def patched_answers(own: Tensor, wanted: Tensor, labels: Tensor, suspect: Tensor) -> Tensor:
    """t'(x + p), (B, M).

    Args:
        own: (B, M), the original's answers to the patched drawings.
        wanted: (B, M), t'(x).
        labels: (B,), int64, of the patches.
        suspect: (M,), bool, which may be a backdoor's.
    """
    capped = torch.where(suspect, torch.minimum(own, wanted), own)
    return torch.where(suspect[labels].unsqueeze(1), wanted, capped)
