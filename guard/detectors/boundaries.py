"""Where STRIP may stop before all passes: the boundaries of a group-sequential test.

S_n is the sum of the entropies under the first n of N overlays, h the entropy threshold. At the end of each stage an input is
accepted if S_n > a_n N h, and rejected if S_n <= r_n N h; after all overlays it is rejected if S_N <= N h, as ever. So the
lowest threshold at which an input is rejected is

    V = min_k max(S_k / (N r_k), max_{j<k} S_j / (N a_j)),    a_N = r_N = 1,

over the stages k, and minus V is a score like any other: a threshold on it is calibrated like any other's, and the false
rejection rate is that of all stages together. The shares a and r, and the order of the overlays, are chosen on other images
than the threshold.

With a_n = 1 and r_n = 0, V is the mean entropy S_N / N: entropies are not negative, so that what is over N h stays over it.
That is exact early acceptance, which may stop anywhere.

References: Jennison and Turnbull, Group Sequential Methods, 1999. STRIP with boundaries: ours.
"""

from __future__ import annotations

import itertools
from typing import final

import msgspec
import torch
from torch import Tensor

from guard.detectors.detector import at_or_over
from guard.errors import CalibrationError


@final
class Boundaries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the top of this file.

    Attributes:
        ends: Overlays tried at the end of each stage, ascending; the last is N.
        accept: a_n of each, at most 1.
        reject: r_n of each, at most a_n.

    Raises:
        CalibrationError: They decide nothing, or both ways.
    """

    ends: tuple[int, ...]
    accept: tuple[float, ...]
    reject: tuple[float, ...]

    def __post_init__(self) -> None:
        """Validate once."""
        if not len(self.ends) == len(self.accept) == len(self.reject) > 0:
            got = f"{len(self.ends)}, {len(self.accept)} and {len(self.reject)}"
            raise CalibrationError(f"expected as many ends of stages as shares to accept and to reject, got {got}")
        if any(later <= end for end, later in itertools.pairwise((0, *self.ends))):
            raise CalibrationError(f"expected ends of stages that ascend from 1, got {', '.join(map(str, self.ends))}")
        pairs = list(zip(self.reject, self.accept, strict=True))
        if not all(0.0 <= reject <= accept <= 1.0 and accept > 0.0 for reject, accept in pairs) or pairs[-1] != (1.0, 1.0):
            raise CalibrationError(
                "expected shares 0 <= reject <= accept <= 1 of each stage, and 1 of the last: calibrate again"
            )


@final
class Evidence:
    """What the passes so far make certain of the V of each of B images.

    Args:
        images: B.
        total: N.
        boundaries: None for exact early acceptance.
        threshold: On the score: once an image's verdict is certain, what comes after tells nothing. None: everything tells.
    """

    def __init__(self, images: int, total: int, boundaries: Boundaries | None, threshold: float | None) -> None:
        self._total, self._threshold = total, threshold
        self._stages = (
            None
            if boundaries is None
            else dict(zip(boundaries.ends, zip(boundaries.accept, boundaries.reject, strict=True), strict=True))
        )
        self._done = torch.zeros(images, dtype=torch.int64)
        self._sums = torch.zeros(images, dtype=torch.float64)
        self._accepting = torch.zeros(images, dtype=torch.float64)  # max S_j / (N a_j)
        self._most = torch.full((images,), torch.inf, dtype=torch.float64)  # V is at most that

    @property
    def exact(self) -> Tensor:
        """(B,), bool: the score is the full evaluation's."""
        return (self._most <= self._accepting) | self._accepting.isnan()

    @property
    def scores(self) -> Tensor:
        """(B,), float32: minus V where that is known; else a bound of it, on the same side of the threshold."""
        return torch.where(self._rejected(), _score(self._most), self._highest())

    @property
    def undecided(self) -> Tensor:
        """(B,), bool: what is still to come may turn the verdict."""
        if self._threshold is None:
            return torch.ones_like(self._done, dtype=torch.bool)
        return at_or_over(self._highest(), self._threshold) & ~self._rejected()

    def add(self, rows: Tensor, entropies: Tensor) -> None:
        """Learn of further passes.

        Args:
            rows: (A,), int64, the images that had them; all of them had as many before.
            entropies: (A, n), float64, bits.
        """
        before = int(self._done[rows[0]])
        last = before + entropies.shape[1]
        sums = torch.cat([self._sums[rows].unsqueeze(1), entropies], dim=1).cumsum(dim=1)[:, 1:]  # one by one, in order
        for end in (last,) if self._stages is None else (end for end in self._stages if before < end <= last):
            open_ = self.undecided[rows]
            self._close(rows[open_], sums[open_, end - before - 1] / self._total, end)
        self._sums[rows], self._done[rows] = sums[:, -1], last

    def _close(self, rows: Tensor, means: Tensor, end: int) -> None:
        """A stage; (A,), int64, and (A,), float64: S_n / N."""
        accept, reject = (1.0, float(end == self._total)) if self._stages is None else self._stages[end]
        before = self._accepting[rows]
        if reject > 0.0:
            self._most[rows] = torch.minimum(self._most[rows], torch.maximum(means / reject, before))
        self._accepting[rows] = torch.maximum(before, means / accept)

    def _highest(self) -> Tensor:
        """Minus the lowest V that is possible."""
        return _score(torch.minimum(self._accepting, self._most))

    def _rejected(self) -> Tensor:
        lowest = _score(self._most)
        if self._threshold is None:
            return torch.zeros_like(self._done, dtype=torch.bool)
        return lowest >= torch.tensor(self._threshold, dtype=lowest.dtype)


def final_scores(entropies: Tensor, boundaries: Boundaries | None) -> Tensor:
    """Minus V, from every overlay's entropy; (B, N), float64, to (B,), float32."""
    evidence = Evidence(len(entropies), entropies.shape[1], boundaries, None)
    evidence.add(torch.arange(len(entropies)), entropies)
    return evidence.scores


def _score(values: Tensor) -> Tensor:
    """Rounding is monotone, so that a larger V never gets a larger score."""
    return -values.to(torch.float32)
