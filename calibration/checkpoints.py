"""Checkpoints of a training: weights and optimizer state as safetensors, nothing pickled, a whole file or none."""

from __future__ import annotations

import contextlib
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

from guard.errors import CalibrationError, one_line

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
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self._writes = writes
        self._started = time.monotonic()
        self._lock: int | None = None
        self._before = max((self._seconds_in(path) for path in folder.glob("*.safetensors")), default=0.0)

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
            CalibrationError: It can't be written, or another process writes there.
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
        partial = self.folder / f".{name}.partial"
        metadata = {
            "key": self._key,
            "step": str(step),
            "seconds": f"{self.seconds:.3f}",
            "facts": json.dumps(dict(facts or {})),
        }
        arrays = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
            save_file(arrays, partial, metadata)
            partial.replace(self.folder / f"{name}.safetensors")
        except (SafetensorError, OSError) as error:  # a full disk is either
            raise CalibrationError(f"expected room for checkpoints in {self.folder}, got: {one_line(error)}") from error

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
            CalibrationError: A damaged one.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("key") != self._key:
                return None
            tensors = {name: value.clone() for name, value in load_file(path).items()}  # which are mapped: the file would stay
            step, facts = int(metadata["step"]), json.loads(metadata["facts"])
            for key, module in (modules or {}).items():
                module.load_state_dict(_below(tensors, f"module/{key}/"))
            for key, optimizer in (optimizers or {}).items():
                _fill(optimizer, _below(tensors, f"optimizer/{key}/"))
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise CalibrationError(f"expected a checkpoint in {path}, got a damaged one: delete {self.folder}") from error
        return step, _below(tensors, "array/"), facts

    def _claim(self) -> None:
        """Until they are removed or the process ends: two works that write into one folder would lose each other's."""
        if self._lock is not None:
            return
        lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError | PermissionError):  # a file system without locks
                raise
            raise CalibrationError(
                f"expected {self.folder} for this work alone, got another process that works there: "
                "wait until it has ended, or pick another --out"
            ) from error
        self._lock = lock

    def found(self) -> bool:
        """Whether there was one of this work from the start."""
        return self._before > 0.0

    def _seconds_in(self, path: Path) -> float:
        """Of a checkpoint of this work; 0 for another's, or a damaged one."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return float(metadata["seconds"]) if metadata.get("key") == self._key else 0.0
        except (SafetensorError, OSError, KeyError, ValueError):
            return 0.0

    def remove(self) -> None:
        """Delete them, and the folder unless it holds anything else."""
        if not self._writes or not self.folder.is_dir():
            return
        with contextlib.suppress(OSError, CalibrationError):  # what another process writes is its own
            self._claim()
            for pattern in ("*.safetensors", ".*.partial", _LOCK):
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fill(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, field = name.partition("/")
        state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
