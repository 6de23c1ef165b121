"""Neural Cleanse's filter: the neurons that a recovered trigger excites are quiet on clean images.

    score(x) = (1/|K|) sum_{k in K} a_k(x)

with a(x) the activations of the second-to-last layer and K the neurons that the trigger excites most (`excited_neurons`). The
mean is taken as the activations are, normalised by nothing: its unit is the model's own, and so a threshold fits one model
and one K.

Blind to: triggers other than the recovered one that excite other neurons. Neuron-driven Trojan triggers, recovered only
roughly, pass more often: in the paper 4.3% and 28.5% at 5% false positives.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from guard.detectors.detector import Detector, Inspection, at_or_over
from guard.errors import CalibrationError, ModelError
from guard.predictors.activations import activations
from guard.predictors.predictor import Predictor


def excited_neurons(clean: Tensor, triggered: Tensor, share: float = 0.01) -> Tensor:
    """The neurons whose mean activation a trigger raises most.

    Args:
        clean: (N, F), activations on clean images.
        triggered: (N', F), activations on images with the trigger.
        share: Of the neurons, in (0, 1]; rounded, and at least one neuron.

    Returns:
        (K,), int64, indices, the most excited first; of equals, the lower index first.

    Raises:
        CalibrationError: Other shapes, values that are not finite, or a share out of range.
    """
    if (
        clean.ndim != 2
        or triggered.ndim != 2
        or clean.shape[1:] != triggered.shape[1:]
        or 0 in (*clean.shape, *triggered.shape)
    ):
        got = f"{tuple(clean.shape)} and {tuple(triggered.shape)}"
        raise CalibrationError(f"expected clean and triggered activations (N, F) of the same neurons, got {got}")
    if not 0.0 < share <= 1.0:
        raise CalibrationError(f"expected a share of the neurons in (0, 1], got {share}")
    gap = triggered.double().mean(dim=0) - clean.double().mean(dim=0)
    if not bool(torch.isfinite(gap).all()):
        raise CalibrationError("expected finite activations, got NaN or Inf: does the model answer these images?")
    return gap.sort(descending=True, stable=True).indices[: max(1, round(share * len(gap)))]


@final
@dataclass(frozen=True)
class ActivationFilter(Detector):
    """The filter over a predictor whose module can be looked into; one forward pass an image.

    Args:
        predictor: The suspicious model.
        neurons: (K,), int64, indices into the second-to-last layer, as `excited_neurons` gives them.
        name: Short name.

    Raises:
        CalibrationError: No neurons, or no indices.
    """

    predictor: Predictor
    neurons: Tensor
    name: str = "activation-filter"

    def __post_init__(self) -> None:
        """Validate once; how many neurons there are shows with the first image."""
        if self.neurons.ndim != 1 or self.neurons.dtype != torch.int64:
            got = f"{tuple(self.neurons.shape)}, {self.neurons.dtype}"
            raise CalibrationError(f"expected indices of neurons (K,), torch.int64, got {got}")
        if len(self.neurons) == 0 or int(self.neurons.min()) < 0 or len(self.neurons.unique()) != len(self.neurons):
            listed = self.neurons.tolist() or "none"
            raise CalibrationError(f"expected at least one neuron, each once and not negative, got {listed}")

    def score(self, images: Tensor) -> Tensor:
        """Mean activation of the neurons, in the model's own unit; (B,), float32."""
        found = activations(self.predictor, images, "penultimate")
        if int(self.neurons.max()) >= found.shape[1]:
            raise ModelError(
                f"expected a second-to-last layer with neuron {int(self.neurons.max())}, got one of {found.shape[1]} neurons: "
                "is it another model?"
            )
        return found[:, self.neurons.to(found.device)].double().mean(dim=1).float().cpu()

    def inspect(self, images: Tensor, threshold: float) -> Inspection:
        """Compare with a threshold, by the one pass that there is.

        Args:
            images: (B, C, H, W), in [0, 1].
            threshold: On the score.
        """
        scores = self.score(images)
        passes = torch.ones(len(scores), dtype=torch.int64)
        return Inspection(at_or_over(scores, threshold), scores, torch.ones_like(scores, dtype=torch.bool), passes)
