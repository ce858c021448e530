"""The architectures as GGUF describes them: what is read, checked and refused.

All are decoders of the same build: norm, attention with rotary positions, norm, gated feed-forward.
What differs between them is said in :class:`Architecture`, and the graph does what that says. What
a file asks for beyond it is refused by name, because the graph would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgemoa.errors import ModelInvalidError
from edgemoa.models.gguf import GgufFile

MAX_LAYERS: Final = 512
MAX_WIDTH: Final = 1 << 18  # of a hidden state, a feed-forward layer, or all heads
MAX_CONTEXT: Final = 1 << 20  # that a file may state
USED_CONTEXT: Final = 1 << 15
"""The most that is used of a model's context. Its cache would be gigabytes on any board, and what
rope needs for each position counts whether it is used or not: half a gigabyte for Gemma 3 4B."""
MAX_VOCABULARY: Final = 1 << 20
MAX_HEAD_SIZE: Final = 512
HEAD_STEP: Final = 8  # GroupQueryAttention takes head sizes in steps of 8


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: dimension i of a head's first half turns by position * ``frequencies[i]``.

    Both are float64 [head_size / 2]. What does not turn has the frequency 0. ``magnitudes``
    multiply cosines and sines.
    """

    frequencies: NDArray[np.float64]
    magnitudes: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes in elements, and what sets one architecture apart from the others.

    ``tied``: the head is the embedding's transpose. ``rotary`` dimensions of a head turn, from the
    first on. ``paired_rows``: rows of queries and keys are in the order of neighbours that turn
    together, not of halves. ``fused``: queries, keys and values are one tensor, gate and up
    another. ``qkv_bias``: they have a bias. ``head_norms``: every head of queries and keys is
    normed before it turns. ``post_norms``: what attention and feed-forward put out is normed, too.
    ``gelu``: the gate is a GELU (tanh), not a SiLU. ``embedding_scale`` multiplies embeddings,
    ``attention_scale`` the scores (0: one over the root of the head size). ``ropes`` are by name;
    ``layer_ropes`` has the name for each layer, and ``windows`` how many tokens it looks back on,
    itself included; 0 for all.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    context: int
    norm_epsilon: float
    tied: bool
    ropes: dict[str, Rope] = field(repr=False)
    layer_ropes: tuple[str, ...]
    windows: tuple[int, ...]
    rotary: int
    paired_rows: bool = False
    fused: bool = False
    qkv_bias: bool = False
    head_norms: bool = False
    post_norms: bool = False
    gelu: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0

    def head_order(self) -> NDArray[np.intp] | None:
        """Which row of a head of queries or keys comes where, so that the first half of a head
        turns with the second; None if they are in that order already. [head_size]
        """
        rows, half, turning = np.arange(self.head_size), self.head_size // 2, self.rotary // 2
        if self.paired_rows:
            return np.concatenate([rows[0::2], rows[1::2]])
        if self.rotary == self.head_size:
            return None
        still = rows[self.rotary :]
        return np.concatenate(
            [rows[:turning], still[: half - turning], rows[turning : self.rotary],
             still[half - turning :]]
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the weights are taken from, by name, with its shape [out, in]."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        hidden, wide = self.hidden, self.feed_forward
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, hidden),
            "output_norm.weight": (hidden,),
        }
        if not self.tied:
            shapes["output.weight"] = (self.vocabulary, hidden)
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_output.weight": (hidden, queries),
            "ffn_norm.weight": (hidden,),
            "ffn_down.weight": (hidden, wide),
        }
        if self.fused:
            block["attn_qkv.weight"] = (queries + 2 * keys, hidden)
            block["ffn_up.weight"] = (2 * wide, hidden)
        else:
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                block[f"attn_{part}.weight"] = (rows, hidden)
                if self.qkv_bias:
                    block[f"attn_{part}.bias"] = (rows,)
            block["ffn_gate.weight"] = block["ffn_up.weight"] = (wide, hidden)
        if self.head_norms:
            block["attn_q_norm.weight"] = block["attn_k_norm.weight"] = (self.head_size,)
        if self.post_norms:
            block["post_attention_norm.weight"] = block["post_ffw_norm.weight"] = (hidden,)
        for number in range(self.layers):
            shapes |= {f"blk.{number}.{name}": shape for name, shape in block.items()}
        return shapes


def read_architecture(gguf: GgufFile) -> Architecture:
    """What the file's metadata say, with every tensor there and of the right shape.

    Raises :class:`ModelInvalidError` for an unknown architecture, a feature that is not
    supported, a size out of range, and for tensors that are missing, misshapen or unknown.
    """
    name = gguf.text("general.architecture")
    reader = READERS.get(name)
    if reader is None:
        raise ModelInvalidError(
            f"the architecture {name!r} is not supported; supported: {', '.join(READERS)}",
            hint="take a model of a supported architecture; `edgemoa model list` shows some",
        )
    source = _Source(gguf, name)
    found = reader(source)
    _check_sizes(found)
    _check_tensors(gguf, found, source.read_tensors)
    return found


class _Source:
    """A file's metadata under its architecture's name, and the sizes that all have."""

    def __init__(self, gguf: GgufFile, name: str) -> None:
        self.gguf = gguf
        self.name = name
        self.read_tensors: set[str] = set()  # small ones that become part of the description
        self._refuse_features()
        embedding = gguf.tensors.get("token_embd.weight")
        self.vocabulary = embedding.shape[0] if embedding else 0
        self.layers = self.size("block_count", MAX_LAYERS)
        self.hidden = self.size("embedding_length", MAX_WIDTH)
        self.heads = self.size("attention.head_count", MAX_WIDTH)
        self.kv_heads = self.size("attention.head_count_kv", MAX_WIDTH, self.heads)
        self.head_size = self.size(
            "attention.key_length", MAX_WIDTH, self.hidden // self.heads or None
        )
        if self.size("attention.value_length", MAX_WIDTH, self.head_size) != self.head_size:
            raise ModelInvalidError("values of another width than the keys are not supported")
        if self.head_size % HEAD_STEP or self.head_size > MAX_HEAD_SIZE:
            raise ModelInvalidError(f"heads of {self.head_size} dimensions are not supported")
        self.rotary = self.size("rope.dimension_count", MAX_WIDTH, self.head_size)
        if self.rotary > self.head_size or self.rotary % 2:
            raise ModelInvalidError(
                f"{self.rotary} rotary dimensions in heads of {self.head_size} are not supported"
            )
        self.context = self.size("context_length", MAX_CONTEXT)

    def size(self, key: str, most: int, default: int | None = None) -> int:
        value = self.gguf.integer(f"{self.name}.{key}", default, most=most)
        if value < 1:
            raise ModelInvalidError(f"{self.gguf.path.name}: {self.name}.{key} is 0")
        return value

    def number(self, key: str, default: float | None, least: float, most: float) -> float:
        value = self.gguf.number(f"{self.name}.{key}", default)
        if not least <= value <= most:  # also for what is no number at all
            raise ModelInvalidError(
                f"{self.gguf.path.name}: {self.name}.{key} is out of range: {value}"
            )
        return value

    def window(self) -> int:
        """Tokens that a layer with a sliding window looks back on; 0 if there is none."""
        key = f"{self.name}.attention.sliding_window"
        return self.gguf.integer(key, 0, most=MAX_CONTEXT)

    def rope_base(self, key: str = "rope.freq_base", default: float = 10000.0) -> float:
        return self.number(key, default, 1.001, 1e12)

    def rope_factor(self) -> float:
        """What linear scaling divides frequencies by; raises for other kinds of scaling."""
        kind = self.gguf.text(f"{self.name}.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ModelInvalidError(f"{self.name} with rope scaling {kind!r} is not supported")
        old = f"{self.name}.rope.scale_linear"  # the key of early files
        if old in self.gguf.metadata:
            return self.number("rope.scale_linear", None, 1e-3, 1e6)
        if kind == "none":
            return 1.0
        return self.number("rope.scaling.factor", 1.0, 1e-3, 1e6)

    def rope_factors(self, tensor_name: str) -> NDArray[np.float64] | float:
        """A divisor for each frequency, float64 [rotary / 2], from a tensor of the file, or 1."""
        tensor = self.gguf.tensors.get(tensor_name)
        if tensor is None:
            return 1.0
        self.read_tensors.add(tensor_name)
        if tensor.type.name != "F32" or tensor.shape != (self.rotary // 2,):
            raise ModelInvalidError(
                f"the tensor {tensor_name!r} is not {self.rotary // 2} float32 values"
            )
        raw = b"".join(slab.tobytes() for slab in self.gguf.slabs(tensor))
        factors = np.frombuffer(raw, "<f4").astype(np.float64)
        if not ((factors > 1e-6) & (factors < 1e9)).all():
            raise ModelInvalidError(f"the tensor {tensor_name!r} has values out of range")
        return factors

    def rope(
        self, base: float, factors: NDArray[np.float64] | float = 1.0, magnitude: float = 1.0
    ) -> Rope:
        """base**(-2 i / rotary) / factor, in the first places of a head's half."""
        frequencies = np.zeros(self.head_size // 2)
        exponents = np.arange(0, self.rotary, 2, dtype=np.float64) / self.rotary
        frequencies[: self.rotary // 2] = base**-exponents / factors
        magnitudes = np.ones(self.head_size // 2)
        magnitudes[: self.rotary // 2] = magnitude
        return Rope(frequencies, magnitudes)

    def architecture(
        self,
        *,
        ropes: dict[str, Rope],
        layer_ropes: tuple[str, ...] = (),
        windows: tuple[int, ...] = (),
        context: int = 0,
        **features: Any,
    ) -> Architecture:
        """What all have, and the ``features`` of this one. A rope or window for all layers need
        not be said.
        """
        return Architecture(
            name=self.name,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            feed_forward=self.size("feed_forward_length", MAX_WIDTH),
            vocabulary=self.vocabulary,
            context=min(context or self.context, USED_CONTEXT),
            norm_epsilon=self.number("attention.layer_norm_rms_epsilon", None, 0.0, 0.1),
            tied="output.weight" not in self.gguf.tensors,
            ropes=ropes,
            layer_ropes=layer_ropes or (next(iter(ropes)),) * self.layers,
            windows=windows or (0,) * self.layers,
            rotary=self.rotary,
            **features,
        )

    def whole_rope(self) -> None:
        """Refuse heads of which only a part turns."""
        if self.rotary != self.head_size:
            raise ModelInvalidError(f"{self.name} with partly rotary heads is not supported")

    def no_window(self) -> None:
        if self.window():
            raise ModelInvalidError(f"{self.name} with a sliding window is not supported")

    def _refuse_features(self) -> None:
        for key, feature in (
            ("expert_count", "a mixture of experts"),
            ("attn_logit_softcapping", "capped attention scores"),
            ("final_logit_softcapping", "capped logits"),
            ("logit_scale", "scaled logits"),
            ("embedding_scale", "scaled embeddings"),
            ("residual_scale", "scaled residuals"),
            ("attention.scale", "scaled attention"),
            ("attention.clamp_kqv", "clamped attention"),
        ):
            if self.gguf.metadata.get(f"{self.name}.{key}", 0) not in (0, 1.0):
                raise ModelInvalidError(f"{self.name} with {feature} is not supported")


def _llama(source: _Source) -> Architecture:
    """SmolLM2, TinyLlama, Llama 1 to 3.2 (whose rope scaling is a tensor of factors)."""
    source.whole_rope()
    source.no_window()
    factors = source.rope_factors("rope_freqs.weight") * source.rope_factor()
    return source.architecture(
        ropes={"rope": source.rope(source.rope_base(), factors)}, paired_rows=True
    )


def _qwen2(source: _Source) -> Architecture:
    source.whole_rope()
    source.no_window()
    return source.architecture(
        ropes={"rope": source.rope(source.rope_base(), source.rope_factor())}, qkv_bias=True
    )


def _qwen3(source: _Source) -> Architecture:
    source.whole_rope()
    source.no_window()
    return source.architecture(
        ropes={"rope": source.rope(source.rope_base(), source.rope_factor())}, head_norms=True
    )


def _gemma3(source: _Source) -> Architecture:
    """Every sixth layer looks at everything, the others back into a window, with a rope of their
    own. The file has no key for that pattern, nor, usually, for the second rope's base.
    """
    source.whole_rope()
    window = source.window()
    pattern = source.size("attention.sliding_window_pattern", MAX_LAYERS, 6)
    is_global = [not window or (n + 1) % pattern == 0 for n in range(source.layers)]
    # Known to llama.cpp by the number of layers: the 27B scales by another width than its heads.
    odd_scale = (source.hidden / source.heads) ** -0.5 if source.layers == 62 else 0.0
    return source.architecture(
        ropes={
            "rope": source.rope(source.rope_base(default=1e6), source.rope_factor()),
            "rope.local": source.rope(source.rope_base("rope.freq_base_swa")),
        },
        layer_ropes=tuple("rope" if everything else "rope.local" for everything in is_global),
        windows=tuple(0 if everything else window for everything in is_global),
        head_norms=True,
        post_norms=True,
        gelu=True,
        embedding_scale=math.sqrt(source.hidden),
        attention_scale=odd_scale,
    )


def _phi3(source: _Source) -> Architecture:
    """Phi-3, 3.5 and Phi-4-mini. The long-context ones have two sets of factors for frequencies:
    one for texts up to the original context, one for longer ones, which changes what has been read
    already. Only the first is used, and the context is the original one.
    """
    original = source.size("rope.scaling.original_context_length", MAX_CONTEXT, source.context)
    factors: NDArray[np.float64] | float = 1.0
    magnitude = 1.0
    context = source.context
    if "rope_factors_short.weight" in source.gguf.tensors:
        factors = source.rope_factors("rope_factors_short.weight")
        source.read_tensors.add("rope_factors_long.weight")
        magnitude = source.number("rope.scaling.attn_factor", 1.0, 1e-3, 1e3)
        context = min(context, original)
    return source.architecture(
        ropes={"rope": source.rope(source.rope_base(), factors, magnitude)},
        windows=(source.window(),) * source.layers,
        context=context,
        fused=True,
    )


READERS: Final[dict[str, Callable[[_Source], Architecture]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _check_sizes(found: Architecture) -> None:
    if found.heads % found.kv_heads or found.heads * found.head_size > MAX_WIDTH:
        raise ModelInvalidError(
            f"attention with {found.heads} heads of {found.head_size} over {found.kv_heads} "
            "key-value heads is not supported"
        )


def _check_tensors(gguf: GgufFile, found: Architecture, read: set[str]) -> None:
    expected = found.shapes()
    for name, shape in expected.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise ModelInvalidError(f"the tensor {name!r} is missing")
        if tensor.shape != shape:
            raise ModelInvalidError(
                f"the tensor {name!r} has the shape {list(tensor.shape)}, not {list(shape)}"
            )
    unknown = sorted(gguf.tensors.keys() - expected.keys() - read)
    if unknown:
        raise ModelInvalidError(
            f"{len(unknown)} tensors are not part of a {found.name} model as edgemoa knows it, "
            f"the first is {unknown[0]!r}"
        )
    if found.vocabulary > MAX_VOCABULARY:
        raise ModelInvalidError(f"a vocabulary of {found.vocabulary} is not supported")
