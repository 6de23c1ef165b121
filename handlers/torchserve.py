"""Handlers for TorchServe: `GuardHandler`, which answers by itself, and `guarded`, for a handler that a user already has.

`export.export_mar` builds archives for both. An archive's handler file holds exactly one class:

    from handlers.torchserve import GuardHandler

    class Handler(GuardHandler):
        pass

or, with the user's own handler,

    from handlers.torchserve import guarded
    from my_package import MyHandler

    class Handler(guarded(MyHandler)):
        pass

or, where MyHandler is written in that very file, `@guarded` above it. The profile's files lie at the archive's root, and
options under `guard:` in its model-config (see `handlers.torchserve_gate.Options`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from guard.errors import ModelError, one_line
from handlers.service import ImageService
from handlers.torchserve_gate import Answered, Gate, load_service
from handlers.torchserve_request import Context, Row, failed_outcome, send, sendable, subset

logger = logging.getLogger("guard.torchserve")


class GuardHandler:
    """Answers images with the profile's own model, guarded; see `handlers.answers` for the answers."""

    _gate: Gate

    def initialize(self, context: Context) -> None:
        """Load the profile from the model archive; never raises."""
        self._gate = Gate(context, functools.partial(load_service, context))

    def handle(self, data: Sequence[Row], context: Context) -> list[dict[str, object]]:
        """Answer a batch; never raises.

        Args:
            data: One row per request.
            context: Takes each answer's status.

        Returns:
            One JSON object per request, in order.
        """
        outcomes = self._gate.judge(data, context)
        outcomes = [item if sendable(item.answer.body) else failed_outcome(item.request_id, item.seconds) for item in outcomes]
        self._gate.finish(outcomes, context)
        return [send(context, row, outcome.answer) for row, outcome in enumerate(outcomes)]


class UserHandler(Protocol):
    """A TorchServe handler class, such as a subclass of TorchServe's BaseHandler."""

    def initialize(self, context: Any, /) -> Any:
        """Load the user's model."""
        ...

    def handle(self, data: Any, context: Any, /) -> Any:
        """One result per row, in order."""
        ...


class GuardedHandler:
    """Passes what the guard accepts on to the user's handler, in monitor mode every image; `guarded` makes one.

    The guard runs the profile's model on the image as it decodes it. The handler behind gets the accepted rows as they
    came: if it decodes differently (turns by EXIF, reads a later frame), it sees other pixels than those that were judged.
    """

    handler_class: type[UserHandler]
    _gate: Gate
    _inner: UserHandler

    def initialize(self, context: Context) -> None:
        """Initialise the user's handler and load the profile; never raises."""

        def load() -> ImageService:
            self._inner = self.handler_class()
            self._inner.initialize(context)
            return load_service(context, with_preprocessor=False)

        self._gate = Gate(context, load)

    def handle(self, data: Sequence[Row], context: Context) -> list[object]:
        """Answer a batch; never raises.

        Args:
            data: One row per request.
            context: Takes each answer's status. The user's handler gets one whose rows are those that it sees.

        Returns:
            The user's results for the rows that the gate let through, a JSON object for the others.
        """
        outcomes = self._gate.judge(data, context)
        passed = [row for row, outcome in enumerate(outcomes) if self._gate.lets_through(outcome)]
        results = self._run(data, context, passed) if passed else {}
        for row in passed:  # the verdict stays, so that what the guard spent is counted
            if row in results:
                status = context.request_processor[row].get_response_status_code()
                outcomes[row] = Answered.with_status(outcomes[row], status)
            else:
                outcomes[row] = dataclasses.replace(outcomes[row], answer=failed_outcome(outcomes[row].request_id).answer)
        self._gate.finish(outcomes, context)
        return [results[row] if row in results else send(context, row, outcome.answer) for row, outcome in enumerate(outcomes)]

    def _run(self, data: Sequence[Row], context: Context, rows: Sequence[int]) -> dict[int, object]:
        """The user's results by row; a row without one, or with one that can't be sent, is left out.

        Where a batch fails, its rows are tried one by one, so that none takes its neighbours down.
        """
        name = self.handler_class.__name__
        try:
            results = self._inner.handle([data[row] for row in rows], subset(context, rows))
            if not isinstance(results, list) or len(results) != len(rows):
                raise ModelError(f"expected a list of {len(rows)} results from {name}.handle, got {type(results).__name__}")
        except Exception as error:  # fail closed: foreign code
            logger.exception("%s failed on %d requests: %s", name, len(rows), one_line(error))
            for row in rows:
                context.set_response_status(idx=row)  # what it may have set before it failed
            alone = rows if len(rows) > 1 else ()
            return {key: result for row in alone for key, result in self._run(data, context, [row]).items()}
        found = {row: result for row, result in zip(rows, results, strict=True) if sendable(result)}
        if len(found) < len(rows):
            logger.error("%s returned %d results that are not JSON (NaN, for one)", name, len(rows) - len(found))
        return found


def guarded(handler_class: type[UserHandler]) -> type[GuardedHandler]:
    """Put the guard around a user's own TorchServe handler class.

    Args:
        handler_class: Its `initialize` runs first; its `handle` gets only accepted rows, in monitor mode all that are images. A
            profile with a preprocessor is refused, since the handler preprocesses by itself.

    Returns:
        A handler class, named as the user's: works as a decorator and as a base class.
    """
    names = {"handler_class": handler_class, "__module__": handler_class.__module__, "__doc__": handler_class.__doc__}
    return type(handler_class.__name__, (GuardedHandler,), names)
