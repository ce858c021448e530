"""OpenAI's shapes: requests checked and understood, errors and models put into words.

Pure: no socket, no clock. What a client sends is decoded straight
into bounded types; what edgemoa does not do is refused where ignoring it would change the answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from edgemoa.api import turns
from edgemoa.api.turns import Choice, Tool, Turn, to_json
from edgemoa.core import limits
from edgemoa.core.events import Given, Wishes
from edgemoa.core.messages import ChatMessage, Sampling
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
    **dict.fromkeys(("functions", "function_call"), "use 'tools'"),
    "audio": "leave it out",
    **dict.fromkeys(_FORMS, "a JSON schema goes in 'response_format'"),
}


Seed: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_StopText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Stop: TypeAlias = _StopText | Annotated[list[_StopText], Meta(max_length=8)]
"""What ends a text, before itself."""


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
    seed: Seed | None = None
    stop: Stop | None = None
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
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1)] | None = None
    functions: Any = None
    function_call: Any = None

    def prompt(self) -> tuple[tuple[ChatMessage, ...], Given]:
        """The turns as the core knows them, and how they are to be read.

        :raises InvalidPromptError: empty, too large, or not ending with a turn to be answered.
        """
        tools = [] if self.tool_choice == "none" else self.tools or []
        return turns.conversation(self.messages, tools)

    def plan(
        self, own_model: str, layers: int, proposers: int, *, alone: bool = False
    ) -> tuple[int, int]:
        """(M, k) as asked for; ``layers`` and ``proposers`` are this board's configuration.

        :param alone: whether only this board's own model can do it.
        :raises ModelNotFoundError: a model that is neither the group nor this board's own.
        :raises UserError: a plan was asked for and cannot be had.
        """
        named, extra = plan_of(self.model, own_model), self.edgemoa
        asked = named
        if extra.plan is not None:
            if extra.layers is not None or extra.proposers is not None:
                raise UserError("a plan is named, and its parts as well", hint="leave one out")
            asked = _plan(extra.plan)
        elif extra.layers is not None or extra.proposers is not None:
            usual = named if named is not None else (layers, proposers)
            asked = (
                usual[0] if extra.layers is None else extra.layers,
                usual[1] if extra.proposers is None else extra.proposers,
            )
        if not alone:
            return asked if asked is not None else (layers, proposers)
        if asked is not None and all(asked):
            raise UserError(
                "tools and bare texts are for this board's model alone, without proposals",
                hint="leave the plan out",
            )
        return 0, 0

    def sampling(self, default_max_tokens: int, chance: int = 0) -> Sampling:
        """How the answer is to be written; greedy unless told otherwise.

        :param chance: the seed for a request without one.
        :raises UserError: for what cannot be done.
        """
        for name, hint in _REFUSED.items():
            if getattr(self, name):
                raise UserError(f"'{name}' is not supported", hint=hint)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
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

    def wishes(self, max_tokens: int, given: Given = "turns") -> Wishes:
        """What else the answer should be; ``max_tokens`` are those of its :meth:`sampling`, and
        ``given`` is what its :meth:`prompt` said.

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
        schema = self._schema()
        parallel = self.parallel_tool_calls is not False
        tools, call = turns.offered(self.tools or [], self.tool_choice, parallel=parallel)
        if tools is not None and (schema or logprobs >= 0):
            raise UserError(
                f"tools and '{'response_format' if schema else 'logprobs'}' cannot go together",
                hint='leave one of them out, or set "tool_choice": "none"',
            )
        return Wishes(
            schema=_bounded(call) or schema,
            given=given,
            tools=tools,
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
        return _bounded(to_json(schema, "the JSON schema"))


class BareRequest(ChatRequest, kw_only=True):
    """One that asks how a text goes on: its one turn is read as it stands."""

    def prompt(self) -> tuple[tuple[ChatMessage, ...], Given]:
        """See :class:`ChatRequest`."""
        return turns.bare("".join(turn.text for turn in self.messages))


def _bounded(schema: str) -> str:
    if len(schema.encode()) > limits.MAX_SCHEMA_BYTES:
        raise UserError(
            f"the JSON schema has more than {limits.MAX_SCHEMA_BYTES} bytes",
            hint="use a smaller one",
        )
    return schema


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


def digest(path: str, asks: Sequence[ChatRequest]) -> bytes:
    """16 bytes that tell what is asked from all else, however the answer is sent.

    :raises UserError: see :func:`edgemoa.api.turns.to_json`.
    """
    asked = [msgspec.structs.replace(ask, stream=False, stream_options=None) for ask in asks]
    return hashlib.sha256(to_json([path, asked], "the request").encode()).digest()[:16]


class ErrorBody(msgspec.Struct):
    """``message`` says what is wrong and what to do; ``code`` is one of the README's table."""

    message: str
    type: str
    code: str
    param: None = None


class Refusal(msgspec.Struct):
    """Where a full board is the reason: how many are before, and when to come back."""

    position: int
    retry_after_s: int


class Error(msgspec.Struct):
    error: ErrorBody
    edgemoa: Refusal | UnsetType = UNSET


def sentence(error: EdgemoaError) -> str:
    """What is wrong and what to do, in one sentence: clients show only that."""
    return f"{str(error).rstrip('.')}: {error.hint}" if error.hint else str(error)


def error_json(error: EdgemoaError) -> Error:
    """An error in OpenAI's shape."""
    told = Error(ErrorBody(sentence(error), error.kind, error.code))
    told.edgemoa = refusal(error)
    return told


def refusal(error: EdgemoaError) -> Refusal | UnsetType:
    """What a full board says besides."""
    if isinstance(error, OverloadedError) and error.position:
        return Refusal(error.position, error.retry_after_s)
    return UNSET


def error_headers(error: EdgemoaError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, OverloadedError):
        return {"Retry-After": str(error.retry_after_s)}
    return {}


class Model(msgspec.Struct):
    """``GET /v1/models/ID``."""

    id: str
    created: int = 0
    object: Literal["model"] = "model"
    owned_by: str = "edgemoa"


class Models(msgspec.Struct):
    """``GET /v1/models``."""

    data: list[Model]
    object: Literal["list"] = "list"


def models(own_model: str, created: int = 0) -> Models:
    """The group, and this board's model alone."""
    names = [GROUP_MODEL, own_model] if own_model else [GROUP_MODEL]
    return Models([Model(name, created) for name in names])
