"""Patches that move a model to a label: what they look like, and where, for every label at once.

Each label has a canvas as large as an image. A patch is a window of it, as fine as it is or blurred to a coarser grain, pasted
where it lies; gradient ascent makes a label's canvas such that whichever window is pasted raises that label's logit. (Of fine
grain alone, what is found is noise: a model that has forgotten that may still answer to a white square.) A map of what the
windows have raised says where it pays to look: most are drawn by its fourth power. A backdoor's label soon stands out, at the
trigger's place, for no natural patch raises a logit as much.

No gradient leads from noise to a plain square, where nothing but the square moves the model. So plain patches are tried as
well, anywhere; what raises a label further than all before is written into its canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

_AT_FIRST = 0.05  # of the unit: what no window has been tried at raises little
_NEW, _MOST_NEW = 0.2, 0.5  # of the map's value that one window replaces, and that a batch does
_SHARPNESS = 4  # of the draws: one label that stands out threefold is to outweigh dozens that do not
_GRAINS = (1, 3, 9)  # pixels
_PLAIN = 3.0  # what a canvas holds where a plain patch is written into it; the darkest and the brightest, after the sigmoid
_NEAR = 3  # cells a side, that a window tells something about

Answers = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Pasted:
    """Images with a patch on each.

    Attributes:
        images: (B, C, H, W).
        labels: (B,), int64, whose canvas it is of.
        rows: (B,), int64, of its middle.
        columns: (B,), int64, likewise.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor


@final
class Patches(nn.Module):
    """See the top of this file.

    Args:
        classes: M.
        shape: (C, H, W).
        rate: Of the canvases' Adam.
        focus: Share of the windows that are drawn by the map; the others are drawn anywhere.
        sides: Smallest and largest side of a window, in pixels.
        seed: Of the canvases.
    """

    canvases: Tensor
    map: Tensor
    unit: Tensor

    def __init__(
        self, classes: int, shape: tuple[int, int, int], rate: float, focus: float, sides: tuple[int, int], seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.canvases = nn.Parameter(torch.randn(classes, *shape, generator=generator))
        self.register_buffer("map", torch.full((classes, *shape[1:]), _AT_FIRST))
        self.register_buffer("unit", torch.zeros(()))  # the model's usual logit, that the map is in
        self.optimizer = torch.optim.Adam([self.canvases], rate)
        self._focus, self._sides = focus, sides

    def paste(
        self, images: Tensor, generator: torch.Generator, *, more: int = 0, copies: int = 0, also: Tensor | None = None
    ) -> Pasted:
        """Put a patch on each image.

        Args:
            images: (B, C, H, W), in [0, 1].
            generator: On the CPU; draws.
            more: Further windows of the same canvas, anywhere.
            copies: Of the patch, anywhere, round the edges.
            also: Another model's map: where that is higher, it takes the place of one's own.
        """
        count, (height, width), device = len(images), images.shape[2:], images.device
        labels, rows, columns = self._draw(count, generator, also)
        side = torch.randint(self._sides[0], self._sides[1] + 1, (count,), generator=generator)
        drawn = [torch.randint(most, (more, count), generator=generator) for most in (height, width)]
        mask = _window(rows.cpu(), columns.cpu(), side, height, width)
        for row, column in zip(*drawn, strict=True):
            mask = torch.maximum(mask, _window(row, column, side, height, width))
        mask = mask.unsqueeze(1).to(device)
        grain = torch.randint(len(_GRAINS), (count,), generator=generator).to(labels.device)
        pattern = self._patterns()[grain, labels]
        pasted = images * (1.0 - mask) + pattern * mask
        for _ in range(copies):
            shift = [int(torch.randint(most, (), generator=generator)) for most in (height, width)]
            there = mask.roll(shift, (2, 3))
            pasted = pasted * (1.0 - there) + (pattern * mask).roll(shift, (2, 3)) * there
        return Pasted(pasted, labels, rows, columns)

    def ascend(
        self,
        answers: Answers,
        images: Tensor,
        generator: torch.Generator,
        more: int,
        *,
        also: Tensor | None = None,
        plain: bool = False,
    ) -> None:
        """Raise logits by one step of the canvases.

        Args:
            answers: (B, C, H, W), in [0, 1], to logits, (B, M).
            images: (B, C, H, W).
            generator: Draws.
            more: Further windows, see `paste`; with some, the map learns nothing.
            also: See `paste`.
            plain: Try plain patches as well. Of a copy they would write over what is left of a trigger that was found.
        """
        with torch.no_grad():
            before = answers(images)
            if not float(self.unit):
                self.unit.copy_(before.std().clamp_min(torch.finfo(torch.float32).tiny))
        if plain:
            self._sow(answers, images, before, generator)
        self.optimizer.zero_grad(set_to_none=True)
        pasted = self.paste(images, generator, more=more, also=also)
        after = answers(pasted.images)
        others = before.argmax(dim=1) != pasted.labels
        own = after.gather(1, pasted.labels.unsqueeze(1)).squeeze(1)
        loss = ((after.mean(dim=1) - own) * others).sum()
        self.canvases.grad = torch.autograd.grad(loss, self.canvases)[0]
        self.optimizer.step()
        if not more:
            raised = (own.detach() - before.gather(1, pasted.labels.unsqueeze(1)).squeeze(1)) * others
            self.note(pasted, pasted.labels, raised)

    def _sow(self, answers: Answers, images: Tensor, before: Tensor, generator: torch.Generator) -> None:
        """Try plain patches, each on two images; by as much as it raises a label on both."""
        count, (channels, height, width) = len(images) // 2, images.shape[1:]
        rows, columns = (torch.randint(most, (count,), generator=generator) for most in (height, width))
        side = torch.randint(self._sides[0], self._sides[1] + 1, (count,), generator=generator)
        bright = torch.randint(2, (count, channels, 1, 1), generator=generator).float().to(images.device)
        mask = _window(rows, columns, side, height, width).unsqueeze(1).to(images.device)
        with torch.no_grad():
            both, known = images[: 2 * count].unflatten(0, (2, count)), before[: 2 * count]
            after = answers((both * (1.0 - mask) + bright * mask).flatten(0, 1))
            raised = (after - known).scatter(1, known.argmax(dim=1, keepdim=True), 0.0).unflatten(0, (2, count)).amin(dim=0)
            most, labels = raised.max(dim=1)
            better = most / self.unit > self.map.flatten(1).amax(dim=1)[labels]
            order = most.argsort()
            for number in order[better[order]].tolist():  # the best stays
                canvas = self.canvases[labels[number]]
                canvas.copy_(torch.where(mask[number] > 0.0, _PLAIN * (2.0 * bright[number] - 1.0), canvas))
        self.note(Pasted(images[:count], labels, rows.to(labels.device), columns.to(labels.device)), labels, most)

    def note(self, pasted: Pasted, labels: Tensor, raised: Tensor) -> None:
        """Let the map learn what some patches have raised.

        Args:
            pasted: Where.
            labels: (B,), int64, which labels' logits.
            raised: (B,), by how much.
        """
        if not float(self.unit):
            return
        where = (labels, pasted.rows, pasted.columns)
        some = torch.stack([raised.float().clamp_min(0.0) / self.unit, torch.ones_like(raised, dtype=torch.float32)])
        sums = torch.zeros(2, *self.map.shape, device=self.map.device)
        for total, part in zip(sums, some, strict=True):
            total.index_put_(where, part, accumulate=True)
        near = nn.functional.avg_pool2d(sums, _NEAR, 1, _NEAR // 2) * _NEAR**2
        new = (_NEW * near[1]).clamp_max(_MOST_NEW)
        self.map.mul_(1.0 - new).add_(new * near[0] / near[1].clamp_min(1.0))

    def renew(self, share: float, generator: torch.Generator) -> None:
        """Begin such a share of the canvases anew: there is more than one way to a label."""
        chosen = torch.rand(len(self.canvases), generator=generator) < share
        fresh = torch.randn(self.canvases.shape, generator=generator)
        with torch.no_grad():
            self.canvases[chosen] = fresh[chosen].to(self.canvases.device)

    def sorest(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each label, (M,): the most that a window has raised it by, in units, and that window's middle, row and column."""
        most, place = self.map.flatten(1).max(dim=1)
        return most, place // self.map.shape[2], place % self.map.shape[2]

    def _patterns(self) -> Tensor:
        """(G, M, C, H, W), in [0, 1]: the canvases, blurred to each grain, with as much contrast."""
        blurred = [
            grain * nn.functional.avg_pool2d(self.canvases, grain, 1, grain // 2, count_include_pad=False) for grain in _GRAINS
        ]
        return torch.sigmoid(torch.stack(blurred))

    def _draw(self, count: int, generator: torch.Generator, also: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self.map if also is None else torch.maximum(self.map, also)).double().pow(_SHARPNESS).flatten()
        share = self._focus * weights / weights.sum() + (1.0 - self._focus) / len(weights)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64).to(share.device)
        cell = torch.searchsorted(share.cumsum(0), drawn).clamp_max(len(weights) - 1)
        height, width = self.map.shape[1:]
        return cell // (height * width), cell // width % height, cell % width


def exchange(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """The same images, (B, C, H, W), each with another one's content in a window around a middle, (B,)."""
    height, width = images.shape[2:]
    sides = torch.full((len(images),), min(side, height, width))
    mask = _window(rows.cpu(), columns.cpu(), sides, height, width).unsqueeze(1).to(images.device)
    return images * (1.0 - mask) + images.roll(1, 0) * mask


def _window(rows: Tensor, columns: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W): 1 in a square of that side around each middle, moved into the image."""
    mask = torch.ones(len(rows), height, width)
    for middle, size, view in ((rows, height, (1, -1, 1)), (columns, width, (1, 1, -1))):
        first = torch.minimum((middle - side // 2).clamp_min(0), size - side).view(-1, 1, 1)
        place = torch.arange(size).view(view)
        mask = mask * ((place >= first) & (place < first + side.view(-1, 1, 1)))
    return mask
