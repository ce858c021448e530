"""What boards say to each other, as typed values.

``edgemoa.core.envelope`` turns them into signed bytes and back; nothing else knows the encoding.
Decoding ignores fields that it does not know, so that a newer board of the same protocol version
may add some. Every string and list is bounded here, by type.
"""

from __future__ import annotations

from typing import Annotated, Literal, NewType, TypeAlias

import msgspec

from edgemoa.core import limits

BoardId = NewType("BoardId", str)
"""The board's identity: see :func:`edgemoa.core.envelope.board_id`."""

Role: TypeAlias = Literal["system", "user", "assistant"]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)]
Reason: TypeAlias = Annotated[str, msgspec.Meta(max_length=limits.MAX_REASON_BYTES)]
RequestId: TypeAlias = Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Millis: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Layer: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_LAYERS)]


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: Annotated[str, msgspec.Meta(max_length=limits.MAX_PROMPT_BYTES)]


class Sampling(msgspec.Struct, frozen=True):
    """How to pick tokens. ``temperature`` 0 is greedy; ``stop`` ends a text before itself.

    ``top_k`` 0, ``min_p`` 0, and a ``repetition_penalty`` of 1 change nothing. What each does, and
    in which order, is said in :mod:`edgemoa.engine.sampling`.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_COMPLETION_TOKENS)] = 256
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    stop: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=256)], ...],
        msgspec.Meta(max_length=8),
    ] = ()
    top_k: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.1, le=10)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """A board's load report, told when there is something new.

    ``boot`` changes when the board restarts: what it asked for before is void then. ``sequence``
    grows within a boot; an older report never replaces a newer one. The last three say what a usual
    job takes of the model, 0 while that is not known, and the work that comes, own and peers',
    against what the board can do.
    """

    boot: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    sequence: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    name: Name
    accepting: bool
    model: Name
    waiting: Count
    running: Count
    expected_wait_ms: Millis  # of a peer's job that would come now
    proposal_ms: Millis = 0
    aggregation_ms: Millis = 0
    utilisation_permille: Count = 0

    @property
    def is_busy(self) -> bool:
        """Whether the board has work, so that what it said changes with time."""
        return bool(self.waiting or self.running)


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """The board stops in good order; no need to suspect it first."""

    boot: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


ShortId: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
"""A board in few bytes: see :func:`edgemoa.core.envelope.short_id`."""
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class News(msgspec.Struct, array_like=True, frozen=True):
    """What ``by`` found out about a board, handed on by anybody.

    ``state`` is one of those in :mod:`edgemoa.core.swim`. It is of one life of the board: a boot,
    and within it an ``incarnation``, which the board alone raises, to contradict what is said.
    """

    board: ShortId
    state: Annotated[int, msgspec.Meta(ge=0, le=255)]
    boot: Number
    incarnation: Number
    by: ShortId


Tidings: TypeAlias = Annotated[tuple[News, ...], msgspec.Meta(max_length=limits.MAX_NEWS)]


class Ping(msgspec.Struct, frozen=True, tag="ping", omit_defaults=True):
    """Are you there? Answered by :class:`Ack` at once, the same way where ``sure``: that is over
    the connection. ``incarnation`` is the sender's own, ``report`` rides along where it is new."""

    number: Number
    incarnation: Number
    news: Tidings = ()
    report: Alive | None = None
    sure: bool = False


class Ack(msgspec.Struct, frozen=True, tag="ack", omit_defaults=True):
    """The answer to the ping or ping_req of that number."""

    number: Number
    incarnation: Number
    news: Tidings = ()
    report: Alive | None = None
    sure: bool = False


class PingReq(msgspec.Struct, frozen=True, tag="ping_req", omit_defaults=True):
    """Ping ``board`` for me, and answer by :class:`Ack` if it answers, else by :class:`Nack`."""

    number: Number
    board: ShortId
    news: Tidings = ()


class Nack(msgspec.Struct, frozen=True, tag="nack"):
    """It did not answer me either; but I am here, so it is not you who is deaf."""

    number: Number


class Gossip(msgspec.Struct, frozen=True, tag="gossip"):
    """News that cannot wait for a ping to ride along with."""

    news: Tidings


class Sync(msgspec.Struct, frozen=True, tag="sync"):
    """What I believe of everybody, in 8 bytes; answered by :class:`View` if you differ."""

    digest: ShortId


class View(msgspec.Struct, frozen=True, tag="view", omit_defaults=True):
    """What I believe of everybody; with ``ask``, tell me what you know better."""

    news: Annotated[tuple[News, ...], msgspec.Meta(max_length=limits.MAX_GROUP_BOARDS)]
    ask: bool = False


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """The owner asks for a proposal. Asked again (the answer got lost), it is answered again,
    not computed again: ``(sender, request_id, layer)`` names the work. With ``is_answer`` it is the
    user's answer that is to be written, after the last layer. With ``stream`` the owner wants to
    hear of the text while it is written (:class:`Part`)."""

    request_id: RequestId
    layer: Layer
    messages: Annotated[
        tuple[ChatMessage, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_MESSAGES)
    ]
    sampling: Sampling
    time_left_ms: Millis
    is_answer: bool = False
    stream: bool = False


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """The proposer took the work; ``position`` counts the jobs before it."""

    request_id: RequestId
    layer: Layer
    position: Count
    expected_wait_ms: Millis


class Declined(msgspec.Struct, frozen=True, tag="declined"):
    """The proposer does not take the work, or took it and could not do it."""

    request_id: RequestId
    layer: Layer
    reason: Reason
    retry_after_ms: Millis = 0


class Part(msgspec.Struct, frozen=True, tag="part"):
    """What a proposer has written more of a text that is not finished, where the owner asked for
    it; ``start`` counts the characters before it. Nothing but a hint: the proposal says what the
    text is. It goes over the connection alone, which keeps the order, and is left out where that
    has no room; the next one then holds it, too."""

    request_id: RequestId
    layer: Layer
    start: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_PROPOSAL_BYTES)]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_PROPOSAL_BYTES)]


class Proposal(msgspec.Struct, frozen=True, tag="proposal"):
    """A finished proposal, with where its time went."""

    request_id: RequestId
    layer: Layer
    text: Annotated[str, msgspec.Meta(max_length=limits.MAX_PROPOSAL_BYTES)]
    model: Name
    prompt_tokens: Count
    tokens: Count
    queue_ms: Millis
    work_ms: Millis
    finish: Literal["stop", "length", "loop"]
    cached_tokens: Count = 0  # of the prompt, that need not be read
    prefill_ms: Millis = 0  # of the work
    model_ms: Millis = 0  # this job's own share of the model's time


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The owner no longer waits for any proposal of ``layer``; work on it may stop."""

    request_id: RequestId
    layer: Layer


def printable(text: str) -> str:
    """``text`` without what a terminal or a log would act on, line ends included."""
    return "".join(c for c in text if c.isprintable())


MembershipMessage: TypeAlias = Ping | Ack | PingReq | Nack | Gossip | Sync | View
Message: TypeAlias = (
    Alive | Leave | MembershipMessage | Propose | Queued | Declined | Part | Proposal | Cancel
)

MEMBERSHIP = (Ping, Ack, PingReq, Nack, Gossip, Sync, View)
HOP_MESSAGES = (Alive, Leave, *MEMBERSHIP, Part)
"""Said by one board to its neighbour and never relayed: the sealed link vouches for them, so they
carry no signature and are not repeated when lost. Everything else is signed and delivered."""


def goes_over_link(message: Message) -> bool:
    """Whether a hop message takes the connection even where datagrams get through: a second way
    to ask a board that did not answer the first, and what a group compares now and then."""
    return isinstance(message, Sync | View) or (isinstance(message, Ping | Ack) and message.sure)
