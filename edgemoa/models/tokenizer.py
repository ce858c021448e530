"""The tokenizer files of a model folder, made from a GGUF's vocabulary.

A GGUF carries the tokens of one of two kinds, and llama.cpp says what they mean; both are written
as a ``tokenizer.json`` of Hugging Face's format, which :mod:`edgemoa.text` reads:

``gpt2``, byte-level BPE
    Text is cut into words by regular expressions, which ``tokenizer.ggml.pre`` names and llama.cpp
    defines (``src/llama-vocab.cpp``). They are written out one ``Split`` after the other, as
    llama.cpp applies them: Hugging Face's ready-made steps, ``Digits`` for one, differ on
    characters such as "½" and on runs of spaces.

``llama``, SentencePiece
    Neighbours are joined as long as there is a token for both together, that of the highest score
    first. Hugging Face's BPE does the same from a list of pairs in that order, so every way to put
    a token together from two others becomes such a pair.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Final, Self

from edgemoa.errors import ModelInvalidError
from edgemoa.models.gguf import GgufFile
from edgemoa.text.template import check_template

# ggml's token types
NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
BYTE: Final = 6

_BYTE_LEVEL: Final = "gpt2"
_SENTENCE_PIECE: Final = "llama"
_SPACE: Final = "▁"  # how SentencePiece writes a space
_MAX_PIECE_CHARACTERS: Final = 512
_MAX_WAYS: Final = 1 << 20
"""Ways to put tokens of SentencePiece together: 515,000 for Gemma's 262,144."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How byte-level BPE cuts text into words: by ``splits``, each within the pieces of the former.

    ``whole_words``: a word that is a token stays whole, whatever the merges say. ``add_bos`` is
    what holds where the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3: Final = rf"{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2: Final = rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
# Words in which capitals come first. Letters without case count as both, and so does every letter
# beyond ASCII: that is how llama.cpp writes it.
_CAPITAL: Final = r"(?:(?=\p{L})[^a-z])"
_SMALL: Final = r"(?:(?=\p{L})[^A-Z])"
_CASED: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+%s|[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*%s"
)
_PATHS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LATIN: Final = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EAST_ASIAN: Final = r"[一-龥ࠀ-一가-퟿&&[^\s]]+"  # to llama.cpp, white space is in no range

_DEFAULT_PRE: Final = PreTokenizer(
    (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
)
_FAMILIES: Final = {
    ("default",): _DEFAULT_PRE,
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat",
     "a.x-4.0", "mellum", "exaone4"): PreTokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
     "mellum2"): PreTokenizer((r"\p{N}", _GPT2)),
    ("falcon",): PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"):
        PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True),
    ("dbrx", "smaug-bpe"): PreTokenizer((_LLAMA3,)),
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "hunyuan", "solar-open"):
        PreTokenizer((_QWEN2,)),
    ("gpt-4o", "llama4", "kanana2"): PreTokenizer(
        (rf"{_CASED % (f'{_SUFFIX}?', f'{_SUFFIX}?')}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}",)
    ),
    ("tekken",): PreTokenizer(
        (rf"{_CASED % ('', '')}|\p{{N}}|{_PATHS}|{_SPACES}",), whole_words=True, add_bos=True
    ),
    ("deepseek-llm",): PreTokenizer(
        (r"[\r\n]", rf"\s?[{_LATIN}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。&&[^\s]]+", r"\s+\z",
         _EAST_ASIAN, r"\p{N}+")
    ),
    ("deepseek-coder",): PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")
    ),
    ("deepseek-v3", "hunyuan-dense"): PreTokenizer(
        (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
         r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
         r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + f"|{_SPACES}")
    ),
    ("seed-coder",): PreTokenizer(
        (rf"{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    ("bailingmoe", "bailingmoe2", "llada-moe"): PreTokenizer(
        (rf"{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    ("poro-chat", "bloom", "gpt3-finnish"): PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    ("viking",): PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
}  # fmt: skip

PRE_TOKENIZERS: Final = {name: pre for names, pre in _FAMILIES.items() for name in names}
"""llama.cpp's names of ways to cut."""

TURN_MARKS: Final = frozenset(
    {
        "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
        "<|system|>", "<|user|>", "<|assistant|>", "<|im_sep|>", "[INST]", "[/INST]",
    }
)  # fmt: skip
"""Tokens that begin a turn. Some files call them the user's own, but then what people write could
begin one."""

END_OF_TURN: Final = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
        "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip
"""Names of tokens that end a turn, whatever a file declares; all of llama.cpp's."""

_FILL_IN: Final = {
    "fim_pad_token_id": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep_token_id": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep_token_id": {"<|file_sep|>"},
}
"""What ends a text in the middle of a file of code; for llama.cpp these end a turn as well."""

_FILL_IN_MARKS: Final = {
    "fim_pre_token_id": {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>",
                         "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"},
    "fim_suf_token_id": {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>",
                         "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"},
    "fim_mid_token_id": {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>",
                         "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"},
}  # fmt: skip

DOCUMENT_SEPARATOR: Final = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What a GGUF says about its tokens.

    ``merges`` are pairs of tokens with a space between, the first to be joined first.
    ``text_start`` is the token that precedes a document, ``stripping`` the tokens that swallow the
    white space after them, ``chat_template`` empty for a model without one.
    """

    kind: str
    pre: PreTokenizer
    tokens: list[str]
    types: list[int]
    merges: list[str]
    space_prefix: bool
    stripping: frozenset[int]
    bos: int
    pad: int
    unknown: int | None
    end_of_turn: tuple[int, ...]
    text_start: int
    add_bos: bool
    chat_template: str

    @classmethod
    def read(cls, gguf: GgufFile) -> Self:
        """Raises :class:`ModelInvalidError` for another kind of tokenizer, for broken tables, and
        for a chat template that cannot be used.
        """
        kind = gguf.text("tokenizer.ggml.model")
        if kind not in (_BYTE_LEVEL, _SENTENCE_PIECE):
            raise ModelInvalidError(
                f"tokenizers of the kind {kind!r} are not supported; "
                "supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
            )
        pre = PreTokenizer((), add_bos=True)
        if kind == _BYTE_LEVEL:
            name = gguf.text("tokenizer.ggml.pre", "default")
            if name not in PRE_TOKENIZERS:
                raise ModelInvalidError(
                    f"the pre-tokenizer {name!r} is not supported; "
                    f"supported: {', '.join(sorted(PRE_TOKENIZERS))}"
                )
            pre = PRE_TOKENIZERS[name]
        tokens = [
            text or f"[EMPTY_{number}]"
            for number, text in enumerate(gguf.texts("tokenizer.ggml.tokens"))
        ]
        types = gguf.integers("tokenizer.ggml.token_type")
        if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise ModelInvalidError("the tokenizer's tables of tokens and types do not fit")
        numbers = {text: number for number, text in enumerate(tokens)}

        def token(key: str, default: int | None = None) -> int:
            return gguf.integer(f"tokenizer.ggml.{key}", default, most=len(tokens) - 1)

        def is_there(key: str) -> bool:
            """Of tokens that few need, files name some that are not in the vocabulary."""
            number = gguf.metadata.get(f"tokenizer.ggml.{key}")
            return isinstance(number, int) and 0 <= number < len(tokens)

        few_need = ("eot_token_id", "eom_token_id", *_FILL_IN, *_FILL_IN_MARKS)
        declared = {key: token(key) for key in few_need if is_there(key)}
        if "tokenizer.ggml.eos_token_id" in gguf.metadata:
            declared = {"eos_token_id": token("eos_token_id"), **declared}
        eos = token("eos_token_id", 2 if kind == _SENTENCE_PIECE else None)
        bos = token("bos_token_id", 1 if kind == _SENTENCE_PIECE else eos)
        ends = _end_of_turn(eos, declared, numbers)
        for number in (
            *(number for number in ends if tokens[number] in END_OF_TURN),
            *(numbers[text] for text in TURN_MARKS if text in numbers),
            *_named(_FILL_IN, declared, numbers),
            *_named(_FILL_IN_MARKS, declared, numbers),
        ):
            types[number] = CONTROL  # by its name, whatever the file says
        add_bos = gguf.flag("tokenizer.ggml.add_bos_token", pre.add_bos)
        separator = bos if add_bos else numbers.get(DOCUMENT_SEPARATOR, bos)
        chat_template = gguf.text("tokenizer.chat_template", "", most=1 << 20)
        if chat_template:
            check_template(chat_template, tokens[bos], tokens[eos])
        return cls(
            kind=kind,
            pre=pre,
            tokens=tokens,
            types=types,
            merges=_merges(gguf, kind, tokens, types, numbers),
            space_prefix=gguf.flag("tokenizer.ggml.add_space_prefix", True)
            and kind == _SENTENCE_PIECE,
            stripping=_stripping(gguf, kind, tokens, types),
            bos=bos,
            pad=token("padding_token_id") if is_there("padding_token_id") else eos,
            unknown=next((n for n, kind_ in enumerate(types) if kind_ == UNKNOWN), None),
            end_of_turn=ends,
            text_start=separator,
            add_bos=add_bos,
            chat_template=chat_template,
        )

    def files(self, context: int) -> dict[str, bytes]:
        """``tokenizer.json`` and ``tokenizer_config.json`` by name."""
        return {
            "tokenizer.json": _json(self._tokenizer()),
            "tokenizer_config.json": _json(self._config(context)),
        }

    def _tokenizer(self) -> dict[str, object]:
        byte_level = self.kind == _BYTE_LEVEL
        added = [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": number in self.stripping,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            **(self._byte_level() if byte_level else self._sentence_piece()),
            "post_processor": None,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None if self.unknown is None else self.tokens[self.unknown],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": not byte_level,
                "byte_fallback": not byte_level,
                "ignore_merges": self.pre.whole_words,
                "vocab": {text: number for number, text in enumerate(self.tokens)},
                "merges": self.merges,
            },
        }

    def _byte_level(self) -> dict[str, object]:
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        cuts = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in self.pre.splits
        ]
        return {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*cuts, {**step, "use_regex": False}],
            },
            "decoder": {**step, "use_regex": True},
        }

    def _sentence_piece(self) -> dict[str, object]:
        escape = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        unescape = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        prefix = [{"type": "Prepend", "prepend": _SPACE}] if self.space_prefix else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, escape]},
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    unescape,
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    *(strip if self.space_prefix else []),
                ],
            },
        }

    def _config(self, context: int) -> dict[str, object]:
        byte_level = self.kind == _BYTE_LEVEL
        unknown = {} if self.unknown is None else {"unk_token": self.tokens[self.unknown]}
        return {
            "tokenizer_class": "GPT2Tokenizer" if byte_level else "LlamaTokenizer",
            "add_bos_token": self.add_bos,
            "add_prefix_space": self.space_prefix,
            "bos_token": self.tokens[self.bos],
            "eos_token": self.tokens[self.end_of_turn[0]],
            "pad_token": self.tokens[self.pad],
            **unknown,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": self.chat_template,
        }


def _named(
    names: dict[str, set[str]], declared: dict[str, int], numbers: dict[str, int]
) -> list[int]:
    """The token of each key that is found by its name, where the file does not declare one."""
    found = []
    for key, texts in names.items():
        if key not in declared:
            found += sorted(numbers[text] for text in texts if text in numbers)[:1]
    return found


def _end_of_turn(eos: int, declared: dict[str, int], numbers: dict[str, int]) -> tuple[int, ...]:
    """Every token at which llama.cpp stops as well, the file's end of sequence first."""
    names = set(END_OF_TURN)
    if numbers.keys() >= {"<|end|>", "<|call|>", "<|return|>"} or (
        numbers.keys() >= {"<|end|>", "<|flush|>"} and numbers.keys() & {"<|call|>", "<|calls|>"}
    ):
        names.discard("<|end|>")  # there it ends one of several messages of a turn
    if "<|tool_response>" in numbers:
        names.discard("</s>")  # there it is a word like others
    ends = [eos]
    ends += [
        declared[key] for key in ("eot_token_id", "eom_token_id", *_FILL_IN) if key in declared
    ]
    ends += _named(_FILL_IN, declared, numbers)
    ends += sorted(numbers[name] for name in names if name in numbers)
    return tuple(dict.fromkeys(ends))


def _stripping(gguf: GgufFile, kind: str, tokens: list[str], types: list[int]) -> frozenset[int]:
    """The tokens of Phi-3 and 3.5 swallow the white space after them. Its files only say what they
    are: by their architecture, which Phi-4 shares with another kind of tokenizer, or by name.
    """
    name = gguf.text("general.name", "", most=1 << 20).lower()
    is_phi3 = gguf.text("general.architecture", "") == "phi3" and kind == _SENTENCE_PIECE
    if not (is_phi3 or "phi-3" in name or "phi3" in name):
        return frozenset()
    keeping = {"<unk>", "<s>", "<|endoftext|>"}
    return frozenset(
        number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if (kind in (CONTROL, USER_DEFINED, UNKNOWN) or text == "</s>") and text not in keeping
    )


def _merges(
    gguf: GgufFile, kind: str, tokens: list[str], types: list[int], numbers: dict[str, int]
) -> list[str]:
    # What people write must never be put together to a control token.
    closed = {
        text for text, kind_ in zip(tokens, types, strict=True) if kind_ in (CONTROL, UNKNOWN)
    }
    if kind == _BYTE_LEVEL:
        merges = list(dict.fromkeys(gguf.texts("tokenizer.ggml.merges")))
        pairs = [merge.split(" ") for merge in merges]
        if not all(len(pair) == 2 for pair in pairs):
            raise ModelInvalidError("the tokenizer has a merge that is not a pair")
        if not all(a in numbers and b in numbers and a + b in numbers for a, b in pairs):
            raise ModelInvalidError("the tokenizer has a merge of what are no tokens of it")
        return [merge for merge, (a, b) in zip(merges, pairs, strict=True) if a + b not in closed]
    missing = [byte for byte in range(256) if types[numbers.get(f"<0x{byte:02X}>", 0)] != BYTE]
    if missing:
        raise ModelInvalidError(
            f"the tokenizer has no token for the byte 0x{missing[0]:02X}: not every text has tokens"
        )
    scores = _scores(gguf, len(tokens))
    ways: list[tuple[float, int, int]] = []
    for number, text in enumerate(tokens):
        if text in closed or " " in text:  # what is encoded has no spaces
            continue
        # Of equal scores the leftmost comes first, so that a run of spaces grows from its left: as
        # if what is longer there went before.
        ways += [
            (-scores[number], -at, number)
            for at in range(1, min(len(text), _MAX_PIECE_CHARACTERS))
            if text[:at] in numbers and text[at:] in numbers
        ]
        if len(ways) > _MAX_WAYS:
            raise ModelInvalidError("the tokenizer has too many ways to put tokens together")
    ways.sort()
    return [f"{tokens[number][:-at]} {tokens[number][-at:]}" for _, at, number in ways]


def _scores(gguf: GgufFile, count: int) -> list[float]:
    values = gguf.metadata.get("tokenizer.ggml.scores")
    if not isinstance(values, list) or len(values) != count:
        raise ModelInvalidError("the tokenizer's tables of tokens and scores do not fit")
    scores = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(scores) != count:
        raise ModelInvalidError("the tokenizer has a score that is not a number")
    return scores


def _json(value: dict[str, object]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # pragma: no cover - the reader of the file decodes strictly
        raise ModelInvalidError("the tokenizer has a token that is no text") from None
