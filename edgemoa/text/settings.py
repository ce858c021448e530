"""``genai_config.json``: the settings of a model folder, and which of them are let in.

A model folder may come from anywhere, and onnxruntime-genai obeys these settings: they can name
other files, and libraries to be loaded into the process. So what is not known here is refused, by
whoever takes a folder in and once more by the engine before it loads one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from edgemoa.core.messages import printable
from edgemoa.errors import ModelInvalidError
from edgemoa.text.files import IMPORT_AGAIN

CONFIG: Final = "genai_config.json"
MAX_CONFIG_BYTES: Final = 1 << 20

# Names of a graph's inputs and outputs. onnxruntime-genai takes those of the cache for a format of
# C, so there is at most one number to put in, and nothing else that starts with a per cent sign.
_TensorName = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9_./-]{1,60}(%d[A-Za-z0-9_./-]{0,40})?\Z")
]
_GraphName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.onnx\Z")]
_Size = Annotated[int, msgspec.Meta(gt=0, le=1 << 20)]
_Layers = Annotated[int, msgspec.Meta(gt=0, le=512)]
_Vocabulary = Annotated[int, msgspec.Meta(gt=0, le=1 << 21)]
_Id = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 21)]
_Ids = _Id | Annotated[list[_Id], msgspec.Meta(max_length=256)] | None
_Number = (
    Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}\Z")] | Annotated[int, msgspec.Meta(ge=0)]
)
# Models for text with one graph, as onnxruntime-genai 0.18 calls them.
_Type = Literal[
    "chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gptoss", "granite", "internlm2",
    "lfm2", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phi3small", "phimoe", "qwen2",
    "qwen3", "smollm3",
]  # fmt: skip


# Options of a session beyond those that onnxruntime-genai knows by itself. Others can name files
# to read, and to write.
_OPTIONS: Final = {
    "disable_quant_qdq": "session.disable_quant_qdq",
    "allow_spinning": "session.intra_op.allow_spinning",
    "spin_duration_us": "session.intra_op.spin_duration_us",
}


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is declared here is what is let in."""


class _SessionOptions(_Known, frozen=True, rename=lambda name: _OPTIONS.get(name, name)):
    log_id: Annotated[str, msgspec.Meta(max_length=64)] = ""
    provider_options: list[dict[str, Any]] = []
    intra_op_num_threads: int | None = None
    inter_op_num_threads: int | None = None
    enable_cpu_mem_arena: bool | None = None
    enable_mem_pattern: bool | None = None
    log_severity_level: int | None = None
    log_verbosity_level: int | None = None
    graph_optimization_level: str | int | None = None
    disable_quant_qdq: _Number = 0  # of earlier imports
    allow_spinning: _Number = 0
    spin_duration_us: _Number = 0


class _Decoder(_Known, frozen=True):
    filename: _GraphName
    head_size: _Size
    hidden_size: _Size
    num_attention_heads: _Size
    num_hidden_layers: _Layers
    num_key_value_heads: _Size
    inputs: dict[str, _TensorName]
    outputs: dict[str, _TensorName]
    session_options: dict[str, Any] = {}  # checked as _SessionOptions
    sliding_window: dict[str, Any] | None = None


class _Model(_Known, frozen=True):
    type: _Type
    context_length: _Size
    vocab_size: _Vocabulary
    decoder: _Decoder
    eos_token_id: _Id | Annotated[list[_Id], msgspec.Meta(max_length=256)]
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
    data = _read(path)
    try:
        # Of a key that comes twice msgspec takes the last; onnxruntime-genai acts on both.
        json.loads(data, object_pairs_hook=_each_once)
        config = msgspec.json.decode(data, type=Config)
        options = msgspec.convert(config.model.decoder.session_options, _SessionOptions)
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode's are ValueErrors
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


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ModelInvalidError(f"{path.name} is missing in {path.parent}", hint=IMPORT_AGAIN)
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelInvalidError(f"{path.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ModelInvalidError(f"{path.name} cannot be read: {error.strerror}") from None
