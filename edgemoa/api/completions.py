"""OpenAI's older shape, ``/v1/completions``: a text, and how it goes on.

Pure, as :mod:`edgemoa.api.openai`, whose types it shares. This board's own model goes on with a
text as it stands. The group answers prompts, and proposals do not go on with each other's texts; so
for the group, a text is the user's turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from edgemoa.api import chats
from edgemoa.api.chats import Finish, Telling, sse
from edgemoa.api.openai import MAX_ANSWERS, Asked, BareRequest, ChatRequest, encode
from edgemoa.api.turns import Turn
from edgemoa.core import limits
from edgemoa.core.events import Accepted, Answered, RequestEvent, Text, TokenLogprob
from edgemoa.errors import UserError

_BARE: Final = "ask for a chat completion"


class CompletionRequest(Asked, kw_only=True, omit_defaults=True):
    """``POST /v1/completions``, as far as it is understood. Each text of ``prompt`` has its own
    answers. ``best_of`` may say what ``n`` says."""

    prompt: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_ANSWERS)]
    logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def asks(self, own_model: str) -> list[ChatRequest]:
        """One for each text.

        :param own_model: the name of this board's.
        :raises UserError: for what cannot be done.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UserError("'best_of' is not supported", hint="leave it out")
        if self.echo:
            raise UserError("'echo' is not supported", hint="the prompt is known to the client")
        if self.suffix:
            raise UserError("'suffix' is not supported", hint=_BARE)
        common = {name: getattr(self, name) for name in Asked.__struct_fields__}
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        kind = BareRequest if self.model == own_model else ChatRequest
        return [
            kind(
                **common,
                messages=[Turn("user", text)],
                logprobs=self.logprobs is not None,
                top_logprobs=self.logprobs,
            )
            for text in texts
        ]


decoder: Final = msgspec.json.Decoder(CompletionRequest)


class TextLogprobs(msgspec.Struct):
    """Lists of one length. A token that is part of a character is written as its bytes."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    text: str
    index: int
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None


class TextChunk(msgspec.Struct):
    """A whole answer, or one event of a stream: they have one shape."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: chats.Usage | UnsetType = UNSET
    edgemoa: RequestEvent | list[Answered] | UnsetType = UNSET


def logprobs(tokens: Iterable[TokenLogprob], offset: int = 0) -> TextLogprobs:
    """The probabilities of tokens whose text begins ``offset`` characters after the answer's."""
    told = list(tokens)
    names = [_name(each.token) for each in told]
    lengths = (len(each.token.decode(errors="ignore")) for each in told)
    return TextLogprobs(
        names,
        [each.logprob for each in told],
        [{_name(token): value for token, value in each.top} for each in told],
        list(accumulate(lengths, initial=offset))[:-1],
    )


def _name(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


@dataclass(slots=True)
class TextTelling(Telling):
    """Answers as text completions."""

    _said: dict[int, int] = field(default_factory=dict)  # characters, by answer

    def opening(self) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        return b""

    def event(self, index: int, event: RequestEvent) -> bytes:
        """See :class:`edgemoa.api.answers.Shape`."""
        match event:
            case Text(text=text, logprobs=told):
                said = self._said.get(index, 0)
                self._said[index] = said + len(text)
                return self._chunk(TextChoice(text, index, logprobs(told, said) if told else None))
            case Answered():
                reason = chats.finish_reason(event)
                return self._chunk(TextChoice("", index, finish_reason=reason))
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
        choices = [
            TextChoice(
                answered.text,
                index,
                logprobs(told[index]) if self.logprobs else None,
                chats.finish_reason(answered),
            )
            for index, answered in enumerate(answers)
        ]
        whole = TextChunk(self.id, self.created, self.model, choices)
        whole.usage = chats.usage(*answers, each=self.each)
        if self.trace is not False:
            whole.edgemoa = chats.traced(answers)
        return whole

    def _chunk(self, *choices: TextChoice, **more: Any) -> bytes:
        return sse(encode(TextChunk(self.id, self.created, self.model, list(choices), **more)))
