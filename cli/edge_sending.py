"""What a device sends an edge server: options, a model file without pickles, and images as plain arrays."""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from guard.errors import EdgeError, GuardError, InputError, one_line
from guard.predictors import load_backend
from guard.predictors.archives import read_archive
from guard.predictors.screening import file_sha256
from handlers.edge_protocol import FileInfo, RepairOptions

if TYPE_CHECKING:
    from calibration.data import ImageSet
    from calibration.repair.record import RepairRecord
    from calibration.sources import ModelSource

_KINDS = {"torch-export": "model.pt2", "torchscript": "model.pt", "onnx": "model.onnx", "module": "model.safetensors"}
_SAMPLES = "data/sample_inputs/"
_SETTINGS = ("recipe", "views", "epochs", "allow_missing_classes", "seed")
_INPUT = ("mean", "std", "layout", "dtype", "container")


def named(options: RepairOptions) -> dict[str, object]:
    """Values by the names that `guard repair` has for them, like `--gan-epochs`."""
    return {_option(name): value for name, value in msgspec.structs.asdict(options).items()}


def check_options(options: RepairOptions) -> None:
    """Refuse, before any work, values that no edge server takes, or that JSON can't hold.

    Raises:
        InputError: It names the option.
    """
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        wanted = "finite numbers" if not _finite(value) else _expected(value, field.type)
        if wanted:
            raise InputError(
                f"expected {_option(field.name)} that an edge server takes ({wanted}), got {_text(value)}: change it, or "
                "repair here, without --edge"
            )


def check_same(record: RepairRecord, given: Mapping[str, object], where: str) -> None:
    """Refuse the result of a job that was sent with other options than those that are given now.

    Args:
        record: What came of the job.
        given: Options of the command line, like `--seed`, and their values.
        where: The job and its server, for the message.

    Raises:
        InputError: It names the first option that differs. What the record does not tell can't be compared.
    """
    told = _told(record)
    for name, value in given.items():
        if name in told and told[name] != value:
            own = one_line(InputError(_spelt(name, told[name])))  # the server's text, which must not steer a terminal
            raise InputError(
                f"expected {own}, which {where} was sent with, got {_spelt(name, value)}: give the "
                "job's, or repair again without --edge-job; the job stays there"
            )


def write_model(source: ModelSource, folder: Path) -> Path:
    """Put a model into a folder, ready to be sent.

    Args:
        source: The model; of a factory's module the weights are sent.
        folder: An existing one.

    Raises:
        EdgeError: It lies in no file, or can't be freed of pickles.
    """
    if source.file is None:
        raise EdgeError("expected a model in a file, or a factory of an nn.Module, got a predict function, which can't be sent")
    target = folder / _KINDS[source.backend.kind]
    if source.backend.kind != "torch-export" or not _has_samples(source.file):
        shutil.copyfile(source.file, target)
        return target
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in read_archive(source.file, "torch.export").items():
            entry = zipfile.ZipInfo(f"model/{name}")  # without a date: the same model is the same bytes
            archive.writestr(entry, b"" if name.startswith(_SAMPLES) else data)
    try:
        load_backend(target)
    except GuardError as error:
        raise EdgeError(
            f"expected a .pt2 file that loads without its pickled sample inputs, got {source.file.name}, which does not: "
            f"send it as TorchScript ({error})"
        ) from error
    return target


def write_images(images: ImageSet, target: Path) -> None:
    """Write images, and what is known of their labels, as an `.npz`; bytes where that is exact."""
    arrays: dict[str, Any] = {"x": _exact(images.pixels).numpy()}
    if images.labels is not None:
        arrays["y"] = images.labels.numpy()
    if images.class_names:
        arrays["class_names"] = np.array(images.class_names, dtype=np.str_)
    np.savez_compressed(target, **arrays)


def declared(path: Path) -> FileInfo:
    """A file's name, size and checksum."""
    return FileInfo(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))


def _has_samples(path: Path) -> bool:
    return any(data for name, data in read_archive(path, "torch.export").items() if name.startswith(_SAMPLES))


def _exact(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    whole = pixels.mul(255.0).round()
    return whole.to(torch.uint8) if bool(((whole / 255.0) - pixels).abs().max() < 1e-6) else pixels


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _finite(value: object) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def _expected(value: object, kind: object) -> str:
    """What a value should have been; empty where it is."""
    try:
        msgspec.convert(msgspec.to_builtins(value), kind)
    except msgspec.ValidationError as error:
        return str(error).removeprefix("Expected ").replace("`", "")
    return ""


def _told(record: RepairRecord) -> dict[str, object]:
    """What a record tells of the options that it was made with."""
    kept = {name: record.settings[name] for name in _SETTINGS if name in record.settings}
    told = {
        "--method": record.method,
        **{_option(name): value for name, value in kept.items()},
        "--max-accuracy-drop": record.max_accuracy_drop,
        "--output": record.model.output,
        "--shape": record.input.shape,
        **{_option(name): getattr(record.input, name) for name in _INPUT},
    }
    gan = record.settings.get("gan")
    if isinstance(gan, dict) and "epochs" in gan:
        told["--gan-epochs"] = gan["epochs"]
    if not record.quarantined_images:
        told["--quarantine"] = None
    return told


def _spelt(name: str, value: object) -> str:
    """An option as on a command line, which a flag or a default may leave out."""
    if value is None or value is False or value == ():
        return f"no {name}"
    return name if value is True else f"{name} {_text(value)}"


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)
