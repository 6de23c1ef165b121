"""Gradients through silent units, for triggers that nothing leads to.

A module that an attacker has inserted may be silent unless nearly the whole trigger is there, as TrojanNet's is: its ReLU gives
0 and passes no gradient, so that no search gets to it. So (ours) rectifiers pass a tenth of the gradient where they are silent.
What the model answers stays as it is.

Reference, for gradients that stand in for others: Neftci et al., Surrogate gradient learning, arXiv:1901.09948.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guard.errors import ModelError

_PASSED = 0.1
_RECTIFIERS = {torch.relu, nn.functional.relu, Tensor.relu, torch.ops.aten.relu.default}
_IN_PLACE = {torch.relu_, Tensor.relu_, torch.ops.aten.relu_.default}
_CLAMPS = {torch.clamp_min, Tensor.clamp_min, torch.clamp, Tensor.clamp, torch.ops.aten.clamp_min.default}


def through_silent_units(answers: nn.Module) -> nn.Module:
    """A model that answers the same, and whose rectifiers let gradients through.

    Args:
        answers: Images (B, C, H, W) to logits (B, M).
    """
    return _Through(answers).eval()


def check_rectifiers(answers: nn.Module, image: Tensor) -> None:
    """Refuse a model in which none is seen: there is nothing to look through.

    Args:
        answers: The model.
        image: (1, C, H, W), to run it on.

    Raises:
        ModelError: See above.
    """
    with torch.no_grad(), _Passing() as passing:
        answers(image)
    if not passing.seen:
        raise ModelError(
            "expected a model with ReLUs that can be looked through, got one without, or one whose program hides them: pass "
            "its factory, package.module:factory, or scan without --silent-units"
        )


@final
class _Through(nn.Module):
    def __init__(self, answers: nn.Module) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: Tensor) -> Tensor:
        with _Passing():
            logits: Tensor = self.answers(images)
        return logits


@final
class _Passing(TorchFunctionMode):
    """Puts another gradient in the place of each rectifier's that is called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """See the class."""
        given = dict(kwargs or {})
        if func in _IN_PLACE or (func is nn.functional.relu and (given.get("inplace") or args[1:] == (True,))):
            self.seen = True
            return args[0].copy_(_rectified(args[0]))
        if func in _RECTIFIERS or (func in _CLAMPS and _rectifies(args[1:], given)):
            self.seen = True
            return _rectified(args[0])
        return func(*args, **given)


def _rectifies(limits: tuple[object, ...], given: Mapping[str, object]) -> bool:
    """Whether a clamp has 0 for its lower limit, and no upper one."""
    lowest = limits[0] if limits else given.get("min")
    highest = limits[1] if len(limits) > 1 else given.get("max")
    return isinstance(lowest, int | float) and lowest == 0 and highest is None


def _rectified(values: Tensor) -> Tensor:
    """ReLU; of what is not positive the second part is 0, with a gradient."""
    return torch.where(values > 0, values, _PASSED * (values - values.detach()))
