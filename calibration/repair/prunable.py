"""A copy of a model whose channels can be silenced, and heard again: what pruning and fine-pruning work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast, final

import torch
from torch import Tensor

from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy, trainable
from calibration.repair.cases import Part
from guard import Predictor
from guard.predictors.activations import Layer, Tap, activations, silence
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend

AT_ONCE = 256
"""Images of a forward pass."""

_DORMANT = 1.0  # of the mean of what neurons add on clean images: so much is added to what one does


@final
class Prunable:
    """A copy whose channels can be silenced, and heard again.

    Args:
        copied: The copy.
        layer: Whose channels.
        images: (B, C, H, W), a few to see the model's layers by.
        engine: Where.

    Raises:
        ModelError: The model's layers can't be watched.
    """

    def __init__(self, copied: TrainableCopy, layer: Layer, images: Tensor, engine: Engine) -> None:
        backend = copied.predictor.backend
        self.predictor, self._layer, self._module = copied.predictor, layer, trainable(backend)
        self._rows, self._answers = backend.batch_size if isinstance(backend, ExportedBackend) else None, copied.answers()
        batch = torch.as_tensor(copied.predictor.spec.to_model(images[:1].expand(self._rows or 1, -1, -1, -1)))
        if isinstance(backend, ModuleBackend):
            engine.place(self._module)
        self._batch = batch.to(copied.parameters[0].device)
        self.total = activations(self.predictor, images[:1], layer).shape[1]
        self._before = {name: value.detach().clone() for name, value in self._module.state_dict().items()}

    def silence(self, channels: Sequence[int]) -> None:
        """Silence these, and no others, in the copy as it came."""
        self._module.load_state_dict(self._before)
        self.keep_silent(channels)

    def keep_silent(self, channels: Sequence[int]) -> None:
        """Silence these in the copy as it is now."""
        silence(self._module, self._layer, torch.tensor(channels, dtype=torch.int64), self._batch)

    def scores(self, images: Tensor, triggered: Tensor, label: int) -> Tensor:
        """(K,), what each neuron adds to a trigger's success for what it adds on clean images; 0 if it adds nothing.

        Args:
            images: (N, C, H, W), clean.
            triggered: The same with the trigger.
            label: Its label.
        """
        tap, device = Tap.of(self._answers, self._layer), self._batch.device
        gains, harms = torch.zeros(self.total, dtype=torch.float64), torch.zeros(self.total, dtype=torch.float64)
        rows = self._rows or AT_ONCE
        for clean, shown in zip(images.split(rows), triggered.split(rows), strict=True):
            count = len(clean)
            padding = (self._rows or count) - count
            clean, shown = (torch.cat([part, part[-1:].expand(padding, -1, -1, -1)]).to(device) for part in (clean, shown))
            answers, fired = tap.run(shown.requires_grad_(True))
            logits = cast(Tensor, answers)
            lead = logits[:, label] - logits.index_fill(1, torch.tensor([label], device=device), -math.inf).amax(dim=1)
            found: Tensor | None = torch.autograd.grad(lead[:count].sum(), fired, allow_unused=True)[0]
            gradient = torch.ones_like(fired) if found is None else found  # of a mean that the model does not take, the gap
            with torch.no_grad():
                usual = tap.run(clean)[1]
                for sums, values in ((gains, gradient * (fired - usual)), (harms, (gradient * usual).abs())):
                    values = values[:count].double().cpu()
                    sums += (values.flatten(2).sum(dim=2) if values.ndim > 2 else values).sum(dim=0)
        return gains.clamp_min(0.0) / (harms + _DORMANT * harms.mean()).clamp_min(torch.finfo(torch.float64).tiny)

    def mean_activations(self, images: Tensor, absolute: bool = False) -> Tensor:
        """(K,), of each channel, over images and places; of absolute values where that is asked for."""
        found = torch.zeros(self.total, dtype=torch.float64)
        for part in images.split(AT_ONCE):
            values = activations(self.predictor, part, self._layer).double()
            values = values.abs() if absolute else values
            found += values.flatten(2).mean(dim=2).sum(dim=0) if values.ndim > 2 else values.sum(dim=0)
        return found / len(images)


def accuracy_of(predictor: Predictor, *parts: Part) -> float:
    """Share of parts' images that a model answers with their label."""
    answers = torch.cat([predictor(images).argmax(dim=1).cpu() for part in parts for images in part.images.split(AT_ONCE)])
    return float((answers == torch.cat([part.labels for part in parts])).double().mean())
