"""Backend for any callable: a scikit-learn method, a remote call, a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from guard.images import Array
from guard.predictors.predictor import BackendKind


@final
@dataclass(frozen=True)
class FunctionBackend:
    """Runs a predict function: one batch in, one array out.

    Args:
        function: Takes a batch in the layout and type that the `InputSpec` names.
    """

    function: Callable[[Any], object]

    @property
    def kind(self) -> BackendKind:
        """`callable`."""
        return "callable"

    @property
    def batch_size(self) -> None:
        """Any."""

    def __call__(self, batch: Array) -> object:
        """Call the function."""
        return self.function(batch)

    def fingerprint(self) -> str | None:
        """None: a function has no bytes to hash; profiles recognise it by its answers instead."""
        return None
