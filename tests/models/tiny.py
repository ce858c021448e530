"""Tiny random llama models, written with the ``gguf`` package, and what they should compute.

The reference works on the file's own order of rows with the interleaved rope that llama.cpp has,
so it shares nothing with the importer, which turns both around.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Type = gguf.GGMLQuantizationType


@dataclass
class Tiny:
    """Sizes of a model; ``kinds`` gives the type of tensors by the end of their name."""

    kind: str = "F32"
    kinds: dict[str, str] = field(default_factory=dict)
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 96
    context: int = 64
    tied: bool = True
    base: float = 10000.0
    epsilon: float = 1e-5
    seed: int = 7
    architecture: str = "llama"
    values: dict[str, Floats] = field(default_factory=dict, init=False)

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def kind_of(self, name: str) -> str:
        for end, kind in self.kinds.items():
            if name.endswith(f"{end}.weight"):
                return kind
        return "F32" if "norm" in name else self.kind

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, f, keys = self.hidden, self.feed_forward, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(VOCABULARY), h)}
        for n in range(self.layers):
            shapes |= {
                f"blk.{n}.attn_norm.weight": (h,),
                f"blk.{n}.attn_q.weight": (h, h),
                f"blk.{n}.attn_k.weight": (keys, h),
                f"blk.{n}.attn_v.weight": (keys, h),
                f"blk.{n}.attn_output.weight": (h, h),
                f"blk.{n}.ffn_norm.weight": (h,),
                f"blk.{n}.ffn_gate.weight": (f, h),
                f"blk.{n}.ffn_up.weight": (f, h),
                f"blk.{n}.ffn_down.weight": (h, f),
            }
        shapes["output_norm.weight"] = (h,)
        if not self.tied:
            shapes["output.weight"] = (len(VOCABULARY), h)
        return shapes

    def write(self, path: Path, **changes: Any) -> Path:
        """Write the file and keep what its weights stand for in ``values``.

        ``changes`` are metadata by key, with dots as ``__``; None leaves a key out. ``tensors``
        replaces shapes by tensor name; None leaves a tensor out.
        """
        tensors = changes.pop("tensors", {})
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in (self._metadata() | changes).items():
            if value is not None:
                writer.add_key_value(key, value, _value_type(value), _item_type(value))
        rng = np.random.default_rng(self.seed)
        for name, shape in (self.shapes() | tensors).items():
            if shape is None:
                continue
            values = rng.standard_normal(shape).astype(np.float32)
            values = 1 + values / 8 if "norm" in name else values / np.sqrt(shape[-1])
            kind = Type[self.kind_of(name)]
            raw = gguf.quants.quantize(values.astype(np.float32), kind)
            self.values[name] = gguf.quants.dequantize(raw, kind).reshape(shape)
            writer.add_tensor(name, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _metadata(self) -> dict[str, Any]:
        return {
            "llama.block_count": self.layers,
            "llama.context_length": self.context,
            "llama.embedding_length": self.hidden,
            "llama.feed_forward_length": self.feed_forward,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.layer_norm_rms_epsilon": self.epsilon,
            "llama.rope.freq_base": self.base,
            "llama.rope.dimension_count": self.head_size,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": VOCABULARY,
            "tokenizer.ggml.token_type": [3 if t.startswith("<|") else 1 for t in VOCABULARY],
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        }

    def logits(self, ids: NDArray[np.int64]) -> Floats:
        """float32 [tokens, vocabulary] of one sequence, straight from the definition."""
        v, size = self.values, self.head_size
        x = v["token_embd.weight"][ids]
        angles = np.outer(
            np.arange(len(ids)), self.base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
        )
        turn = np.exp(1j * angles)[:, None, :]  # neighbours (2 i, 2 i + 1) as complex numbers
        hidden_from = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        for n in range(self.layers):
            w = {k.split(".")[2]: t for k, t in v.items() if k.startswith(f"blk.{n}.")}
            y = self._norm(x, w["attn_norm"])
            q, k, value = (
                (y @ w[f"attn_{part}"].T).reshape(len(ids), -1, size) for part in ("q", "k", "v")
            )
            q, k = (_rotate(part, turn) for part in (q, k))
            outputs = []
            for head in range(self.heads):
                group = head * self.kv_heads // self.heads
                scores = q[:, head] @ k[:, group].T / np.sqrt(size) + hidden_from
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                outputs.append(weights @ value[:, group])
            x = x + np.concatenate(outputs, -1).astype(np.float32) @ w["attn_output"].T
            y = self._norm(x, w["ffn_norm"])
            gate = y @ w["ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
        head_weight = v["token_embd.weight" if self.tied else "output.weight"]
        return np.asarray(self._norm(x, v["output_norm.weight"]) @ head_weight.T, np.float32)

    def _norm(self, x: Floats, gain: Floats) -> Floats:
        mean = (x.astype(np.float64) ** 2).mean(-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + self.epsilon) * gain, np.float32)


def _rotate(x: Floats, turn: NDArray[np.complex128]) -> Floats:
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape).astype(np.float32)


def _bytes_as_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
MERGES = ["t h", "th e", "Ġ the", "i n"]
VOCABULARY = [*SPECIAL, *_bytes_as_letters(), "th", "the", "Ġthe", "in"]
VOCABULARY += [f"<unused{n}>" for n in range(-len(VOCABULARY) % 32)]


def _value_type(value: Any) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.get_type(value)


def _item_type(value: Any) -> gguf.GGUFValueType | None:
    return gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
