from __future__ import annotations

from pathlib import Path

import pytest

from .tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that takes milliseconds; see tiny.py."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
