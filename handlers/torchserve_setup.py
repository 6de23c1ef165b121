"""How our own TorchServe is set up: options, ports, configuration, environment."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, final

from guard.errors import MissingExtraError, ServingError, one_line
from handlers.torchserve_metrics import metrics_config_path

HOST = "127.0.0.1"
BATCH_DELAY_MS = 2
"""How long a request waits for others to be judged along with it, unless told otherwise."""

STORE = "store"
"""The private model store, in the private folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MIB = 1024**2
_PACKAGES = {"ts": "torchserve", "yaml": "PyYAML", "psutil": "psutil", "requests": "requests"}
_DEFAULTS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": BATCH_DELAY_MS}
_LOG4J = Path(__file__).with_name("torchserve_log4j2.xml")


@final
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How TorchServe runs.

    Args:
        inference_port: Of `/predictions`; 0 picks a free one.
        management_port: Of the management API, read-only unless `model_api`; 0 picks a free one.
        metrics_port: Of `/metrics`; 0 picks a free one.
        workers: Processes per model; None leaves it to the archive's model-config, or makes it 1.
        batch_size: Requests that a worker answers at once; None as above.
        max_batch_delay_ms: How long a request waits for others to fill its batch; a lone one waits that long too. None
            leaves it to the archive's model-config, or makes it 2.
        max_request_size: Bytes; larger bodies are answered 413 by TorchServe itself. Above the handler's own limit.
        metrics_config: TorchServe's metrics file; the packaged one when None.
        model_api: Let the management API register and remove versions, for `TorchServeProcess.roll_out`. Off, so that nothing
            on this machine can.
        token_auth: Ask clients for a token, see `TorchServeProcess.token`. Off, because only this machine can connect.
        timeout: Seconds until everything must be ready.
        grace: Seconds between the request to stop and the order.
        environment: Further environment variables.
        echo: Where TorchServe's log goes as well, line by line; None keeps only its end, for error messages.
    """

    inference_port: int = 0
    management_port: int = 0
    metrics_port: int = 0
    workers: int | None = None
    batch_size: int | None = None
    max_batch_delay_ms: int | None = None
    max_request_size: int = 11 * _MIB
    metrics_config: Path | None = None
    model_api: bool = False
    token_auth: bool = False
    timeout: float = 120.0
    grace: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)
    echo: TextIO | None = None


def find_java(extra: Mapping[str, str]) -> str:
    """Path of Java, after a look at what else is needed."""
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "torchserve")
    home = extra.get("JAVA_HOME", os.environ.get("JAVA_HOME", ""))
    java = shutil.which(str(Path(home) / "bin" / "java") if home else "java")
    if java is None:
        where = f"JAVA_HOME ({home})" if home else "PATH"
        raise ServingError(
            f"expected Java 11 or newer for TorchServe, got none in {where}: install a JRE, or use --engine asgi"
        )
    return java


def stage_store(store: Path, models: Mapping[str, str], options: ServerOptions, target: Path) -> dict[str, Any]:
    """Bring the archives into a private store, as `NAME.mar`, each with the options.

    Returns:
        What TorchServe is told of each model.

    Raises:
        ServingError: There is no such archive, or a name can't be used.
    """
    if not models:
        raise ServingError("expected at least one model to serve, got none")
    target.mkdir()
    entries = {}
    for name, file in models.items():
        if not _NAME.fullmatch(name):
            raise ServingError(f"expected a model name of letters, digits, '.', '_' and '-', got {name!r}")
        try:
            entries[name] = stage_archive(store / file, target / f"{name}.mar", options)
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            raise ServingError(f"expected a model archive {file} in {store}, got none: make one with guard export") from error
    return entries


def stage_archive(source: Path, target: Path, options: ServerOptions) -> dict[str, Any]:
    """Link an archive, or copy it, where it must last or with another model-config, which TorchServe prefers to its own."""
    wanted = {
        "minWorkers": options.workers,
        "maxWorkers": options.workers,
        "batchSize": options.batch_size,
        "maxBatchDelay": options.max_batch_delay_ms,
    }
    given = {key: value for key, value in wanted.items() if value is not None}
    with zipfile.ZipFile(source) as archive:
        model = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
        config = model.get("configFile")
        if config is not None and given:
            _copy_with_config(archive, target, config, given)
        elif options.model_api:  # a version may be rolled out again when the next one has taken this file's place
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source.resolve())
    entry = {"defaultVersion": True, "marName": target.name, "responseTimeout": 120}
    return {str(model["modelVersion"]): {**entry, **_DEFAULTS, **given}}


def _copy_with_config(archive: zipfile.ZipFile, target: Path, config: str, changes: Mapping[str, int]) -> None:
    yaml = importlib.import_module("yaml")
    try:
        own = yaml.safe_load(archive.read(config)) or {}
    except yaml.YAMLError as error:
        raise ServingError(f"expected YAML in {config} of {target.name}, got {one_line(error)}") from error
    with zipfile.ZipFile(target, "w") as copy:
        for item in archive.infolist():
            if item.filename != config and not item.is_dir():
                entry = zipfile.ZipInfo(item.filename)  # without the time: the same archive makes the same copy
                with archive.open(item) as source, copy.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink)
        copy.writestr(zipfile.ZipInfo(config), json.dumps({**own, **changes}))


def pick_ports(options: ServerOptions) -> dict[str, int]:
    """The ports that were asked for, after a check, and free ones for the rest."""
    wanted = {
        "inference": options.inference_port,
        "management": options.management_port,
        "metrics": options.metrics_port,
        "grpc_inference": 0,
        "grpc_management": 0,
    }
    with contextlib.ExitStack() as stack:
        sockets = {api: stack.enter_context(_bound(api, port)) for api, port in wanted.items()}
        return {api: item.getsockname()[1] for api, item in sockets.items()}


@contextlib.contextmanager
def _bound(api: str, port: int) -> Iterator[socket.socket]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TorchServe does: a closing connection is no obstacle
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ServingError(f"expected a free {api} port, got {port}, which is in use: pick another") from error
        yield probe


def write_config(folder: Path, ports: Mapping[str, int], entries: Mapping[str, Any], options: ServerOptions) -> None:
    """Write `config.properties` and the metrics file into the private folder, and make its sub-folders."""
    for name in ("tmp", "logs"):
        (folder / name).mkdir()
    shutil.copyfile(options.metrics_config or metrics_config_path(), folder / "metrics.yaml")
    settings = {
        **{f"{api}_address": f"http://{HOST}:{ports[api]}" for api in ("inference", "management", "metrics")},
        **{f"grpc_{api}_address": HOST for api in ("inference", "management")},
        **{f"grpc_{api}_port": ports[f"grpc_{api}"] for api in ("inference", "management")},
        "metrics_mode": "prometheus",
        "metrics_config": folder / "metrics.yaml",
        "disable_system_metrics": "true",
        "enable_envvars_config": "false",
        "allowed_urls": "file://nowhere",  # archives come from the model store alone
        "install_py_dep_per_model": "false",
        "max_request_size": options.max_request_size,
        "number_of_netty_threads": 4,
        "vmargs": "-Xmx1g -XX:+ExitOnOutOfMemoryError",
        "models": json.dumps(entries),
    }
    (folder / "config.properties").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


def command(folder: Path, models: Iterable[str], options: ServerOptions) -> list[str]:
    """The command line, with this very interpreter for the workers too."""
    line = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--log-config", str(_LOG4J)]
    line += ["--ts-config", str(folder / "config.properties"), "--model-store", str(folder / STORE)]
    line += ["--models", *(f"{name}={name}.mar" for name in models)]
    line += ["--enable-model-api"] if options.model_api else []
    return line if options.token_auth else [*line, "--disable-token-auth"]


def environment(folder: Path, java: str, extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with private folders, and with the code that this process runs.

    Unless something else is asked for, a worker's model runs on one thread: workers, Java and clients share the cores,
    and small models lose more by waiting for a busy core than they gain by a second one.
    """
    code = str(Path(__file__).resolve().parent.parent)
    paths = [code, *filter(None, extra.get("PYTHONPATH", os.environ.get("PYTHONPATH", "")).split(os.pathsep))]
    private = {"TMPDIR": str(folder / "tmp"), "TEMP": str(folder / "tmp"), "LOG_LOCATION": str(folder / "logs")}
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **extra, **private, "METRICS_LOCATION": str(folder / "logs")}
    variables.pop("TS_CONFIG_FILE", None)
    search = os.pathsep.join([str(Path(java).parent), variables.get("PATH", "")])
    return {**variables, "PYTHONPATH": os.pathsep.join(paths), "PATH": search}
