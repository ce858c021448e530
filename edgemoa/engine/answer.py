"""What every back end does with a job besides running the model: prompts in, answers out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgemoa.core.events import Finish, Given, TokenLogprob, Tools, WorkDone
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.engine.calls import FORCED, Calls
from edgemoa.engine.frames import Done, Event, Generate, Text
from edgemoa.engine.guidance import Guidance, Guide
from edgemoa.engine.sampling import Sampler, likeliest, logprobs
from edgemoa.engine.text import Detokenizer, Loop, StopText
from edgemoa.errors import (
    EngineError,
    InvalidPromptError,
    PromptTooLongError,
    SchemaError,
    UserError,
)
from edgemoa.text.template import CallForm, ChatTemplate, load_template
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
_MOST_HELD: Final = 512  # a stop string has 256 characters


class Reader:
    """A model's way to read conversations."""

    def __init__(self, tokens: Tokens, template: ChatTemplate, context_tokens: int) -> None:
        self.tokens = tokens
        self.context_tokens = context_tokens
        self._template = template
        self._guidance = Guidance(tokens)

    def read(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> list[int]:
        """The conversation's tokens, or those of what else is ``given``.

        A mere text may hold control tokens: who sends one knows the model. Raises
        :class:`InvalidPromptError`.
        """
        match given:
            case "turns":
                prompt = self._template.render(self.tokens.guard(messages))
            case "text":
                prompt = "".join(message.content for message in messages)
            case "template":
                prompt = self._render_with_tools("".join(m.content for m in messages))
        if tokens := self.tokens.encode_prompt(prompt):
            return tokens
        raise InvalidPromptError("The prompt is empty.")

    def _render_with_tools(self, given: str) -> str:
        if self.call_form is None:
            raise InvalidPromptError(
                "The model does not support tools: its chat template knows none, or has them called"
                " otherwise than in JSON."
            )
        try:
            told = self.tokens.guard_all(msgspec.json.decode(given))
            return self._template.render_with_tools(told["messages"], told.get("tools"))
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError, RecursionError):
            raise InvalidPromptError("The conversation with tools cannot be read.") from None

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the model writes calls of tools; None where it was not taught to."""
        return self._template.call_form(self._visible)

    def _visible(self, text: str) -> str:
        return self.tokens.decode(self.tokens.encode_prompt(text))

    def read_begun(self, messages: tuple[ChatMessage, ...]) -> list[int]:
        """The tokens that a conversation begins with of which the last message goes on, whatever
        follows. Where the assistant goes on, the user follows: templates want it so.

        The last tokens may come out otherwise once it is known what follows. Raises
        :class:`InvalidPromptError`.
        """
        *before, last = messages
        follows = (ChatMessage("user", "?"),) if last.role == "assistant" else ()
        one, other = (
            self._template.render(
                self.tokens.guard((*before, ChatMessage(last.role, last.content + more), *follows))
            )
            for more in "AB"
        )
        alike = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        return self.tokens.encode_prompt(one[: next(alike, len(one))])

    def limit(self, prompt: list[int], sampling: Sampling) -> int:
        """How many tokens may follow, one at least. Raises :class:`PromptTooLongError`."""
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"The prompt has {len(prompt)} tokens; the model's context holds"
                f" {self.context_tokens}, answer included."
            )
        return min(sampling.max_tokens, room)

    def guide(self, schema: str) -> Guide | None:
        """What an answer that obeys ``schema`` may go on with; None for an empty one.

        Raises :class:`SchemaError` where it cannot be obeyed. What is wrong with it was told to the
        client when it was checked; here it could get into a log.
        """
        try:
            return self._guidance.guide(schema) if schema else None
        except UserError:
            raise SchemaError("The answer's JSON schema cannot be obeyed.") from None


class Answer:
    """One job's text as it grows, and its times: until the first token, and from there on."""

    def __init__(
        self, job: Generate, reader: Reader, prompt: list[int], limit: int, *, ends_loops: bool
    ) -> None:
        """Raises :class:`SchemaError` where the answer cannot be given the form that it should, and
        :class:`EngineError` where none can."""
        wishes, tokens = job.wishes, reader.tokens
        self.job = job
        self.cached_tokens = 0  # of the prompt, that the model had read before
        self.last = -1  # the token to go on from
        self.ahead_tokens = 0  # of those, read ahead of this very job
        self.model_s = 0.0  # of the model's steps, this job's share
        self._known = tokens
        self._prompt_tokens = len(prompt)
        self._limit = limit
        self._tokens = 0
        self._sampler = Sampler(
            job.sampling, bias=wishes.logit_bias, prompt=prompt, spared=tokens.end_of_turn
        )
        self._guide = reader.guide(wishes.schema)
        self._logprobs = _Logprobs(tokens, wishes.logprobs) if wishes.logprobs >= 0 else None
        self._detokenizer = Detokenizer(tokens)
        self._stop = StopText(job.sampling.stop)
        self._calls = _calls(wishes.tools, reader) if wishes.tools is not None else None
        self._loop = Loop() if ends_loops else None
        self._text: list[str] = []
        self._started_s = time.perf_counter()
        self._prefilled_s = self._started_s

    @property
    def left(self) -> int:
        """How many tokens may still follow."""
        return self._limit - self._tokens

    def begin(self) -> None:
        """The model turns to this job now: what it waited does not count."""
        self._started_s = time.perf_counter()

    def pick(self, logits: npt.NDArray[np.float32]) -> list[Event]:
        """Choose the next token by a row of logits; a ``Done`` among the events is the end.

        Raises :class:`EngineError` where the model computed no numbers, or wants a token that
        nobody knows, and :class:`SchemaError` where the schema turns out to take too much.
        """
        logits = logits[: self._known.size]
        allowed = None if self._guide is None else self._guide.allowed()[: len(logits)]
        token = self._sampler.pick(logits, allowed)
        if not self._known.knows(token):
            raise EngineError("The model chose a token that its tokenizer does not know.")
        if self._tokens == 0:
            self._prefilled_s = time.perf_counter()
        self._tokens += 1
        self.last = token
        finish: Finish | None = None
        piece = ""
        if token in self._known.end_of_turn:
            finish = "stop"
        else:
            text = self._detokenizer.push(token)
            if self._logprobs is not None:
                self._logprobs.push(token, logits, len(text))
            piece = self._stop.push(text)
            if self._guide is not None and self._guide.push(token):
                finish = "stop"
            elif self._loop is not None and self._loop.push(token):
                finish = "loop"
            elif self._tokens == self._limit:
                finish = "length"
        if finish is not None and not self._stop.stopped:
            piece += self._stop.finish()
        if self._calls is not None:
            piece = self._calls.push(piece)
            if finish is not None:
                piece += self._calls.finish()
        if self._stop.stopped:
            finish = "stop"
        told: tuple[TokenLogprob, ...] = ()
        if self._logprobs is not None:
            rest = finish is not None and not self._stop.stopped
            told = self._logprobs.pop(len(piece), rest=rest)
        events: list[Event] = []
        if piece:
            self._text.append(piece)
        if self.job.stream and (piece or told):
            events.append(Text(self.job.job_id, piece, told))
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
            model_ms=round(self.model_s * 1000),
            ahead_tokens=self.ahead_tokens,
            calls=self._calls.calls if self._calls is not None else (),
        )


class _Logprobs:
    """The tokens' probabilities, each held back until the text has come to where it begins: so all
    of them that are told make up the text, and none is of what a stop string has cut off."""

    def __init__(self, tokens: Tokens, alternatives: int) -> None:
        self._tokens = tokens
        self._alternatives = alternatives
        self._written = 0  # characters, as far as they are complete
        self._told = 0  # of these
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # with where each begins

    def push(self, token: int, logits: npt.NDArray[np.float32], completes: int) -> None:
        """A token that was picked, the logits that it was picked by, and how many characters are
        complete with it that were not before."""
        best = likeliest(logits, self._alternatives) if self._alternatives else np.empty(0, np.intp)
        first, *others = logprobs(logits, np.concatenate(([token], best)))
        top = zip(map(self._tokens.piece, map(int, best)), others, strict=True)
        told = TokenLogprob(self._tokens.piece(token), first, tuple(top))
        self._held.append((self._written, told))
        self._written += completes

    def pop(self, characters: int, *, rest: bool) -> tuple[TokenLogprob, ...]:
        """Those that so many more characters have come to; or all."""
        self._told += characters
        held, popped = self._held, []
        # Tokens without any text are not heaped up for one that has some.
        while held and (rest or held[0][0] < self._told or len(held) > _MOST_HELD):
            popped.append(held.popleft()[1])
        return tuple(popped)


def _calls(tools: Tools, reader: Reader) -> Calls:
    form = FORCED if tools.forced else reader.call_form or FORCED
    return Calls(form, tools.names, parallel=tools.parallel)


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
