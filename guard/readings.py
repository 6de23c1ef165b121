"""How people read what a detector found: STRIP's score is minus an entropy in bits, the others' scores are read as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from guard.verdict import method_of


@final
@dataclass(frozen=True)
class Reading:
    """What a detector measures.

    Attributes:
        quantity: In words.
        unit: With a space before it; empty for none.
        sign: That a score is multiplied by.
    """

    quantity: str
    unit: str = ""
    sign: float = 1.0

    def value(self, score: float) -> float:
        """A score, or a threshold, as people read it."""
        return self.sign * score + 0.0  # no -0.0

    def text(self, score: float, digits: int = 4) -> str:
        """The same with its unit."""
        return f"{self.value(score):.{digits}f}{self.unit}"

    @property
    def rejects(self) -> str:
        """On which side of a threshold an input is rejected."""
        return "<=" if self.sign < 0.0 else ">="


_READINGS = {
    "strip": Reading("entropy", " bits", -1.0),
    "feature-squeezing": Reading("change of the answer"),
    "activation-filter": Reading("mean activation"),
}


def reading_of(detector: str) -> Reading:
    """What a detector of this name measures; of an unknown one its score."""
    return _READINGS.get(method_of(detector), Reading("score"))
