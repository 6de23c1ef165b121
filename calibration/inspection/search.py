"""How Neural Cleanse looks for triggers; why, see `neural_cleanse`."""

from __future__ import annotations

import msgspec

from guard.errors import CalibrationError


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """How a trigger is looked for.

    Attributes:
        steps: Of Adam, at most, for each label; whole windows.
        images: A step sees so many of them, the same for each label.
        start: Up to which the values of a mask are drawn.
        rate: Adam's.
        weight: w at the start.
        factor: w is multiplied by this when it rises, and divided by its 1.5th power when it falls.
        patience: Steps on one side of `success` until w moves.
        success: Share of images that must get the label.
        window: Steps over which that share is averaged. What is kept is the trigger at their beginning, as a rule the largest.
        first: Steps that every label gets; then only the smallest masks go on.
        smallest: Share of the labels that then go on; three at least.
        still: Steps without a smaller mask after which these are done.
        again: So many labels with the smallest masks are searched again.
        draws: How often, each time from another draw; 0 for never.
        early: Steps that each of these draws gets; then only the smallest mask of a label goes on.
    """

    steps: int = 1008
    images: int = 16
    start: float = 0.1
    rate: float = 0.1
    weight: float = 1e-3
    factor: float = 1.5
    patience: int = 5
    success: float = 0.99
    window: int = 16
    first: int = 192
    smallest: float = 0.25
    still: int = 80
    again: int = 8
    draws: int = 4
    early: int = 128

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.steps < self.window:
            raise CalibrationError(f"expected at least {self.window} steps for each label, got {self.steps}")

    def plain(self) -> Search:
        """As published: every label gets all steps, of 32 images, once, from masks of any value."""
        return msgspec.structs.replace(self, images=32, start=1.0, first=self.steps + 1, draws=0)
