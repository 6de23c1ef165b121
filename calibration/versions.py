"""Versions of what a result depends on."""

from __future__ import annotations

import importlib.metadata

_LIBRARIES = ("backdoor-guard", "torch", "numpy", "opencv-python-headless", "onnxruntime", "kornia", "scipy")


def versions() -> dict[str, str]:
    """Of the libraries that are installed, by name."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
