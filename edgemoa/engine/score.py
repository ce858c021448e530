"""How likely the model would have written given texts: what choosing between proposals needs.

A prompt is read once, as any other; then each candidate behind it in its turn, several tokens to a
run, in the same place of the cache. Nothing is written, so this goes at the speed of reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgemoa.engine.frames import Event, Likelihood, Score, Scored
from edgemoa.errors import EngineError, InvalidPromptError, PromptTooLongError
from edgemoa.text.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Stretch:
    """The next tokens of a candidate to read: those from ``start`` to ``end`` of it."""

    tokens: npt.NDArray[np.int64]
    start: int
    end: int


class Scoring:
    """The candidates of one prompt, as far as they are scored; to its slot what an
    :class:`~edgemoa.engine.answer.Answer` is.

    The last token of the prompt predicts the first of each candidate, and each token of a candidate
    the next one. That a candidate ends where it does counts for nothing: it may have been cut off.
    """

    def __init__(self, job: Score, candidates: list[list[int]]) -> None:
        self.job = job
        self.cached_tokens = 0  # of the prompt, that the model had read before
        self.model_s = 0.0  # of the model's steps, this job's share
        self.last = -1
        self._candidates = [np.array(tokens, np.int64) for tokens in candidates]
        self._sums = [0.0] * len(candidates)
        self._at = 0  # the candidate that is being read
        self._read = 0  # tokens of it

    @property
    def longest(self) -> int:
        """Tokens of the longest candidate."""
        return max(map(len, self._candidates))

    def begin(self) -> None:
        """Nothing: no time is reported."""

    def pick(self, logits: npt.NDArray[np.float32]) -> list[Event]:
        """What the prompt says of every candidate's first token, by its last token's logits.

        Raises :class:`EngineError` where the model computed no numbers.
        """
        firsts = np.array([tokens[0] for tokens in self._candidates])
        self._sums = log_probabilities(logits[None].copy(), firsts[None])[0].tolist()
        return self._go_on()

    def next(self, most: int) -> Stretch:
        """What to read next, up to ``most`` tokens; the last one of a candidate is not among them,
        as nothing follows it.
        """
        tokens = self._candidates[self._at]
        end = min(self._read + most, len(tokens) - 1)
        return Stretch(tokens[self._read : end], self._read, end)

    def take(self, stretch: Stretch, logits: npt.NDArray[np.float32]) -> list[Event]:
        """What was read says of the tokens after it; ``logits`` [tokens, vocabulary] is used up.

        The last of the events is ``Scored`` when all candidates are. Raises :class:`EngineError`
        where the model computed no numbers.
        """
        targets = self._candidates[self._at][stretch.start + 1 : stretch.end + 1]
        self._sums[self._at] += float(log_probabilities(logits, targets[:, None]).sum())
        self._read = stretch.end
        return self._go_on()

    def _go_on(self) -> list[Event]:
        while self._at < len(self._candidates):
            if self._read < len(self._candidates[self._at]) - 1:
                return []
            self._at, self._read = self._at + 1, 0
        scores = zip(self._sums, self._candidates, strict=True)
        told = tuple(Likelihood(total / len(tokens), len(tokens)) for total, tokens in scores)
        return [Scored(self.job.job_id, told)]


def scoring(job: Score, tokens: Tokens, prompt_tokens: int, context_tokens: int) -> Scoring:
    """The job's candidates, as the model would have written them: by themselves, behind the prompt.

    Raises :class:`InvalidPromptError` for a candidate without tokens, or none at all, and
    :class:`PromptTooLongError` for one that does not fit behind the prompt.
    """
    candidates = [tokens.encode(text) for text in job.candidates]
    if not candidates or not all(candidates):
        raise InvalidPromptError("There is nothing to score: a candidate is empty.")
    found = Scoring(job, candidates)
    if prompt_tokens + found.longest > context_tokens:
        raise PromptTooLongError(
            f"Prompt and candidate have {prompt_tokens + found.longest} tokens; the model's"
            f" context holds {context_tokens}."
        )
    return found


def log_probabilities(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """ln p of targets [positions, n], by logits [positions, vocabulary], which are used up.

    Raises :class:`EngineError` for logits that are no numbers.
    """
    highest = logits.max(axis=-1, keepdims=True)
    np.subtract(logits, highest, out=logits)
    chosen = np.take_along_axis(logits, targets, axis=-1)
    np.exp(logits, out=logits)
    partition = logits.sum(axis=-1, dtype=np.float64, keepdims=True)
    found = np.asarray(chosen - np.log(partition), np.float64)
    if not np.isfinite(found).all():
        raise EngineError("The model computed no valid numbers.")
    return found
