"""The model that is exported, and the comparison that every export must pass."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import torch
from torch import Tensor

from guard import Predictor, Profile, load_profile
from guard.errors import ExportError, GuardError
from guard.loading import load_predictor, probe_images, profile_overlays
from guard.predictors import Backend

TOLERANCE = 1e-4
"""Largest difference of a probability between an export and its original."""

_BATCHES = (1, 2, 7)


@contextlib.contextmanager
def drafts_beside(folder: Path, name: str) -> Iterator[Path]:
    """A hidden folder for drafts on the target's own disk, gone afterwards, so that exports appear whole or not at all.

    Raises:
        ExportError: The disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise ExportError(f"could not write {name} to {folder}: {error.strerror or error}") from error


@final
@dataclass(frozen=True)
class Original:
    """A profile with its model, loaded.

    Args:
        folder: Of the profile.
        profile: What `guard.json` holds.
        arrays: What `arrays.safetensors` holds.
        predictor: Runs the model.
        overlays: (N, C, H, W), the clean images that exports are compared on: all detectors', or those that a profile without
            overlays remembers.
    """

    folder: Path
    profile: Profile
    arrays: dict[str, Tensor]
    predictor: Predictor
    overlays: Tensor

    @classmethod
    def load(cls, folder: Path) -> Original:
        """Load a profile folder whose model is in a file, or made by a factory.

        Raises:
            ExportError: The model is a function or lives in memory.
            GuardError: The profile or the model can't be loaded.
        """
        profile, arrays = load_profile(folder)
        record = profile.model
        if record.kind == "callable" or (record.file is None and record.factory is None):
            raise ExportError(
                f"expected a profile with a model file, got one for a {record.kind} in memory: save the model as .onnx, .pt2 "
                "or TorchScript, calibrate that file, and export its profile"
            )
        predictor = load_predictor(folder, record, profile.input).in_full_precision()
        overlays = torch.cat(profile_overlays(profile, arrays) or (probe_images(profile, arrays),))
        return cls(folder, profile, arrays, predictor, overlays)

    def tripwire(self) -> Original | None:
        """The same for the model that the detectors look at, where that is another one.

        Raises:
            GuardError: It can't be loaded.
        """
        watched = self.profile.tripwire
        if watched is None:
            return None
        profile = msgspec.structs.replace(self.profile, model=watched.model, input=watched.input, tripwire=None)
        predictor = load_predictor(self.folder, watched.model, watched.input).in_full_precision()
        return Original(self.folder, profile, self.arrays, predictor, self.overlays)

    @property
    def model_file(self) -> Path:
        """The model's file.

        Raises:
            ExportError: There is none.
        """
        if self.profile.model.file is None:
            raise ExportError(f"expected a model file in {self.folder}, got a model that a factory makes")
        return self.folder / self.profile.model.file

    def example(self) -> Tensor:
        """Two blank images as the model takes them: tracing needs shapes and types, and an export should carry no data."""
        return torch.zeros_like(torch.as_tensor(self.predictor.spec.to_model(self.overlays[:1].repeat(2, 1, 1, 1))))

    def compare(self, exported: Backend) -> float:
        """Answer the overlays with both, in batches of 1, 2 and 7 and at once.

        Returns:
            The largest difference of a probability.

        Raises:
            ExportError: It is over the tolerance, or the export can't answer.
        """
        record = self.profile.model
        candidate = Predictor(exported, self.profile.input, record.num_classes, record.output)
        images = self.overlays if len(self.overlays) >= max(_BATCHES) else self.overlays.repeat(max(_BATCHES), 1, 1, 1)
        expected = self.predictor(images)
        worst = 0.0
        for size in (*_BATCHES, len(images)):
            try:
                difference = float((candidate(images[:size]) - expected[:size]).abs().max())
            except GuardError as error:
                raise ExportError(f"the exported model fails on a batch of {size}: {error}") from error
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"expected the exported model to answer like the original, got probabilities that differ by "
                    f"{difference:.3g} on a batch of {size} (allowed {TOLERANCE:g}): report this model's architecture"
                )
            worst = max(worst, difference)
        return worst
