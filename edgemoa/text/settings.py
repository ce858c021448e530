"""``genai_config.json``: the settings of a model folder, and which of them are let in.

A model folder may come from anywhere, and onnxruntime-genai obeys these settings: they can name
other files, and libraries to be loaded into the process. So what is not known here is refused, by
whoever takes a folder in and once more by the engine before it loads one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from edgemoa.core.messages import printable
from edgemoa.errors import ModelInvalidError
from edgemoa.text.files import IMPORT_AGAIN

CONFIG: Final = "genai_config.json"
MAX_CONFIG_BYTES: Final = 1 << 20

# Further options of a session, which are let in with a number: that names no file.
_ENTRY: Final = re.compile(r"(session|memory|mlas|optimization)\.[a-z0-9_.]{1,100}")
_GraphName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.onnx$")]
_Count = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
_Id = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]
_Ids = _Id | list[_Id] | None


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is declared here is what is let in."""


class _SessionOptions(_Known, frozen=True):
    log_id: str = ""
    provider_options: list[dict[str, Any]] = []
    intra_op_num_threads: int | None = None
    inter_op_num_threads: int | None = None
    enable_cpu_mem_arena: bool | None = None
    enable_mem_pattern: bool | None = None
    log_severity_level: int | None = None
    log_verbosity_level: int | None = None
    graph_optimization_level: str | int | None = None


class _Decoder(_Known, frozen=True):
    filename: _GraphName
    head_size: _Count
    hidden_size: _Count
    num_attention_heads: _Count
    num_hidden_layers: _Count
    num_key_value_heads: _Count
    inputs: dict[str, str]
    outputs: dict[str, str]
    session_options: dict[str, Any] = {}
    sliding_window: dict[str, Any] | None = None


class _Model(_Known, frozen=True):
    type: str
    context_length: _Count
    vocab_size: _Count
    decoder: _Decoder
    eos_token_id: _Id | list[_Id]
    bos_token_id: _Ids = None
    pad_token_id: _Ids = None
    sep_token_id: _Ids = None


class Config(_Known, frozen=True):
    """``genai_config.json`` of a text model."""

    model: _Model
    search: dict[str, Any] = {}
    engine: dict[str, Any] = {}


def read_config(path: Path) -> Config:
    """Raises :class:`ModelInvalidError` for settings that are not let in."""
    try:
        config = msgspec.json.decode(_read(path), type=Config)
        options = msgspec.convert(
            {
                key: value
                for key, value in config.model.decoder.session_options.items()
                if not (_ENTRY.fullmatch(key) and re.fullmatch(r"\d{1,9}", str(value)))
            },
            _SessionOptions,
        )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelInvalidError(
            f"{CONFIG} is not taken: {printable(str(error))[:300]}",
            hint="Import the model again; of ready-made ones, those for text on the CPU are taken, "
            "whose settings name no file but the graph",
        ) from None
    providers = [name for each in options.provider_options for name in each]
    if any(name.lower() != "cpu" for name in providers):
        raise ModelInvalidError(
            f"{CONFIG} is made for {printable(', '.join(providers))[:300]}, not for the CPU",
            hint="such repositories usually have a folder with 'cpu' in its name: take that",
        )
    return config


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ModelInvalidError(f"{path.name} is missing in {path.parent}", hint=IMPORT_AGAIN)
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelInvalidError(f"{path.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ModelInvalidError(f"{path.name} cannot be read: {error.strerror}") from None
