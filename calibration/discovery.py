"""Find out what a model takes and returns, on calibration images.

A file says most of it (ONNX: shape, type; `torch.export` and TorchScript: float NCHW). For a plain function everything
is tried: NumPy or torch, NHWC or NCHW, uint8 or float. What runs and answers the labels best is taken and recorded.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from calibration.data import ImageSet
from guard.errors import GuardError, InputError, ModelError, one_line
from guard.images import Container, DType, InputSpec, Layout
from guard.predictors import Backend, OutputKind, Predictor
from guard.predictors.exported import ExportedBackend
from guard.predictors.onnx import OnnxBackend
from guard.predictors.outputs import as_tensor, detect_kind
from guard.predictors.predictor import without_gradients

logger = logging.getLogger("guard.calibration")

_TRIALS = 128
_BLIND_TRIALS = 32
_LARGEST = 1 << 24  # numbers in an image, four megapixels and more, of which all trials fit into memory
_AGREEMENT = 0.99
_SAME = 0.02  # in probability; half precision differs by less


class Hints(msgspec.Struct, frozen=True, kw_only=True):
    """What the user says about the model; None leaves it to be found out.

    Attributes:
        mean: Per channel, of images in [0, 1].
        std: Per channel.
        output: What the model returns.
        layout: Axis order of its input.
        dtype: Value type of its input.
        container: Array library of its input.
        class_names: In label order.
        resize: Bring images of other sizes to the model's, when serving.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    output: OutputKind | None = None
    layout: Layout | None = None
    dtype: DType | None = None
    container: Container | None = None
    class_names: tuple[str, ...] = ()
    resize: bool = False


@dataclass(frozen=True)
class _Trial:
    spec: InputSpec
    answers: Tensor
    output: OutputKind


def declared_shape(backend: Backend) -> tuple[int, int, int] | None:
    """(C, H, W) that a model file declares, where it does."""
    if not isinstance(backend, OnnxBackend | ExportedBackend) or len(backend.input_shape) != 4:
        return None
    _, first, second, third = backend.input_shape
    shape = (third, first, second) if first not in (1, 3) and third in (1, 3) else (first, second, third)
    channels, height, width = shape
    return None if channels is None or height is None or width is None else (channels, height, width)


def discover(backend: Backend, clean: ImageSet, hints: Hints | None = None, memory_limit: int | None = None) -> Predictor:
    """Make a predictor of a model whose conventions are not fully known.

    Args:
        backend: Runs the model.
        clean: Calibration images; with labels, several working conventions are told apart by accuracy.
        hints: What the user knows.
        memory_limit: Bytes that one forward pass may take.

    Raises:
        ModelError: No convention works, or several work, answer differently, and there are no labels to tell.
        InputError: Hints that contradict the images.
    """
    hints = hints or Hints()
    rows = torch.linspace(0, len(clean) - 1, min(len(clean), _TRIALS)).round().to(torch.int64).unique()
    images = clean.images(rows)
    labels = None if clean.labels is None else clean.labels[rows]
    trials, problems = _try_all(backend, clean, hints, images)
    if not trials:
        declared = declared_shape(backend)
        if declared not in (None, clean.shape):
            raise ModelError(
                f"expected images of shape {declared} (C, H, W), as the model's file declares, got {clean.shape}: check the "
                "images and --shape"
            )
        raise ModelError(
            f"expected images that the model takes, got shape {clean.shape} (C, H, W), on which it does not run "
            f"({len(problems)} tried: layouts and types): is it the model's? The last said: {problems[-1]}"
        )
    best = _choose(trials, labels)
    num_classes = _count_classes(best, clean)
    predictor = Predictor(backend, best.spec, num_classes, best.output)
    if memory_limit is not None:
        predictor = Predictor(backend, best.spec, num_classes, best.output, memory_limit)
    _check_answers(predictor, images)
    return predictor


def discover_without_images(backend: Backend, shape: tuple[int, int, int], hints: Hints | None = None) -> Predictor:
    """The same where there are no images at all: the model is tried on noise.

    What noise can't tell is taken as the hints have it: without mean and std, the model is believed to normalise for itself.

    Args:
        backend: Runs the model.
        shape: (C, H, W) of its images.
        hints: What the user knows.

    Raises:
        ModelError: No convention works, or several work and answer differently.
        InputError: Hints that contradict the shape.
    """
    if math.prod(shape) > _LARGEST:
        raise InputError(f"expected images of at most {_LARGEST:,} numbers, got {'x'.join(map(str, shape))}: check --shape")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (_BLIND_TRIALS, *shape), dtype=torch.uint8, generator=generator)
    return discover(backend, ImageSet(noise), hints)


def _check_answers(predictor: Predictor, images: Tensor) -> None:
    """Refuse what calibration would take for entropy: no answers, other ones each time, or none to a single image."""
    answers = predictor(images)
    failed = int(torch.isnan(answers).any(dim=1).sum())
    if failed:
        raise ModelError(f"the model gave NaN or Inf for {failed} of {len(images)} clean images: check --mean, --std, --output")
    if float((predictor(images) - answers).abs().max()) > _SAME:
        raise ModelError("the model answers the same images differently each time: switch off dropout or whatever it draws")
    try:
        alone = predictor(images[:1])
    except ModelError as error:
        raise ModelError(f"the model answers batches but not a single image: {error}") from error
    if not float((alone - answers[:1]).abs().max()) <= _SAME:
        raise ModelError("the model answers an image differently on its own than in a batch: switch off batch statistics")


def _specs(backend: Backend, clean: ImageSet, hints: Hints) -> list[InputSpec]:
    """The conventions worth trying, the likeliest first."""
    channels, height, width = clean.shape
    containers: tuple[Container, ...] = ("torch",)
    layouts: tuple[Layout, ...] = ("NCHW",)
    dtypes: tuple[DType, ...] = ("float32",)
    if isinstance(backend, OnnxBackend):
        containers, dtypes = ("numpy",), ("uint8",) if backend.input_dtype == "uint8" else ("float32",)
        last = backend.input_shape[-1]
        axes = len(backend.input_shape)
        layouts = (
            ("flat",) if axes == 2 else ("NHW",) if axes == 3 else ("NHWC",) if last == channels and width != last else layouts
        )
    elif backend.kind == "callable":
        containers = ("numpy", "torch")
        layouts = ("NHWC", "NCHW", "NHW", "flat") if channels == 1 else ("NHWC", "NCHW")
        dtypes = ("float32",) if hints.mean or hints.std else ("uint8", "float32")
    combinations = itertools.product(
        (hints.container,) if hints.container else containers,
        (hints.layout,) if hints.layout else layouts,
        (hints.dtype,) if hints.dtype else dtypes,
    )
    names = hints.class_names or clean.class_names
    return [
        InputSpec(
            channels=channels,
            height=height,
            width=width,
            layout=layout,
            dtype=dtype,
            container=container,
            mean=hints.mean,
            std=hints.std,
            class_names=names,
            resize=hints.resize,
        )
        for container, layout, dtype in combinations
    ]


def _try_all(backend: Backend, clean: ImageSet, hints: Hints, images: Tensor) -> tuple[list[_Trial], list[str]]:
    trials: list[_Trial] = []
    problems: list[str] = []
    for spec in _specs(backend, clean, hints):
        try:
            raw = _run(backend, spec, images)
            kind = hints.output or detect_kind(raw)
            if kind != "labels" and (raw.ndim != 2 or raw.shape[1] < 2):
                raise ModelError(f"expected {kind} (B, M) with M >= 2, got shape {tuple(raw.shape)}: is --output right?")
            if kind == "labels" and raw.numel() != len(images):
                raise ModelError(f"expected one label per image, got shape {tuple(raw.shape)}: is --output right?")
            if raw.shape[0] != len(images):
                raise ModelError(f"expected one row per image ({len(images)}), got shape {tuple(raw.shape)}")
            trials.append(_Trial(spec, raw, kind))
        except InputError:
            raise
        except GuardError as error:
            problems.append(str(error))
        except (Exception, SystemExit) as error:  # a convention that a foreign function can't take: the next may do
            logger.debug("%s: %s", _name(spec), one_line(error), exc_info=True)
            problems.append(one_line(error))
    return trials, problems


def _run(backend: Backend, spec: InputSpec, images: Tensor) -> Tensor:
    with without_gradients(backend):
        parts = [as_tensor(backend(spec.to_model(part)), len(part)) for part in images.split(32)]
    return torch.cat([part.cpu() for part in parts])


def _choose(trials: list[_Trial], labels: Tensor | None) -> _Trial:
    answers = [_labels(trial) for trial in trials]
    if labels is not None:
        accuracies = [float((answer == labels).double().mean()) for answer in answers]
        return trials[accuracies.index(max(accuracies))]
    first = answers[0]
    for trial, answer in zip(trials[1:], answers[1:], strict=True):
        if float((answer == first).double().mean()) < _AGREEMENT:
            raise ModelError(
                f"the model runs on several input conventions ({_name(trials[0].spec)}; {_name(trial.spec)}) and answers "
                "differently: give labels with the clean images, or say which with --layout, --dtype or --container"
            )
    return trials[0]


def _labels(trial: _Trial) -> Tensor:
    return trial.answers.reshape(-1).to(torch.int64) if trial.output == "labels" else trial.answers.argmax(dim=1)


def _count_classes(trial: _Trial, clean: ImageSet) -> int:
    if trial.output != "labels":
        return int(trial.answers.shape[1])
    known = [int(_labels(trial).max()) + 1, len(trial.spec.class_names)]
    if clean.labels is not None:
        known.append(int(clean.labels.max()) + 1)
    return max(2, *known)


def _name(spec: InputSpec) -> str:
    return f"{spec.container} {spec.layout} {spec.dtype}"
