"""Triggers as a mask and a pattern, (1 - m) x + m d, and what they are looked for, by whichever search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_EDGE = 1e-4  # of mask and pattern where a search begins: tanh has no gradient at its ends


@final
@dataclass(frozen=True)
class Goals:
    """What triggers are looked for.

    Attributes:
        labels: (K,), int64: to which label each trigger sends images.
        sources: (K,), int64: only images that the model gives this label are to be sent there; -1 for all images.
    """

    labels: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def all_labels(cls, classes: int) -> Goals:
        """To each label from everywhere."""
        return cls.of(torch.arange(classes))

    @classmethod
    def of(cls, labels: Tensor) -> Goals:
        """To these labels from everywhere."""
        return cls(labels, torch.full_like(labels, -1))

    @classmethod
    def pairs(cls, classes: int) -> Goals:
        """From each label to each other one; M (M - 1) of them, by target."""
        labels = torch.arange(classes).repeat_interleave(classes)
        sources = torch.arange(classes).repeat(classes)
        return cls(labels[labels != sources], sources[labels != sources])

    def select(self, rows: Tensor | slice) -> Goals:
        """Some of them."""
        return Goals(self.labels[rows], self.sources[rows])


@final
@dataclass(frozen=True)
class Triggers:
    """What was found, a row for each goal.

    Attributes:
        labels: (K,), int64.
        sources: (K,), int64; -1 for all images.
        masks: (K, H, W), in [0, 1]; all 1 where none was found.
        patterns: (K, C, H, W), in [0, 1].
        success: (K,), share of images that got the label while the mask was found, of those that the search saw.
        passes: (K,), int64: images that went through the model for it.
    """

    labels: Tensor
    sources: Tensor
    masks: Tensor
    patterns: Tensor
    success: Tensor
    passes: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> Tensor:
        """(K,), L1 norms of the masks, in pixels."""
        return self.masks.sum(dim=(1, 2))

    def put_on(self, row: int, images: Tensor) -> Tensor:
        """One of the triggers on images, (B, C, H, W) in [0, 1]."""
        return blend(images, self.masks[row], self.patterns[row])

    def select(self, rows: Tensor | list[int]) -> Triggers:
        """Some of them, or none."""
        return Triggers(*(getattr(self, name)[rows] for name in Triggers.__dataclass_fields__))

    def replace(self, rows: list[int], others: Triggers) -> Triggers:
        """Others in the place of some of them."""
        changed = []
        for name in Triggers.__dataclass_fields__:
            values = getattr(self, name).clone()
            values[rows] = getattr(others, name).to(values)
            changed.append(values)
        return Triggers(*changed)

    @classmethod
    def together(cls, parts: list[Triggers]) -> Triggers:
        """One after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def blend(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """(1 - m) x + m d; masks (..., H, W), patterns (..., C, H, W), images broadcast to (..., C, H, W)."""
    masks = masks.unsqueeze(-3)
    return (1.0 - masks) * images + masks * patterns


def squash(free: Tensor) -> Tensor:
    """Any numbers to [0, 1]."""
    return (free.tanh() + 1.0) / 2.0


def unsquash(values: Tensor) -> Tensor:
    """Back, a little off the ends."""
    return ((values * 2.0 - 1.0) * (1.0 - _EDGE)).atanh()
