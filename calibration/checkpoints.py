"""Checkpoints of a training: weights and optimizer state as safetensors, nothing pickled, a whole file or none."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.data import Progress
from guard.errors import CheckpointError, one_line

_LOCK = ".lock"


@final
class Checkpoints:
    """A folder of checkpoints that belong to one piece of work.

    Args:
        folder: Made on the first write; what is in there of other work is not resumed.
        key: Whatever the work depends on; other keys, other work.
        writes: False for the processes that must not.
    """

    def __init__(self, folder: Path, key: object, writes: bool = True) -> None:
        self.folder = folder
        self._key = _digest(key)
        self._writes = writes
        self._started = time.monotonic()
        self._lock = _Lock(folder)
        self._prefix, self._stage = "", ""
        there = [_owner(path) for path in folder.glob("*.safetensors")]
        own = [seconds for found, seconds in there if found == self._key]
        self._found, self._others = bool(own), any(found not in ("", self._key) for found, _ in there)
        self._before = max(own, default=0.0)

    @property
    def seconds(self) -> float:
        """That the work has taken, with the time before interruptions, up to the checkpoints that were written."""
        return self._before + time.monotonic() - self._started

    def save(
        self,
        name: str,
        step: int,
        modules: Mapping[str, nn.Module] | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
        arrays: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, float] | None = None,
    ) -> None:
        """Write one, in the place of the last of that name.

        Args:
            name: Of the training.
            step: How far it is.
            modules: Whose weights.
            optimizers: Whose state.
            arrays: What else.
            facts: Numbers.

        Raises:
            CheckpointError: It can't be written, or another process writes there.
        """
        if not self._writes:
            return
        tensors = {f"array/{key}": value for key, value in (arrays or {}).items()}
        for key, module in (modules or {}).items():
            tensors |= {f"module/{key}/{field}": value for field, value in module.state_dict().items()}
        for key, optimizer in (optimizers or {}).items():
            for number, state in optimizer.state_dict()["state"].items():
                for field, value in state.items():
                    tensors[f"optimizer/{key}/{number}/{field}"] = torch.as_tensor(value)
        partial = self.folder / f".{self._prefix}{name}.partial"
        metadata = {
            "key": self._key,
            "stage": self._stage,
            "step": str(step),
            "seconds": f"{self.seconds:.3f}",
            "facts": json.dumps(dict(facts or {})),
        }
        arrays = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.claim()
            save_file(arrays, partial, metadata)
            partial.replace(self._path(name))
        except (SafetensorError, OSError) as error:  # a full disk is either
            raise CheckpointError(f"expected room for checkpoints in {self.folder}, got: {one_line(error)}") from error

    def load(
        self,
        name: str,
        modules: Mapping[str, nn.Module] | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    ) -> tuple[int, dict[str, Tensor], dict[str, float]] | None:
        """Fill modules and optimizers from the last one of that name.

        Returns:
            How far it was, the arrays and the facts; None when there is none of this work.

        Raises:
            CheckpointError: A damaged one.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("key") != self._key or metadata.get("stage", "") != self._stage:
                return None
            tensors = {name: value.clone() for name, value in load_file(path).items()}  # which are mapped: the file would stay
            step, facts = int(metadata["step"]), json.loads(metadata["facts"])
            for key, module in (modules or {}).items():
                module.load_state_dict(_below(tensors, f"module/{key}/"))
            for key, optimizer in (optimizers or {}).items():
                _fill(optimizer, _below(tensors, f"optimizer/{key}/"))
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"expected a checkpoint in {path}, got a damaged one: delete {self.folder}") from error
        return step, _below(tensors, "array/"), facts

    def within(self, stage: str, key: object = None) -> Checkpoints:
        """Those of a part of this work, whose trainings may be called like those of other parts: in the same folder.

        Args:
            stage: Its name.
            key: What it depends on besides the whole work, like what earlier parts came to.
        """
        part = copy.copy(self)
        part._prefix, part._stage = f"{self._prefix}{stage}.", _digest([self._stage, stage, key])
        return part

    def _path(self, name: str) -> Path:
        return self.folder / f"{self._prefix}{name}.safetensors"

    def found(self) -> bool:
        """Whether there was one of this work from the start."""
        return self._found

    def tell(self, progress: Progress) -> None:
        """Say whether there is something to go on from, and what is there of another work and will be lost."""
        if self.found():
            progress(f"going on from {self.folder.name}", 1, 1)
        elif self._others:
            progress(f"beginning anew: {self.folder.name} is of another model, other images or other options", 1, 1)

    def remove(self) -> None:
        """Delete them, and the folder unless it holds anything else."""
        if not self._writes or not self.folder.is_dir():
            return
        with contextlib.suppress(OSError, CheckpointError):  # what another process writes is its own
            self._lock.claim()
            for pattern in ("*.safetensors", ".*.partial", _LOCK):
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()
        self._lock.give_back()


@final
class _Lock:
    """On a folder: two works that write into one would lose each other's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: int | None = None

    def claim(self) -> None:
        """Until it is given back or the process ends.

        Raises:
            CheckpointError: Another process has it.
        """
        if self._held is not None:
            return
        lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError | PermissionError):  # a file system without locks
                raise
            raise CheckpointError(
                f"expected {self._folder} for this work alone, got another process that works there: "
                "wait until it has ended, or pick another --out"
            ) from error
        self._held = lock

    def give_back(self) -> None:
        """If it was claimed."""
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _owner(path: Path) -> tuple[str, float]:
    """The key of the work that wrote a checkpoint, and the seconds that it had taken; of a damaged one no key."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return metadata["key"], float(metadata["seconds"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return "", 0.0


def _digest(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fill(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, field = name.partition("/")
        state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
