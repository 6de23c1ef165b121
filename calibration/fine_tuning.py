"""Fine-tuning a copy of a model that somebody else made, whatever it takes and returns; the model itself never changes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from calibration.data import Progress, no_progress
from guard.errors import GuardError, ModelError, one_line
from guard.images import InputSpec
from guard.predictors import Backend, OutputKind, Predictor
from guard.predictors.chunks import run_in_chunks
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend, state_sha256
from guard.predictors.torchscript import TorchScriptBackend

_LEAST = torch.finfo(torch.float32).tiny  # of a probability: under it there is no gradient, and a backdoor is very sure
_OF_IMAGES = 4  # axes
_TRAINABLE = "a factory of an nn.Module, a TorchScript .pt or a .pt2 file, which returns logits or probabilities"


@final
@dataclass(frozen=True)
class TrainableCopy:
    """A copy of a predictor's model with weights of its own.

    It stays in eval mode: dropout is off and batch norm keeps its statistics, so a few images are enough.

    Attributes:
        predictor: Answers with the copy.
        parameters: Its weights.
    """

    predictor: Predictor
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, predictor: Predictor) -> TrainableCopy:
        """Copy a predictor's model.

        Raises:
            ModelError: It has no weights that PyTorch can train.
        """
        backend = predictor.backend
        module = trainable(backend)
        if predictor.labels_only:
            raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got one that returns labels only")
        if predictor.spec.container != "torch":
            raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got one that takes NumPy arrays")
        copied = _copy(module)
        parameters = [value for value in copied.parameters() if value.dtype.is_floating_point]
        for parameter in parameters:
            parameter.requires_grad_(True)
        if not parameters:
            raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got one without weights")
        if any(parameter.dtype == torch.float16 for parameter in parameters):  # Adam's eps is nothing there
            raise ModelError("expected weights in float32, got some in float16, which training makes NaN: use .float()")
        if isinstance(backend, ModuleBackend):
            return cls(dataclasses.replace(predictor, backend=ModuleBackend(copied)), parameters)
        if isinstance(backend, TorchScriptBackend) and isinstance(copied, torch.jit.ScriptModule):
            return cls(dataclasses.replace(predictor, backend=TorchScriptBackend(copied, "")), parameters)
        if isinstance(backend, ExportedBackend):
            return cls(dataclasses.replace(predictor, backend=dataclasses.replace(backend, run=copied, sha256="")), parameters)
        raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got {backend.kind}")

    def faster(self, images: Tensor) -> Self:
        """The same copy with its weights in channels-last order, where the model answers as before.

        Convolutions are about twice as fast so on a CPU. A model may not bear it (`view` on what is no longer contiguous):
        then it stays as it is.

        Args:
            images: (B, C, H, W), in [0, 1], a few to try it on.
        """
        module = trainable(self.predictor.backend)
        before = self.predictor(images)
        arrange(module, torch.channels_last)
        try:
            same = bool(torch.isclose(self.predictor(images), before, atol=1e-3, equal_nan=True).all())
        except ModelError:
            same = False
        if not same:
            arrange(module, torch.contiguous_format)
        return self

    def settle(self) -> None:
        """Bring the weights back to the CPU and into their usual order, with gradients off."""
        module = trainable(self.predictor.backend)
        module.cpu()
        arrange(module, torch.contiguous_format)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def answers(self) -> Answers:
        """The copy as a module that can be trained: images in, logits out."""
        backend = self.predictor.backend
        module, spec, output = trainable(backend), self.predictor.spec, self.predictor.output
        if not isinstance(backend, ExportedBackend):
            return Answers(module, spec, output)
        return Answers(module, spec, output, backend.batch_size, _insists_on_types(module))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats; images (B, C, H, W) in [0, 1], labels (B,)."""
        logits = self.answers()(images)
        return nn.functional.cross_entropy(logits, labels.to(logits.device))


@final
class Answers(nn.Module):
    """A model as a function that gradients pass through: images (B, C, H, W) in [0, 1] to logits (B, M).

    Of a model that returns probabilities, their logarithm: whatever takes logits takes that.

    Args:
        module: The model's own.
        spec: Its input.
        output: What it returns.
        batch_size: The only one that it takes; None for any.
        full_precision: Run it so, whatever is asked for around it.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: InputSpec,
        output: OutputKind,
        batch_size: int | None = None,
        full_precision: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self._spec, self._output, self._batch_size, self._full_precision = spec, output, batch_size, full_precision

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        full = torch.autocast(images.device.type, enabled=False) if self._full_precision else contextlib.nullcontext()
        try:
            with full:
                raw = run_in_chunks(self.module, self._spec.to_model(images.float()), self._batch_size)
        except GuardError:
            raise
        except (Exception, SystemExit) as error:  # a model is foreign code, and must not end its own inspection
            kind = " for gradients" if torch.is_grad_enabled() else ""
            raise ModelError(f"the model can't be run{kind}, on a batch of {len(images)}: {one_line(error)}") from error
        answers = raw[0] if isinstance(raw, tuple | list) else raw
        if not isinstance(answers, Tensor) or (torch.is_grad_enabled() and not answers.requires_grad):
            raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got one without gradients")
        return answers.float() if self._output == "logits" else answers.float().clamp_min(_LEAST).log()


def arrange(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Put the weights of a module's 2-D convolutions in this order, in place; they are about twice as fast channels last."""
    for value in itertools.chain(module.parameters(), module.buffers()):
        if value.ndim == _OF_IMAGES:
            value.data = value.data.contiguous(memory_format=memory_format)


def fine_tune(
    copied: TrainableCopy,
    batches: Callable[[int], list[tuple[Tensor, Tensor]]],
    epochs: int,
    rate: float,
    low_loss: float = 0.0,
    progress: Progress = no_progress,
    what: str = "fine-tuning",
) -> None:
    """Train a copy in place with Adam, its rate falling linearly to 0.

    Args:
        copied: The copy.
        batches: Epoch to images and labels.
        epochs: Passes.
        rate: First learning rate.
        low_loss: Stop once an epoch's mean loss, in nats, is under this.
        progress: Told how far it is.
        what: For the progress display.

    Raises:
        ModelError: The model can't be trained.
    """
    optimizer = torch.optim.Adam(copied.parameters, lr=rate)
    for epoch in range(epochs):
        found = batches(epoch)
        losses: list[float] = []
        for number, (images, labels) in enumerate(found):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 - (epoch + number / len(found)) / epochs)
            optimizer.zero_grad(set_to_none=True)
            try:
                loss = copied.loss(images, labels)
                loss.backward()
            except ModelError:
                raise
            except Exception as error:  # foreign code
                raise ModelError(f"the model can't be fine-tuned: {one_line(error)}") from error
            if not bool(loss.isfinite()):
                raise ModelError(
                    "expected a model that can be fine-tuned, got one whose loss is no number: check --mean, --std and --output"
                )
            if not losses and not any(value.grad is not None and bool(value.grad.any()) for value in copied.parameters):
                raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got one without gradients")
            optimizer.step()
            losses.append(float(loss.detach()))
        done = sum(losses) / len(losses) < low_loss
        progress(what, epochs if done else epoch + 1, epochs)
        if done:
            break


def weights_sha256(predictor: Predictor) -> str:
    """SHA-256 over the weights of a model, or a copy, that can be fine-tuned, as they stand."""
    return state_sha256(trainable(predictor.backend).state_dict())


def trainable(backend: Backend) -> nn.Module:
    """The module inside.

    Raises:
        ModelError: There is none that PyTorch could train.
    """
    if isinstance(backend, ModuleBackend | TorchScriptBackend):
        return backend.module
    if isinstance(backend, ExportedBackend) and isinstance(backend.run, nn.Module):
        return backend.run
    instead = ": use the one that it was exported from" if backend.kind == "onnx" else ""
    raise ModelError(f"expected a model that can be fine-tuned ({_TRAINABLE}), got a model of kind {backend.kind}{instead}")


def _insists_on_types(program: nn.Module) -> bool:
    """Whether a `torch.export` program checks the types of what it casts, as it saw them: another precision fails there."""
    graph = getattr(program, "graph", None)
    checks = torch.ops.aten._assert_tensor_metadata.default
    return graph is not None and any(node.target is checks for node in graph.nodes)


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy whose weights are leaves; those of TorchScript are not, unless gradients are off."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export's own, about its own trees
            return copy.deepcopy(module)
    except Exception as error:  # foreign code
        raise ModelError(f"the model can't be copied, so nothing can be planted: {one_line(error)}") from error
