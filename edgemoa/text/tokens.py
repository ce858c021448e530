"""Text to tokens and back, as a model folder's ``tokenizer.json`` says.

Encoding is Hugging Face's ``tokenizers``, which defines that file: it gives llama.cpp's tokens for
what we import (``tests/models/test_tokenizer.py``), and needs no loaded model. Tokens are put
together to text here, as bytes, so that a stream of them and the whole give the same text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models

from edgemoa.core import limits
from edgemoa.core.messages import ChatMessage
from edgemoa.errors import InvalidPromptError, ModelInvalidError
from edgemoa.text.files import IMPORT_AGAIN, read_object, unusable

MAX_FILE_BYTES: Final = 64 * limits.MIB  # 262,144 tokens and their merges make 16 to 33 MB

_MAX_CONTROL_CHARACTERS: Final = 256
_MAX_STEPS: Final = 16
_MAX_GROWTH: Final = 64  # of a text, by what is done to it before it is cut into tokens

_TEAR: Final = "\ufdd0"  # a code point that Unicode keeps out of texts
_WHITE_SPACE: Final = " \t\n\v\f\r"
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Tokens:
    """A model's tokens. ``end_of_turn`` are those that end an answer. All have a number under
    ``size``; a model may compute logits for more, which stand for nothing.

    **Control tokens** mark where turns begin and end. A tokenizer takes the characters
    ``<|im_end|>`` for one wherever they stand, so a proposal of another board could forge a turn of
    the user's. Messages are therefore passed through :meth:`guard` before a template is rendered;
    :meth:`encode_prompt` then reads control tokens from what the template wrote alone.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_turn: Iterable[int], start: int | None) -> None:
        """:param start: the token that every prompt begins with, if any.

        Raises :class:`ModelInvalidError` for a tokenizer of another kind than byte-level BPE and
        SentencePiece, and for one that would make much of little text.
        """
        self.end_of_turn = frozenset(end_of_turn)
        self._start = start
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # never read control tokens from text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content.encode() for number, token in added.items()}
        control = {number: token for number, token in added.items() if token.special}
        self._control = {token.content: number for number, token in control.items()}
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in control.values()}
        self._control_numbers = frozenset(control)
        unknown = self._control.get(getattr(tokenizer.model, "unk_token", None) or "")
        self._never_text = self._control_numbers - {unknown}
        self.size = _size(tokenizer)
        self._sorted = sorted(self._control)
        if max(map(len, self._sorted), default=0) > _MAX_CONTROL_CHARACTERS:
            raise ModelInvalidError("The model's tokenizer has a control token that is too long.")
        self._longest = max(map(len, self._sorted), default=0)
        self._finder = Tokenizer(models.BPE())  # knows nothing but control tokens
        self._finder.add_special_tokens(
            [AddedToken(text, normalized=False, special=True) for text in self._sorted]
        )
        _check_growth([*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer)])
        decoder = {str(step["type"]): step for step in _steps(tokenizer.decoder)}
        steps = decoder.keys()
        self.strips_first_space = (
            "Strip" in steps
            or decoder.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        )
        self._letters = _bytes_of_letters() if "ByteLevel" in steps else None
        if self._letters is None and not steps & {"ByteFallback", "Metaspace", "Replace"}:
            raise ModelInvalidError(
                "The model's tokenizer is of a kind that is not supported;"
                " supported are byte-level BPE and SentencePiece."
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text in which control tokens are characters like any other.

        Raises :class:`InvalidPromptError` for a text that the tokenizer cannot read.
        """
        try:
            numbers: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # defects of the library are raised past Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            # Its words could quote the text.
            raise InvalidPromptError("The model's tokenizer cannot read the prompt.") from None
        if not self._never_text.isdisjoint(numbers):
            raise InvalidPromptError("The model's tokenizer takes this text for a control token.")
        return numbers

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens of a rendered template, control tokens among them.

        Raises :class:`InvalidPromptError` for a text that the tokenizer cannot read.
        """
        numbers: list[int] = []
        at = 0
        strip = False
        for text, (start, end) in self._find(prompt):
            before, after = self._strips[text]
            numbers += self._encode_part(prompt[at:start], strip, before)
            numbers.append(self._control[text])
            at, strip = end, after
        numbers += self._encode_part(prompt[at:], strip, False)
        if self._start is not None and numbers[:1] != [self._start]:
            numbers.insert(0, self._start)
        return numbers

    def guard(self, messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
        """The messages with the characters of control tokens torn apart; for the template."""
        return tuple(ChatMessage(turn.role, self._guard(turn.content)) for turn in messages)

    def guard_all(self, value: Any) -> Any:
        """The same for every text in a value of JSON, names included.

        Raises :class:`RecursionError` for one that is nested too deep.
        """
        match value:
            case str():
                return self._guard(value)
            case list():
                return [self.guard_all(each) for each in value]
            case dict():
                return {self._guard(name): self.guard_all(each) for name, each in value.items()}
            case _:
                return value

    def knows(self, number: int) -> bool:
        """Whether a token has this number."""
        return self._tokenizer.id_to_token(number) is not None

    def piece(self, number: int) -> bytes:
        """What a token stands for in a text: nothing for a control token, or an unknown number."""
        if number in self._control_numbers:
            return b""
        if number in self._added:
            return self._added[number]
        text: str | None = self._tokenizer.id_to_token(number)
        if text is None:
            return b""
        if self._letters is not None:
            try:
                return bytes(self._letters[letter] for letter in text)
            except KeyError:
                return text.encode()
        if byte := _BYTE.fullmatch(text):
            return bytes.fromhex(byte[1])
        return text.replace("▁", " ").encode()

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of tokens; bytes that are no character become U+FFFD."""
        text = b"".join(map(self.piece, numbers)).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def _find(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """The control tokens that are written in a text, from left to right, with their places."""
        if not self._control:
            return []
        found = self._finder.encode(text, add_special_tokens=False)
        return list(zip(found.tokens, found.offsets, strict=True))

    def _encode_part(self, text: str, strip_left: bool, strip_right: bool) -> list[int]:
        text = text.replace(_TEAR, "")
        if strip_left:
            text = text.lstrip(_WHITE_SPACE)
        if strip_right:
            text = text.rstrip(_WHITE_SPACE)
        return self.encode(text) if text else []

    def _guard(self, text: str) -> str:
        text = text.replace(_TEAR, "\N{REPLACEMENT CHARACTER}")
        tears = [start + 1 for _, (start, _) in self._find(text)]
        # What could become one together with the text that a template puts after it, with or
        # without the white space at its end.
        end = len(text.rstrip())
        for start in range(max(0, end - self._longest), end):
            at = bisect_left(self._sorted, text[start:end])
            if at < len(self._sorted) and self._sorted[at].startswith(text[start:end]):
                tears.append(start + 1)
        parts, at = [], 0
        for tear in sorted(set(tears)):
            parts.append(text[at:tear])
            at = tear
        return _TEAR.join([*parts, text[at:]])


def load_tokens(model_dir: Path) -> Tokens:
    """The tokens of a model folder.

    Raises :class:`ModelInvalidError` for a folder without the files that say what they are.
    """
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        raise ModelInvalidError(
            "The model has no tokenizer.json; other kinds of tokenizer files are not supported.",
            hint=IMPORT_AGAIN,
        )
    settings = read_object(model_dir / "genai_config.json")
    config = read_object(model_dir / "tokenizer_config.json")
    tokenizer = _read(file)
    try:
        ends = settings["model"]["eos_token_id"]
        ends = [int(number) for number in (ends if isinstance(ends, list) else [ends])]
    except (KeyError, TypeError, ValueError) as error:
        raise unusable("genai_config.json", error) from error
    start = None
    if config.get("add_bos_token") is True:
        try:
            token = config["bos_token"]
            start = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
        except (KeyError, TypeError) as error:
            raise unusable("tokenizer_config.json", error) from error
    return Tokens(tokenizer, ends, start)


def _read(file: Path) -> Tokenizer:
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ModelInvalidError(
            f"The model's {file.name} has more than {MAX_FILE_BYTES >> 20} MiB."
        )
    try:
        return Tokenizer.from_file(str(file))
    except BaseException as error:  # plain Exceptions, and defects past them
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ModelInvalidError(
            "The model's tokenizer.json is no valid tokenizer.", hint=IMPORT_AGAIN
        ) from None


def _size(tokenizer: Tokenizer) -> int:
    """One more than a token's largest number; numbers may be left out, as far as half of them."""
    count = 2 * tokenizer.get_vocab_size()
    return next((n for n in range(count, 0, -1) if tokenizer.id_to_token(n - 1) is not None), 0)


def _steps(part: Any) -> list[dict[str, Any]]:
    """What a part of a tokenizer does, one step after the other."""
    if part is None:
        return []
    steps = [json.loads(part.__getstate__())]
    flat = []
    while steps:
        step = steps.pop()
        inner = [step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step]
        if inner:
            steps += inner[0]
        else:
            flat.append(step)
    return flat


def _check_growth(steps: list[dict[str, Any]]) -> None:
    """A few kilobytes of steps could make gigabytes of a word, each doubling what there is."""
    growth = 1
    for step in steps:
        if step["type"] in ("Replace", "Prepend", "ByteLevel"):
            written = len(str(step.get("content", "")))
            replaced = len(str(step.get("pattern", {}).get("String", "")))
            growth *= {"Prepend": 1, "ByteLevel": 2}.get(
                str(step["type"]), max(1, -(-written // replaced) if replaced else 1 + written)
            )
    if len(steps) > _MAX_STEPS or growth > _MAX_GROWTH:
        raise ModelInvalidError("The model's tokenizer makes too much of a text.")


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where it can be seen, others from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + number): byte for number, byte in enumerate(hidden)
    }
