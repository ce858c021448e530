"""From tokens to text that may be shown: whole characters, nothing of a stop string, no loops."""

from __future__ import annotations

import codecs
from typing import Final, Protocol

import numpy as np

LONGEST_PERIOD: Final = 80  # tokens: a sentence or two, a row of a table
LEAST_COPIES: Final = 4
LEAST_LOOP: Final = 64  # tokens; rulers, tables and refrains of natural texts are shorter


class Pieces(Protocol):
    """What a :class:`Detokenizer` asks of :class:`edgemoa.text.tokens.Tokens`."""

    @property
    def strips_first_space(self) -> bool: ...

    def piece(self, number: int) -> bytes: ...


class Detokenizer:
    """Decodes token by token, holding back a character until all its bytes are there.

    What it gives is together what ``Tokens.decode`` makes of all the tokens, but for a
    character that is cut off at the end.
    """

    def __init__(self, tokens: Pieces) -> None:
        self._tokens = tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = tokens.strips_first_space

    def push(self, token: int) -> str:
        """The text that ``token`` completes, often none."""
        text = self._bytes.decode(self._tokens.piece(token))
        if text and self._first:
            self._first = False
            text = text.removeprefix(" ")
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


class Loop:
    """Notices a text that goes round and round, as small models' greedy texts do.

    It does when its last tokens are :data:`LEAST_COPIES` exact copies or more of one period of
    :data:`LONGEST_PERIOD` tokens at most, :data:`LEAST_LOOP` tokens or more altogether.
    """

    def __init__(self) -> None:
        self._periods = np.arange(1, LONGEST_PERIOD + 1)
        self._recent = np.full(LONGEST_PERIOD, -1)  # the last token first
        self._matched = np.zeros(LONGEST_PERIOD, np.int64)  # tokens like the one a period before
        # The first period has nothing to be like, and counts all the same.
        self._enough = np.maximum(LEAST_COPIES * self._periods, LEAST_LOOP) - self._periods

    def push(self, token: int) -> bool:
        """Whether ``token`` completes a loop."""
        self._matched += 1
        self._matched[self._recent != token] = 0
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._matched >= self._enough).any())
