"""Who is there, found out by asking each other: SWIM with Lifeguard's additions.

Every second a board pings one other, each in its turn. One that does not answer is asked for by
three others, and over the connection; if that fails too, it is suspected. Suspicions spread as news
on datagrams that are sent anyway, and on a few more while there are any. Whoever hears one pings
the board at once and tells it, so that it can contradict, by a higher incarnation. It is gone when
nothing has contradicted for some time, the shorter the more boards found the same by themselves.

A board believes itself before others: while it has a link to another one, nobody's word makes that
gone, only that its own pings stay without an answer as well. And a board that finds itself slow (it
wakes late, or answers are missing that others should have given) gives others more time.

The figures are memberlist's for a LAN (probe 1 s, timeout 500 ms, 3 helpers, gossip every 200 ms to
3), but for a retransmit multiplier of 8, a comparison of views every 10 s, and a shorter suspicion:
``tools/bench_lan_sim.py`` says what that gives.

Pure: nothing here reads a clock. What is to be sent is collected in ``out``, who is lost in
``lost``, and the node takes both away after each call.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from edgemoa.core import limits
from edgemoa.core.envelope import short_id
from edgemoa.core.membership import LOST, SILENT, Membership, Peer, Presence
from edgemoa.core.messages import (
    Ack,
    Alive,
    BoardId,
    Gossip,
    Leave,
    Message,
    Nack,
    News,
    Ping,
    PingReq,
    Sync,
    View,
)

# States in news.
IS_ALIVE: Final = 0
IS_SUSPECT: Final = 1
IS_GONE: Final = 2

PROBE_MS: Final = 1_000
TIMEOUT_MS: Final = 500
HELPERS: Final = 3
HELP_MS: Final = 400  # for which a helper waits before it says that it heard nothing either
GOSSIP_MS: Final = 200
FANOUT: Final = 3
RETRANSMIT: Final = 8
SYNC_MS: Final = 10_000
REPORT_MS: Final = 1_000
REPORT_REPEATS: Final = 2  # of one that says something new, a second apart
REPORT_RIDES: Final = 2  # to each board, along with what is sent to it anyway
REFRESH_MS: Final = 2_000  # from one report to the next of a board that works
SUSPICION_MS: Final = 2_000  # at least; for ten boards, more by the logarithm of their number
SUSPICION_STRETCH: Final = 6  # as many times that where nobody else found the same
CONFIRMATIONS: Final = 3
AGAIN_MS: Final = 500  # from one ping to the next of a board that is suspected
MAX_HEALTH: Final = 8
LATE_MS: Final = 250  # a board that wakes so late is slow itself
LEAP: Final = 1_000  # by how much an incarnation may be ahead of the known one
MAX_HELPED: Final = 64  # pings on behalf of others at a time

assert HELP_MS < TIMEOUT_MS < PROBE_MS < SUSPICION_MS  # noqa: S101


@dataclass(slots=True)
class _Probe:
    """One board being asked. ``due_ms`` is when the next thing is done about it."""

    board: BoardId
    number: int
    due_ms: int
    ends_ms: int
    helpers: int = -1  # that were asked; -1 for not yet
    nacks: int = 0
    vouched: bool = False  # a helper had an answer


@dataclass(slots=True)
class _Suspicion:
    since_ms: int
    least_ms: int
    again_ms: int  # when the board is asked again
    by: set[bytes] = field(default_factory=set)

    def ends_ms(self, needed: int) -> int:
        """When it is believed, with what is known now: the sooner, the more of ``needed`` boards
        beside the first found the same."""
        share = 1.0
        if needed > 0:
            others = max(len(self.by) - 1, 0)
            share = min(math.log(others + 1) / math.log(needed + 1), 1.0)
        return self.since_ms + round(
            self.least_ms * (SUSPICION_STRETCH - share * (SUSPICION_STRETCH - 1))
        )


@dataclass(slots=True)
class _Helped:
    """A ping on behalf of another board, which called it by ``number``."""

    asker: BoardId
    number: int
    board: BoardId
    until_ms: int


@dataclass(slots=True)
class _Rumour:
    news: News
    told: int = 0


class Swim:
    """See the module. It keeps ``members`` up to date: nobody else moves a board there.

    :param report: what this board tells of itself now.
    """

    def __init__(
        self,
        own: BoardId,
        boot: int,
        members: Membership,
        rng: Random,
        report: Callable[[int], Alive],
        now_ms: int,
    ) -> None:
        self.out: list[tuple[BoardId, Message]] = []
        self.lost: list[tuple[BoardId, str]] = []
        self.health = 0
        """How slow this board finds itself: 0 for not at all, up to :data:`MAX_HEALTH`."""
        self.incarnation = 0
        """How often this board had to contradict."""
        self._boot = boot
        self._members = members
        self._rng = rng
        self._report = report
        self._id = short_id(own)
        self._ids: dict[BoardId, bytes] = {}
        self._boards: dict[bytes, BoardId] = {}
        self._number = 0
        self._turn: list[BoardId] = []  # who is asked next, from the end
        self._probes: dict[BoardId, _Probe] = {}
        self._helped: dict[int, _Helped] = {}
        self._suspicions: dict[BoardId, _Suspicion] = {}
        # By board; suspicions also by who found it, all else replaces what was said before.
        self._rumours: dict[tuple[bytes, bytes], _Rumour] = {}
        self._probe_ms = now_ms + rng.randrange(PROBE_MS)
        self._sync_ms = now_ms + rng.randrange(SYNC_MS)
        self._beat_ms = now_ms + REPORT_MS
        self._gossip_ms = now_ms
        self._told: Alive | None = None  # the last report that was told to all
        self._told_ms = 0
        self._repeats = 0
        self._latest: Alive | None = None  # the last one that differs from the one before at all
        self._rides: dict[BoardId, int] = {}  # how often each board was told that along the way

    # --- boards come and go

    def pair(self, board: BoardId) -> None:
        """A board of the table, from now on."""
        self._ids[board] = short_id(board)
        self._boards[self._ids[board]] = board

    def forget(self, board: BoardId) -> None:
        """One that is about to leave the table."""
        known = self._ids.pop(board, None)
        if known is None:
            return
        del self._boards[known]
        self._settle(board)
        self._drop_rumours(known)
        self._rides.pop(board, None)
        for number in [n for n, help in self._helped.items() if board in (help.asker, help.board)]:
            del self._helped[number]

    def linked(self, board: BoardId, boot: int, now_ms: int) -> None:
        """There is a link to it, which proved its boot: each tells the other what it knows."""
        if self._members.linked(board, boot):
            self._restarted(board)
        knew = self._members.peers[board].there
        self._settle(board)
        self.heard(board, now_ms)
        if knew:
            self._greet(board, now_ms)

    def unlinked(self, board: BoardId, now_ms: int) -> None:
        """Its link has ended, which is no death, but a reason to ask."""
        self._members.unlinked(board)
        self._probes.pop(board, None)
        if self._members.peers[board].there:
            self._probe(board, now_ms)

    def heard(self, board: BoardId, now_ms: int) -> bool:
        """Something authentic came from it, whatever it was. Returns whether to listen to it."""
        was = self._members.peers[board].presence
        if not self._members.heard(board, now_ms):
            return False
        if board in self._suspicions:
            self._calm(board)
        if was is Presence.GONE:  # it may not know that it was given up here, and maybe elsewhere
            self._send(board, Gossip((self._news(board, IS_GONE),)))
        if was is Presence.GONE or was is Presence.UNHEARD:
            self._spread(self._news(board, IS_ALIVE))
            self._greet(board, now_ms)
        return True

    def _greet(self, board: BoardId, now_ms: int) -> None:
        self._send(board, self._report(now_ms))
        self._send(board, Sync(self.digest()))

    def _restarted(self, board: BoardId) -> None:
        """The table knows that it is there with another boot."""
        self._settle(board)
        self._rides.pop(board, None)
        self._spread(self._news(board, IS_ALIVE))
        self.lost.append((board, "restarted"))

    # --- messages

    def receive(self, sender: BoardId, message: Message, now_ms: int) -> bool:
        """Something authentic, from a board in the table. Returns whether to listen to it: not to
        what came after the sender's good-bye and was said before."""
        peer = self._members.peers[sender]
        match message:
            case Leave(boot=boot):
                if self._members.left(sender, boot):
                    self._settle(sender)
                    self._spread(self._news(sender, IS_GONE))
                    self.lost.append((sender, "left the group"))
                return False
            case Alive():
                self._reported(sender, message, now_ms)
        if not self.heard(sender, now_ms):
            return False
        match message:
            case Ping(number=number, incarnation=incarnation, news=news, report=report, sure=sure):
                self._reported(sender, report, now_ms)
                self._said_itself(peer, incarnation)
                self._take(sender, news, now_ms)
                ack = Ack(number, self.incarnation, self._some(sender), self._ride(sender), sure)
                self._send(sender, ack)
            case Ack(number=number, incarnation=incarnation, news=news, report=report):
                self._reported(sender, report, now_ms)
                self._said_itself(peer, incarnation)
                self._take(sender, news, now_ms)
                self._answered(sender, number)
            case PingReq(number=number, board=wanted, news=news):
                self._take(sender, news, now_ms)
                self._help(sender, number, wanted, now_ms)
            case Nack(number=number):
                probe = self._probe_of(number)
                if probe is not None and probe.board != sender:
                    probe.nacks += 1
            case Gossip(news=news):
                self._take(sender, news, now_ms)
            case Sync(digest=digest):
                if digest != self.digest():
                    self._send(sender, View(self._view(), ask=True))
            case View(news=news, ask=ask):
                self._take(sender, news, now_ms)
                better = tuple(each for each in self._view() if not _said(each, news))
                if ask and better:
                    self._send(sender, View(better))
        return True

    def _reported(self, sender: BoardId, report: Alive | None, now_ms: int) -> None:
        if report is not None and self._members.report(sender, report, now_ms):
            self._restarted(sender)

    def _said_itself(self, peer: Peer, incarnation: int) -> None:
        if incarnation > peer.incarnation:
            peer.incarnation = incarnation
            self._spread(self._news(peer.board, IS_ALIVE))

    def _probe_of(self, number: int) -> _Probe | None:
        return next((p for p in self._probes.values() if p.number == number), None)

    def _answered(self, sender: BoardId, number: int) -> None:
        helped = self._helped.get(number)
        if helped is not None:
            if helped.board == sender:
                del self._helped[number]
                self._send(helped.asker, Ack(helped.number, self.incarnation))
            return
        probe = self._probe_of(number)
        if probe is None or probe.board == sender:
            self._members.peers[sender].mute = False
        if probe is None:
            return
        if probe.board == sender:
            self.health = max(self.health - 1, 0)
            del self._probes[sender]
            return
        probe.vouched = True
        self._calm(probe.board)
        if self._members.peers[probe.board].there:
            self._members.vouched(probe.board)
        if not self._members.peers[probe.board].linked:
            del self._probes[probe.board]

    def _help(self, asker: BoardId, number: int, wanted: bytes, now_ms: int) -> None:
        board = self._boards.get(wanted)
        if board is None or board == asker or len(self._helped) >= MAX_HELPED:
            return
        if not self._members.peers[board].linked:
            self._send(asker, Nack(number))
            return
        own_number = self._next_number()
        self._helped[own_number] = _Helped(asker, number, board, now_ms + HELP_MS)
        self._send(board, Ping(own_number, self.incarnation, self._some(board)))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    # --- time

    def due_ms(self) -> int:
        """When :meth:`tick` has something to do."""
        due = min(self._timers_ms(), self._sync_ms)
        if self._rumours:
            due = min(due, self._gossip_ms)
        for helped in self._helped.values():
            due = min(due, helped.until_ms)
        if self._suspicions:
            needed = self._needed()
            for board, suspicion in self._suspicions.items():
                if self._may_end(board):
                    due = min(due, suspicion.ends_ms(needed))
                due = min(due, suspicion.again_ms)
        return due

    def _timers_ms(self) -> int:
        """The timers that tell how late this board wakes: nothing that it hears moves them."""
        return min(
            self._beat_ms, self._probe_ms, *(probe.due_ms for probe in self._probes.values())
        )

    def tick(self, now_ms: int) -> None:
        """Do what is due by now; harmless when called early."""
        if now_ms < self.due_ms():
            return
        late_ms = now_ms - self._timers_ms()
        if late_ms >= LATE_MS:
            self._was_away(late_ms, now_ms)
        for number, helped in list(self._helped.items()):
            if now_ms >= helped.until_ms:
                del self._helped[number]
                self._send(helped.asker, Nack(helped.number))
        for probe in list(self._probes.values()):
            if now_ms >= probe.due_ms:
                self._probe_due(probe, now_ms)
        for board in list(self._suspicions):
            self._suspicion_due(board, now_ms)
        if now_ms >= self._probe_ms:
            self._probe_ms = now_ms + PROBE_MS * (self.health + 1)
            self._probe_next(now_ms)
        if now_ms >= self._beat_ms:
            self._beat_ms = now_ms + REPORT_MS
            self._report_due(now_ms)
        if now_ms >= self._sync_ms:
            self._sync_ms = now_ms + SYNC_MS
            for board in self._sample(self._reachable(), 1):
                self._send(board, Sync(self.digest()))
        if self._rumours and now_ms >= self._gossip_ms:
            self._gossip_ms = now_ms + GOSSIP_MS
            for board in self._sample(self._reachable(), FANOUT):
                news = self._some(board)
                if news:
                    self._send(board, Gossip(news))

    def _was_away(self, late_ms: int, now_ms: int) -> None:
        """This board slept. What came meanwhile has not been read, so that nobody may be judged by
        its absence."""
        self.health = min(self.health + 1, MAX_HEALTH)
        for probe in self._probes.values():
            probe.due_ms = max(probe.due_ms + late_ms, now_ms + TIMEOUT_MS)
            probe.ends_ms = max(probe.ends_ms + late_ms, probe.due_ms)
        for suspicion in self._suspicions.values():
            suspicion.since_ms += late_ms + PROBE_MS
        for helped in self._helped.values():
            helped.until_ms = now_ms + HELP_MS
