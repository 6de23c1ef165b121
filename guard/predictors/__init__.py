"""Models of every kind, brought to one shape: images to probabilities."""

from guard.predictors.execution import Execution, MemoryFormat, Precision
from guard.predictors.loading import load_backend, wrap
from guard.predictors.outputs import OutputKind
from guard.predictors.predictor import Backend, BackendKind, Predictor

__all__ = [
    "Backend",
    "BackendKind",
    "Execution",
    "MemoryFormat",
    "OutputKind",
    "Precision",
    "Predictor",
    "load_backend",
    "wrap",
]
