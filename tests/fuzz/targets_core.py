"""What the core makes of what paired boards say, message after message.

An exception in the node stops the daemon, so none may come of any values that the decoders let
through, in any order and at any time. What the node says in return has to be what other boards
take, and what is shown of it has to be what clients can read.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Annotated, Final

import msgspec
from generate import ANN, BOB, BOOT, CID, HOPS, MESSAGES, NEWS
from msgspec import Meta
from targets import Target

from edgemoa.core import envelope, limits, swim
from edgemoa.core.events import (
    Answered,
    Effect,
    EngineInfo,
    Failed,
    Request,
    Send,
    StartWork,
    StopWork,
    Tell,
    WorkDone,
)
from edgemoa.core.messages import (
    HOP_MESSAGES,
    Alive,
    Cancel,
    ChatMessage,
    Gossip,
    Message,
    News,
    Part,
    Ping,
    Proposal,
    Propose,
    Queued,
    Sampling,
)
from edgemoa.core.node import Node, NodeSettings
from edgemoa.core.status import snapshot
from edgemoa.errors import ProtocolError

_PEERS: Final = (ANN.board_id, CID.board_id)
_OWN_REQUEST: Final = "request-0001"  # the one that the vectors are about
_MOST_TICKS: Final = 8  # between two messages

_Step = tuple[
    Annotated[int, Meta(ge=0, le=2**36)],  # milliseconds since the one before
    Annotated[int, Meta(ge=0, le=3)],  # who; and above 1, whether the engine finishes a job first
    Message,
]
_decoder: Final = msgspec.msgpack.Decoder(Annotated[list[_Step], Meta(max_length=16)])
_messages: Final = msgspec.msgpack.Decoder(Message)


class _Board:
    """BOB's node with an engine that is done when it is told so, and a prompt of its own user."""

    def __init__(self) -> None:
        self.now_ms = 1_000
        self.node = Node(BOB.board_id, NodeSettings("bob", 7), Random(1), self.now_ms)
        self.jobs: list[int] = []
        self.ended = 0
        self.kinds: set[str] = set()  # of what it did
        for peer in _PEERS:
            self.take(self.node.pair(peer, peer[:4], self.now_ms))
            self.take(self.node.linked(peer, BOOT, self.now_ms))
        engine = EngineInfo("model", 2048, slots=1, reads_ahead=True)
        self.take(self.node.engine_is_ready(engine, self.now_ms))
        for peer in _PEERS:
            report = Alive(BOOT, 1, "", True, "model", 0, 0, 0, 1_000, 2_000)
            self.take(self.node.receive(peer, report, self.now_ms))
        asked = (ChatMessage("user", "Why is the sky blue?"),)
        request = Request(_OWN_REQUEST, asked, 10, 2, 2, Sampling(64), 600_000)
        self.take(self.node.submit(request, self.now_ms))

    def take(self, effects: list[Effect]) -> None:
        """See that each of them is one that its receiver takes."""
        for effect in effects:
            self.kinds.add(type(effect).__name__)
            match effect:
                case Send(message=message):
                    self.kinds.add(_check(message))
                case StartWork(job=job):
                    self.jobs.append(job.job_id)
                    msgspec.msgpack.encode(job)
                case StopWork(job_id=job_id):
                    self.jobs.remove(job_id)
                case Tell(request_id=request_id, event=event):
                    self.kinds.add(type(event).__name__)
                    msgspec.json.encode(event)
                    if self.ended:
                        raise AssertionError(f"{request_id} was told more after its end")
                    self.ended += isinstance(event, Answered | Failed)

    def step(self, step: _Step) -> None:
        """Let time pass, and hear a message."""
        after_ms, who, message = step
        until_ms = self.now_ms + after_ms
        for _ in range(_MOST_TICKS):
            self.now_ms = min(max(self.node.next_deadline_ms(), self.now_ms), until_ms)
            self.take(self.node.tick(self.now_ms))
        self.now_ms = until_ms
        if who > 1 and self.jobs:
            done = WorkDone("written", "stop", 10, 5, 100, 400)
            self.take(self.node.finished(self.jobs.pop(0), done, self.now_ms))
        self.take(self.node.receive(_PEERS[who & 1], message, self.now_ms))
        _bounded(self.node)


def _check(message: Message) -> str:
    """What it is; :raises AssertionError: if other boards would not take it."""
    kind, body = envelope.encode(message)
    if len(body) > limits.MAX_FRAME_BYTES - limits.KIB:
        raise AssertionError(f"a {kind} that no frame holds")
    try:
        again = envelope.decode_hop(body) if isinstance(message, HOP_MESSAGES) else _again(body)
    except ProtocolError as error:
        raise AssertionError(f"a {kind} that nobody takes") from error
    if again != message:
        raise AssertionError(f"a {kind} that others read otherwise")
    return kind


def _again(body: bytes) -> Message:
    message: Message = envelope.decode(_messages, body, "message")
    return message


def _bounded(node: Node) -> None:
    if node.peer_jobs() > limits.MAX_PEER_JOBS:
        raise AssertionError("more peers' jobs than there is room for")
    if any(len(each) > limits.MAX_REMEMBERED_RESULTS for each in node._results.values()):
        raise AssertionError("more results are remembered than there is room for")


def _core(data: bytes) -> object:
    steps = envelope.decode(_decoder, data, "conversation")
    board = _Board()
    for step in steps:
        board.step(step)
    status = snapshot(board.node, board.now_ms)
    msgspec.json.encode(status)
    board.take(board.node.stop(board.now_ms))
    if not board.ended:
        raise AssertionError("a prompt without an end")
    return frozenset(board.kinds), len(steps)


def _seeds() -> Iterable[bytes]:
    steps = [(50, number % 4, each) for number, each in enumerate([*MESSAGES, *HOPS])]
    yield msgspec.msgpack.encode(steps[:8])
    yield msgspec.msgpack.encode(steps[8:])
    proposal = Proposal(_OWN_REQUEST, 1, "Rayleigh.", "model", 20, 5, 100, 2000, "stop")
    second = msgspec.structs.replace(proposal, layer=2)
    talk: list[tuple[int, int, Message]] = [
        (10, 0, Queued(_OWN_REQUEST, 1, 0, 500)),
        (10, 0, Part(_OWN_REQUEST, 1, 0, "Ray")),
        (10, 0, Part(_OWN_REQUEST, 1, 3, "leigh")),
        (500, 2, proposal),
        (10, 1, proposal),
        (10, 2, second),
        (10, 3, second),
        (10, 2, Cancel(_OWN_REQUEST, 2)),
    ]
    yield msgspec.msgpack.encode(talk)
    ask = MESSAGES[0]
    assert isinstance(ask, Propose)
    asks = [msgspec.structs.replace(ask, request_id=f"another-{n}") for n in range(3)]
    yield msgspec.msgpack.encode([(1, n, each) for n, each in enumerate([*asks, asks[0]])])
    me, cid = envelope.short_id(BOB.board_id), envelope.short_id(CID.board_id)
    states = (swim.IS_ALIVE, swim.IS_GONE, NEWS.state, 200)
    news = tuple(News(about, state, 7, n, cid) for n, state in enumerate(states) for about in (me,))
    yield msgspec.msgpack.encode(
        [(3_000, 0, Gossip(news)), (900, 1, Ping(1, 5, news, sure=True)), (90_000, 0, HOPS[-2])]
    )


TARGETS: Final = [Target("core", _core, (ProtocolError,), _seeds, figure=1_000_000)]
