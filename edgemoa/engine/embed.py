"""Texts as vectors: what the model makes of a text, so that texts can be compared and found.

A text is read as it stands, by itself and without a chat template, behind the token that the
model's texts begin with, if there is one. Its vector is the mean of the hidden states of its own
tokens, as they are after the last layer and the final norm (what the head is given), and has
length 1: the product of two vectors is the cosine of the angle between them.

The model was made to write and not to tell texts apart, and vectors of unlike texts are alike to a
degree, too; they serve to rank, and those of different models do not compare.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgemoa.core import limits
from edgemoa.engine.answer import chunk_of
from edgemoa.engine.frames import Embed, Embedded, Embedding, Event
from edgemoa.engine.score import Stretch
from edgemoa.errors import EngineError, InvalidPromptError, PromptTooLongError
from edgemoa.text.tokens import Tokens


class Embedder:
    """The texts of one job, as far as they are read; to its slot what an
    :class:`~edgemoa.engine.answer.Answer` is.

    A vector depends on its text alone, to the last bit: hidden states do not depend on how tokens
    are brought in (:mod:`edgemoa.engine.ragged`), and are added up one by one.
    """

    def __init__(self, job: Embed, texts: list[list[int]], start: int) -> None:
        """:param texts: their tokens, of which the first ``start`` are not the text's own."""
        self.job = job
        self.cached_tokens = 0
        self.model_s = 0.0  # of the model's steps, this job's share
        self._texts = [np.array(tokens, np.int64) for tokens in texts]
        self._start = start
        self._read = 0  # tokens of the text whose turn it is
        self._sum = np.zeros(0)
        self._done: list[Embedding] = []

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self._texts))

    def next(self, most: int) -> Stretch:
        """What to read next, up to ``most`` tokens."""
        tokens = self._texts[len(self._done)]
        end = self._read + chunk_of(len(tokens) - self._read, most - 1)
        return Stretch(tokens[self._read : end], self._read, end)

    def take(self, stretch: Stretch, hidden: npt.NDArray[np.float32]) -> list[Event]:
        """What the model made of what was read, [tokens, width]; ``Embedded`` when all texts are.

        Raises :class:`EngineError` where the model computed no numbers.
        """
        if stretch.start == 0:
            self._sum = np.zeros(hidden.shape[1])
        for state in hidden[max(self._start - stretch.start, 0) :]:
            self._sum += state  # one by one: any other order could differ with the chunks
        self._read = stretch.end
        text = self._texts[len(self._done)]
        if self._read < len(text):
            return []
        length = math.sqrt(float((self._sum * self._sum).sum()))
        if not (0 < length < math.inf):
            raise EngineError("The model computed no valid numbers.")
        vector = (self._sum / length).astype("<f4")
        self._done.append(Embedding(vector.tobytes(), len(text)))
        self._read = 0
        if len(self._done) < len(self._texts):
            return []
        return [Embedded(self.job.job_id, tuple(self._done))]


def embedder(job: Embed, tokens: Tokens, width: int, context_tokens: int) -> Embedder:
    """The job's texts, for a model whose hidden states have ``width`` numbers.

    Raises :class:`InvalidPromptError` for a text without tokens, :class:`PromptTooLongError` for
    one that does not fit in the model's context, and :class:`EngineError` for a model whose vectors
    are too large.
    """
    if width > limits.MAX_DIMENSIONS:
        raise EngineError(f"Vectors of {width} numbers are too large to be given out.")
    start = tokens.encode_prompt("")
    texts = [tokens.encode(text) for text in job.texts]
    if not all(texts):
        raise InvalidPromptError("There is nothing to embed: a text is empty.")
    found = Embedder(job, [start + text for text in texts], len(start))
    if found.longest > context_tokens:
        raise PromptTooLongError(
            f"A text has {found.longest} tokens; the model's context holds {context_tokens}."
        )
    return found
