"""A model folder of a few kilobytes that onnxruntime-genai runs like any other.

Its tokens are bytes, and it only looks at the last one: the last character of the last message
picks what it writes.

====  =============================================================================
``>``  `` hi😀é日語``, each character in as many tokens as it has bytes, and ends
``x``  ``xxxx`` without end
``9``  random digits without end, each as likely as the next; greedy, zeros
``#``  a byte that is no character, ``AB``, and ends
``%``  a special token, ``Z``, and ends
``!``  logits that are not numbers
====  =============================================================================

It loads in milliseconds and writes thousands of tokens a second, so the real engine with this
folder serves wherever a test needs a model process and not a model's quality.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HELLO: Final = " hi😀é日語"
CONTEXT_TOKENS: Final = 50_000

_END, _PAD, _MARK = 256, 257, 258
_SPECIAL: Final = ("<|end|>", "<|pad|>", "<|mark|>")
_VOCABULARY: Final = 256 + len(_SPECIAL)
_TEMPLATE: Final = (
    "{% for message in messages %}\n"  # the line end goes where templates are rendered rightly
    "{% if message.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}\n"
    "{{ message.role + ':' + message.content }}{% if not loop.last %}<|end|>{% endif %}\n"
    "{% endfor %}"
)


def write_tiny_model(folder: Path) -> Path:
    """Write the model into ``folder``, which is made; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_graph(folder / "model.onnx")
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": _SPECIAL[0],
            "eos_token": _SPECIAL[0],
            "unk_token": _SPECIAL[0],
            "pad_token": _SPECIAL[1],
            "chat_template": _TEMPLATE,
        },
    )
    _write_json(folder / "genai_config.json", _genai_config())
    return folder


def _followers() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Logits of the next token, a row per last token."""
    table = np.full((_VOCABULARY, _VOCABULARY), -9, np.float32)
    for chain in (
        [*f">{HELLO}".encode(), _END],
        [*b"xx"],
        [ord("#"), 0xFE, *b"AB", _END],
        [ord("%"), _MARK, ord("Z"), _END],
    ):
        for last, following in itertools.pairwise(chain):
            table[last, following] = 9
    digits = slice(ord("0"), ord("9") + 1)
    table[digits, digits] = 9
    table[ord("!")] = np.nan
    return table


def _write_graph(path: Path) -> None:
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    cache = ["batch", 1, "past", 4], ["batch", 1, "total", 4]
    sides = ("key", "value")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["followers", "input_ids"], ["logits"]),
            helper.make_node("Gather", ["zeros", "input_ids"], ["flat"]),
            helper.make_node("Unsqueeze", ["flat", "one"], ["new"]),
            *(
                helper.make_node(
                    "Concat", [f"past_key_values.0.{side}", "new"], [f"present.0.{side}"], axis=2
                )
                for side in sides
            ),
        ],
        "tiny",
        [
            helper.make_tensor_value_info("input_ids", integers, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", integers, ["batch", "total"]),
            *(
                helper.make_tensor_value_info(f"past_key_values.0.{side}", floats, cache[0])
                for side in sides
            ),
        ],
        [
            helper.make_tensor_value_info("logits", floats, ["batch", "tokens", _VOCABULARY]),
            *(
                helper.make_tensor_value_info(f"present.0.{side}", floats, cache[1])
                for side in sides
            ),
        ],
        [
            numpy_helper.from_array(_followers(), "followers"),
            numpy_helper.from_array(np.zeros((_VOCABULARY, 4), np.float32), "zeros"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def _tokenizer() -> dict[str, object]:
    """Bytes, written as GPT-2's byte-level tokenizers write them, and no merges."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + at) for at, byte in enumerate(hidden)}
    special = {text: 256 + at for at, text in enumerate(_SPECIAL)}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": token,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, token in special.items()
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {letter: byte for byte, letter in letters.items()} | special,
            "merges": [],
        },
    }


def _genai_config() -> dict[str, object]:
    return {
        "model": {
            "type": "llama",
            "bos_token_id": _END,
            "eos_token_id": [_END],
            "pad_token_id": _PAD,
            "vocab_size": _VOCABULARY,
            "context_length": CONTEXT_TOKENS,
            "decoder": {
                "filename": "model.onnx",
                "head_size": 4,
                "hidden_size": 4,
                "num_attention_heads": 1,
                "num_hidden_layers": 1,
                "num_key_value_heads": 1,
                "session_options": {"log_id": "tiny", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": CONTEXT_TOKENS, "past_present_share_buffer": False},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")
