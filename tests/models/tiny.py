"""Tiny random models of every architecture, written with the ``gguf`` package, and what they
should compute.

A file has the keys, tensors and order of rows that llama.cpp's converter gives it. The reference
is the definition in plain numpy and float64; it shares nothing with the importer. It was itself
compared with llama.cpp and transformers: ``test_tiny.py`` holds it to recorded logits,
``tools/prove-models`` compares anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from . import k_quants

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
Type = gguf.GGMLQuantizationType

# What sets the architectures apart, beyond the sizes that a file states.
BIASED: Final = {"qwen2"}  # queries, keys and values have a bias
NORMED_HEADS: Final = {"qwen3", "gemma3"}  # each head of queries and keys is normed before rope
FUSED: Final = {"phi3"}  # q, k and v in one tensor, gate and up in another
POST_NORMED: Final = {"gemma3"}  # what attention and feed-forward give is normed once more
INTERLEAVED: Final = {"llama"}  # rope turns neighbours (2 i, 2 i + 1), elsewhere (i, i + half)
GEMMA_WINDOW_BASE: Final = 10000.0  # where a file says nothing, as old ones do not
GEMMA_PERIOD: Final = 6  # every sixth layer of gemma3 sees everything, the others a window


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
    key_length: int = 0  # of a head; 0 is hidden / heads
    rotary: int = 0  # how many numbers of a head rope turns, the first ones; 0 is all
    window: int = 0  # tokens that a windowed layer sees, its own included; 0 is all
    window_base: float = GEMMA_WINDOW_BASE  # of rope in gemma3's windowed layers
    linear: float = 1.0  # positions are divided by it, in gemma3's windowed layers not
    llama3_factor: float = 0.0  # > 0: the file has rope_freqs, as Llama 3.1 and later
    original_context: int = 0  # > 0 in phi3: the file has long and short rope factors
    tokenizer: str = "gpt2"
    pre: str = "smollm"
    far: float = 0.0  # > 0: weights of a block lie around a value up to so many times as large
    values: dict[str, Floats] = field(default_factory=dict, init=False)

    @property
    def head_size(self) -> int:
        return self.key_length or self.hidden // self.heads

    @property
    def rotated(self) -> int:
        return self.rotary or self.head_size

    def kind_of(self, name: str) -> str:
        for end, kind in self.kinds.items():
            if name.endswith(f"{end}.weight"):
                return kind
        plain = "norm" in name or "rope" in name or name.endswith("bias")
        return "F32" if plain else self.kind

    # --- the file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, f, size, here = self.hidden, self.feed_forward, self.head_size, self.architecture
        queries, keys = self.heads * size, self.kv_heads * size
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(VOCABULARY), h)}
        if self.llama3_factor:
            shapes["rope_freqs.weight"] = (self.rotated // 2,)
        if self.original_context:
            shapes["rope_factors_long.weight"] = (self.rotated // 2,)
            shapes["rope_factors_short.weight"] = (self.rotated // 2,)
        for n in range(self.layers):
            b = f"blk.{n}."
            shapes[f"{b}attn_norm.weight"] = (h,)
            if here in FUSED:
                shapes[f"{b}attn_qkv.weight"] = (queries + 2 * keys, h)
            else:
                for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                    shapes[f"{b}attn_{part}.weight"] = (rows, h)
                    if here in BIASED:
                        shapes[f"{b}attn_{part}.bias"] = (rows,)
            if here in NORMED_HEADS:
                shapes[f"{b}attn_q_norm.weight"] = shapes[f"{b}attn_k_norm.weight"] = (size,)
            shapes[f"{b}attn_output.weight"] = (h, queries)
            if here in POST_NORMED:
                shapes[f"{b}post_attention_norm.weight"] = (h,)
            shapes[f"{b}ffn_norm.weight"] = (h,)
            if here in FUSED:
                shapes[f"{b}ffn_up.weight"] = (2 * f, h)
            else:
                shapes[f"{b}ffn_gate.weight"] = shapes[f"{b}ffn_up.weight"] = (f, h)
            shapes[f"{b}ffn_down.weight"] = (h, f)
            if here in POST_NORMED:
                shapes[f"{b}post_ffw_norm.weight"] = (h,)
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
            kind = self.kind_of(name)
            raw = _quantized(self._random(name, shape, rng).astype(np.float32), kind)
            self.values[name] = gguf.quants.dequantize(raw, Type[kind]).reshape(shape)
            writer.add_tensor(name, raw, raw_dtype=Type[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _random(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Doubles:
        values = rng.standard_normal(shape)
        if name.startswith("rope"):
            return self._factors(name, shape[0])
        if "norm" in name:
            # Sharper heads where they are normed, so that it matters where they look.
            return (1.5 if "_q_norm" in name or "_k_norm" in name else 1) + values / 8
        if name.endswith("bias"):
            return values / 2
        if self.far:
            centres = rng.uniform(-self.far, self.far, (*shape[:-1], shape[-1] // 32))
            values = values / 4 + np.repeat(4 * centres, 32, axis=-1)
        return np.asarray(values / np.sqrt(shape[-1]))

    def _factors(self, name: str, count: int) -> Doubles:
        """Divisors of rope's frequencies, from the fastest to the slowest."""
        if name == "rope_freqs.weight":
            # Llama 3: long waves are stretched by the factor, short ones are not, in between it
            # goes over smoothly. The limits are those of a model trained on a quarter of context.
            waves = 2 * np.pi * self.base ** (2 * np.arange(count) / self.rotated)
            original = self.context / 4
            smooth = np.clip((original / waves - 1) / (4 - 1), 0, 1)
            return np.asarray(1 / ((1 - smooth) / self.llama3_factor + smooth))
        top = 4.0 if "long" in name else 1.25
        return np.asarray(np.linspace(1, top, count))

    def _metadata(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.feed_forward,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": self.epsilon,
            "rope.freq_base": self.base,
        }
        if self.architecture in {"llama", "phi3"}:
            keys["rope.dimension_count"] = self.rotated
        if self.architecture in {"qwen3", "gemma3"} or self.key_length:
            keys["attention.key_length"] = keys["attention.value_length"] = self.head_size
        if self.window or self.architecture == "phi3":
            keys["attention.sliding_window"] = self.window
        if self.window_base != GEMMA_WINDOW_BASE:
            keys["rope.freq_base_swa"] = self.window_base
        if self.linear != 1:
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": self.linear}
        if self.original_context:
            keys["rope.scaling.original_context_length"] = self.original_context
            keys["rope.scaling.attn_factor"] = self._attention_factor
        return {f"{self.architecture}.{key}": value for key, value in keys.items()} | (
            self._gpt2_keys() if self.tokenizer == "gpt2" else _sentencepiece_keys()
        )

    def _gpt2_keys(self) -> dict[str, Any]:
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": VOCABULARY,
            "tokenizer.ggml.token_type": [3 if t.startswith("<|") else 1 for t in VOCABULARY],
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        }

    # --- the reference

    def logits(self, ids: Ids, *, long: bool | None = None) -> Floats:
        """float32 [tokens, vocabulary] of one sequence, straight from the definition.

        ``long`` chooses among phi3's rope factors; None takes the long ones for a sequence that
        is longer than the original context, for all of its positions.
        """
        if long is None:
            long = len(ids) > self.original_context
        x = self.values["token_embd.weight"][ids].astype(np.float64)
        if self.architecture == "gemma3":
            x *= np.sqrt(self.hidden)
        for n in range(self.layers):
            w = self._layer(n)
            part = self._attention(self._norm(x, w["attn_norm"]), w, self._is_local(n), long)
            x = x + self._after(part, w, "post_attention_norm")
            part = self._feed_forward(self._norm(x, w["ffn_norm"]), w)
            x = x + self._after(part, w, "post_ffw_norm")
        head = self.values["token_embd.weight" if self.tied else "output.weight"]
        final = self._norm(x, self.values["output_norm.weight"])
        return np.asarray(final @ head.T.astype(np.float64), np.float32)

    def continuation(self, ids: Ids, count: int, *, long: bool | None = None) -> list[int]:
        """The ``count`` tokens that greedy decoding appends to ``ids``."""
        text = [int(token) for token in ids]
        for _ in range(count):
            text.append(int(self.logits(np.array(text), long=long)[-1].argmax()))
        return text[-count:]

    def _layer(self, number: int) -> dict[str, Doubles]:
        """The layer's tensors by name, weights without the ending, split where they are fused."""
        start = f"blk.{number}."
        w = {
            name.removeprefix(start).removesuffix(".weight"): value.astype(np.float64)
            for name, value in self.values.items()
            if name.startswith(start)
        }
        if self.architecture in FUSED:
            queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
            parts = np.split(w.pop("attn_qkv"), [queries, queries + keys])
            w["attn_q"], w["attn_k"], w["attn_v"] = parts
            w["ffn_gate"], w["ffn_up"] = np.split(w.pop("ffn_up"), 2)
        return w

    def _is_local(self, number: int) -> bool:
        if self.architecture == "gemma3":
            return bool(self.window) and (number + 1) % GEMMA_PERIOD != 0
        return bool(self.window)

    def _attention(self, y: Doubles, w: dict[str, Doubles], local: bool, long: bool) -> Doubles:
        size, count = self.head_size, len(y)
        q, k, value = (
            (y @ w[f"attn_{part}"].T + w.get(f"attn_{part}.bias", 0)).reshape(count, -1, size)
            for part in ("q", "k", "v")
        )
        if self.architecture in NORMED_HEADS:
            q, k = self._norm(q, w["attn_q_norm"]), self._norm(k, w["attn_k_norm"])
        turn = self._turn(count, local, long)
        q, k = (self._rotate(part, turn) for part in (q, k))
        age = np.arange(count)[:, None] - np.arange(count)  # of a key, seen from a query
        unseen = (age < 0) | ((age >= self.window) if local else False)
        outputs = []
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            scores = np.where(unseen, -np.inf, q[:, head] @ k[:, group].T / np.sqrt(size))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ value[:, group])
        return np.asarray(np.concatenate(outputs, -1) @ w["attn_output"].T)

    def _feed_forward(self, y: Doubles, w: dict[str, Doubles]) -> Doubles:
        gate = y @ w["ffn_gate"].T
        if self.architecture == "gemma3":
            active = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            active = gate / (1 + np.exp(-gate))
        return np.asarray((active * (y @ w["ffn_up"].T)) @ w["ffn_down"].T)

    def _after(self, part: Doubles, w: dict[str, Doubles], name: str) -> Doubles:
        return self._norm(part, w[name]) if self.architecture in POST_NORMED else part

    def _norm(self, x: Doubles, gain: NDArray[Any]) -> Doubles:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * gain)

    def _turn(self, count: int, local: bool, long: bool) -> NDArray[np.complex128]:
        """[tokens, 1, pairs]: what rope multiplies a pair with, taken as a complex number."""
        gemma_local = self.architecture == "gemma3" and local
        base = self.window_base if gemma_local else self.base
        frequencies = base ** (-np.arange(0, self.rotated, 2) / self.rotated)
        if not gemma_local:
            frequencies = frequencies / self.linear
        if self.llama3_factor:
            frequencies = frequencies / self.values["rope_freqs.weight"]
        if self.original_context:
            which = "long" if long else "short"
            frequencies = frequencies / self.values[f"rope_factors_{which}.weight"]
        turn = np.exp(1j * np.outer(np.arange(count), frequencies))
        return np.asarray(self._attention_factor * turn[:, None, :])

    @property
    def _attention_factor(self) -> float:
        """What phi3 multiplies rotated queries and keys with, to make up for a longer context."""
        if not self.original_context:
            return 1.0
        longer = np.log(self.context / self.original_context)
        return float(np.float32(np.sqrt(1 + longer / np.log(self.original_context))))

    def _rotate(self, x: Doubles, turn: NDArray[np.complex128]) -> Doubles:
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        half = self.rotated // 2
        one, other = (
            (turned[..., 0::2], turned[..., 1::2])
            if self.architecture in INTERLEAVED
            else (turned[..., :half], turned[..., half:])
        )
        pairs = (one + 1j * other) * turn
        if self.architecture in INTERLEAVED:
            turned = np.stack([pairs.real, pairs.imag], -1).reshape(turned.shape)
        else:
            turned = np.concatenate([pairs.real, pairs.imag], -1)
        return np.concatenate([turned, rest], -1)


def tiny(name: str, kind: str = "F32", kinds: dict[str, str] | None = None, **changes: Any) -> Tiny:
    """A model of :data:`PRESETS`; with K types it is as wide as their blocks need."""
    settings = dict(PRESETS[name])
    if any(k in k_quants.KINDS for k in (kind, *(kinds or {}).values())):
        settings |= {"hidden": 256, "feed_forward": 256, "key_length": 64}
        if name == "phi4":
            settings["rotary"] = 48
        if name not in {"qwen3", "gemma3", "gemma3-linear"}:
            del settings["key_length"]  # hidden / heads is the same
    return Tiny(kind, kinds or {}, **(settings | changes))


# Windows, original contexts and the like are much smaller than the sequences of the tests.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "llama3": {"llama3_factor": 8.0, "context": 256, "tied": False, "pre": "llama-bpe"},
    "llama-linear": {"linear": 4.0, "tied": False},
    "qwen2": {"architecture": "qwen2", "epsilon": 1e-6, "base": 1e6, "pre": "qwen2"},
    "qwen3": {
        "architecture": "qwen3", "epsilon": 1e-6, "base": 1e6, "pre": "qwen2", "key_length": 32,
    },
    "gemma3": {
        "architecture": "gemma3", "epsilon": 1e-6, "base": 1e6, "tokenizer": "llama",
        "key_length": 32, "layers": 7, "kv_heads": 1, "window": 12,
    },
    # The larger ones stretch the positions of the layers that see everything; a newer file states
    # the base of the others, too.
    "gemma3-linear": {
        "architecture": "gemma3", "epsilon": 1e-6, "base": 1e6, "tokenizer": "llama",
        "key_length": 32, "layers": 7, "kv_heads": 2, "window": 12, "linear": 8.0,
        "window_base": 20000.0,
    },
    # Phi-3-mini-4k: every layer has the window, no key-value groups.
    "phi3": {
        "architecture": "phi3", "tokenizer": "llama", "tied": False, "kv_heads": 4, "window": 20,
    },
    # Phi-3.5-mini: long and short rope factors, a window longer than any text.
    "phi3-long": {
        "architecture": "phi3", "tokenizer": "llama", "tied": False, "kv_heads": 4,
        "context": 128, "original_context": 32, "window": 262144,
    },
    # Phi-4-mini: groups, tied, rope on three quarters of a head.
    "phi4": {
        "architecture": "phi3", "pre": "gpt-4o", "rotary": 12,
        "context": 128, "original_context": 32, "window": 262144,
    },
}  # fmt: skip


def _quantized(values: Floats, kind: str) -> NDArray[Any]:
    if kind in k_quants.KINDS:
        return k_quants.quantize(values, kind)
    raw: NDArray[Any] = gguf.quants.quantize(values, Type[kind])
    return raw


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

# A vocabulary of SentencePiece's kind, of the same size: special tokens, bytes, pieces with scores.
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
PIECES = ["▁the", "▁th", "the", "▁t", "th", "in", "he", *"▁etaoinshrdlucm"]
SENTENCEPIECE = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
SENTENCEPIECE += [f"<unused{n}>" for n in range(len(VOCABULARY) - len(SENTENCEPIECE))]


def _sentencepiece_keys() -> dict[str, Any]:
    first_piece, first_unused = len(CONTROL) + 256, len(CONTROL) + 256 + len(PIECES)
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
    kinds = [control] * len(CONTROL) + [byte] * 256 + [normal] * len(PIECES)
    kinds += [unused] * (len(SENTENCEPIECE) - first_unused)
    kinds[CONTROL.index("<unk>")] = unknown
    scores = [0.0] * first_piece + [-float(n) for n in range(1, len(PIECES) + 1)]
    scores += [-1000.0] * (len(SENTENCEPIECE) - first_unused)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": SENTENCEPIECE,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": CONTROL.index("<bos>"),
        "tokenizer.ggml.eos_token_id": CONTROL.index("<eos>"),
        "tokenizer.ggml.unknown_token_id": CONTROL.index("<unk>"),
        "tokenizer.ggml.padding_token_id": CONTROL.index("<pad>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def _value_type(value: Any) -> gguf.GGUFValueType:
    """As the converter has it; llama.cpp refuses sizes that are not unsigned."""
    if type(value) is int and value >= 0:
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def _item_type(value: Any) -> gguf.GGUFValueType | None:
    return gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
