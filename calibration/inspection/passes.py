"""Passes through a model: how many images at once, and what it says of them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from calibration.engine import Engine
from guard.errors import GuardError, InspectionError, ModelError, one_line

_ACTIVATIONS = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes
_AT_ONCE = {"cpu": 256, "cuda": 4096}  # images in a pass, at most: more are no faster
_WITHOUT_GRADIENTS = 256  # images


@final
class Sound(nn.Module):
    """A model's answers, which are numbers, whatever the image.

    One that gives NaN to what lies between clean images and those with its trigger would lead every search past it.

    Args:
        answers: Images (B, C, H, W) to logits (B, K).
    """

    def __init__(self, answers: nn.Module) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: Tensor) -> Tensor:
        """See the class.

        Raises:
            InspectionError: Some are none.
        """
        logits: Tensor = self.answers(images)
        numbers = logits.detach().isfinite().all(dim=1)
        if not bool(numbers.all()):
            raise InspectionError(
                f"expected answers to all images that are looked at, got NaN or Inf for {int((~numbers).sum())} of "
                f"{len(images)}, which hides whatever lies there: check --mean, --std, --output, or don't trust this model"
            )
        return logits


def images_at_once(answers: nn.Module, images: Tensor, engine: Engine) -> int:
    """How many images may be in a forward pass whose gradients are kept, so that memory stays bounded."""
    _check_gradients(answers, images[:1], engine)
    per_image = (_kept_bytes(answers, images[:1], 3, engine) - _kept_bytes(answers, images[:1], 1, engine)) / 2.0
    kind = "cuda" if engine.device.type == "cuda" else "cpu"
    return int(min(max(_ACTIVATIONS[kind] / max(per_image, images[0].nbytes), 1), _AT_ONCE[kind]))


def _check_gradients(answers: nn.Module, image: Tensor, engine: Engine) -> None:
    """Before any work: in-place operations may fail only on the way back, and a buffer that is used again the second time."""
    given, again = image.clone().requires_grad_(True), ""
    try:
        possible = _there_and_back(answers, given, engine)
        again = " again, make it return new tensors"
        _there_and_back(answers, given, engine)
    except GuardError:
        raise
    except Exception as error:  # foreign code
        raise ModelError(f"the model can't be run for gradients{again}: {one_line(error)}") from error
    if not possible:
        raise ModelError("expected a model with gradients towards its input, got one without: pass its factory")


def _there_and_back(answers: nn.Module, given: Tensor, engine: Engine) -> bool:
    """Once; whether there are gradients."""
    with engine.autocast():
        logits = answers(given)
    if logits.requires_grad:
        torch.autograd.grad(logits.float().sum(), given, allow_unused=True)
    return bool(logits.requires_grad)


def _kept_bytes(answers: nn.Module, image: Tensor, count: int, engine: Engine) -> int:
    """What a forward pass of so many images keeps for its gradients."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    few = image.expand(count, -1, -1, -1).clone().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), engine.autocast():
        answers(few)
    return sum(kept.values())


def says(answers: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Labels, (B,), int64, on the processor, that a model on the device gives images, (B, C, H, W)."""
    with torch.no_grad():  # what a model keeps from this pass, the next one may need gradients through
        return torch.cat([answers(part.to(device)).argmax(dim=1).cpu() for part in images.split(_WITHOUT_GRADIENTS)])
