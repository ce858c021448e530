"""What a shell tells the node (arguments of its methods) and what the node wants done (effects).

Times are integer milliseconds on the board's own monotonic clock.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edgemoa.core import limits
from edgemoa.core.messages import (
    BoardId,
    ChatMessage,
    Count,
    Message,
    Millis,
    Name,
    Sampling,
)

JobKind: TypeAlias = Literal["proposal", "aggregation"]
Finish: TypeAlias = Literal["stop", "length", "loop"]
"""Why a text ended: the model or a stop string, its limit, or because it only repeated itself."""


FailureCode: TypeAlias = Literal["context", "prompt", "schema", "model", "engine"]
"""What a failure is up to: the prompt is too long, or no text that this model reads; the answer
cannot be held to its schema; this model cannot do such a job at all; or the engine failed."""


Given: TypeAlias = Literal["turns", "text", "template"]
"""What a prompt's messages are: turns; or a single one, whose content is a text that the model goes
on with as it stands, or the JSON that its chat template is given, ``messages`` and ``tools``, for a
conversation in which tools are called."""


class Tools(msgspec.Struct, frozen=True):
    """Which tools an answer may call. ``forced``: it is a call of one, in JSON, and nothing else;
    its schema says so. Not ``parallel``: one call at most."""

    names: Annotated[tuple[Name, ...], Meta(max_length=limits.MAX_TOOLS)]
    forced: bool = False
    parallel: bool = True


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool that the model wrote, with its arguments, a JSON object."""

    name: str
    arguments: str


class Wishes(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a user wishes of the answer's text, beyond how its tokens are picked.

    It concerns the answer alone and stays on this board: proposals are written freely. What was
    written without it is never given as an answer.
    """

    schema: Annotated[str, Meta(max_length=limits.MAX_SCHEMA_BYTES)] = ""
    """The JSON schema, as JSON, that the answer obeys; empty for none."""
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0, lt=2**31)], Annotated[float, Meta(ge=-100, le=100)]],
        Meta(max_length=limits.MAX_BIASES),
    ] = msgspec.field(default_factory=dict)
    """What is added to the logits of these tokens of this board's model."""
    logprobs: Annotated[int, Meta(ge=-1, le=limits.MAX_TOP_LOGPROBS)] = -1
    """With how many alternatives each token's probability is told; -1: not at all."""

    given: Given = "turns"
    """How the prompt is to be read; all but turns by this board alone, without proposals."""
    tools: Tools | None = None

    def __bool__(self) -> bool:
        return bool(
            self.schema
            or self.logit_bias
            or self.logprobs >= 0
            or self.given != "turns"
            or self.tools is not None
        )


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token of the answer, as the bytes that it stands for, and the natural logarithm of its
    probability: by the model's logits as they are, whatever it was sampled with. ``top`` are the
    likeliest ones in its place."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


# --- inputs


class Request(msgspec.Struct, frozen=True):
    """A prompt of this board's own user, checked and measured, on its way in."""

    request_id: str
    messages: tuple[ChatMessage, ...]
    prompt_tokens: int  # as the model counts them, chat template included
    layers: int  # M, as asked for
    proposers: int  # k, as asked for
    sampling: Sampling  # of the answer; proposals have their own
    deadline_ms: int  # from acceptance
    wishes: Wishes = Wishes()
    strict: bool = False  # rather refused than answered with a smaller plan
    client: str = ""  # which local application asks; each gets the same share of the board
    streamed: bool = False  # the client is shown the answer while it is written


class EngineInfo(msgspec.Struct, frozen=True):
    """What the model process says of itself once it is ready."""

    model: str
    context_tokens: int
    slots: int  # jobs that it works on at a time
    backend: str = ""
    threads: int = 0
    budget_tokens: int = 0  # that all jobs together may hold, prompts kept for later included
    reads_ahead: bool = False  # whether :class:`ReadAhead` is of any use
    calls_tools: bool = False  # whether the model was taught to
    embeds: bool = False  # whether it makes vectors of texts


class WorkDone(msgspec.Struct, frozen=True):
    """A finished job. Times are by the clock, from when the model turned to the job: until its
    first token, and from there on. ``model_ms`` is the job's own share of the model's steps: one
    that several jobs have in common counts for each in equal parts, and what was read ahead of the
    job counts for it."""

    text: str
    finish: Finish
    prompt_tokens: Count
    tokens: Count
    prefill_ms: Millis
    decode_ms: Millis
    cached_tokens: Count = 0  # of the prompt, that the model had read before
    model_ms: Millis = 0
    ahead_tokens: Count = 0  # of the cached ones, those that were read ahead of this very job
    calls: tuple[ToolCall, ...] = ()  # of tools, which are no part of the text

    @property
    def work_ms(self) -> int:
        """Prefill and decode, queueing excluded."""
        return self.prefill_ms + self.decode_ms


class WorkFailed(msgspec.Struct, frozen=True):
    """A job that the engine could not do. ``reason`` never carries any of the prompt."""

    reason: str
    code: FailureCode = "engine"


# --- effects


class Send(msgspec.Struct, frozen=True):
    """Deliver ``message`` to a paired board; report :meth:`Node.undelivered` if that fails."""

    to: BoardId
    message: Message


class Job(msgspec.Struct, frozen=True):
    """One piece of inference. ``job_id`` is unique within this run of the board."""

    job_id: int
    kind: JobKind
    messages: tuple[ChatMessage, ...]
    sampling: Sampling
    stream: bool  # report text as it is written
    wishes: Wishes = Wishes()


class StartWork(msgspec.Struct, frozen=True):
    """Hand a job to the engine; it has a free slot."""

    job: Job


class ReadAhead(msgspec.Struct, frozen=True):
    """Have the model read, when it has nothing else to read, what the next prompt of this request
    surely begins with: ``messages``, of which the last goes on. Replaces what was said before of
    the same request; without messages, no more is to be read ahead of it."""

    request_id: str
    messages: tuple[ChatMessage, ...] = ()


class StopWork(msgspec.Struct, frozen=True):
    """Nobody waits for this running job any longer; the engine reports nothing more of it."""

    job_id: int


class Tell(msgspec.Struct, frozen=True):
    """Something to tell the local client that waits for ``request_id``."""

    request_id: str
    event: RequestEvent


Effect: TypeAlias = Send | StartWork | ReadAhead | StopWork | Tell


# --- what a waiting client hears, in this order: Accepted, any number of the middle ones, then
# --- exactly one of Answered and Failed


class Granted(msgspec.Struct, frozen=True):
    """The plan that a prompt runs with. ``why`` is empty where it is what was asked for."""

    layers: int
    proposers: int
    why: str = ""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The prompt will be answered or refused with a reason. ``position`` counts jobs before it."""

    granted: Granted
    position: int
    expected_ms: int = 0  # until the whole answer, as far as can be told


class ProposalRecord(msgspec.Struct, frozen=True):
    """One proposal, as shown to the user: who, where its time went, how much was read and written.

    ``work_ms`` is prefill and decode by the clock, ``model_ms`` the job's own share of the model's
    time, what was read ahead of it included. ``network_ms`` is what is left of the time from the
    question to the proposal, delivery included; bytes are of the texts, without what carries them.
    """

    board: str  # name
    board_id: BoardId
    model: str
    layer: int
    prompt_tokens: int
    tokens: int
    queue_ms: int
    work_ms: int
    own: bool
    cached_tokens: int = 0  # of the prompt, that need not be read
    prefill_ms: int = 0
    model_ms: int = 0
    asked_at_ms: int = 0  # after the prompt was accepted
    network_ms: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class LeftOut(msgspec.Struct, frozen=True):
    """A proposer that a layer went on without."""

    board: str
    board_id: BoardId
    layer: int
    reason: str


class ProposalArrived(msgspec.Struct, frozen=True, tag="proposal"):
    """A proposal is in."""

    proposal: ProposalRecord


class ProposerLeftOut(msgspec.Struct, frozen=True, tag="left_out"):
    """A proposer will not be waited for."""

    left_out: LeftOut


class LayerStarted(msgspec.Struct, frozen=True, tag="layer"):
    """The boards of this layer have been asked."""

    layer: int
    boards: tuple[str, ...]


class Aggregating(msgspec.Struct, frozen=True, tag="aggregating"):
    """The layers are done; the answer is written from so many proposals, by the owner's model or,
    where it is named, by that of a stronger board."""

    proposals: int
    board: str = ""


class Text(msgspec.Struct, frozen=True, tag="text"):
    """The next piece of the answer. Where ``logprobs`` were asked for, those of its tokens: one
    whose text is held back, since a character is not complete, comes with the piece that has it."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """The end: the whole answer and how it came about."""

    text: str
    finish: Literal["stop", "length", "loop", "deadline"]
    granted: Granted
    proposals: tuple[ProposalRecord, ...]
    left_out: tuple[LeftOut, ...]
    prompt_tokens: int  # of the user's own prompt
    tokens: int  # of the answer; the pieces told where the deadline cut it
    queue_ms: int  # of the job that wrote it
    work_ms: int  # of that job
    total_ms: int
    note: str = ""  # where the answer is not what the plan would have made it, why
    # Of that job, too, unless the deadline cut the answer.
    job_tokens: int = 0  # of its prompt, proposals and all
    cached_tokens: int = 0  # of those, that need not be read
    prefill_ms: int = 0
    model_ms: int = 0
    calls: tuple[ToolCall, ...] = ()  # of tools, which are no part of the text


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The end: no answer, and why."""

    code: Literal[
        "overloaded",
        "engine_failed",
        "deadline_exceeded",
        "context_length_exceeded",
        "schema_failed",
        "cancelled",
        "unavailable",
    ]
    reason: str
    retry_after_ms: int = 0
    position: int = 0  # how many prompts were before it, where that is why


RequestEvent: TypeAlias = (
    Accepted
    | LayerStarted
    | ProposalArrived
    | ProposerLeftOut
    | Aggregating
    | Text
    | Answered
    | Failed
)
