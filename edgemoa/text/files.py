"""The JSON files of a model folder, read within a bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from edgemoa.core import limits
from edgemoa.errors import ModelInvalidError

MAX_BYTES: Final = 16 * limits.MIB  # Gemma's tokenizer_config.json has 1.2 MB

IMPORT_AGAIN: Final = "Import the model again."

RAGGED_GRAPH: Final = "ragged.onnx"  # beside the one that onnxruntime-genai runs


def read_object(file: Path) -> dict[str, Any]:
    """Raises :class:`ModelInvalidError` for a file that is too large, or no JSON object."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ModelInvalidError(
                f"The model's {file.name} has more than {MAX_BYTES >> 20} MiB.", hint=IMPORT_AGAIN
            )
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(file.name, error) from error
    if not isinstance(found, dict):
        raise unusable(file.name, TypeError())
    return found


def unusable(name: str, error: Exception) -> ModelInvalidError:
    """What to say of a file that does not hold what it should."""
    return ModelInvalidError(
        f"The model has no usable {name} ({type(error).__name__}).", hint=IMPORT_AGAIN
    )
