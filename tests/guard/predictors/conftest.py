"""What tests of foreign model files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """Exists only if an attack ran."""
    return tmp_path / "owned"
