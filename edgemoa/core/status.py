"""What a person or a script is shown of a running board. No prompt, no answer, no secret."""

from __future__ import annotations

from typing import Final

import msgspec

from edgemoa.core.admission import Cap, Headroom, Plan, headroom, rungs
from edgemoa.core.membership import Presence
from edgemoa.core.messages import BoardId
from edgemoa.core.node import Counters, Node
from edgemoa.core.rates import Rates

SHOWN_LAYERS: Final = 2  # plans that the head-room is told for
SHOWN_PROPOSERS: Final = 4


class PeerStatus(msgspec.Struct, frozen=True):
    """A paired board as this one sees it."""

    id: BoardId
    name: str
    presence: Presence
    accepting: bool
    model: str
    waiting: int
    running: int
    expected_wait_ms: int
    proposal_ms: int  # what a usual one takes of its model; 0 while it is not known
    utilisation: float  # work that comes to it against what it can do
    heard_ms_ago: int | None


class NodeStatus(msgspec.Struct, frozen=True):
    """The state of one board's core."""

    id: BoardId
    name: str
    ready: bool  # the model takes work
    draining: bool
    model: str
    context_tokens: int
    slots: int
    backend: str  # which of the engine's runs the model
    threads: int
    budget_tokens: int  # that the engine's memory holds, of all jobs and of what is kept
    waiting: int
    running: int
    expected_wait_ms: int  # of a prompt that came now
    utilisation: float  # work that comes against what the board can do: rho
    peers_utilisation: float  # the part of that which peers ask for
    prompts_per_min: float  # that come, of this board's users
    prompts_scv: float  # squared coefficient of variation of the times between them
    service_ms: dict[str, int]  # of the model's time, per kind of job, as far as measured
    rates: Rates  # how fast the model reads and writes here, as far as measured
    prompts: int  # of this board's users, being worked on
    own_requests_cap: int
    peer_jobs: int
    peer_jobs_cap: int
    caps: dict[str, Cap]  # what those two follow from: own, peers
    headroom: list[Headroom]  # for each plan with the boards at hand
    peers: list[PeerStatus]
    counters: Counters


def snapshot(node: Node, now_ms: int) -> NodeStatus:
    """The status of ``node`` as of ``now_ms``."""
    peers = []
    for board, peer in sorted(node.members.peers.items()):
        report = peer.report
        peers.append(
            PeerStatus(
                id=board,
                name=node.members.name(board),
                presence=peer.presence,
                accepting=peer.usable,
                model=report.model if report else "",
                waiting=report.waiting if report else 0,
                running=report.running if report else 0,
                expected_wait_ms=report.expected_wait_ms if report else 0,
                proposal_ms=report.proposal_ms if report else 0,
                utilisation=report.utilisation_permille / 1000 if report else 0.0,
                heard_ms_ago=None if peer.presence is Presence.UNHEARD else now_ms - peer.heard_ms,
            )
        )
    queue, engine = node.queue, node.engine
    caps = {"own": node.cap(own=True), "peers": node.cap(own=False)}
    return NodeStatus(
        id=node.board_id,
        name=node.settings.name,
        ready=node.engine_ready,
        draining=node.draining,
        model=engine.model if engine else "",
        context_tokens=engine.context_tokens if engine else 0,
        slots=queue.slots,
        backend=engine.backend if engine else "",
        threads=engine.threads if engine else 0,
        budget_tokens=engine.budget_tokens if engine else 0,
        waiting=len(queue.waiting),
        running=len(queue.running),
        expected_wait_ms=queue.expected_wait_ms(now_ms, own=True),
        utilisation=queue.utilisation(now_ms),
        peers_utilisation=queue.utilisation(now_ms, own=False),
        prompts_per_min=node.prompts.per_ms(now_ms) * 60_000,
        prompts_scv=node.prompts.scv,
        service_ms=queue.times.measured(),
        rates=queue.times.rates,
        prompts=len(node.runs),
        own_requests_cap=caps["own"].requests,
        peer_jobs=node.peer_jobs(),
        peer_jobs_cap=caps["peers"].requests,
        caps=caps,
        headroom=_headroom(node, now_ms),
        peers=peers,
        counters=node.counters,
    )


def _headroom(node: Node, now_ms: int) -> list[Headroom]:
    own = node.outlook(now_ms)
    peers = [node.peer_outlook(board, now_ms) for board in node.members.usable()]
    plans = rungs(SHOWN_LAYERS, min(len(peers), SHOWN_PROPOSERS))
    return [headroom(Plan(layers, proposers), own, peers) for layers, proposers in plans]
