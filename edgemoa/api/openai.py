"""OpenAI's shapes: requests checked and understood, answers and errors put into words.

Pure: no socket, no clock but the ``created`` argument. What a client sends is decoded straight
into bounded types; what edgemoa does not do is refused where ignoring it would change the answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from edgemoa.core import limits
from edgemoa.core.events import (
    Accepted,
    Answered,
    RequestEvent,
    Text,
    TokenLogprob,
    Wishes,
)
from edgemoa.core.messages import ChatMessage, Role, Sampling
from edgemoa.errors import (
    EdgemoaError,
    InvalidPromptError,
    ModelNotFoundError,
    OverloadedError,
    UserError,
)

GROUP_MODEL = "edgemoa"
MAX_ANSWERS: Final = 8  # to one request
_PLAN = re.compile(r"M(\d)k(\d{1,2})")
_FORMS = (  # how llama.cpp and vLLM are told what form the answer has
    *("grammar", "json_schema", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
_REFUSED = {
    "audio": "leave it out",
    **dict.fromkeys(_FORMS, "a JSON schema goes in 'response_format'"),
}


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class Turn(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class JsonSchema(msgspec.Struct):
    """``name``, ``description`` and ``strict`` are taken and change nothing: a schema is obeyed."""

    schema: dict[str, Any]
    name: str = ""


class ResponseFormat(msgspec.Struct):
    """What form the answer has. ``schema`` beside ``json_object`` is llama.cpp's way to say it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None


class Extra(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a request may ask of edgemoa beyond OpenAI's fields, under ``"edgemoa"``.

    ``trace`` has the answer say how it came about; without it, whole answers do, and streams where
    usage is told.
    """

    plan: Annotated[str, Meta(max_length=64)] | None = None  # M2k3: layers and proposers in one
    layers: Annotated[int, Meta(ge=0, le=limits.MAX_LAYERS)] | None = None
    proposers: Annotated[int, Meta(ge=0, le=limits.MAX_PROPOSERS)] | None = None
    deadline_ms: Annotated[int, Meta(ge=1_000, le=86_400_000)] | None = None
    strict: bool = False  # refuse what cannot be had as it was asked for, instead of less
    events: bool = False  # stream what happens while the boards work
    trace: bool | None = None


class Asked(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What chat and text completions have in common, as far as it is understood."""

    model: str = GROUP_MODEL
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_COMPLETION_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.1, le=10)] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.1, le=10)] | None = None  # llama.cpp's name for it
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Meta(pattern="^[0-9]{1,9}$")],
                Annotated[float, Meta(ge=-100, le=100)],
            ],
            Meta(max_length=limits.MAX_BIASES),
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Meta(max_length=8)] | None = None
    edgemoa: Extra = msgspec.field(default_factory=Extra)
    n: Annotated[int, Meta(ge=1, le=MAX_ANSWERS)] | None = None
    # Understood only as far as leaving them out would give another answer; see _REFUSED.
    audio: Any = None
    grammar: Any = None
    json_schema: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class ChatRequest(Asked, kw_only=True, omit_defaults=True):
    """``POST /v1/chat/completions``, as far as it is understood."""

    messages: Annotated[list[Turn], Meta(max_length=limits.MAX_TURNS)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_COMPLETION_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None

    def conversation(self) -> tuple[ChatMessage, ...]:
        """The turns as the core knows them.

        :raises InvalidPromptError: empty, too large, or not ending with the user's turn.
        """
        turns = []
        for turn in self.messages:
            if turn.role in ("tool", "function") or turn.tool_calls:
                raise InvalidPromptError(
                    "calls of tools and their results are not supported",
                    hint="leave these turns out",
                )
            role: Role = "system" if turn.role == "developer" else turn.role  # type: ignore[assignment]
            content = turn.content or ""
            if isinstance(content, list):
                content = "".join(part.text for part in content)
            turns.append(ChatMessage(role, content))
        if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
            raise InvalidPromptError(
                "the prompt is empty", hint="the last message must be the user's and say something"
            )
        size_bytes = sum(len(turn.content.encode()) for turn in turns)
        if size_bytes > limits.MAX_PROMPT_BYTES:
            raise InvalidPromptError(
                f"the conversation has {size_bytes} bytes, more than {limits.MAX_PROMPT_BYTES}",
                hint="send less of it",
            )
        return tuple(turns)

    def plan(self, own_model: str, layers: int, proposers: int) -> tuple[int, int]:
        """(M, k) as asked for; ``layers`` and ``proposers`` are this board's configuration.

        :raises ModelNotFoundError: a model that is neither the group nor this board's own.
        """
        named = plan_of(self.model, own_model)
        layers, proposers = named if named is not None else (layers, proposers)
        extra = self.edgemoa
        if extra.plan is not None:
            if extra.layers is not None or extra.proposers is not None:
                raise UserError("a plan is named, and its parts as well", hint="leave one out")
            return _plan(extra.plan)
        return (
            layers if extra.layers is None else extra.layers,
            proposers if extra.proposers is None else extra.proposers,
        )

    def sampling(self, default_max_tokens: int, chance: int = 0) -> Sampling:
        """How the answer is to be written; greedy unless told otherwise.

        :param chance: the seed for a request without one.
        :raises UserError: for what cannot be done.
        """
        if (self.tools or self.functions) and self.tool_choice != "none":
            raise UserError(
                "this board's model cannot be told of tools",
                hint="leave 'tools' out, or ask for JSON with 'response_format'",
            )
        for name, hint in _REFUSED.items():
            if getattr(self, name):
                raise UserError(f"'{name}' is not supported", hint=hint)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not 0 < len(text) <= 256 for text in stop):
            raise UserError("a stop string must have 1 to 256 characters", hint="see 'stop'")
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=(chance if self.seed is None else self.seed) & 0x7FFFFFFF,
            stop=stop,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self._repetition_penalty(),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )

    def wishes(self, max_tokens: int) -> Wishes:
        """What else the answer should be; ``max_tokens`` are those of its :meth:`sampling`.

        :raises UserError: for what cannot be done.
        """
        logprobs = -1
        if self.logprobs:
            logprobs = self.top_logprobs or 0
            if max_tokens * (1 + logprobs) > limits.MAX_LOGPROBS:
                raise UserError(
                    f"'logprobs' for {max_tokens} tokens with {logprobs} alternatives are too many",
                    hint="ask for a smaller 'max_tokens' or 'top_logprobs'",
                )
        elif self.top_logprobs:
            raise UserError("'top_logprobs' goes with 'logprobs'", hint='set "logprobs": true')
        return Wishes(
            schema=self._schema(),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
        )

    def _repetition_penalty(self) -> float:
        given = [p for p in (self.repetition_penalty, self.repeat_penalty) if p is not None]
        if len(given) > 1:
            raise UserError(
                "'repetition_penalty' and 'repeat_penalty' are two names of one thing",
                hint="leave one of them out",
            )
        return given[0] if given else 1.0

    def _schema(self) -> str:
        """The JSON schema that the answer is to obey, as JSON; empty for none."""
        form = self.response_format
        if form is None or form.type == "text":
            return ""
        if form.type == "json_schema":
            if form.json_schema is None:
                raise UserError("'response_format' has no 'json_schema'", hint="add it")
            schema = form.json_schema.schema
        else:
            schema = form.schema or {"type": "object"}
        try:
            text = encode(schema).decode()
        except (RecursionError, UnicodeError):
            raise UserError("the JSON schema cannot be read", hint="check it") from None
        if len(text.encode()) > limits.MAX_SCHEMA_BYTES:
            raise UserError(
                f"the JSON schema has more than {limits.MAX_SCHEMA_BYTES} bytes",
                hint="use a smaller one",
            )
        return text


encode = msgspec.json.Encoder().encode
T = TypeVar("T")


def plan_of(model: str, own_model: str) -> tuple[int, int] | None:
    """(M, k) that a model's name stands for; None for the group with the configured plan.

    :raises ModelNotFoundError: it is neither the group nor this board's own model.
    :raises UserError: that plan is too large.
    """
    if model == GROUP_MODEL:
        return None
    if own_model and model == own_model:
        return 0, 0
    group, _, plan = model.partition(":")
    if group == GROUP_MODEL and _PLAN.fullmatch(plan):
        return _plan(plan)
    raise ModelNotFoundError(
        f"there is no model '{model[:64]}' here",
        hint=f"ask for '{GROUP_MODEL}', '{GROUP_MODEL}:M1k2' or '{own_model}'",
    )


def _plan(text: str) -> tuple[int, int]:
    match = _PLAN.fullmatch(text)
    if match is None:
        raise UserError("that is no plan", hint="write e.g. M2k3: 2 layers of 3 peers")
    layers, proposers = int(match[1]), int(match[2])
    if layers > limits.MAX_LAYERS or proposers > limits.MAX_PROPOSERS:
        raise UserError(
            f"the plan {text} is too large",
            hint=f"at most M{limits.MAX_LAYERS}k{limits.MAX_PROPOSERS}",
        )
    return layers, proposers


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Read a request body.

    :raises InvalidPromptError: it is not UTF-8.
    :raises UserError: it is not JSON, or not of this shape; says where.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidPromptError(
            f"the request is not valid UTF-8 (byte {error.start})", hint="encode it as UTF-8"
        ) from None
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise UserError(f"the request does not fit: {error}", hint="see the README") from None
    except RecursionError:
        raise UserError("the request is nested too deep", hint="check the body") from None
    except msgspec.DecodeError as error:
        raise UserError(f"the request is not valid JSON: {error}", hint="check the body") from None


chat_decoder: Final = msgspec.json.Decoder(ChatRequest)


def digest(asks: Sequence[ChatRequest]) -> bytes:
    """16 bytes that tell what is asked from all else, however the answer is sent."""
    asked = [msgspec.structs.replace(ask, stream=False, stream_options=None) for ask in asks]
    return hashlib.sha256(msgspec.json.encode(asked)).digest()[:16]


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    code: str
    param: None = None


def sentence(error: EdgemoaError) -> str:
    """What is wrong and what to do, in one sentence: clients show only that."""
    return f"{str(error).rstrip('.')}: {error.hint}" if error.hint else str(error)


def error_json(error: EdgemoaError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    told: dict[str, Any] = {"error": ErrorBody(sentence(error), error.kind, error.code)}
    if isinstance(error, OverloadedError) and error.position:
        told["edgemoa"] = {"position": error.position, "retry_after_s": error.retry_after_s}
    return told


def error_headers(error: EdgemoaError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, OverloadedError):
        return {"Retry-After": str(error.retry_after_s)}
    return {}


class PromptDetails(msgspec.Struct):
    cached_tokens: int = 0  # that this board need not read for this request


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = msgspec.field(default_factory=PromptDetails)


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


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


class ChunkChoice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None
    index: int = 0
    logprobs: Logprobs | None = None


class Chunk(msgspec.Struct):
    """One event of a stream. ``edgemoa`` is ours; clients pass over it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    edgemoa: RequestEvent | Sequence[RequestEvent] | UnsetType = UNSET


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


def finish_reason(answered: Answered) -> str:
    """OpenAI's word for how the text ended; a deadline cut it like a length does."""
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


def completion(
    request_id: str,
    created: int,
    model: str,
    *answers: Answered,
    told: Sequence[Iterable[TokenLogprob]] | None = None,
    trace: bool = True,
) -> dict[str, Any]:
    """The answers to a prompt, whole; ``told`` are their logprobs, if asked for."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answered.text},
            "logprobs": None if told is None else logprobs(told[index]),
            "finish_reason": finish_reason(answered),
        }
        for index, answered in enumerate(answers)
    ]
    whole = {
        "id": request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(*answers, each=len(answers)),
    }
    return whole | ({"edgemoa": traced(answers)} if trace else {})


def traced(answers: Sequence[Answered]) -> Answered | Sequence[Answered]:
    """How it came about: of one answer, or of each."""
    return answers[0] if len(answers) == 1 else answers


@dataclass(slots=True)
class Telling:
    """How answers are told that were asked for in one of OpenAI's shapes: what both have in common.

    :param usage: whether a stream ends with the tokens that were counted.
    :param trace: see :class:`Extra`.
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
                return self._chunk(ChunkChoice(Delta(), finish_reason(event), index))
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

    def _chunk(self, *choices: ChunkChoice, **more: Any) -> bytes:
        return sse(encode(Chunk(self.id, self.created, self.model, list(choices), **more)))


def sse(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


def model_json(name: str, created: int = 0) -> dict[str, Any]:
    """A model, for ``GET /v1/models/ID``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgemoa"}


def models_json(own_model: str, created: int = 0) -> dict[str, Any]:
    """``GET /v1/models``: the group, and this board's model alone."""
    names = [GROUP_MODEL, own_model] if own_model else [GROUP_MODEL]
    return {"object": "list", "data": [model_json(name, created) for name in names]}
