"""How many workers a version of a model has, and what they are given at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How a version takes requests; what is None is left to somebody else.

    Args:
        workers: Processes.
        batch_size: Requests that a worker answers at once.
        max_batch_delay: Milliseconds that a request waits for others to fill its batch.
        response_timeout: Seconds after which TorchServe ends a worker that has not answered. An archive with a model-config
            has that one's, or else 120, whatever is asked for.
    """

    workers: int | None = None
    batch_size: int | None = None
    max_batch_delay: int | None = None
    response_timeout: int | None = None

    @classmethod
    def read(cls, settings: Mapping[str, object]) -> Capacity:
        """From a model-config, or from TorchServe's description of a version: both use the same names."""
        names = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout")
        least, most, batch_size, delay, response_timeout = (_whole(settings.get(name)) for name in names)
        workers = least if least and most is not None and most >= least else None  # TorchServe ignores others, too
        return cls(
            workers=workers, batch_size=batch_size or None, max_batch_delay=delay, response_timeout=response_timeout or None
        )

    def or_else(self, other: Capacity) -> Capacity:
        """This one, and the other where this one says nothing."""
        mine = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(other, **mine)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
