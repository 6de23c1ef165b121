"""Where training runs: one device or several, in full or mixed precision. Lightning Fabric does it."""

from __future__ import annotations

import logging
import warnings
from typing import Self, TypeVar, cast, final

import torch
from torch import Tensor, nn

from guard.errors import CalibrationError, MissingExtraError

_Module = TypeVar("_Module", bound=nn.Module)


@final
class Engine:
    """Runs training steps; a context manager, which matters where there are several devices.

    With several, end the process by `os._exit` afterwards: at times network threads abort an interpreter that takes its time.

    With several devices, Fabric starts this very command again, once for each further device. All of them draw the same batches
    and take their share of each; only the first one shows and writes anything.

    Args:
        devices: GPUs or, where there is none, processes on the CPU.

    Raises:
        CalibrationError: So many devices are not there.
        MissingExtraError: Fabric is not installed.
    """

    def __init__(self, devices: int = 1) -> None:
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise MissingExtraError("lightning-fabric", "repair") from error
        if devices < 1:
            raise CalibrationError(f"expected at least one device, got {devices}")
        on_gpu = torch.cuda.is_available()
        if on_gpu and devices > torch.cuda.device_count():
            raise CalibrationError(f"expected at most {torch.cuda.device_count()} devices, the GPUs here, got {devices}")
        for name in ("lightning_fabric", "lightning_utilities"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hints on clusters
            self._fabric = Fabric(
                accelerator="cuda" if on_gpu else "cpu",
                devices=devices,
                strategy="auto" if devices == 1 else "ddp",
                precision="bf16-mixed" if bfloat16_is_fast() else "32-true",
            )
            self._fabric.launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the group of processes in order: one that just ends may be aborted by its own network threads."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if kind is None:
                self._fabric.barrier()
            torch.distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process shows and writes."""
        return bool(self._fabric.is_global_zero)

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return self._fabric.device

    def setup(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A module and its optimizer, ready to be trained here; the module's own weights are those that change."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped, wrapped_optimizer = self._fabric.setup(module, optimizer)
        return cast(nn.Module, wrapped), cast(torch.optim.Optimizer, wrapped_optimizer)

    def place(self, module: _Module) -> _Module:
        """Bring a module that is not trained to the device."""
        return module.to(self.device)

    def share(self, batch: Tensor) -> Tensor:
        """The rows of a batch that this process works on; at least one."""
        rank, world = self._fabric.global_rank, self._fabric.world_size
        return batch if world == 1 else batch[rank::world] if rank < len(batch) else batch[:1]

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over all processes."""
        self._fabric.backward(loss)

    def autocast(self) -> torch.autocast:
        """Around forward passes of modules that were not set up."""
        return cast(torch.autocast, self._fabric.autocast())

    def agree(self, value: float) -> float:
        """The mean over all processes, so that all of them decide alike."""
        reduced = self._fabric.all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device), reduce_op="mean")
        return float(cast(Tensor, reduced))


def bfloat16_is_fast() -> bool:
    """Whether training is faster in mixed precision here; a processor that only emulates it takes ten times as long."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and worth half of the time where it says yes
    return bool(known is not None and known())
