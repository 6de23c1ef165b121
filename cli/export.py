"""`guard export`."""

from __future__ import annotations

import importlib
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from cli import options
from cli.extras import needs
from guard import Profile, load_profile
from guard.errors import ExportError, one_line
from guard.loading import check_memory_limit

_Whole = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]


def export(
    profile: options.ProfileArgument,
    kind: Annotated[
        Literal["mar", "onnx"], typer.Option("--format", help="mar: a TorchServe archive with model, profile and handler.")
    ] = "mar",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")] = Path("model-store"),
    name: Annotated[str | None, typer.Option(help="Of the model.", show_default="the profile folder's name")] = None,
    version: Annotated[str | None, typer.Option(help="Of the archive.", show_default="1.0")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The archive's model-config, in YAML: TorchServe's options, and the guard's under guard:.",
            show_default="none: the profile's policy, no quarantine",
        ),
    ] = None,
) -> None:
    """Make a TorchServe archive or an ONNX file; what comes out is compared with the original first.

    Example: guard export profile --format mar --out model-store --name signs --config model-config.yaml
    """
    name = name or profile.absolute().name
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise ExportError(f"expected a model name of letters, digits, '.', '_' and '-', got {name!r}: pass another --name")
    if kind == "onnx":
        for option, value in (("--config", config), ("--version", version)):
            if value is not None:
                raise ExportError(f"expected {option} with --format mar, got it with onnx, which has no room for it: drop it")
        with needs("onnx"):
            from export import export_onnx

        typer.echo(str(export_onnx(profile, out / f"{name}.onnx")))
        typer.echo(_without_guard(load_profile(profile)[0]), err=True)
        return
    from export import export_mar

    model_config = None if config is None else read_model_config(config, profile)
    typer.echo(str(export_mar(profile, out, name, "1.0" if version is None else version, model_config)))


def _without_guard(profile: Profile) -> str:
    """What an ONNX file lacks of a profile, in words."""
    missing = ["the guard"]
    if profile.preprocessor is not None:
        missing.append("the preprocessor that it was tuned for, without which it answers otherwise than was measured")
    if profile.tripwire is not None:
        missing.append("the original that detects")
    spec = profile.input
    takes = f"{spec.layout} {spec.dtype}" + (f", less a mean of {spec.mean}, over {spec.std}" if spec.mean else "")
    return f"note: this is the model alone, without {', without '.join(missing)}; it takes {takes}"


class _ModelConfig(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What TorchServe 0.12 takes from a model-config and has a meaning for ours, and our own section."""

    min_workers: _Positive | None = None
    max_workers: _Positive | None = None
    batch_size: _Positive | None = None
    max_batch_delay: _Whole | None = None
    response_timeout: _Positive | None = None
    startup_timeout: _Positive | None = None
    max_retry_timeout_in_sec: _Positive | None = None
    client_timeout_in_mills: _Whole | None = None
    job_queue_size: _Positive | None = None
    use_job_ticket: bool = False
    device_type: Literal["cpu", "gpu"] | None = None
    device_ids: list[_Whole] | None = None
    guard: dict[str, Any] | None = None


def read_model_config(path: Path, profile: Path) -> dict[str, object]:
    """A model-config for a profile's archive, checked as a worker will check it.

    TorchServe itself passes over what it does not know, be it a misspelt option.

    Raises:
        GuardError: No YAML, an unknown field, a value that is none, or a memory limit that the profile's images exceed.
    """
    with needs("torchserve"):
        yaml = importlib.import_module("yaml")
    from handlers.torchserve_gate import Options

    try:
        found = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ExportError(f"expected a model-config, got {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: a date that is none
        raise ExportError(f"expected YAML in {path}, got {one_line(error)}") from error
    try:
        known = msgspec.convert(found, _ModelConfig)
    except msgspec.ValidationError as error:
        raise ExportError(
            f"expected a model-config in {path}, got: {error}; the guard's own options go under `guard:`"
        ) from error
    if (known.min_workers is None) != (known.max_workers is None) or (known.min_workers or 0) > (known.max_workers or 0):
        raise ExportError(f"expected minWorkers and maxWorkers in {path}, no fewer than the first: TorchServe ignores others")
    check_memory_limit(Options.read(found).memory_limit, load_profile(profile)[0].input)
    return dict(found)


def export_to_scratch(profile: Path, name: str, model_config: dict[str, object]) -> tempfile.TemporaryDirectory[str]:
    """An archive in a folder of its own, for a server started from a profile; the caller removes it."""
    from export import export_mar

    store = tempfile.TemporaryDirectory(prefix="guard-store-")
    try:
        export_mar(profile, Path(store.name), name, model_config=model_config)
    except BaseException:
        store.cleanup()
        raise
    return store
