"""A profile as a TorchServe model archive (`.mar`): the profile's files and a handler file of three lines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from export.original import Original, drafts_beside
from export.torch_export import with_exported_model
from guard import Guard
from guard.errors import ExportError, GuardError, MissingExtraError, one_line
from guard.predictors.predictor import DEFAULT_MEMORY_LIMIT

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")
_OURS = ("benchmarks", "calibration", "cli", "export", "guard", "handlers")
_HANDLER = '''"""Made by backdoor-guard, which must be installed where TorchServe runs."""

from handlers.torchserve import GuardHandler


class Handler(GuardHandler):
    """The only class in here, as TorchServe wants it."""
'''


def export_mar(
    profile_folder: str | Path,
    output: str | Path,
    name: str,
    version: str = "1.0",
    model_config: Mapping[str, object] | None = None,
    handler: str | Path | None = None,
) -> Path:
    """Build `NAME.mar`, and make sure that the profile in it loads.

    None of our source goes in: backdoor-guard must be installed where TorchServe runs. A model that a factory makes is
    exported to `.pt2` first, so that the archive needs none of its code.

    Args:
        profile_folder: The profile.
        output: The model store, a folder; it is made if needed, and an archive of the same name in it is replaced.
        name: Of the model.
        version: Numbers with dots.
        model_config: TorchServe's options (`minWorkers`, `batchSize`, `maxBatchDelay` ...), and ours under `guard`.
        handler: A handler file instead of the generated one, with a class made by `handlers.torchserve.guarded`.

    Returns:
        Path of the archive.

    Raises:
        ExportError: The profile can't be archived; nothing is left behind.
        MissingExtraError: torch-model-archiver is not installed.
    """
    if not _NAME.fullmatch(name):
        raise ExportError(f"expected a model name of letters, digits, '.', '_' and '-', got {name!r}: rename it")
    if not _VERSION.fullmatch(version):
        raise ExportError(f"expected a version of numbers and dots, like 1.0, got {version!r}")
    if importlib.util.find_spec("model_archiver") is None:
        raise MissingExtraError("torch-model-archiver", "torchserve")
    profile_folder, output = Path(profile_folder), Path(output)
    target = output / f"{name}.mar"
    with drafts_beside(output, name) as stage:
        _stage_profile(profile_folder, stage / "profile")
        command = ["--model-name", name, "--version", version, "--extra-files", "profile", "--export-path", "."]
        command += ["--handler", _stage_handler(stage, None if handler is None else Path(handler))]
        if model_config is not None:
            (stage / "model-config.yaml").write_text(_as_json(model_config))  # JSON is YAML
            command += ["--config-file", "model-config.yaml"]
        _archive(stage, command)
        _verify(stage / target.name, stage / "verified", _memory_limit(model_config))
        os.replace(stage / target.name, target)
    return target


def _stage_profile(profile_folder: Path, stage: Path) -> None:
    """The files that serving needs, in a folder of their own."""
    original = Original.load(profile_folder)
    subjects = [item for item in (original, original.tripwire()) if item is not None]
    if any(item.profile.model.factory is not None for item in subjects):
        with_exported_model(profile_folder, stage)
        return
    stage.mkdir()
    own = (profile_folder / "guard.json", profile_folder / "arrays.safetensors")
    for file in (*own, *(item.model_file for item in subjects)):
        shutil.copyfile(file, stage / file.name)


def _stage_handler(stage: Path, handler: Path | None) -> str:
    """Name of the handler file in the stage; it must not hide a package, as the archive comes first on Python's path."""
    if handler is None:
        (stage / "guard_handler.py").write_text(_HANDLER)
        return "guard_handler.py"
    if handler.suffix != ".py" or not handler.stem.isidentifier() or _is_taken(handler):
        raise ExportError(f"expected a handler file like my_handler.py, got {handler.name}: rename it to a free module name")
    try:
        shutil.copyfile(handler, stage / handler.name)
    except OSError as error:
        raise ExportError(f"expected a handler file, got {handler}: {error.strerror}") from error
    return handler.name


def _is_taken(handler: Path) -> bool:
    """Whether a package, or a module that is another file, has its name."""
    if handler.stem in (*_OURS, *sys.stdlib_module_names):
        return True
    try:
        found = importlib.util.find_spec(handler.stem)
    except ValueError:  # `__main__`
        return True
    return found is not None and found.origin is not None and Path(found.origin).resolve() != handler.resolve()


def _as_json(model_config: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(model_config), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(f"expected plain values in the model-config, got {one_line(error)}") from error


def _archive(stage: Path, arguments: list[str]) -> None:
    """Run the archiver, which empties `$TMPDIR/NAME` before it starts: give it a TMPDIR of its own."""
    scratch = stage / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging", *arguments]
    environment = {**os.environ, "TMPDIR": str(scratch.absolute())}
    done = subprocess.run(command, cwd=stage, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ExportError(f"torch-model-archiver failed: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")


def _memory_limit(model_config: Mapping[str, object] | None) -> int:
    """That the server will load the archive with."""
    options = {} if model_config is None else model_config.get("guard")
    limit = options.get("memory_limit") if isinstance(options, Mapping) else None
    return limit if isinstance(limit, int) and limit > 0 else DEFAULT_MEMORY_LIMIT


def _verify(archive: Path, folder: Path, memory_limit: int) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        Guard.load(folder, memory_limit=memory_limit)
    except (OSError, zipfile.BadZipFile, GuardError) as error:
        raise ExportError(f"the archive that was built does not load: {one_line(error)}") from error
