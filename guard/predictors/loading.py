"""From what a user names as MODEL to a backend: a file, or `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from guard.errors import ModelError, one_line
from guard.predictors.exported import ExportedBackend
from guard.predictors.function import FunctionBackend
from guard.predictors.module import ModuleBackend
from guard.predictors.onnx import OnnxBackend
from guard.predictors.predictor import Backend
from guard.predictors.torchscript import TorchScriptBackend

_WHAT = "a .onnx, .pt2 or TorchScript .pt file, or package.module:factory"


def load_backend(model: str | Path, weights: Path | None = None, device: str = "cpu") -> Backend:
    """Load a model by file name or factory.

    Args:
        model: Path of an `.onnx`, `.pt2` or TorchScript `.pt` file, or `package.module:factory`.
        weights: `.safetensors` for the module that a factory makes.
        device: Where PyTorch runs it; ONNX Runtime chooses among its own.

    Raises:
        ModelError: It can't be found or loaded.
    """
    name = str(model)
    path = Path(name)
    if path.exists() or ":" not in name:
        if weights is not None:
            raise ModelError(f"expected package.module:factory for --weights, got {path.name}, which has its own")
        return _load_file(path, device)
    made = load_factory(name, weights)
    return wrap(made.to(device) if isinstance(made, nn.Module) else made)


def wrap(model: object) -> Backend:
    """Give an object that a user holds in memory a backend.

    Args:
        model: An `nn.Module` in eval mode, any callable, or what `load_backend` returned, which stays as it is.

    Raises:
        ModelError: It is none of them.
    """
    if isinstance(model, nn.Module):
        return ModuleBackend(model)
    if _is_backend(model):
        return model
    if callable(model):
        return FunctionBackend(model)
    raise ModelError(f"expected an nn.Module or a function of a batch, got {type(model).__name__}")


def load_factory(name: str, weights: Path | None = None) -> object:
    """Import `package.module:attribute`, make the model and fill in its weights.

    The attribute is a module, a function or class without required arguments that makes one, or itself a predict
    function of one batch.

    Raises:
        ModelError: It can't be imported, or the weights don't fit.
    """
    module_name, _, attribute = name.partition(":")
    try:
        _look_here_too()
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise ModelError(
            f"expected an importable package.module:factory, got {name} ({one_line(error)}): is it installed, or in "
            "the current folder?"
        ) from error
    try:
        model = target() if _makes_model(target) else target
    except (Exception, SystemExit) as error:  # so does making the model
        raise ModelError(f"{name} failed to make a model: {one_line(error)}") from error
    if isinstance(model, nn.Module):
        if weights is not None:
            _fill(model, weights)
        if target is not model:
            model.eval()  # we made it, so its mode is ours to set
    elif weights is not None:
        raise ModelError(f"expected {name} to make an nn.Module for --weights, got {type(model).__name__}: drop --weights")
    return model


def _is_backend(model: object) -> TypeGuard[Backend]:
    return hasattr(model, "kind") and hasattr(model, "fingerprint")


def _look_here_too() -> None:
    """Let a factory lie in the current folder: last in line, so that no file there passes for an installed package."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _makes_model(target: object) -> bool:
    if isinstance(target, nn.Module) or not callable(target):
        return False
    if isinstance(target, type):
        return True
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # built in: a predict function, if anything
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(item.default is not inspect.Parameter.empty or item.kind in kinds for item in parameters)


def _fill(module: nn.Module, weights: Path) -> None:
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"expected weights in a .safetensors file, got {weights.name}, which does not load") from error
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the weights in {weights.name} don't fit the module: {one_line(error)}") from error


def _load_file(path: Path, device: str) -> Backend:
    if not path.is_file():
        raise ModelError(f"expected {_WHAT}, got {path}: no such file")
    loaders: dict[str, Callable[[Path, str], Backend]] = {
        ".onnx": lambda file, _: OnnxBackend.load(file),
        ".pt2": ExportedBackend.load,
        ".pt": TorchScriptBackend.load,
        ".ts": TorchScriptBackend.load,
        ".torchscript": TorchScriptBackend.load,
    }
    loader = loaders.get(path.suffix.lower())
    if loader is None:
        raise ModelError(f"expected {_WHAT}, got {path.name}: nothing else is loaded, and nothing is unpickled")
    return loader(path, device)
