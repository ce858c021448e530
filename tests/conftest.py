"""What several test folders need."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from edgemoa.models.library import ModelLibrary, default_model_dir
from edgemoa.models.pull import ensure

# Where the tests run in a shell's background, Ctrl-C is ignored, by all that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """A library that holds the default model, imported from its GGUF."""
    library = ModelLibrary(default_model_dir())
    ensure(MODEL, library, lambda *_: None)
    return library.root


@pytest.fixture(scope="session")
def smollm2(models_dir: Path) -> Path:
    """The folder of the default model."""
    return ModelLibrary(models_dir).find(MODEL)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own EDGEMOA_ variables do not change what is tested."""
    for name in list(os.environ):
        if name.startswith("EDGEMOA_") and name != "EDGEMOA_MODELS":
            monkeypatch.delenv(name)
