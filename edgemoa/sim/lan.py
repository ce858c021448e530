"""A group that does nothing but watch itself, over a network that fails: what membership is worth.

Each board runs the :class:`~edgemoa.core.node.Node` that the daemon runs, on a virtual clock, from
one seed. Datagrams are lost one by one; a link repeats what is lost, later, as TCP does, ends after
:data:`KEEP_ALIVE_MS` where nothing gets through, and is dialled again as the network shell does. A
board that is starved handles what came, messages first, when it runs again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Final

from edgemoa.core import envelope, limits
from edgemoa.core.events import Effect, EngineInfo, Send
from edgemoa.core.membership import Presence
from edgemoa.core.messages import BoardId, Message, goes_over_link
from edgemoa.core.node import Node, NodeSettings

DELAY_MS: Final = (1, 10)
KEEP_ALIVE_MS: Final = 11_000
RESEND_MS: Final = 200  # of TCP at first, then twice as long each time
REDIAL_MS: Final = (250, 8_000)  # from the first wait to the longest
DIAL_TRIPS: Final = 6  # of TCP, TLS and HELLO, of which each may be lost
UDP_BYTES: Final = 28 + 8 + 8 + 16 + 1  # IP and UDP, key id, counter, tag; the kind of packet
TCP_BYTES: Final = 2 * 52 + 22 + 4 + 1  # a segment and what acknowledges it; TLS; length; kind
PACKET_BYTES: Final = limits.MAX_DATAGRAM_BYTES - UDP_BYTES + 28

Pair = tuple[int, int]


@dataclass(slots=True, eq=False)
class Machine:
    """One board. ``node`` is None while it is down."""

    place: int
    board: BoardId
    node: Node | None = None
    boot: int = 0
    asleep_until_ms: int = 0
    tick_ms: int = -1
    deaths: int = 0
    links: dict[int, int] = field(default_factory=dict)  # with which boot of whom


class Lan:
    """See the module.

    :param loss: share of packets that are lost.
    :param naps: draws how long a board runs, and then how long it gets no processor, in ms, again
        and again; None for never.
    """

    def __init__(
        self,
        boards: int,
        rng: Random,
        *,
        loss: float = 0.0,
        naps: Callable[[Random], Pair] | None = None,
    ) -> None:
        self.now_ms = 0
        self.loss = loss
        self.blocked: set[Pair] = set()
        """Who cannot reach whom, in that direction."""
        self.sent_bytes = 0
        self.sent = 0
        self.false_deaths = 0
        """How often a board that was up came to be believed gone, by the first to do so."""
        self.machines = [Machine(i, BoardId(f"board-{i:02}")) for i in range(boards)]
        self._place = {each.board: each.place for each in self.machines}
        self._rng = rng
        self._naps = naps
        self._heap: list[tuple[int, int, int, Callable[[], None]]] = []
        self._order = 0
        for machine in self.machines:
            self.start(machine.place)
            if naps is not None:
                self._nap(machine, naps)

    # --- what happens to boards

    def start(self, place: int) -> None:
        """A board comes up, with a new boot."""
        machine = self.machines[place]
        machine.boot += 1
        machine.deaths, machine.tick_ms = 0, -1
        random = Random(self._rng.getrandbits(64))
        settings = NodeSettings(name=machine.board, boot=machine.boot)
        node = machine.node = Node(machine.board, settings, random, self.now_ms)
        for other in self.machines:
            if other is not machine:
                node.pair(other.board, other.board, self.now_ms)
        self._do(
            machine, node.engine_is_ready(EngineInfo("smollm2-135m", 2_048, slots=1), self.now_ms)
        )
        for other in self.machines:
            if other.node is not None and other is not machine:
                self._dial(machine, other, self._rng.randint(20, 500), REDIAL_MS[0])

    def cut_power(self, place: int) -> None:
        """A board is gone without a word. Others find by themselves that their links are dead."""
        self._end(place, KEEP_ALIVE_MS)

    def kill(self, place: int) -> None:
        """A board's process dies; its system closes the links."""
        self._end(place, DELAY_MS[1])

    def leave(self, place: int) -> None:
        """A board stops in good order."""
        machine = self.machines[place]
        if machine.node is not None:
            self._do(machine, machine.node.stop(self.now_ms))
            self._end(place, DELAY_MS[1])

    def lose_engine(self, place: int) -> None:
        """A board's model goes away; that is something to report."""
        machine = self.machines[place]
        if machine.node is not None:
            self._do(machine, machine.node.engine_is_lost(self.now_ms))

    def part(self, *sides: Iterable[int]) -> None:
        """Nothing gets from one side to another any more."""
        groups = [set(side) for side in sides]
        for a, b in combinations(groups, 2):
            self.blocked |= {(i, j) for i in a for j in b} | {(j, i) for i in a for j in b}
        for i, j in combinations(range(len(self.machines)), 2):
            if (i, j) in self.blocked:
                self._in(KEEP_ALIVE_MS, lambda i=i, j=j: self._starve_link(i, j))  # type: ignore[misc]

    def heal(self) -> None:
        """Everything gets everywhere again."""
        self.blocked.clear()

    def _end(self, place: int, noticed_ms: int) -> None:
        machine = self.machines[place]
        machine.node = None
        machine.links.clear()
        for other in self.machines:
            boot = other.links.get(place)
            if boot is not None:
                self._in(noticed_ms, lambda o=other, b=boot: self._unlink(o, place, b))  # type: ignore[misc]

    def _nap(self, machine: Machine, naps: Callable[[Random], Pair]) -> None:
        runs_ms, sleeps_ms = naps(self._rng)

        def sleep() -> None:
            machine.asleep_until_ms = self.now_ms + sleeps_ms
            self._in(sleeps_ms, lambda: self._nap(machine, naps))

        self._in(runs_ms, sleep)

    def hear(self, place: int, sender: int, message: Message) -> None:
        """A board is told something, as by another one."""
        machine = self.machines[place]
        if machine.node is not None:
            board = self.machines[sender].board
            self._do(machine, machine.node.receive(board, message, self.now_ms))

    # --- links

    def _dial(self, one: Machine, other: Machine, wait_ms: int, backoff_ms: int) -> None:
        boots = one.boot, other.boot

        def attempt() -> None:
            if (one.boot, other.boot) != boots or one.node is None or other.node is None:
                return
            if one.links.get(other.place) == other.boot:
                return
            trips_ms = sum(self._trip_ms() for _ in range(DIAL_TRIPS))
            reach = self._reach(one.place, other.place) and self._reach(other.place, one.place)
            if reach and trips_ms < 3_000:
                self._in(trips_ms, lambda: self._link(one, other, boots))
                return
            longer_ms = min(2 * backoff_ms, REDIAL_MS[1])
            self._dial(one, other, self._rng.randint(backoff_ms // 2, backoff_ms), longer_ms)

        self._in(wait_ms, attempt)

    def _link(self, one: Machine, other: Machine, boots: Pair) -> None:
        if (one.boot, other.boot) != boots or one.node is None or other.node is None:
            return
        one.links[other.place], other.links[one.place] = other.boot, one.boot
        for machine, peer in ((one, other), (other, one)):
            if machine.node is not None:
                self._do(machine, machine.node.linked(peer.board, peer.boot, self.now_ms))

    def _unlink(self, machine: Machine, place: int, boot: int) -> None:
        """A board notices that its link has ended, and dials if there is still somebody there."""
        if machine.node is None or machine.links.get(place) != boot:
            return
        del machine.links[place]
        other = self.machines[place]
        self._do(machine, machine.node.unlinked(other.board, self.now_ms))
        if other.node is not None and (machine.place < place or place not in other.links):
            self._dial(machine, other, 0, REDIAL_MS[0])

    def _starve_link(self, i: int, j: int) -> None:
        if (i, j) in self.blocked:
            for a, b in ((i, j), (j, i)):
                boot = self.machines[a].links.get(b)
                if boot is not None:
                    self._unlink(self.machines[a], b, boot)

    # --- the network

    def _reach(self, a: int, b: int) -> bool:
        return (a, b) not in self.blocked

    def _trip_ms(self) -> int:
        """What TCP takes to bring something to the other side."""
        taken_ms, resend_ms = self._rng.randint(*DELAY_MS), RESEND_MS
        while self._rng.random() < self.loss:
            taken_ms += resend_ms
            resend_ms *= 2
        return taken_ms

    def _carry(self, machine: Machine, to: BoardId, message: Message) -> None:
        place = self._place[to]
        target, boot = self.machines[place], machine.links.get(place)
        if boot is None:
            return
        size = len(envelope.encode(message)[1])
        by_link = goes_over_link(message) or size > PACKET_BYTES
        self.sent += 1
        self.sent_bytes += size + (TCP_BYTES if by_link else UDP_BYTES)
        if not self._reach(machine.place, place):
            return
        if not by_link and self._rng.random() < self.loss:
            return
        delay_ms = self._trip_ms() if by_link else self._rng.randint(*DELAY_MS)
        link = (machine.boot, boot)

        def arrive() -> None:
            if target.node is None or (machine.boot, target.boot) != link:
                return
            if target.links.get(machine.place) != machine.boot:
                return
            if self.now_ms < target.asleep_until_ms:
                self._at(target.asleep_until_ms, arrive)
                return
            self._do(target, target.node.receive(machine.board, message, self.now_ms))

        self._in(delay_ms, arrive)

    # --- the clock

    def _do(self, machine: Machine, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._carry(machine, effect.to, effect.message)
        node = machine.node
        if node is None:
            return
        if node.swim.deaths != machine.deaths:
            machine.deaths = node.swim.deaths
            self._mourn(machine)
        due_ms = max(node.next_deadline_ms(), self.now_ms + 1)
        if machine.tick_ms <= self.now_ms or due_ms < machine.tick_ms:
            machine.tick_ms = due_ms
            self._at(due_ms, lambda: self._tick(machine, node, due_ms), after=1)

    def _tick(self, machine: Machine, node: Node, due_ms: int) -> None:
        if machine.node is not node or machine.tick_ms != due_ms:
            return
        if self.now_ms < machine.asleep_until_ms:
            machine.tick_ms = machine.asleep_until_ms
            self._at(machine.tick_ms, lambda: self._tick(machine, node, machine.tick_ms), after=1)
            return
        self._do(machine, node.tick(self.now_ms))

    def _mourn(self, machine: Machine) -> None:
        """A board has given up others: those that are up count, the first time."""
        up = self.up()
        for place in up:
            if place != machine.place and self.presence(place, machine.place) is Presence.GONE:
                others = [by for by in up if by not in (place, machine.place)]
                gone = [by for by in others if self.presence(place, by) is Presence.GONE]
                self.false_deaths += not gone

    def _at(self, at_ms: int, event: Callable[[], None], after: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at_ms, after, self._order, event))

    def _in(self, delay_ms: int, event: Callable[[], None]) -> None:
        self._at(self.now_ms + delay_ms, event)

    def run(self, ms: int, until: Callable[[], bool] | None = None) -> int:
        """Let time pass; returns how much did, in ms: ``ms``, or until something is true."""
        began_ms, end_ms = self.now_ms, self.now_ms + ms
        while self._heap and self._heap[0][0] <= end_ms:
            if until is not None and until():
                return self.now_ms - began_ms
            self.now_ms, _, _, event = heapq.heappop(self._heap)
            event()
        self.now_ms = end_ms
        return ms

    # --- what is seen

    def presence(self, of: int, by: int) -> Presence:
        """What one board believes of another."""
        node = self.machines[by].node
        assert node is not None  # noqa: S101 - asked of boards that are up
        return node.members.peers[self.machines[of].board].presence

    def up(self) -> list[int]:
        """The boards that are up."""
        return [each.place for each in self.machines if each.node is not None]

    def all_believe(self, of: int, presence: Presence) -> bool:
        """Whether all that are up believe the same of a board."""
        return all(self.presence(of, by) is presence for by in self.up() if by != of)

    def agrees(self) -> bool:
        """Whether everybody believes of everybody what is true."""
        up = set(self.up())
        return all(
            self.all_believe(each.place, Presence.ALIVE if each.place in up else Presence.GONE)
            for each in self.machines
        )
