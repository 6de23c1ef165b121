"""TorchServe's own context and metrics cache, as a worker makes them, without a server."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from handlers.torchserve_metrics import metrics_config_path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchServe leaves a file open when it is imported
    from ts.context import Context, RequestProcessor
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl


class Handler(Protocol):
    def initialize(self, context: Any) -> None: ...

    def handle(self, data: Sequence[Mapping[str, object]], context: Any) -> Sequence[object]: ...


@dataclass(frozen=True)
class Reply:
    status: int
    phrase: str
    content_type: str | None
    body: Any
    request_id: str


def worker_context(folder: Path, options: Mapping[str, object] | None = None) -> Any:
    """A context for the profile in a folder, with options under `guard:`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another open file
        metrics = MetricsCacheYamlImpl(str(metrics_config_path()))
        metrics.initialize_cache()
    config = {} if options is None else {"guard": dict(options)}
    return Context("toy", str(folder), {}, 8, None, "0.12.0", metrics=metrics, model_yaml_config=config)


def started(handler: Handler, folder: Path, options: Mapping[str, object] | None = None) -> Any:
    """Initialise a handler; returns its context."""
    context = worker_context(folder, options)
    handler.initialize(context)
    return context


def ask(handler: Handler, context: Any, *rows: Mapping[str, object] | bytes, ids: Sequence[str] = ()) -> list[Reply]:
    """What TorchServe does with a batch; bytes stand for a bare body."""
    batch = [{"body": bytearray(row)} if isinstance(row, bytes) else row for row in rows]
    names = list(ids) or [str(uuid.uuid4()) for _ in batch]
    context.request_ids = dict(enumerate(names))
    context.request_processor = [RequestProcessor({}) for _ in batch]
    results = handler.handle(batch, context)
    replies = []
    for row, result in enumerate(results):
        status, phrase = context.get_response_status(row)
        replies.append(Reply(status, phrase, context.get_response_content_type(row), result, names[row]))
    return replies
