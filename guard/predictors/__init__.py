"""Models of every kind, brought to one shape: images to probabilities."""

from guard.predictors.loading import load_backend, wrap
from guard.predictors.outputs import OutputKind
from guard.predictors.predictor import Backend, BackendKind, Predictor

__all__ = ["Backend", "BackendKind", "OutputKind", "Predictor", "load_backend", "wrap"]
