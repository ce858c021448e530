"""OpenAI's shapes: requests checked and understood, answers and errors put into words.

Pure: no socket, no clock but the ``created`` argument. What a client sends is decoded straight
into bounded types; what edgemoa does not do is refused where ignoring it would change the answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from edgemoa.core import limits
from edgemoa.core.events import Answered, RequestEvent
from edgemoa.core.messages import ChatMessage, Role, Sampling
from edgemoa.errors import (
    EdgemoaError,
    InvalidPromptError,
    ModelNotFoundError,
    OverloadedError,
    UserError,
)

GROUP_MODEL = "edgemoa"
_PLAN = re.compile(r"edgemoa:M(\d)k(\d{1,2})")


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class Turn(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Extra(msgspec.Struct, forbid_unknown_fields=True):
    """What a request may ask of edgemoa beyond OpenAI's fields, under ``"edgemoa"``."""

    layers: Annotated[int, Meta(ge=0, le=limits.MAX_LAYERS)] | None = None
    proposers: Annotated[int, Meta(ge=0, le=limits.MAX_PROPOSERS)] | None = None
    deadline_ms: Annotated[int, Meta(ge=1_000, le=86_400_000)] | None = None
    events: bool = False  # stream what happens while the boards work


class ChatRequest(msgspec.Struct):
    """``POST /v1/chat/completions``, as far as it is understood."""

    messages: Annotated[list[Turn], Meta(max_length=limits.MAX_TURNS)]
    model: str = GROUP_MODEL
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_COMPLETION_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_COMPLETION_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Meta(max_length=8)] | None = None
    edgemoa: Extra = msgspec.field(default_factory=Extra)
    # Understood only as far as leaving them out would give another answer.
    n: int | None = None
    tools: Any = None
    functions: Any = None
    response_format: Any = None
    logprobs: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Any = None

    def conversation(self) -> tuple[ChatMessage, ...]:
        """The turns as the core knows them.

        :raises InvalidPromptError: empty, too large, or not ending with the user's turn.
        """
        turns = []
        for turn in self.messages:
            if turn.role in ("tool", "function"):
                raise InvalidPromptError("tool results are not supported")
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
        if match := _PLAN.fullmatch(self.model):
            layers, proposers = int(match[1]), int(match[2])
            if layers > limits.MAX_LAYERS or proposers > limits.MAX_PROPOSERS:
                raise UserError(
                    f"the plan {self.model} is too large",
                    hint=f"at most M{limits.MAX_LAYERS}k{limits.MAX_PROPOSERS}",
                )
        elif self.model == own_model:
            layers, proposers = 0, 0
        elif self.model != GROUP_MODEL:
            raise ModelNotFoundError(
                f"there is no model '{self.model[:64]}' here",
                hint=f"ask for '{GROUP_MODEL}', 'edgemoa:M1k2' or '{own_model}'",
            )
        extra = self.edgemoa
        return (
            layers if extra.layers is None else extra.layers,
            proposers if extra.proposers is None else extra.proposers,
        )

    def sampling(self, default_max_tokens: int) -> Sampling:
        """How the answer is to be written; greedy unless told otherwise.

        :raises UserError: for what cannot be done.
        """
        unsupported = {
            "n": self.n not in (None, 1),
            "tools": bool(self.tools),
            "functions": bool(self.functions),
            "response_format": self.response_format not in (None, {"type": "text"}),
            "logprobs": bool(self.logprobs),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
            "logit_bias": bool(self.logit_bias),
        }
        for name, asked_for in unsupported.items():
            if asked_for:
                raise UserError(f"'{name}' is not supported", hint="leave it out")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not 0 < len(text) <= 256 for text in stop):
            raise UserError("a stop string must have 1 to 256 characters", hint="see 'stop'")
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=(self.seed or 0) & 0x7FFFFFFF,
            stop=stop,
        )


_decoder = msgspec.json.Decoder(ChatRequest)
encode = msgspec.json.Encoder().encode


def decode_chat_request(body: bytes) -> ChatRequest:
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
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise UserError(f"the request does not fit: {error}", hint="see the README") from None
    except RecursionError:
        raise UserError("the request is nested too deep", hint="check the body") from None
    except msgspec.DecodeError as error:
        raise UserError(f"the request is not valid JSON: {error}", hint="check the body") from None


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    code: str
    param: None = None


def error_json(error: EdgemoaError) -> dict[str, Any]:
    """An error in OpenAI's shape. The hint is part of the sentence: clients show only that."""
    message = f"{error}: {error.hint}" if error.hint else str(error)
    return {"error": ErrorBody(message, error.kind, error.code)}


def error_headers(error: EdgemoaError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, OverloadedError):
        return {"Retry-After": str(error.retry_after_s)}
    return {}


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None
    index: int = 0


class Chunk(msgspec.Struct):
    """One event of a stream. ``edgemoa`` is ours; clients pass over it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    edgemoa: RequestEvent | UnsetType = UNSET


def usage(answered: Answered) -> Usage:
    """OpenAI's token counts: the user's prompt and the answer, whatever the boards read besides."""
    total = answered.prompt_tokens + answered.tokens
    return Usage(answered.prompt_tokens, answered.tokens, total)


def finish_reason(answered: Answered) -> str:
    """OpenAI's word for how the text ended; a deadline cut it like a length does."""
    return "stop" if answered.finish == "stop" else "length"


def completion(request_id: str, created: int, model: str, answered: Answered) -> dict[str, Any]:
    """The answer to a request that was not streamed."""
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answered.text},
                "finish_reason": finish_reason(answered),
            }
        ],
        "usage": usage(answered),
        "edgemoa": answered,
    }


def models_json(own_model: str) -> dict[str, Any]:
    """``GET /v1/models``: the group, and this board's model alone."""
    names = [GROUP_MODEL, own_model] if own_model else [GROUP_MODEL]
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "edgemoa"} for name in names
        ],
    }
