"""The tokenizer files that onnxruntime-genai reads, made from a GGUF's vocabulary.

A GGUF carries the vocabulary and merges of byte-level BPE, and names the way in which text is cut
into words before (``tokenizer.ggml.pre``). Both go into a ``tokenizer.json`` of the kind that
Hugging Face defines. The cutting is written out as llama.cpp's regular expressions, one ``Split``
after the other: the ready-made ``Digits`` step differs from them on characters such as "½" and on
runs of spaces before a digit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Self

from edgemoa.errors import ModelInvalidError
from edgemoa.models.gguf import GgufFile

# ggml's token types
CONTROL: Final = 3
USER_DEFINED: Final = 4

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: Final = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
}
"""llama.cpp's names of ways to cut, each with the regular expressions that it applies in turn."""

END_OF_TURN: Final = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|return|>",
        "<end_of_turn>",
        "</s>",
    }
)
"""Names of control tokens that end a turn, whatever a file declares as its end of sequence."""

DOCUMENT_SEPARATOR: Final = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What a GGUF says about its tokens. ``text_start`` is the token that precedes a document."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    splits: tuple[str, ...]
    bos: int
    pad: int
    end_of_turn: tuple[int, ...]
    text_start: int
    add_bos: bool
    chat_template: str

    @classmethod
    def read(cls, gguf: GgufFile) -> Self:
        """Raises :class:`ModelInvalidError` for another kind of tokenizer and for broken tables."""
        kind = gguf.text("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ModelInvalidError(
                f"tokenizers of the kind {kind!r} are not supported; "
                "supported: 'gpt2' (byte-level BPE)"
            )
        pre = gguf.text("tokenizer.ggml.pre", "gpt-2")
        if pre not in PRE_TOKENIZERS:
            raise ModelInvalidError(
                f"the pre-tokenizer {pre!r} is not supported; "
                f"supported: {', '.join(sorted(PRE_TOKENIZERS))}"
            )
        tokens = gguf.texts("tokenizer.ggml.tokens")
        types = gguf.integers("tokenizer.ggml.token_type")
        merges = gguf.texts("tokenizer.ggml.merges")
        if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise ModelInvalidError("the tokenizer's tables of tokens and types do not fit")
        if not all(merge.count(" ") == 1 for merge in merges):
            raise ModelInvalidError("the tokenizer has a merge that is not a pair")

        def token(key: str, default: int | None = None) -> int:
            return gguf.integer(f"tokenizer.ggml.{key}", default, most=len(tokens) - 1)

        eos = token("eos_token_id")
        bos = token("bos_token_id", eos)
        numbers = {text: number for number, text in enumerate(tokens)}
        named = [
            number
            for number, (text, kind_) in enumerate(zip(tokens, types, strict=True))
            if kind_ == CONTROL and text in END_OF_TURN
        ]
        declared = [token(key, eos) for key in ("eot_token_id", "eom_token_id")]
        return cls(
            tokens=tokens,
            types=types,
            merges=merges,
            splits=PRE_TOKENIZERS[pre],
            bos=bos,
            pad=token("padding_token_id", eos),
            end_of_turn=tuple(dict.fromkeys([eos, *declared, *named])),
            text_start=numbers.get(DOCUMENT_SEPARATOR, bos),
            add_bos=gguf.flag("tokenizer.ggml.add_bos_token", False),
            chat_template=gguf.text("tokenizer.chat_template", ""),
        )

    def files(self, context: int) -> dict[str, bytes]:
        """``tokenizer.json`` and ``tokenizer_config.json`` by name."""
        return {
            "tokenizer.json": _json(self._tokenizer()),
            "tokenizer_config.json": _json(self._config(context)),
        }

    def _tokenizer(self) -> dict[str, object]:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        cuts: list[dict[str, object]] = [
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            }
            for regex in self.splits
        ]
        added = [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == CONTROL,
            }
            for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*cuts, {**byte_level, "use_regex": False}],
            },
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {text: number for number, text in enumerate(self.tokens)},
                "merges": self.merges,
            },
        }

    def _config(self, context: int) -> dict[str, object]:
        return {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": self.add_bos,
            "add_prefix_space": False,
            "bos_token": self.tokens[self.bos],
            "eos_token": self.tokens[self.end_of_turn[0]],
            "pad_token": self.tokens[self.pad],
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": self.chat_template,
        }


def _json(value: dict[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
