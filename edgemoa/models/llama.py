"""The ``llama`` architecture as GGUF describes it: what is read, checked and refused.

SmolLM2, TinyLlama and Llama 1 and 2 are of this kind. Refused by name, because the graph would
compute something else: rope scaling (Llama 3.x), experts (Mixtral), biases, sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from edgemoa.errors import ModelInvalidError
from edgemoa.models.gguf import GgufFile

ARCHITECTURE: Final = "llama"
MAX_LAYERS: Final = 512
MAX_WIDTH: Final = 1 << 18  # of a hidden state, a feed-forward layer, or all heads
MAX_CONTEXT: Final = 1 << 20
MAX_VOCABULARY: Final = 1 << 20
MAX_HEAD_SIZE: Final = 512  # the rope caches grow with it, times the context
HEAD_STEP: Final = 8  # GroupQueryAttention takes head sizes in steps of 8


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes of a model, in elements; ``tied`` if the head is the embedding's transpose."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    context: int
    rope_base: float
    norm_epsilon: float
    tied: bool

    @classmethod
    def read(cls, gguf: GgufFile) -> Self:
        """The sizes from the metadata, with every tensor there and of the right shape.

        Raises :class:`ModelInvalidError` for another architecture, a feature that is not
        supported, a size out of range, and for tensors that are missing, misshapen or unknown.
        """
        architecture = gguf.text("general.architecture")
        if architecture != ARCHITECTURE:
            raise ModelInvalidError(
                f"the architecture {architecture!r} is not supported; supported: {ARCHITECTURE}",
                hint="take a model of a supported architecture; `edgemoa model list` shows some",
            )
        _refuse_features(gguf)

        def size(key: str, most: int, default: int | None = None) -> int:
            value = gguf.integer(f"llama.{key}", default, most=most)
            if value < 1:
                raise ModelInvalidError(f"{gguf.path.name}: llama.{key} is 0")
            return value

        hidden = size("embedding_length", MAX_WIDTH)
        heads = size("attention.head_count", MAX_WIDTH)
        kv_heads = size("attention.head_count_kv", MAX_WIDTH, heads)
        head_size = size("attention.key_length", MAX_WIDTH, hidden // heads or None)
        if (
            size("attention.value_length", MAX_WIDTH, head_size) != head_size
            or size("rope.dimension_count", MAX_WIDTH, head_size) != head_size
        ):
            raise ModelInvalidError(
                "values or rope of another width than the keys are not supported"
            )
        if (
            heads % kv_heads
            or head_size % HEAD_STEP
            or head_size > MAX_HEAD_SIZE
            or heads * head_size > MAX_WIDTH
        ):
            raise ModelInvalidError(
                f"attention with {heads} heads of {head_size} over {kv_heads} key-value heads "
                "is not supported"
            )
        embedding = gguf.tensors.get("token_embd.weight")
        model = cls(
            layers=size("block_count", MAX_LAYERS),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            feed_forward=size("feed_forward_length", MAX_WIDTH),
            vocabulary=embedding.shape[0] if embedding else 0,
            context=size("context_length", MAX_CONTEXT),
            rope_base=gguf.number("llama.rope.freq_base", 10000.0),
            norm_epsilon=gguf.number("llama.attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in gguf.tensors,
        )
        if not 1.0 < model.rope_base < 1e12 or not 0.0 <= model.norm_epsilon < 1.0:
            raise ModelInvalidError("the rope base or the norm's epsilon is out of range")
        model._check_tensors(gguf)
        return model

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file by name, with its shape [out, in]."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.hidden),
            "output_norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["output.weight"] = (self.vocabulary, self.hidden)
        for number in range(self.layers):
            for name, shape in (
                ("attn_norm", (self.hidden,)),
                ("attn_q", (queries, self.hidden)),
                ("attn_k", (keys, self.hidden)),
                ("attn_v", (keys, self.hidden)),
                ("attn_output", (self.hidden, queries)),
                ("ffn_norm", (self.hidden,)),
                ("ffn_gate", (self.feed_forward, self.hidden)),
                ("ffn_up", (self.feed_forward, self.hidden)),
                ("ffn_down", (self.hidden, self.feed_forward)),
            ):
                shapes[f"blk.{number}.{name}.weight"] = shape
        return shapes

    def _check_tensors(self, gguf: GgufFile) -> None:
        expected = self.shapes()
        for name, shape in expected.items():
            tensor = gguf.tensors.get(name)
            if tensor is None:
                raise ModelInvalidError(f"the tensor {name!r} is missing")
            if tensor.shape != shape:
                raise ModelInvalidError(
                    f"the tensor {name!r} has the shape {list(tensor.shape)}, not {list(shape)}"
                )
        unknown = sorted(gguf.tensors.keys() - expected.keys())
        if unknown:
            raise ModelInvalidError(
                f"{len(unknown)} tensors are not part of a plain llama model, "
                f"the first is {unknown[0]!r}"
            )
        if not 0 < self.vocabulary <= MAX_VOCABULARY:
            raise ModelInvalidError(f"a vocabulary of {self.vocabulary} is not supported")


def _refuse_features(gguf: GgufFile) -> None:
    refused = {
        "rope scaling": gguf.metadata.get("llama.rope.scaling.type", "none") != "none"
        or gguf.metadata.get("llama.rope.scale_linear", 1.0) != 1.0
        or "rope_freqs.weight" in gguf.tensors,
        "a mixture of experts": gguf.metadata.get("llama.expert_count", 0) != 0,
        "a sliding window": gguf.metadata.get("llama.attention.sliding_window", 0) != 0,
    }
    for feature, present in refused.items():
        if present:
            raise ModelInvalidError(f"llama with {feature} is not supported")
