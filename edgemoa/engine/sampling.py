"""Picking the next token from the model's logits.

Done here and not in onnxruntime-genai, whose ``top_p`` keeps one token more than the nucleus
(0.18: with probabilities .5 .3 .1 .1 and top_p .6 it draws all four), and so that a seed means
the same text with every back end.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
import numpy.typing as npt

from edgemoa.core.messages import Sampling
from edgemoa.errors import EngineError

_BLOCK: Final = 256
_COLD: Final = 1e-3  # a temperature at which nothing but the likeliest is ever drawn


class Sampler:
    """One job's choices. The same logits and the same seed give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._random = random.Random(sampling.seed)

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token of a row of logits [vocabulary].

        Raises :class:`EngineError` where the model computed no numbers (NaN or infinity).
        """
        best = int(np.argmax(logits))  # NaN counts as the largest
        peak = logits[best]
        if not np.isfinite(peak):
            raise EngineError("The model computed no valid numbers.")
        if self._temperature < _COLD:
            return best
        weights = np.exp((logits - peak) / np.float32(self._temperature))
        if self._top_p == 1:
            # A block of the vocabulary, then a token in it: running sums over all of it (400 us
            # for 49,152 tokens) would be a good part of a step of the model.
            starts = np.arange(0, len(weights), _BLOCK)
            blocks = np.add.reduceat(weights, starts, dtype=np.float64)
            start = int(starts[self._draw(np.cumsum(blocks))])
            block = weights[start : start + _BLOCK]
            return start + self._draw(np.cumsum(block, dtype=np.float64))
        # Tokens below this share weigh less than 1 - top_p all together, so the nucleus is among
        # the others, which are few enough to sort.
        total = float(weights.sum(dtype=np.float64))
        floor = (1 - self._top_p) * total / len(weights)
        tokens = np.flatnonzero(weights >= floor)
        tokens = tokens[np.argsort(-weights[tokens])]
        sums = np.cumsum(weights[tokens], dtype=np.float64)
        nucleus = int(np.searchsorted(sums, self._top_p * total)) + 1
        return int(tokens[self._draw(sums[:nucleus])])

    def _draw(self, sums: npt.NDArray[np.float64]) -> int:
        """An index, by running sums of weights."""
        drawn = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return min(drawn, len(sums) - 1)
