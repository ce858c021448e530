"""Guessing what a model will write: what followed the same tokens before.

Models repeat: names and phrases of the prompt, their own turns of speech, and above all an
aggregation repeats its proposals. The model reads a few guessed tokens in the same run as the last
one, which costs little where a run is bound by reading the weights, and each guess that comes true
is a run saved (prompt lookup decoding). Simulated with the default model's texts on 16 prompts of
AlpacaEval, a token more taking .15 of a run: an aggregation of three proposals is written 2.7 times
as fast, a greedy answer 1.3 times, a sampled one 1.1 times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MOST: Final = 7
"""Guesses in a run."""

_SHARES: Final = {8: 0.8, 4: 0.6, 3: 0.5, 2: 0.4, 1: 0.25}
"""By how many tokens have to be the same: the share of guesses that come true, before anything is
known of a text. More that are the same say more, so each has its own."""

_MEMORY: Final = 0.9  # what an old guess weighs against the next one


class Drafts:
    """The tokens of one job, and what may follow them."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # by some tokens: where what followed them is
        self._shares = dict(_SHARES)
        for token in tokens:
            self._add(token)

    def push(self, token: int) -> None:
        """The next token. What would have been guessed in its place tells how good guesses are,
        whether they were made or not."""
        start, alike = self._start()
        if alike:
            right = self._tokens[start] == token
            self._shares[alike] += (1 - _MEMORY) * (right - self._shares[alike])
        self._add(token)

    def guess(self, most: int, cost: float) -> list[int]:
        """What may follow, up to ``most`` tokens.

        :param cost: the share of guesses that must come true for one to be worth its while.
        """
        start, alike = self._start()
        if not alike:
            return []
        share = 1.0
        for count in range(most):
            # It counts only when all before it came true; then so many more tokens are the same.
            share *= next(self._shares[n] for n in self._shares if n <= alike + count)
            if share <= cost:
                return self._tokens[start : start + count]
        return self._tokens[start : start + most]

    def _start(self) -> tuple[int, int]:
        """Where what followed the last tokens before is, and how many are the same, if any."""
        for alike in self._shares:
            start = self._after.get(tuple(self._tokens[-alike:]))
            if start is not None:
                return start, alike
        return 0, 0

    def _add(self, token: int) -> None:
        at = len(self._tokens)
        for alike in self._shares:
            if at >= alike:
                self._after[tuple(self._tokens[-alike:])] = at
        self._tokens.append(token)
