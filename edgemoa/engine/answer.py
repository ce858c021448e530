"""What every back end does with a job besides running the model: prompts in, answers out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgemoa.core.events import Finish, WorkDone
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.engine.frames import Done, Event, Generate, Text
from edgemoa.engine.sampling import Sampler
from edgemoa.engine.text import Detokenizer, Loop, StopText
from edgemoa.errors import PromptTooLongError
from edgemoa.text.template import ChatTemplate, load_template
from edgemoa.text.tokens import Tokens, load_tokens

PROBE_TOKENS: Final = 32

STEP_GOAL_MS: Final = 100
"""How long a prefill step may take: cancelling, measuring and other jobs wait for it."""

CHUNKS: Final = (128, 64, 32, 16, 8)
"""Tokens of a prefill step to choose from. On x86-64, logits are bit for bit the same with each, as
long as no step has a single token (onnxruntime computes attention for one by another kernel than
for several); speed, against a prompt in one piece: 1.0, .97, .88, .72 for the first four."""

SPIN_US: Final = 20
"""How long onnxruntime's threads spin for work before they sleep. On two quiet cores as fast as
its default (181 against 180 tok/s; 126 without spinning); with another model process on the same
cores a quarter faster than the default."""

_MAX_CAUSE_CHARACTERS: Final = 160


class Reader:
    """A model's way to read conversations."""

    def __init__(self, tokens: Tokens, template: ChatTemplate, context_tokens: int) -> None:
        self.tokens = tokens
        self.context_tokens = context_tokens
        self._template = template

    def read(self, messages: tuple[ChatMessage, ...]) -> list[int]:
        """The conversation's tokens. Raises :class:`InvalidPromptError`."""
        prompt = self._template.render(self.tokens.guard(messages))
        return self.tokens.encode_prompt(prompt)

    def limit(self, prompt: list[int], sampling: Sampling) -> int:
        """How many tokens may follow, one at least. Raises :class:`PromptTooLongError`."""
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"The prompt has {len(prompt)} tokens; the model's context holds"
                f" {self.context_tokens}, answer included."
            )
        return min(sampling.max_tokens, room)


class Answer:
    """One job's text as it grows, and its times: until the first token, and from there on."""

    def __init__(
        self, job: Generate, tokens: Tokens, prompt_tokens: int, limit: int, *, ends_loops: bool
    ) -> None:
        self.job = job
        self.cached_tokens = 0  # of the prompt, that the model had read before
        self.last = -1  # the token to go on from
        self._end_tokens = tokens.end_of_turn
        self._prompt_tokens = prompt_tokens
        self._limit = limit
        self._tokens = 0
        self._sampler = Sampler(job.sampling)
        self._detokenizer = Detokenizer(tokens)
        self._stop = StopText(job.sampling.stop)
        self._loop = Loop() if ends_loops else None
        self._text: list[str] = []
        self._started_s = time.perf_counter()
        self._prefilled_s = self._started_s

    def begin(self) -> None:
        """The model turns to this job now: what it waited does not count."""
        self._started_s = time.perf_counter()

    def pick(self, logits: npt.NDArray[np.float32]) -> list[Event]:
        """Choose the next token by a row of logits; a ``Done`` among the events is the end.

        Raises :class:`EngineError` where the model computed no numbers.
        """
        token = self._sampler.pick(logits)
        if self._tokens == 0:
            self._prefilled_s = time.perf_counter()
        self._tokens += 1
        self.last = token
        finish: Finish | None = None
        piece = ""
        if token in self._end_tokens:
            finish = "stop"
        else:
            piece = self._stop.push(self._detokenizer.push(token))
            if self._loop is not None and self._loop.push(token):
                finish = "loop"
            elif self._tokens == self._limit:
                finish = "length"
        if finish is not None and not self._stop.stopped:
            piece += self._stop.finish()
        if self._stop.stopped:
            finish = "stop"
        events: list[Event] = []
        if piece:
            self._text.append(piece)
            if self.job.stream:
                events.append(Text(self.job.job_id, piece))
        if finish is not None:
            events.append(Done(self.job.job_id, self._result(finish)))
        return events

    def _result(self, finish: Finish) -> WorkDone:
        now_s = time.perf_counter()
        return WorkDone(
            text="".join(self._text),
            finish=finish,
            prompt_tokens=self._prompt_tokens,
            tokens=self._tokens,
            prefill_ms=round((self._prefilled_s - self._started_s) * 1000),
            decode_ms=round((now_s - self._prefilled_s) * 1000),
            cached_tokens=self.cached_tokens,
        )


def load_reader(model_dir: Path, context_tokens: int) -> Reader:
    """The reader of a model folder; raises :class:`ModelInvalidError`."""
    return Reader(load_tokens(model_dir), load_template(model_dir), context_tokens)


def find_chunk(read: Callable[[int], None], context_tokens: int) -> int:
    """The largest prefill step that this board does in time; ``read`` does one of so many tokens.

    Brings the model's weights into memory, too.
    """
    least = min(CHUNKS[-1], context_tokens)
    read(least)
    # A larger step takes less for each token: from 32 to 128, two thirds.
    goal_s = 1.4 * STEP_GOAL_MS / 1000
    token_s = float("inf")
    # Small ones first: a slow board is not held up by a step that it would never do.
    for probe in (least, min(PROBE_TOKENS, context_tokens)):
        for _ in range(2):  # the better of two: the other may have had neighbours
            started_s = time.perf_counter()
            read(probe)
            token_s = min(token_s, (time.perf_counter() - started_s) / probe)
        if PROBE_TOKENS * token_s > 3 * goal_s:
            break
    fitting = (n for n in CHUNKS if n <= context_tokens and n * token_s <= goal_s)
    return next(fitting, least)


def chunk_of(unread: int, chunk_tokens: int) -> int:
    """How many of ``unread`` tokens the next prefill step reads; it never leaves a single one."""
    return unread if unread <= chunk_tokens + 1 else chunk_tokens


def cause(error: Exception) -> str:
    """The first line of what a library said, cut short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0][:_MAX_CAUSE_CHARACTERS]
    return said if said.endswith(".") else f"{said}."
