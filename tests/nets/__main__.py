"""See the package."""

from __future__ import annotations

from tests.nets import make

make()
