"""Answers in OpenAI's shape: chat completions, whole and streamed.

Pure: no socket, no clock. What text completions have in common with them is here, too.
"""

from __future__ import annotations

import hashlib
from base64 import b32encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from edgemoa.api.openai import MAX_ANSWERS, Asked, encode, error_json
from edgemoa.core.events import (
    Accepted,
    Answered,
    RequestEvent,
    Text,
    TokenLogprob,
    ToolCall,
)
from edgemoa.errors import EdgemoaError, UserError

_ID_CHARACTERS: Final = 9  # of a tool's call: some models' templates take no others


class PromptDetails(msgspec.Struct):
    cached_tokens: int = 0  # that this board need not read for this request


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = msgspec.field(default_factory=PromptDetails)


class Called(msgspec.Struct):
    name: str
    arguments: str


class ToolCallDelta(msgspec.Struct):
    """A tool's call, which comes in one piece."""

    index: int
    id: str
    function: Called
    type: Literal["function"] = "function"


class ToolCallTold(msgspec.Struct):
    id: str
    function: Called
    type: Literal["function"] = "function"


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class Message(msgspec.Struct, kw_only=True):
    """What the assistant says; no content where it only calls tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallTold] | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """``bytes`` because a token may be part of a character, for which ``token`` has U+FFFD."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct):
    content: list[ContentLogprob]
    refusal: None = None


Finish: TypeAlias = Literal["stop", "length", "tool_calls"]


class ChunkChoice(msgspec.Struct):
    delta: Delta
    finish_reason: Finish | None = None
    index: int = 0
    logprobs: Logprobs | None = None


class Chunk(msgspec.Struct):
    """One event of a stream. ``edgemoa`` is ours; clients pass over it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType = UNSET
    edgemoa: RequestEvent | list[Answered] | UnsetType = UNSET


class Choice(msgspec.Struct):
    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Finish


class Completion(msgspec.Struct):
    """A whole answer, or several. ``edgemoa`` is ours: how each came about."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    edgemoa: Answered | list[Answered] | UnsetType = UNSET


def usage(*answers: Answered, each: int = 1) -> Usage:
    """OpenAI's token counts: the user's prompt and the answer, whatever the boards read besides.
    Where one prompt has several answers, so many follow ``each`` other, it counts once.

    Cached is what of the user's prompt this board knew before its first job for it: its own
    proposal, or the answer. What each job read and found is in ``edgemoa``.
    """
    prompt = sum(answered.prompt_tokens for answered in answers[::each])
    tokens = sum(answered.tokens for answered in answers)
    return Usage(prompt, tokens, prompt + tokens, PromptDetails(sum(map(_cached, answers[::each]))))


def _cached(answered: Answered) -> int:
    first = next((p for p in answered.proposals if p.own and p.layer == 1), answered)
    return min(first.cached_tokens, answered.prompt_tokens)


def finish_reason(answered: Answered) -> Finish:
    """OpenAI's word for how the answer ended; a deadline cut it like a length does."""
    if answered.calls:
        return "tool_calls"
    return "stop" if answered.finish == "stop" else "length"


def logprobs(tokens: Iterable[TokenLogprob]) -> Logprobs:
    """The probabilities of an answer's tokens, or of a piece's."""
    return Logprobs(
        [
            ContentLogprob(
                each.token.decode(errors="replace"),
                each.logprob,
                list(each.token),
                [TopLogprob(t.decode(errors="replace"), p, list(t)) for t, p in each.top],
            )
            for each in tokens
        ]
    )


def call_ids(request_id: str, index: int, calls: Sequence[ToolCall]) -> list[str]:
    """The ids of an answer's calls; the same whenever it is told."""
    seeds = (f"{request_id} {index} {number}" for number in range(len(calls)))
    digests = (hashlib.sha256(seed.encode()).digest() for seed in seeds)
    return [b32encode(digest)[:_ID_CHARACTERS].decode().lower() for digest in digests]


def _message(request_id: str, index: int, answered: Answered) -> Message:
    message = Message(content=answered.text)
    if answered.calls:
        message.content = answered.text or None
        message.tool_calls = [
            ToolCallTold(call_id, Called(call.name, call.arguments))
            for call_id, call in zip(
                call_ids(request_id, index, answered.calls), answered.calls, strict=True
            )
        ]
    return message


def completion(
    request_id: str,
    created: int,
    model: str,
    *answers: Answered,
    told: Sequence[Iterable[TokenLogprob]] | None = None,
    trace: bool = True,
) -> Completion:
    """The answers to a prompt, whole; ``told`` are their logprobs, if asked for."""
    choices = [
        Choice(
            index,
            _message(request_id, index, answered),
            None if told is None else logprobs(told[index]),
            finish_reason(answered),
        )
        for index, answered in enumerate(answers)
    ]
    whole = Completion(request_id, created, model, choices, usage(*answers, each=len(answers)))
    if trace:
        whole.edgemoa = traced(answers)
    return whole


def traced(answers: Sequence[Answered]) -> Answered | list[Answered]:
    """How it came about: of one answer, or of each."""
    return answers[0] if len(answers) == 1 else list(answers)


@dataclass(slots=True)
class Telling:
    """How answers are told that were asked for in one of OpenAI's shapes: what both have in common.

    :param usage: whether a stream ends with the tokens that were counted.
    :param trace: see :class:`edgemoa.api.openai.Extra`.
    """

    id: str
    created: int
    model: str
    stream: bool = False
    events: bool = False
    usage: bool = False
    trace: bool | None = None
    logprobs: bool = False
    answers: int = 1
    each: int = 1  # to each prompt

    content_type = "text/event-stream"
    alive = b": working\n\n"

    @classmethod
    def of(cls, ask: Asked, logprobs: bool, prompts: int = 1) -> Self:
        """As it was asked for; whose answer it is, is not known yet.

        :raises UserError: it cannot be told so.
        """
        options, extra, each = ask.stream_options, ask.edgemoa, ask.n or 1
        if prompts * each > MAX_ANSWERS:
            raise UserError(
                f"{prompts * each} answers are too many for one request",
                hint=f"at most {MAX_ANSWERS}",
            )
        if extra.events and prompts * each > 1:
            raise UserError("'events' are those of a single answer", hint="leave 'n' out")
        return cls(
            id="",
            created=0,
            model=ask.model,
            stream=bool(ask.stream),
            events=extra.events,
            usage=extra.events or (options is not None and options.include_usage),
            trace=extra.trace,
            logprobs=logprobs,
            answers=prompts * each,
            each=each,
        )

    def ending(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """What a stream says beyond the answers."""
        more: dict[str, Any] = {}
        if self.usage:
            more["usage"] = usage(*answers, each=self.each)
        if self.usage if self.trace is None else self.trace:
            more["edgemoa"] = traced(answers)
        return more

    def failed(self, error: EdgemoaError) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        return sse(encode(error_json(error)))


class ChatTelling(Telling):
    """Answers as chat completions."""

    __slots__ = ()

    def opening(self) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        begin = Delta(role="assistant", content="")
        return b"".join(self._chunk(ChunkChoice(begin, index=i)) for i in range(self.answers))

    def event(self, index: int, event: RequestEvent) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        match event:
            case Text(text=text, logprobs=told):
                choice = ChunkChoice(Delta(content=text), index=index)
                if told:
                    choice.logprobs = logprobs(told)
                return self._chunk(choice)
            case Answered():
                end = self._chunk(ChunkChoice(Delta(), finish_reason(event), index))
                return self._calls(index, event.calls) + end
            case _ if self.events:
                return self._chunk(edgemoa=event)
            case Accepted():
                return b""
            case _:
                return self.alive

    def closing(self, answers: Sequence[Answered]) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        more = self.ending(answers)
        return (self._chunk(**more) if more else b"") + sse(b"[DONE]")

    def whole(self, answers: Sequence[Answered], told: Sequence[Sequence[TokenLogprob]]) -> Any:
        """See :class:`edgemoa.api.answers.Shape`."""
        return completion(
            self.id,
            self.created,
            self.model,
            *answers,
            told=told if self.logprobs else None,
            trace=self.trace is not False,
        )

    def _calls(self, index: int, calls: Sequence[ToolCall]) -> bytes:
        if not calls:
            return b""
        told = [
            ToolCallDelta(number, call_id, Called(call.name, call.arguments))
            for number, (call_id, call) in enumerate(
                zip(call_ids(self.id, index, calls), calls, strict=True)
            )
        ]
        return self._chunk(ChunkChoice(Delta(tool_calls=told), index=index))

    def _chunk(self, *choices: ChunkChoice, **more: Any) -> bytes:
        return sse(encode(Chunk(self.id, self.created, self.model, list(choices), **more)))


def sse(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"
