"""Activations inside a model: of its second-to-last layer, of its last convolution, or what a linear layer takes from that.

A forward pass is watched function by function (`torch.overrides.TorchFunctionMode`), so that "last" means executed last and a
plain module and a `torch.export` program are looked into alike. The module is never touched, and the watch is its thread's
own and ends with the pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, final, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guard.errors import GuardError, ModelError, one_line
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend
from guard.predictors.outputs import as_tensor
from guard.predictors.predictor import Backend, Predictor

Layer = Literal["penultimate", "last_convolution", "features"]
"""`penultimate`: what the last linear layer takes, (B, F); in a model without one, the spatial mean of what its last
convolution takes. `last_convolution`: what the last 2-D convolution gives, after the batch norm and the activation that
directly follow it, (B, C, H, W). `features`: what the first linear layer after the last convolution takes, (B, F), so its
neurons one by one where they are flattened; in a model without such a layer the same as `penultimate`.
"""

_INSTEAD = "pass package.module:factory or a .pt2 file instead"
_CPU_ROWS = 128  # as many as a predictor runs at a time there

_CONVOLUTIONS = {"conv2d", "convolution", "_convolution"}
_PRODUCTS = {"mm", "matmul"}  # linear layers only where the second factor is the model's own
_ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "threshold", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu",
    "gelu", "silu", "mish", "hardswish", "tanh", "softplus", "softsign",
}  # fmt: skip
"""Not `sigmoid`: after a convolution it is a gate, or half of a decomposed SiLU."""


@final
@dataclass(frozen=True)
class Tap:
    """A module, and the layer whose activations it gives out beside its answers.

    Args:
        module: An eager module, or that of a `torch.export` program; in eval mode.
        layer: Which layer.

    Raises:
        ModelError: TorchScript, or an unknown layer.
    """

    module: nn.Module
    layer: Layer

    def __post_init__(self) -> None:
        """Refuse what can't be watched."""
        if self.layer not in get_args(Layer):
            raise ModelError(f"expected a layer of {', '.join(get_args(Layer))}, got {self.layer!r}")
        if any(isinstance(part, torch.jit.ScriptModule) for part in self.module.modules()):
            raise ModelError(f"expected a model whose layers can be watched, got TorchScript: {_INSTEAD}")

    @classmethod
    def of(cls, module: nn.Module, layer: Layer) -> Self:
        """Tap a module, of a compiled one the original; whether it has such a layer shows at the first run."""
        return cls(getattr(module, "_orig_mod", module), layer)

    def run(self, batch: Tensor) -> tuple[object, Tensor]:
        """Run the module as it is, from any thread.

        Args:
            batch: What the module takes, on its device.

        Returns:
            What the module returned, and the layer's activations, (B, F) or (B, C, H, W). Gradients pass through both.

        Raises:
            ModelError: The module has no such layer. What it raises itself is passed on.
        """
        watch = _Watch(self.module)
        with watch:
            answers = self.module(batch)
        found = watch.activations(self.layer)
        if len(found) != len(batch):
            raise ModelError(
                f"expected {self.layer} activations of {len(batch)} images, got {len(found)} rows: the layer must take one row "
                "per image"
            )
        return answers, found


def activations(predictor: Predictor, images: Tensor, layer: Layer) -> Tensor:
    """Activations inside a predictor's model, in as many passes as its memory limit and batch size need.

    Args:
        predictor: The model.
        images: (B, C, H, W), float32, in [0, 1].
        layer: Which.

    Returns:
        (B, F) or (B, C', H', W'), float32, on the images' device, without gradients.

    Raises:
        ModelError: The model can't be looked into, has no such layer, or failed.
    """
    tapped = _tapped(predictor.backend, layer)
    rows = min(predictor.max_rows, _CPU_ROWS) if images.device.type == "cpu" else predictor.max_rows
    try:
        with torch.no_grad():
            parts = [as_tensor(tapped(predictor.spec.to_model(part)), len(part)).float() for part in images.split(rows)]
    except GuardError:
        raise
    except (Exception, SystemExit) as error:  # foreign code
        raise ModelError(f"the model failed on a batch of {len(images)}: {one_line(error)}") from error
    return torch.cat(parts).to(images.device)


def silence(module: nn.Module, layer: Layer, channels: Tensor, batch: Tensor) -> None:
    """Make neurons or channels count as 0 for every input, by weights alone, in place.

    Of the penultimate layer and of the features, the next layer's weights for them become 0: they still fire, unheard. Of the
    last convolution, its weights and biases and those of the batch norm behind it become 0: the channels are 0.

    Args:
        module: A copy that may change.
        layer: Which layer.
        channels: (K,), indices of its neurons or channels.
        batch: What the module takes, on its device, to see the order of its layers; one image does, or as many as the
            module's fixed batch size.

    Raises:
        ModelError: That can't be done, and the module is as it was.
    """
    tap = Tap.of(module, layer)
    channels = channels.to(torch.int64)
    with torch.no_grad():
        watch = _watched(tap, batch)
        count = watch.activations(layer).shape[1]
        if channels.ndim != 1 or (len(channels) and not 0 <= int(channels.min()) <= int(channels.max()) < count):
            raise ModelError(f"expected indices of {layer} channels, 0 to {count - 1}, got {channels.flatten().tolist()}")
        places = watch.weights(layer)
        if any(weight.shape[axis] != count for weight, axis in places):
            raise ModelError(f"expected a weight for each of {count} {layer} channels, got shared ones: they can't be silenced")
        before = [weight.clone() for weight, _ in places]
        for weight, axis in places:
            weight.index_fill_(axis, channels.to(weight.device), 0.0)
        if not _silent(_watched(tap, batch), layer, channels):
            for (weight, _), old in zip(places, before, strict=True):
                weight.copy_(old)
            raise ModelError(
                f"expected {layer} channels that zero weights silence, got a layer whose weights are computed, or whose batch "
                "norm or activation makes something of 0: they can't be silenced"
            )


def _watched(tap: Tap, batch: Tensor) -> _Watch:
    watch = _Watch(tap.module)
    with watch:
        tap.module(batch)
    return watch


def _silent(watch: _Watch, layer: Layer, channels: Tensor) -> bool:
    """Whether zeros that were written are what the model used: not so where it computes its weights."""
    found = [(watch.activations(layer), 1)] if layer == "last_convolution" else watch.weights(layer)
    return not any(bool(values.index_select(axis, channels.to(values.device)).any()) for values, axis in found)


@dataclass
class _Executed:
    """A linear layer or a convolution that was executed, and what followed it directly.

    Attributes:
        taken: Its input.
        weight: Its weight.
        axis: Of the weight, over the input's features or channels.
        given: Its output, or the last of what followed it.
        parts: Further weights that have a value for each channel of the output.
        after: What `given` comes from.
    """

    taken: Tensor
    weight: Tensor
    axis: int
    given: Tensor
    parts: list[Tensor] = field(default_factory=list)
    after: Literal["layer", "norm", "activation"] = "layer"


@final
class _Watch(TorchFunctionMode):
    """Remembers the last linear layer and the last convolution of one forward pass, and the first linear layer after that.

    Args:
        module: Whose pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._own = {_memory(value) for values in (module.parameters(), module.buffers()) for value in values}
        self._linear: _Executed | None = None
        self._convolution: _Executed | None = None
        self._features: _Executed | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        last, step = self._convolution, self._follows(name.rstrip("_"), args)
        if _may_write(name, args, kwargs):
            self._spare(_tensors(kwargs.get("out"), *args[:1]), followed=step is not None)
        result = func(*args, **kwargs)
        if last is None or step is None:
            self._note(name, args, kwargs, result)
            return result
        last.after, last.given = step, result[0] if isinstance(result, tuple | list) else result
        if step == "norm":
            first = 3 if func is nn.functional.batch_norm else 1
            last.parts += _tensors(_argument(args, kwargs, first, "weight"), _argument(args, kwargs, first + 1, "bias"))
        return result

    def activations(self, layer: Layer) -> Tensor:
        """The layer's, as `Layer` defines them."""
        if layer == "last_convolution":
            return self._last(layer).given
        taken = self._last(layer).taken
        return taken.flatten(1) if self._linear else taken.mean(dim=(2, 3))

    def weights(self, layer: Layer) -> list[tuple[Tensor, int]]:
        """Weights that hear the penultimate layer, or that make the last convolution's channels; the axis over those."""
        last = self._last(layer)
        if layer == "last_convolution":
            return [(part, 0) for part in (last.weight, *last.parts)]
        return [(last.weight, last.axis)]

    def _last(self, layer: Layer) -> _Executed:
        head = self._linear or self._convolution
        last = {"last_convolution": self._convolution, "features": self._features or head, "penultimate": head}[layer]
        if last is None:
            what = "a 2-D convolution" if layer == "last_convolution" else "a linear layer or a 2-D convolution"
            raise ModelError(f"expected a model with {what} for its {layer} activations, got one that runs none")
        return last

    def _follows(self, name: str, args: tuple[Any, ...]) -> Literal["norm", "activation"] | None:
        """Whether a function takes what the last convolution gave, and counts as part of it."""
        last = self._convolution
        if last is None or last.after == "activation" or not args or args[0] is not last.given:
            return None
        if "batch_norm" in name and last.after == "layer":
            return "norm"
        return "activation" if name in _ACTIVATIONS else None

    def _spare(self, targets: list[Tensor], followed: bool) -> None:
        """Copy what is remembered before a function writes over it."""
        written = {_memory(target) for target in targets}
        for last in filter(None, (self._linear, self._convolution, self._features)):
            if _memory(last.taken) in written:
                last.taken = last.taken.clone()
            if _memory(last.given) in written and not followed:
                last.given = last.given.clone()

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> None:
        """Remember a layer."""
        if name == "addmm":
            args, name = args[1:], "mm"
        taken, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        if not (isinstance(taken, Tensor) and isinstance(weight, Tensor) and isinstance(result, Tensor)):
            return
        if name == "linear":
            self._note_linear(_Executed(taken, weight, 1, result))
        elif name in _PRODUCTS and weight.ndim == 2 and _memory(weight) in self._own:
            self._note_linear(_Executed(taken, weight, 0, result))
        elif name in _CONVOLUTIONS and weight.ndim == 4:
            self._convolution = _Executed(taken, weight, 1, result, _tensors(_argument(args, kwargs, 2, "bias")))
            self._features = None

    def _note_linear(self, layer: _Executed) -> None:
        self._linear = layer
        if self._convolution is not None and self._features is None:
            self._features = layer


def _may_write(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function may work in place: by its name, or by a flag; rather once too often."""
    by_name = name.endswith("_") and (not name.startswith("__") or name.startswith(("__i", "__set")))
    return by_name or "out" in kwargs or any(value is True for value in (*args, *kwargs.values()))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> object:
    return args[position] if position < len(args) else kwargs.get(name)


def _tensors(*values: object) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Where a tensor lies: views of one another have the same."""
    return tensor.untyped_storage().data_ptr()


@final
class _Tapped(nn.Module):
    """A module that returns a tap's activations in place of its answers."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.module = tap.module
        self._tap = tap
        self.training = False  # its own flag: the module's is for the backend to look at

    def forward(self, batch: Tensor) -> Tensor:
        return self._tap.run(batch)[1]


def _tapped(backend: Backend, layer: Layer) -> Backend:
    """The same backend, with activations for answers."""
    if isinstance(backend, ModuleBackend):
        return ModuleBackend(_Tapped(Tap.of(backend.module, layer)))
    if isinstance(backend, ExportedBackend) and isinstance(backend.run, nn.Module):
        return dataclasses.replace(backend, run=_Tapped(Tap.of(backend.run, layer)))
    raise ModelError(f"expected a model whose layers can be watched, got one of kind {backend.kind}: {_INSTEAD}")
