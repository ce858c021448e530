"""Picking the next token from the model's logits.

Done here and not in onnxruntime-genai, whose ``top_p`` keeps one token more than the nucleus
(0.18: with probabilities .5 .3 .1 .1 and top_p .6 it draws all four), and so that a seed means
the same text with every back end.

Steps, in this order; one that is not asked for is not taken:

1. ``logit_bias`` is added, as a client that bans or prefers tokens means the model's own logits;
2. the repetition penalty divides the logits over 0, and multiplies those below, of every token that
   the prompt or the answer has had; there is no window, as in ``transformers`` and vLLM. Tokens
   that end an answer are spared: they stand in every prompt of several turns, and an answer is not
   to go on because the ones before it ended;
3. the presence and frequency penalties are taken off the logits of the tokens that the answer has
   had, once and for each time, as OpenAI defines them;
4. what guidance does not allow is left out;
5. the temperature divides the logits; near 0, the likeliest token is picked and that is all;
6. top-k keeps the k likeliest; then top-p the fewest of those that together have the share p of
   their weight; then min-p those that weigh at least so much of what the likeliest weighs. That is
   the order of ``transformers``: the shares are those of the distribution that is drawn from, with
   its temperature (llama.cpp would have that last);
7. one of these is drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from edgemoa.core.messages import Sampling
from edgemoa.errors import EngineError

Logits: TypeAlias = npt.NDArray[np.float32]
Allowed: TypeAlias = npt.NDArray[np.bool_]
"""For each token of a row of logits, whether it may be picked."""

LEAST_LOGPROB: Final = -9999.0
"""What is said of a token that the model holds for impossible: JSON has no infinity."""

_BLOCK: Final = 256
_SMALL_BLOCK: Final = 64
_COLD: Final = 1e-3  # a temperature at which nothing but the likeliest is ever drawn
_SORTABLE: Final = 512  # so many are sorted without a thought
_MANY: Final = 8  # one allowed token in so many: then none of them are gathered
_BINS: Final = 16  # in which the weight goes down by e


class Sampler:
    """One job's choices. The same logits and the same seed give the same tokens."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        bias: Mapping[int, float] | None = None,
        prompt: Iterable[int] = (),
        spared: frozenset[int] = frozenset(),
    ) -> None:
        """
        :param bias: what is added to these tokens' logits.
        :param prompt: the tokens before the answer; the repetition penalty counts them.
        :param spared: tokens that the repetition penalty leaves alone.
        """
        self._temperature = sampling.temperature
        self._top_k = sampling.top_k
        self._top_p = sampling.top_p
        self._min_p = sampling.min_p
        self._random = random.Random(sampling.seed)
        self._bias = dict(bias or {})
        self._biased = np.fromiter(self._bias.keys(), np.intp, len(self._bias))
        self._added = np.fromiter(self._bias.values(), np.float32, len(self._bias))
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._spared = spared
        self._repeated = _Counts()
        self._written = _Counts()
        if self._repetition != 1:
            for token in prompt:
                if token not in spared:
                    self._repeated.add(token)
        self._counts = bool(self._presence or self._frequency)
        # Kept: to be given new memory at each step takes several times what is done with it.
        self._room = np.empty((2, 0), np.float32)
        self._adjusts = bool(self._bias) or self._repetition != 1 or self._counts

    def pick(self, logits: Logits, allowed: Allowed | None = None) -> int:
        """The next token of a row of logits [vocabulary]: any, or any that is allowed.

        Raises :class:`EngineError` where the model computed no numbers (NaN or infinity), and where
        nothing is allowed.
        """
        best = check(logits)
        tokens: npt.NDArray[np.intp] | None = None
        if self._adjusts or allowed is not None:
            if self._adjusts:
                logits = self._adjust(logits)
            if allowed is not None:
                count = int(np.count_nonzero(allowed))
                if count == 0:
                    raise EngineError("Nothing that the answer's schema allows can follow.")
                if count * _MANY > len(logits):
                    logits = np.where(allowed, logits, np.float32(-np.inf))
                else:
                    tokens = np.flatnonzero(allowed)
                    logits = logits[tokens]
            best = check(logits)
        if self._temperature >= _COLD:
            best = self._draw(logits, logits[best])
        token = best if tokens is None else int(tokens[best])
        if self._counts:
            self._written.add(token)
        if self._repetition != 1 and token not in self._spared:
            self._repeated.add(token)
        return token

    def _adjust(self, logits: Logits) -> Logits:
        """The logits with bias and penalties."""
        logits = logits.copy()
        if self._bias:
            known = self._biased < len(logits)
            logits[self._biased[known]] += self._added[known]
        if self._repetition != 1:
            tokens, _ = self._repeated.below(len(logits))
            seen = logits[tokens]
            penalty = np.float32(self._repetition)
            logits[tokens] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts:
            tokens, counts = self._written.below(len(logits))
            logits[tokens] -= np.float32(self._presence) + np.float32(self._frequency) * counts
        return logits

    def _draw(self, logits: Logits, peak: np.float32) -> int:
        """One of the tokens that top-k, top-p and min-p leave."""
        temperature = np.float32(self._temperature)
        tokens: npt.NDArray[np.intp] | None = None
        if 0 < self._top_k < len(logits):
            tokens = likeliest(logits, self._top_k)
        elif self._min_p > 0 and self._top_p == 1:
            # Only these, and no need to know what all of them weigh together.
            tokens = np.flatnonzero(logits >= peak + temperature * math.log(self._min_p))
        considered = logits if tokens is None else logits[tokens]
        if self._room.shape[1] < len(considered):
            self._room = np.empty((2, len(considered)), np.float32)
        exponents, weights = self._room[:, : len(considered)]
        np.subtract(considered, peak, out=exponents)
        exponents /= temperature
        np.exp(exponents, out=weights)
        if self._top_p < 1:
            drawn = self._draw_of_nucleus(exponents, weights)
        elif tokens is None:
            drawn = self._draw_of_all(weights)
        else:
            weights[weights < self._min_p] = 0
            drawn = self._index(np.cumsum(weights, dtype=np.float64))
        return drawn if tokens is None else int(tokens[drawn])

    def _draw_of_all(self, weights: Logits) -> int:
        # A block of the vocabulary, then a token in it: running sums over all of it (400 us for
        # 49,152 tokens) would be a good part of a step of the model.
        starts = np.arange(0, len(weights), _BLOCK)
        blocks = np.add.reduceat(weights, starts, dtype=np.float64)
        start = int(starts[self._index(np.cumsum(blocks))])
        block = weights[start : start + _BLOCK]
        return start + self._index(np.cumsum(block, dtype=np.float64))

    def _draw_of_nucleus(self, exponents: Logits, weights: Logits) -> int:
        total = float(weights.sum(dtype=np.float64))
        share = self._top_p * total
        # Tokens below this weigh less than 1 - top_p all together: the nucleus is among the others.
        tokens = np.flatnonzero(weights >= (total - share) / len(weights))
        weights = weights[tokens]
        if len(tokens) > _SORTABLE:
            # In bins by weight; only the bin in which the share is reached has to be sorted.
            steps = np.minimum(exponents[tokens] * np.float32(-_BINS), _BINS * _BINS)
            bins = steps.astype(np.intp)
            sums = np.cumsum(np.bincount(bins, weights))
            edge = min(int(np.searchsorted(sums, share)), len(sums) - 1)
            light = np.flatnonzero(bins == edge)
            before = float(sums[edge - 1]) if edge else 0.0
            light = light[_beyond(weights[light], share - before)]
            weights[bins > edge] = 0
        else:
            light = _beyond(weights, share)
        weights[light] = 0
        if self._min_p > 0:
            weights[weights < self._min_p] = 0
        return int(tokens[self._draw_of_all(weights)])

    def _index(self, sums: npt.NDArray[np.float64]) -> int:
        """An index, by running sums of weights; never of one without weight."""
        drawn = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return drawn if drawn < len(sums) else int(np.searchsorted(sums, sums[-1]))


def _beyond(weights: Logits, share: float) -> npt.NDArray[np.intp]:
    """Which weights are not among the fewest that make up ``share``."""
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    return order[int(np.searchsorted(sums, share)) + 1 :]


class _Counts:
    """Tokens, each once, and how often they were added; in arrays, for use at each step."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._tokens = np.empty(256, np.intp)
        self._counts = np.zeros(256, np.float32)

    def add(self, token: int) -> None:
        at = self._index.setdefault(token, len(self._index))
        if at == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.empty_like(self._tokens)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._tokens[at] = token
        self._counts[at] += 1

    def below(self, end: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
        """The tokens under ``end``, and their counts."""
        tokens, counts = self._tokens[: len(self._index)], self._counts[: len(self._index)]
        if len(tokens) and tokens.max() >= end:  # control tokens of a prompt, in odd models
            fitting = tokens < end
            tokens, counts = tokens[fitting], counts[fitting]
        return tokens, counts


def check(logits: Logits) -> int:
    """The likeliest token of a row of logits.

    Raises :class:`EngineError` where the model computed no numbers (NaN or infinity).
    """
    best = int(np.argmax(logits))  # NaN counts as the largest
    if not math.isfinite(logits[best]):
        raise EngineError("The model computed no valid numbers.")
    return best


def likeliest(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    """The ``count`` likeliest tokens, the likeliest first; of equal ones those of lower number."""
    blocks = len(logits) // _SMALL_BLOCK
    if count < blocks:
        # So many blocks hold a token each that is as good as the last of these blocks' best one:
        # a bar that few besides the wanted ones pass, and much quicker than to sort them all.
        best = logits[: blocks * _SMALL_BLOCK].reshape(blocks, _SMALL_BLOCK).max(axis=1)
        bar = np.partition(best, blocks - count)[blocks - count]
    else:
        count = min(count, len(logits))
        bar = np.partition(logits, len(logits) - count)[len(logits) - count]
    found = np.flatnonzero(logits >= bar)
    return found[np.argsort(-logits[found], kind="stable")[:count]]


def logprobs(logits: Logits, tokens: npt.NDArray[np.intp]) -> list[float]:
    """The model's own log-probabilities of some tokens: of its logits as they are, at a temperature
    of 1, without bias, penalties or guidance."""
    peak = logits.max()
    rest = math.log(float(np.exp(logits - peak).sum(dtype=np.float64))) + float(peak)
    return [max(float(logits[token]) - rest, LEAST_LOGPROB) for token in tokens]
