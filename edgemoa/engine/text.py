"""From tokens to text that may be shown: whole characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_TOKENS: Final = 4  # a character has at most four bytes, a token at least one


class Detokenizer:
    """Decodes token by token, holding back a character until all its bytes are there.

    onnxruntime-genai's own stream loses the text after bytes that form no character (0.18: the
    tokens F0 9F ``a`` ``b`` print nothing), and a model that samples does write such bytes.
    ``decode`` turns tokens into text without special tokens, and ends at bytes that form no
    character with U+FFFD.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []  # what the piece before was made of
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` completes, often none."""
        self._held.append(token)
        text = self._take_whole()
        if text or len(self._held) < _MAX_CHARACTER_TOKENS:
            return text
        # More tokens than a character can have: the first one is not the start of any. Shown as
        # what it is, so that what follows is not lost.
        return self._take_first() + self._take_whole()

    def finish(self) -> str:
        """What is held back at the end; a character that was cut off is left out."""
        text = ""
        while self._held:
            text += self._take_whole() or self._take_first()
        return text.rstrip(_REPLACEMENT)

    def _take_whole(self) -> str:
        # Some tokenizers write a token's leading space only when it is not the first: decode with
        # the piece before and cut it off again.
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._held)
        if text.endswith(_REPLACEMENT):
            return ""
        self._shown, self._held = self._held, []
        return text[len(before) :]

    def _take_first(self) -> str:
        text = self._decode(self._held[:1])
        self._shown, self._held = [], self._held[1:]
        return text


class StopText:
    """Ends a text before the first of its stop strings, wherever the borders of pieces fall."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What of the text so far can no longer become part of a stop string.

        Once ``stopped`` is set, the text is complete.
        """
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        # Hold back the longest end that a stop string starts with.
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        held = next(
            (n for n in range(longest, 0, -1) if self._might_stop(self._held[-n:])),
            0,
        )
        text = self._held[: len(self._held) - held]
        self._held = self._held[len(text) :]
        return text

    def finish(self) -> str:
        """What was held back, when no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _might_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
