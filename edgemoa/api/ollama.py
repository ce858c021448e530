"""Ollama's shapes: its clients' requests understood, answers, models and errors told their way.

Pure, as :mod:`edgemoa.api.openai`. A request is made one of OpenAI's shape, so that both ways are
one: the same bounds, the same defaults (greedy, the board's own length), the same refusals. The
fields are those of Ollama's published API documentation (docs/api.md of its repository).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from edgemoa.api import chats, openai
from edgemoa.api.chats import ContentLogprob
from edgemoa.api.embeddings import Texts, numbers
from edgemoa.api.openai import (
    BareRequest,
    ChatRequest,
    Extra,
    Refusal,
    ResponseFormat,
    Seed,
    Stop,
    encode,
)
from edgemoa.api.service import Card
from edgemoa.api.turns import Tool, ToolCallPart, Turn
from edgemoa.core import limits
from edgemoa.core.events import Answered, RequestEvent, Text, TokenLogprob
from edgemoa.errors import EdgemoaError, UserError

RUNNING: Final = "Ollama is running"
"""What clients look for at ``/``: some compare the words."""
VERSION: Final = "0.6.4"
"""Of Ollama, whose API this is like: clients ask for the newest one that they need."""
_LATEST: Final = ":latest"  # what a name without a tag means
_NEVER: Final = "9999-12-31T23:59:59Z"
_NS_PER_MS: Final = 1_000_000


class Options(msgspec.Struct):
    """How the answer is to be written. Others say how Ollama is to run its model (``num_ctx``,
    ``num_gpu``, ``num_thread``...): they change nothing of the answer, and nothing here."""

    num_predict: Annotated[int, Meta(ge=-2)] | None = None  # below 1: as long as the board lets it
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.1, le=10)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1)] | None = None  # here always over all, or none
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    # Understood only as far as leaving them out would give another answer.
    mirostat: int | None = None
    typical_p: float | None = None
    tfs_z: float | None = None

    def asked(self) -> dict[str, Any]:
        """The same in OpenAI's fields.

        :raises UserError: for what cannot be done.
        """
        for name, usual in (("mirostat", 0), ("typical_p", 1), ("tfs_z", 1)):
            if getattr(self, name) not in (None, usual):
                raise UserError(f"the option '{name}' is not supported", hint="leave it out")
        most = self.num_predict
        penalty = None if self.repeat_last_n == 0 else self.repeat_penalty
        same = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty")
        return {name: getattr(self, name) for name in (*same, "frequency_penalty")} | {
            "max_tokens": min(most, limits.MAX_COMPLETION_TOKENS) if most and most > 0 else None,
            "repeat_penalty": penalty,
        }


class Common(msgspec.Struct, kw_only=True):
    """What both ways to ask have in common, as far as it is understood. ``keep_alive`` is taken and
    changes nothing: the model stays."""

    model: str = openai.GROUP_MODEL
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    think: bool | str | None = None
    edgemoa: Extra = msgspec.field(default_factory=Extra)

    def asked(self, turns: list[Turn], *, bare: bool = False, **more: Any) -> ChatRequest:
        """The same in OpenAI's shape.

        :param bare: whether the one turn is read as it stands.
        :raises UserError: for what cannot be done.
        """
        if self.think:
            raise UserError("'think' is not supported", hint="leave it out")
        if self.edgemoa.events:
            raise UserError("'events' have no place in this shape", hint="use /v1/chat/completions")
        form = None
        if self.format:
            schema = self.format if isinstance(self.format, dict) else None
            form = ResponseFormat("json_object", schema=schema)
        kind = BareRequest if bare else ChatRequest
        return kind(
            messages=turns,
            model=name_of(self.model),
            stream=self.stream is not False,
            response_format=form,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            edgemoa=self.edgemoa,
            **(self.options or Options()).asked(),
            **more,
        )


class ChatTurn(msgspec.Struct):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[ToolCallPart], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    tool_name: Annotated[str, Meta(max_length=256)] | None = None


class ChatAsk(Common, kw_only=True):
    """``POST /api/chat``."""

    messages: Annotated[list[ChatTurn], Meta(max_length=limits.MAX_TURNS)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] | None = None

    @property
    def loads(self) -> bool:
        """Whether only the model is to be there."""
        return not self.messages

    def ask(self) -> ChatRequest:
        """The same in OpenAI's shape.

        :raises UserError: for what cannot be done.
        """
        turns = self.messages or []
        if any(turn.images for turn in turns):
            raise _no_images()
        told = [
            Turn(turn.role, turn.content, turn.tool_calls, turn.tool_call_id, turn.tool_name)
            for turn in turns
        ]
        return self.asked(told, tools=self.tools)


class GenerateAsk(Common, kw_only=True):
    """``POST /api/generate``."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[Any] | None = None
    raw: bool | None = None
    images: list[Any] | None = None

    @property
    def loads(self) -> bool:
        """Whether only the model is to be there."""
        return not self.prompt and not self.images

    def ask(self) -> ChatRequest:
        """The same in OpenAI's shape.

        :raises UserError: for what cannot be done.
        """
        if self.images:
            raise _no_images()
        for name, hint in (
            ("template", "the model has its own"),
            ("suffix", "ask for what is to be written"),
            ("context", "use /api/chat, and send the conversation"),
        ):
            if getattr(self, name):
                raise UserError(f"'{name}' is not supported", hint=hint)
        if self.raw and self.system:
            raise UserError("'raw' and 'system' cannot go together", hint="leave one of them out")
        if self.raw:
            return self.asked([Turn("user", self.prompt)], bare=True)
        system = [Turn("system", self.system)] if self.system else []
        return self.asked([*system, Turn("user", self.prompt)])


class EmbedAsk(msgspec.Struct):
    """``POST /api/embed``. A text that does not fit in the model's context is refused, also where
    ``truncate`` is asked for."""

    model: str = openai.GROUP_MODEL
    input: Texts | None = None
    dimensions: Annotated[int, Meta(ge=0)] | None = None


class EmbeddingsAsk(msgspec.Struct):
    """``POST /api/embeddings``, the older way, for one text."""

    model: str = openai.GROUP_MODEL
    prompt: str | None = None


class ShowAsk(msgspec.Struct):
    """``POST /api/show``; ``name`` is the older word."""

    model: str = ""
    name: str = ""


chat_decoder: Final = msgspec.json.Decoder(ChatAsk)
generate_decoder: Final = msgspec.json.Decoder(GenerateAsk)
embed_decoder: Final = msgspec.json.Decoder(EmbedAsk)
embeddings_decoder: Final = msgspec.json.Decoder(EmbeddingsAsk)
show_decoder: Final = msgspec.json.Decoder(ShowAsk)


def name_of(model: str) -> str:
    """A model's name here: no tags but those that are plans."""
    return model.removesuffix(_LATEST) or openai.GROUP_MODEL


def _no_images() -> UserError:
    return UserError("images are not supported", hint="this board's model reads text alone")


# --- answers


class CalledWith(msgspec.Struct):
    """``arguments`` are a JSON object."""

    name: str
    arguments: Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "object"})]


class CallTold(msgspec.Struct):
    function: CalledWith


class TurnTold(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    tool_calls: list[CallTold] | UnsetType = UNSET


class Told(msgspec.Struct, kw_only=True):
    """A line of a stream, or all of an answer. What follows ``done`` is said at the end; durations
    are in nanoseconds."""

    model: str
    created_at: str
    logprobs: list[ContentLogprob] | UnsetType = UNSET
    done: bool = False
    done_reason: Literal["stop", "length", "load"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    edgemoa: Answered | UnsetType = UNSET


class ChatTold(Told, kw_only=True):
    message: TurnTold


class GenerateTold(Told, kw_only=True):
    response: str


@dataclass(slots=True)
class Telling:
    """How an answer is told: lines of JSON, or one.

    :param chat: whether as a turn, or as a mere text.
    :param trace: whether the end says how the answer came about.
    """

    model: str
    chat: bool
    stream: bool
    logprobs: bool = False
    trace: bool = False
    id: str = ""  # there is no place for it
    created: int = 0

    content_type = "application/x-ndjson"

    @classmethod
    def of(cls, ask: ChatAsk | GenerateAsk) -> Telling:
        """As it was asked for."""
        stream, trace = ask.stream is not False, bool(ask.edgemoa.trace)
        return cls(ask.model, isinstance(ask, ChatAsk), stream, bool(ask.logprobs), trace)

    @property
    def alive(self) -> bytes:
        """A line of no text: clients read each as JSON, and none may be empty."""
        return self._line("")

    def opening(self) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        return b""

    def event(self, index: int, event: RequestEvent) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        match event:
            case Text(text=text, logprobs=told):
                return self._line(text, logprobs=_logprobs(told or None))
            case Answered(calls=calls) if calls:
                return self._line("", calls=_calls(event))
            case _:
                return b""

    def closing(self, answers: Sequence[Answered]) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        return self._line("", **self._end(answers[0]))

    def failed(self, error: EdgemoaError) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        return encode(error_json(error)) + b"\n"

    def whole(self, answers: Sequence[Answered], told: Sequence[Sequence[TokenLogprob]]) -> Any:
        """See :class:`edgemoa.api.answers.Shape`. Without an answer, only the model was loaded."""
        if not answers:
            return self._said("", done=True, done_reason="load")
        return self._said(
            answers[0].text,
            calls=_calls(answers[0]),
            logprobs=_logprobs(told[0] if self.logprobs else None),
            **self._end(answers[0]),
        )

    def _line(self, text: str, **more: Any) -> bytes:
        return encode(self._said(text, **more)) + b"\n"

    def _said(
        self, text: str, *, calls: list[CallTold] | UnsetType = UNSET, **more: Any
    ) -> ChatTold | GenerateTold:
        more |= {"model": self.model, "created_at": _time(self.created)}
        if self.chat:
            return ChatTold(message=TurnTold(content=text, tool_calls=calls), **more)
        return GenerateTold(response=text, **more)

    def _end(self, answered: Answered) -> dict[str, Any]:
        reading_ms = answered.prefill_ms
        writing_ms = max(answered.work_ms - reading_ms, 1)  # which clients divide by
        return {
            "done": True,
            "done_reason": "length" if chats.finish_reason(answered) == "length" else "stop",
            "total_duration": answered.total_ms * _NS_PER_MS,
            "load_duration": 0,
            "prompt_eval_count": answered.prompt_tokens,
            "prompt_eval_duration": reading_ms * _NS_PER_MS,
            "eval_count": answered.tokens,
            "eval_duration": writing_ms * _NS_PER_MS,
            "edgemoa": answered if self.trace else UNSET,
        }


def _logprobs(told: Sequence[TokenLogprob] | None) -> list[ContentLogprob] | UnsetType:
    return UNSET if told is None else chats.logprobs(told).content


def _calls(answered: Answered) -> list[CallTold] | UnsetType:
    if not answered.calls:
        return UNSET
    return [
        CallTold(CalledWith(call.name, msgspec.Raw(call.arguments.encode())))
        for call in answered.calls
    ]


class EmbedTold(msgspec.Struct):
    """The answer to :class:`EmbedAsk`."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int
    load_duration: int = 0


class EmbeddingTold(msgspec.Struct):
    """The answer to :class:`EmbeddingsAsk`."""

    embedding: list[float]


def embed_json(model: str, vectors: Sequence[bytes], tokens: int, duration_ms: int) -> EmbedTold:
    """The answer to :class:`EmbedAsk`."""
    found = [numbers(vector) for vector in vectors]
    return EmbedTold(model, found, duration_ms * _NS_PER_MS, tokens)


class OllamaError(msgspec.Struct):
    error: str
    edgemoa: Refusal | UnsetType = UNSET


def error_json(error: EdgemoaError) -> OllamaError:
    """An error in Ollama's shape."""
    return OllamaError(openai.sentence(error), openai.refusal(error))


# --- models


class Details(msgspec.Struct):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Listed(msgspec.Struct):
    """A model; the last three are of one that is loaded."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class OllamaModels(msgspec.Struct):
    models: list[Listed]


class Shown(msgspec.Struct):
    """``POST /api/show``. The template stays on the board."""

    modelfile: str
    details: Details
    model_info: dict[str, str | int]
    capabilities: list[Literal["completion", "tools", "embedding"]]
    modified_at: str
    parameters: str = ""
    template: str = ""
    license: str = ""


def tags_json(card: Card) -> OllamaModels:
    """``GET /api/tags``: the group, and this board's model alone."""
    return OllamaModels([_listed(each) for each in (group_card(card), card)])


def ps_json(card: Card, context_tokens: int) -> OllamaModels:
    """``GET /api/ps``: the same, once the model is loaded. It stays, so its time has no end."""
    models = tags_json(card) if context_tokens else OllamaModels([])
    for each in models.models:
        each.expires_at, each.size_vram, each.context_length = _NEVER, 0, context_tokens
    return models


def show_json(card: Card) -> Shown:
    """``POST /api/show``."""
    info: dict[str, str | int] = {"general.architecture": card.architecture}
    if card.parameters:
        info["general.parameter_count"] = card.parameters
    info[f"{card.architecture}.context_length"] = card.context_length
    info[f"{card.architecture}.block_count"] = card.layers
    can: list[Literal["completion", "tools", "embedding"]] = ["completion"]
    if card.calls_tools:
        can.append("tools")
    if card.embeds:
        can.append("embedding")
    return Shown(f"FROM {card.name}\n", _details(card), info, can, _time(card.created))


def group_card(card: Card) -> Card:
    """The group, which answers with this board's model in the end."""
    digest = hashlib.sha256(f"{openai.GROUP_MODEL} {card.digest}".encode()).hexdigest()
    return replace(card, name=openai.GROUP_MODEL, digest=digest)


def _listed(card: Card) -> Listed:
    name = card.name + _LATEST
    return Listed(name, name, _time(card.created), card.size_bytes, card.digest, _details(card))


def _details(card: Card) -> Details:
    return Details(
        parent_model="",
        format="onnx",
        family=card.architecture,
        families=[card.architecture],
        parameter_size=_size(card.parameters),
        quantization_level=card.quantization,
    )


def _size(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.2f}{name}"
    return ""


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
