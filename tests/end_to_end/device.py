"""An environment like a thin device's: the base installation and the extra `device`, and nothing that trains.

It is made without a network: the packages that `pyproject.toml` asks for, and theirs, are links to those that run the tests.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent


def make_device(folder: Path) -> Path:
    """Make the environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)], check=True, timeout=60)
    (site,) = folder.glob("lib/python3*/site-packages")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = config["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["device"]]
    for distribution in _with_theirs(asked):
        tops = {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    for package in config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        (site / package).symlink_to(ROOT / package)
    return folder / "bin" / "python"


def _with_theirs(asked: list[str]) -> list[importlib.metadata.Distribution]:
    """Distributions, and those that they require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(text) for text in asked]
    while waiting:
        wanted = waiting.pop()
        if wanted.name in found or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        found[wanted.name] = importlib.metadata.distribution(wanted.name)
        waiting += [Requirement(text) for text in found[wanted.name].requires or []]
    return list(found.values())
