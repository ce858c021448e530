"""What is accepted, and with which plan: the caps of a queue, and the ladder down from a request.

A prompt is granted the largest plan, up to what was asked for, that keeps every board involved
stable and the promised latency: first fewer proposers, then fewer layers, then this board alone.
Only where even that would break the promise to those who are here already, it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import msgspec

from edgemoa.core.load import Average
from edgemoa.core.messages import BoardId
from edgemoa.core.picking import Outlook
from edgemoa.core.stability import places_for

DESIGN_UTILISATION: Final = 0.9  # at which refusals are to be rare
BLOCKING: Final = 0.01  # as rare as that
MOST_PLACES: Final = 1024
FULL: Final = 0.95  # utilisation from which on a board with a backlog is given no more
NOT_FULL: Final = 0.85  # below which it is again, or
BACKLOG_JOBS: Final = 2.0  # a wait of so many jobs is a backlog,
NO_BACKLOG_JOBS: Final = 1.0  # and one of fewer is none any more
LONG_WAIT: Final = 1 / 8  # of the promise: full, whatever the rates, which take minutes to tell
RESUME: Final = 1 / 3  # of a cap: once it was reached, so far down the queue is drained first.
# Who is told when to come back can be told well only where several prompts have to end till then.
SLOW_OWNER: Final = 2.0  # who would propose so many times as late as its peers leaves it to them
TRIED_AGAIN: Final = 10  # of so many plans that seem to take too long, one is tried
SIGMAS: Final = 2.5  # by which a prediction is doubted
PRIOR_DOUBT: Final = 1.5  # factor, until enough predictions have been compared
FEW_SAMPLES: Final = 10


class Cap(msgspec.Struct, frozen=True):
    """How many requests of one class are taken, and the figures that this follows from.

    ``requests`` is the least of the others.
    """

    requests: int
    memory: int  # so many usual ones fit into ``budget_bytes``
    latency: int  # so many are served within the promised latency
    blocking: int  # with so many places, refusals are rare at the utilisation that is designed for
    setting: int | None
    budget_bytes: int  # a bound of its own, whatever the number
    usual_bytes: int
    service_ms: int
    scv: float
    promise_ms: int


def cap(
    *,
    service_ms: float,
    scv: float,
    slots: int,
    promise_ms: int,
    budget_bytes: int,
    usual_bytes: float,
    setting: int | None,
) -> Cap:
    """The cap of one class of work.

    :param service_ms: of the model's time, that a request takes at least.
    :param scv: squared coefficient of variation of that.
    :param promise_ms: within which the last of them is to be done.
    """
    memory = int(budget_bytes / max(usual_bytes, 1.0))
    latency = int(promise_ms / max(service_ms, 1.0))
    blocking = _places(round(scv, 1)) + slots - 1
    least = max(min(memory, latency, blocking), 1)
    return Cap(
        requests=least if setting is None else min(least, setting),
        memory=memory,
        latency=latency,
        blocking=blocking,
        setting=setting,
        budget_bytes=budget_bytes,
        usual_bytes=round(usual_bytes),
        service_ms=round(service_ms),
        scv=scv,
        promise_ms=promise_ms,
    )


@lru_cache(maxsize=256)
def _places(scv: float) -> int:
    found = places_for(DESIGN_UTILISATION, scv, BLOCKING, MOST_PLACES, RESUME)
    return MOST_PLACES if found is None else found


@dataclass(frozen=True, slots=True)
class Plan:
    """A rung of the ladder. ``own`` says whether the owner proposes as well."""

    layers: int
    proposers: int
    own: bool = True

    def own_work_ms(self, outlook: Outlook) -> float:
        """What a prompt with this plan takes of its owner's model: of its work in the two-class
        condition, lambda [(k+1) S_1 + ((M-1)(k+1) + 1) S_a] < 1, the owner's own part."""
        if not self.layers:
            return outlook.proposal_ms
        later_ms = (self.layers - 1) * outlook.aggregation_ms
        return self.own * (outlook.proposal_ms + later_ms) + outlook.aggregation_ms

    def layer_ms(self, own: Outlook, peers: Sequence[Outlook]) -> float:
        """How long the first layer takes from now, by everybody's mean times."""
        done_ms = [peer.done_ms() for peer in peers[: self.proposers]]
        return max([*done_ms, own.done_ms()] if self.own else done_ms, default=0.0)

    def latency_ms(self, own: Outlook, peers: Sequence[Outlook]) -> float:
        """How long the answer takes from now, by everybody's mean times.

        :param peers: those that would be asked, the best first.
        """
        if not self.layers:
            return own.done_ms()
        asked = peers[: self.proposers]
        # An older prompt's jobs go before a younger one's: the owner waits for its turn once.
        turn_ms = min(own.wait_ms, own.proposal_ms)
        total_ms = turn_ms + own.aggregation_ms
        for layer in range(1, self.layers + 1):
            done_ms = [peer.done_ms(layer) for peer in asked]
            if self.own:
                first_ms = own.done_ms()
                done_ms.append(first_ms if layer == 1 else turn_ms + own.aggregation_ms)
            total_ms += max(done_ms)
        return total_ms


def rungs(layers: int, proposers: int) -> Iterator[tuple[int, int]]:
    """(M, k) from what was asked for down to the board alone, (0, 0)."""
    for m in range(layers, 0, -1):
        for k in range(proposers, 0, -1):
            yield m, k
    yield 0, 0


@dataclass(frozen=True, slots=True)
class Grant:
    """A plan, what it takes by mean times, and why it is not what was asked for."""

    plan: Plan
    predicted_ms: float
    why: str = ""


class Ladder:
    """Remembers which boards are full, and how far predictions were off.

    :param promise_ms: within which a prompt is usually meant to be answered.
    """

    def __init__(self, promise_ms: float) -> None:
        self._long_ms = LONG_WAIT * promise_ms
        self._full: set[BoardId] = set()
        self._off = Average()  # what a prompt took, against what was predicted
        self._held_back = 0  # plans that were not granted since they would take too long

    def is_full(self, outlook: Outlook) -> bool:
        """Whether more work comes to a board than it can do, and it shows; or its queue is long
        already. With hysteresis, so that plans do not change with every report."""
        jobs, wait_ms = outlook.wait_ms / outlook.proposal_ms, outlook.wait_ms
        if outlook.board in self._full:
            eased = outlook.utilisation < NOT_FULL and wait_ms < self._long_ms / 2
            if eased or jobs < NO_BACKLOG_JOBS:
                self._full.discard(outlook.board)
        elif jobs >= BACKLOG_JOBS and (outlook.utilisation >= FULL or wait_ms >= self._long_ms):
            self._full.add(outlook.board)
        return outlook.board in self._full

    def forget(self, board: BoardId) -> None:
        """A board is gone."""
        self._full.discard(board)

    def observe(self, predicted_ms: float, took_ms: float) -> None:
        """An answer has come."""
        self._off.add(took_ms / max(predicted_ms, 1.0))

    @property
    def doubt(self) -> float:
        """What a prediction is multiplied with before it is relied on."""
        if self._off.samples < FEW_SAMPLES:
            return PRIOR_DOUBT
        return max(self._off.mean + SIGMAS * math.sqrt(self._off.variance), 1.0)

    def likely_ms(self, predicted_ms: float) -> float:
        """What predictions like this one came to, on average."""
        if self._off.samples < FEW_SAMPLES:
            return predicted_ms
        return predicted_ms * self._off.mean

    def grant(
        self,
        asked: Plan,
        own: Outlook,
        peers: Sequence[Outlook],
        *,
        prompts_per_ms: float,
        peers_utilisation: float,
        promise_ms: float,
    ) -> Grant:
        """The largest plan that keeps the boards stable and the promise; at least the board alone.

        :param asked: with ``own`` only if the owner is to propose however slow it is.
        :param peers: those that could be asked, the best first.
        :param prompts_per_ms: at which this board's own prompts come.
        :param peers_utilisation: of this board, by what its peers ask of it.
        """
        ready = [peer for peer in peers if not self.is_full(peer)]
        own_is_full = self.is_full(own)
        why = ""
        for layers, proposers in rungs(asked.layers, asked.proposers):
            if proposers > len(ready):
                why = why or _too_few(asked.proposers, len(peers), len(ready))
                continue
            spared = proposers > 1 and (
                own_is_full
                or own.done_ms() > SLOW_OWNER * max(p.done_ms() for p in ready[:proposers])
            )
            plan = Plan(layers, proposers, asked.own or not spared)
            predicted_ms = plan.latency_ms(own, ready)
            if layers and own_is_full:
                load = peers_utilisation + prompts_per_ms * plan.own_work_ms(own)
                if load > FULL:
                    why = why or f"this board would be {load:.0%} loaded"
                    continue
            layer_ms = plan.layer_ms(own, ready) * (layers + 1)  # each has its part of the time
            late = layers and max(predicted_ms, layer_ms) * self.doubt > promise_ms
            if late and not why:
                self._held_back += 1
                # Only what is done is measured: or else one slow answer would be the last of all.
                late = self._held_back % TRIED_AGAIN != 0
            if late:
                why = why or (
                    f"it would take about {self.likely_ms(predicted_ms) / 1000:.0f} s, and"
                    f" {promise_ms / 1000:.0f} s are promised"
                )
                continue
            return Grant(plan, predicted_ms, why)
        raise AssertionError("the board alone is always a plan")


def grant_anyway(asked: Plan, own: Outlook, peers: Sequence[Outlook]) -> Grant:
    """As much of what was asked for as there are boards at hand, whatever their load."""
    proposers = min(asked.proposers, len(peers))
    plan = Plan(asked.layers, proposers) if proposers else Plan(0, 0)
    less = (plan.layers, plan.proposers) != (asked.layers, asked.proposers)
    why = _too_few(asked.proposers, len(peers), len(peers)) if less else ""
    return Grant(plan, plan.latency_ms(own, peers), why)


class Headroom(msgspec.Struct, frozen=True):
    """How many prompts a minute more a board could answer with a plan, and which boards limit it.
    Negative where it is too many already."""

    layers: int
    proposers: int
    prompts_per_min: float
    limited_by: tuple[BoardId, ...]


def headroom(plan: Plan, own: Outlook, peers: Sequence[Outlook]) -> Headroom:
    """What a plan leaves room for beside the work that comes now, with picks by what each board
    has to spare: the per-device condition, solved for the rate.

    x more picks per ms of a board's peers are possible iff, for each number s of boards with the
    least to spare, these have x (k - (n - s)) to spare: the others take x each at most.
    """
    least = (1 - own.utilisation) / plan.own_work_ms(own)
    limited_by: tuple[BoardId, ...] = (own.board,)
    if plan.layers:
        by_room = sorted((_room(plan, peer), peer.board) for peer in peers)
        total = 0.0
        for s, (room, _) in enumerate(by_room, 1):
            total += room
            must = plan.proposers - (len(by_room) - s)
            if must > 0 and total / must / plan.layers < least:
                least = total / must / plan.layers
                limited_by = tuple(board for _, board in by_room[:s])
    return Headroom(plan.layers, plan.proposers, least * 60_000, limited_by)


def _room(plan: Plan, peer: Outlook) -> float:
    """Proposals per ms, of all layers alike, that a board could do beside its work."""
    mean_ms = (peer.proposal_ms + (plan.layers - 1) * peer.aggregation_ms) / plan.layers
    return max(1 - peer.utilisation, 0.0) / mean_ms  # whoever has none need not be picked


def _too_few(asked: int, at_hand: int, ready: int) -> str:
    if ready < at_hand:
        return f"{at_hand - ready} of {at_hand} boards are full"
    if not at_hand:
        return "no other board is at hand"
    return f"{asked} proposers were asked for, {at_hand} at hand"
