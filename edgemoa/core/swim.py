"""Who is there, found out by asking each other: SWIM with Lifeguard's additions.

Every second a board pings one other, each in its turn. One that does not answer is asked for by
three others, and over the connection; if that fails too, it is suspected. Suspicions spread as news
on datagrams that are sent anyway, and on a few more while there are any. Whoever hears one pings
the board at once and tells it, so that it can contradict, by a higher incarnation. It is gone when
nothing has contradicted for some time, the shorter the more boards found the same by themselves.

A board is believed before others: while there is a link to it, nobody's word makes it gone, only
that this board's own pings stay without an answer as well. A board that finds itself slow (it wakes
late, or answers are missing that others should have given) gives others more time. And where a
board's *system* still acknowledges what is sent over the connection, its process is there, though
too busy to answer: it has :data:`STALLED_MS` then, and the others are told.

Measured as ``tools/bench_lan_sim.py`` says. The figures are memberlist's for a LAN (probe 1 s,
timeout 500 ms, 3 helpers, gossip every 200 ms to 3), but for a retransmit multiplier of 8, a
comparison of views every 10 s, and a shorter suspicion, which the acknowledgements above allow.

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
from edgemoa.core.membership import LEFT, SILENT, VERY_SILENT, Membership, Peer, Presence
from edgemoa.core.messages import (
    Ack,
    Alive,
    BoardId,
    Gossip,
    Leave,
    MembershipMessage,
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
IS_STALLED: Final = 2  # a suspect whose system is there: it is given more time
IS_GONE: Final = 3
HAS_LEFT: Final = 4

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
REPORT_RIDES: Final = 2  # of a change that is too small to be told by itself
SUSPICION_MS: Final = 2_000  # at least; for ten boards, more by the logarithm of their number
SUSPICION_STRETCH: Final = 6  # as many times that where nobody else found the same
CONFIRMATIONS: Final = 3
AGAIN_MS: Final = 500  # from one ping to the next of a board that is suspected
STALLED_MS: Final = 15_000
MAX_HEALTH: Final = 8
LATE_MS: Final = 250  # a board that wakes so late is slow itself
LEAP: Final = 1_000  # by how much an incarnation may be ahead of the known one
MAX_HELPED: Final = 64  # pings on behalf of others at a time

LONGEST_SUSPICION_MS: Final = SUSPICION_STRETCH * SUSPICION_MS
assert TIMEOUT_MS < PROBE_MS < SUSPICION_MS < STALLED_MS  # noqa: S101
assert HELP_MS < TIMEOUT_MS  # noqa: S101


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
    most_ms: int
    least_ms: int
    by: set[bytes] = field(default_factory=set)
    stalled: bool = False

    def ends_ms(self, needed: int) -> int:
        """When it is believed, with what is known now."""
        if self.stalled:
            return self.since_ms + STALLED_MS
        others = len(self.by) - 1
        if needed < 1 or others >= needed:
            return self.since_ms + self.least_ms
        share = math.log(max(others, 0) + 1) / math.log(needed + 1)
        return self.since_ms + round(self.most_ms - share * (self.most_ms - self.least_ms))


@dataclass(slots=True)
class _Helped:
    asker: BoardId
    number: int
    board: BoardId
    until_ms: int


@dataclass(slots=True)
class _Rumour:
    news: News
    told: int = 0


class Swim:
    """See the module.

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
        self.false_alarms = 0
        """How often this board had to contradict."""
        self._boot = boot
        self._members = members
        self._rng = rng
        self._report = report
        self._id = short_id(own)
        self._ids: dict[BoardId, bytes] = {}
        self._boards: dict[bytes, BoardId] = {}
        self._number = 0
        self._turn: list[BoardId] = []
        self._gone_turn: list[BoardId] = []
        self._probes: dict[BoardId, _Probe] = {}
        self._helped: dict[int, _Helped] = {}
        self._suspicions: dict[BoardId, _Suspicion] = {}
        self._again_ms: dict[BoardId, int] = {}
        self._rumours: dict[tuple[bytes, bytes], _Rumour] = {}
        self._probe_ms = now_ms + rng.randrange(PROBE_MS)
        self._sync_ms = now_ms + rng.randrange(SYNC_MS)
        self._report_ms = now_ms + REPORT_MS
        self._gossip_ms = now_ms
        self._told: Alive | None = None  # the last report that was told to all
        self._repeats = 0
        self._latest: Alive | None = None  # the last one that differs from the one before at all
        self._rides: dict[BoardId, int] = {}  # how often each board was told of that

    # --- boards come and go

    def pair(self, board: BoardId) -> None:
        """A board that belongs to the group from now on."""
        self._ids[board] = short_id(board)
        self._boards[self._ids[board]] = board

    def forget(self, board: BoardId) -> None:
        """One that does not any more."""
        known = self._ids.pop(board, None)
        if known is None:
            return
        del self._boards[known]
        self._calm(board)
        self._unprobe(board)
        self._drop_rumours(known)
        self._rides.pop(board, None)
        for number in [n for n, help in self._helped.items() if board in (help.asker, help.board)]:
            del self._helped[number]

    def linked(self, board: BoardId, now_ms: int) -> None:
        """There is a link to it now: it is told what it needs to know of this board and others."""
        self.heard(board, now_ms)
        self._unprobe(board)
        self._tell([board], now_ms)
        self._send(board, Sync(self.digest()))

    def unlinked(self, board: BoardId, now_ms: int) -> None:
        """Its link has ended, which is no death, but a reason to ask."""
        self._members.unlinked(board)
        self._unprobe(board)
        suspicion = self._suspicions.get(board)
        if suspicion is not None:
            suspicion.stalled = False
        if self._members.peers[board].presence in _THERE:
            self._probe(board, now_ms)

    def stirs(self, board: BoardId, now_ms: int) -> None:
        """Its system acknowledged what was sent over the connection and not answered."""
        suspicion = self._suspicions.get(board)
        if suspicion is not None and not suspicion.stalled:
            suspicion.stalled = True
            self._spread(self._news(board, IS_STALLED), now_ms)

    def heard(self, board: BoardId, now_ms: int) -> None:
        """Something authentic came from it, whatever it was; called beside the table's own."""
        was = self._members.peers[board].presence
        if was is Presence.ALIVE and board not in self._suspicions:
            return
        self._members.heard(board, now_ms)
        if self._members.peers[board].presence is not Presence.ALIVE:
            return  # late words of a board that has left
        self._calm(board)
        if was is Presence.SUSPECT:
            self._drop_rumours(self._ids[board])
        elif was is not Presence.ALIVE:
            self._drop_rumours(self._ids[board])
            self._spread(self._news(board, IS_ALIVE), now_ms)
            self._tell([board], now_ms)
            self._send(board, Sync(self.digest()))

    def left(self, board: BoardId, now_ms: int) -> None:
        """It said good-bye, and the table knows."""
        self._calm(board)
        self._unprobe(board)
        self._drop_rumours(self._ids[board])
        self._spread(self._news(board, HAS_LEFT), now_ms)

    def restarted(self, board: BoardId, now_ms: int) -> None:
        """It is there with another boot, and the table knows."""
        self._calm(board)
        self._unprobe(board)
        self._drop_rumours(self._ids[board])
        self._rides.pop(board, None)
        self._spread(self._news(board, IS_ALIVE), now_ms)

    # --- messages

    def receive(self, sender: BoardId, message: MembershipMessage, now_ms: int) -> None:
        """Something of this protocol, from a board in the table."""
        peer = self._members.peers[sender]
        match message:
            case Ping(number=number, incarnation=incarnation, news=news, sure=sure):
                self._said_itself(peer, incarnation, now_ms)
                self._take(sender, news, now_ms)
                self._send(
                    sender,
                    Ack(number, self.incarnation, self._some(sender), self._ride(sender), sure),
                )
            case Ack(number=number, incarnation=incarnation, news=news):
                self._said_itself(peer, incarnation, now_ms)
                self._take(sender, news, now_ms)
                self._answered(sender, number, now_ms)
            case PingReq(number=number, board=wanted, news=news):
                self._take(sender, news, now_ms)
                self._help(sender, number, wanted, now_ms)
            case Nack(number=number):
                probe = next((p for p in self._probes.values() if p.number == number), None)
                if probe is not None and probe.board != sender:
                    probe.nacks += 1
            case Gossip(news=news):
                self._take(sender, news, now_ms)
            case Sync(digest=digest):
                if digest != self.digest():
                    self._send(sender, View(self._view(), ask=True))
            case View(news=news, ask=ask):
                self._take(sender, news, now_ms)
                if ask:
                    told = {(each.board, each.boot, each.incarnation, each.state) for each in news}
                    better = tuple(
                        each
                        for each in self._view()
                        if (each.board, each.boot, each.incarnation, each.state) not in told
                    )
                    if better:
                        self._send(sender, View(better))

    def took_report(self, board: BoardId) -> None:
        """A report of ``board`` came in whatever message; its number is for the table to judge."""

    def _said_itself(self, peer: Peer, incarnation: int, now_ms: int) -> None:
        if incarnation > peer.incarnation:
            peer.incarnation = incarnation
            self._drop_rumours(self._ids[peer.board])
            self._spread(self._news(peer.board, IS_ALIVE), now_ms)

    def _answered(self, sender: BoardId, number: int, now_ms: int) -> None:
        helped = self._helped.get(number)
        if helped is not None:
            if helped.board == sender:
                del self._helped[number]
                self._send(helped.asker, Ack(helped.number, self.incarnation))
            return
        probe = next((p for p in self._probes.values() if p.number == number), None)
        if probe is None:
            self._members.peers[sender].mute = False
            return
        peer = self._members.peers[probe.board]
        if probe.board == sender:
            self.health = max(self.health - 1, 0)
            peer.mute = False
            self._unprobe(sender)
        else:
            probe.vouched = True
            self._vouched(probe.board)
            if not peer.linked:
                self._unprobe(probe.board)

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
        due = min(self._probe_ms, self._sync_ms, self._report_ms)
        if self._rumours:
            due = min(due, self._gossip_ms)
        for probe in self._probes.values():
            due = min(due, probe.due_ms)
        for helped in self._helped.values():
            due = min(due, helped.until_ms)
        needed = self._needed
        for board, suspicion in self._suspicions.items():
            due = min(due, suspicion.ends_ms(needed), self._again_ms.get(board, due))
        return due

    def tick(self, now_ms: int) -> None:
        """Do what is due by now; harmless when called early. Late, it knows that it is slow: what
        came meanwhile has not been read, so that nobody may be judged by its absence."""
        late_ms = now_ms - self.due_ms()
        if late_ms < 0:
            return
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
        if now_ms >= self._report_ms:
            self._report_ms = now_ms + REPORT_MS
            self._report_due(now_ms)
        if now_ms >= self._sync_ms:
            self._sync_ms = now_ms + SYNC_MS
            others = self._reachable()
            if others:
                self._send(self._rng.choice(others), Sync(self.digest()))
        if self._rumours and now_ms >= self._gossip_ms:
            self._gossip_ms = now_ms + GOSSIP_MS
            for board in self._sample(self._reachable(), FANOUT):
                news = self._some(board)
                if news:
                    self._send(board, Gossip(news))

    def _was_away(self, late_ms: int, now_ms: int) -> None:
        self.health = min(self.health + 1, MAX_HEALTH)
        for probe in self._probes.values():
            probe.due_ms = max(probe.due_ms + late_ms, now_ms + TIMEOUT_MS)
            probe.ends_ms = max(probe.ends_ms + late_ms, probe.due_ms)
        for suspicion in self._suspicions.values():
            suspicion.since_ms += late_ms + PROBE_MS
        for helped in self._helped.values():
            helped.until_ms = now_ms + HELP_MS

    # --- asking

    def _probe_next(self, now_ms: int) -> None:
        peers = self._members.peers
        while self._turn:
            board = self._turn.pop()
            if board in peers and peers[board].presence in _THERE and board not in self._probes:
                self._probe(board, now_ms)
                break
        else:
            self._turn = [board for board, peer in peers.items() if peer.presence in _THERE]
            self._rng.shuffle(self._turn)
            if self._turn:
                self._probe(self._turn.pop(), now_ms)
        # Those that are gone while their link still stands, as after a partition.
        while self._gone_turn:
            board = self._gone_turn.pop()
            if board in peers and self._is_worth_a_call(peers[board]):
                number = self._next_number()
                self._send(board, Ping(number, self.incarnation, self._some(board), sure=True))
                return
        self._gone_turn = [board for board, peer in peers.items() if self._is_worth_a_call(peer)]
        self._rng.shuffle(self._gone_turn)

    @staticmethod
    def _is_worth_a_call(peer: Peer) -> bool:
        return peer.presence is Presence.GONE and peer.linked and not peer.left

    def _probe(self, board: BoardId, now_ms: int) -> None:
        if board in self._probes:
            return
        stretch = self.health + 1
        probe = _Probe(
            board, self._next_number(), now_ms + TIMEOUT_MS * stretch, now_ms + PROBE_MS * stretch
        )
        self._probes[board] = probe
        if self._members.peers[board].linked:
            self._send(
                board, Ping(probe.number, self.incarnation, self._some(board), self._ride(board))
            )
        else:
            self._ask_around(probe, now_ms)

    def _ask_around(self, probe: _Probe, now_ms: int) -> None:
        probe.due_ms = max(probe.ends_ms, now_ms + TIMEOUT_MS)
        others = [board for board in self._reachable() if board != probe.board]
        helpers = self._sample(others, HELPERS)
        probe.helpers = len(helpers)
        for helper in helpers:
            news = self._some(helper)
            self._send(helper, PingReq(probe.number, self._ids[probe.board], news))
        if self._members.peers[probe.board].linked:
            news = self._some(probe.board)
            self._send(probe.board, Ping(probe.number, self.incarnation, news, sure=True))

    def _probe_due(self, probe: _Probe, now_ms: int) -> None:
        if probe.helpers < 0:
            self._ask_around(probe, now_ms)
            return
        del self._probes[probe.board]
        peer = self._members.peers[probe.board]
        if probe.vouched:
            peer.mute = peer.linked
            self._again_ms[probe.board] = now_ms + AGAIN_MS
            return
        if peer.presence not in _THERE:
            return
        missing = probe.helpers - probe.nacks
        self.health = min(self.health + (missing if probe.helpers else 1), MAX_HEALTH)
        self._suspect(peer, self._id, now_ms)
        self._again_ms[probe.board] = now_ms + AGAIN_MS

    def _unprobe(self, board: BoardId) -> None:
        self._probes.pop(board, None)

    # --- suspecting

    @property
    def _needed(self) -> int:
        """Others that have to find the same, for a suspicion to be as short as it gets."""
        return min(CONFIRMATIONS, self._there() - 2)

    def _there(self) -> int:
        """How many boards the group has now, as far as is known, this one included."""
        return 1 + sum(1 for p in self._members.peers.values() if p.presence in _THERE)

    def _suspect(self, peer: Peer, by: bytes, now_ms: int, *, stalled: bool = False) -> None:
        """Somebody found that a board does not answer."""
        board = peer.board
        suspicion = self._suspicions.get(board)
        if suspicion is None:
            least_ms = round(SUSPICION_MS * max(1.0, math.log10(self._there())))
            suspicion = _Suspicion(now_ms, SUSPICION_STRETCH * least_ms, least_ms)
            self._suspicions[board] = suspicion
            self._again_ms[board] = now_ms
        if by == self._id:
            self._members.move(board, SILENT)
        if stalled and not suspicion.stalled:
            suspicion.stalled = True
            self._spread(self._news(board, IS_STALLED, by), now_ms)
        if by not in suspicion.by and (len(suspicion.by) <= CONFIRMATIONS or by == self._id):
            suspicion.by.add(by)
            self._spread(self._news(board, IS_SUSPECT, by), now_ms)

    def _suspicion_due(self, board: BoardId, now_ms: int) -> None:
        suspicion = self._suspicions[board]
        peer = self._members.peers[board]
        found = self._id in suspicion.by
        if now_ms >= suspicion.ends_ms(self._needed) and (found or not peer.linked):
            self._gone(peer, self._id, now_ms)
        elif now_ms >= self._again_ms.get(board, now_ms):
            self._again_ms[board] = now_ms + AGAIN_MS
            self._probe(board, now_ms)

    def _gone(self, peer: Peer, by: bytes, now_ms: int) -> None:
        self._calm(peer.board)
        self._unprobe(peer.board)
        self._members.move(peer.board, VERY_SILENT)
        self._drop_rumours(self._ids[peer.board])
        self._spread(self._news(peer.board, IS_GONE, by), now_ms)
        self.lost.append((peer.board, "fell silent"))

    def _calm(self, board: BoardId) -> None:
        self._suspicions.pop(board, None)
        self._again_ms.pop(board, None)

    def _vouched(self, board: BoardId) -> None:
        """Somebody else reaches it."""
        if self._members.peers[board].presence is Presence.SUSPECT:
            self._members.vouched(board)
        self._calm(board)

    # --- news

    def _news(self, board: BoardId, state: int, by: bytes = b"") -> News:
        peer = self._members.peers[board]
        return News(self._ids[board], state, max(peer.boot, 0), peer.incarnation, by or self._id)

    def _take(self, sender: BoardId, news: Iterable[News], now_ms: int) -> None:
        for each in news:
            if each.board == self._id:
                self._accused(sender, each, now_ms)
            elif (board := self._boards.get(each.board)) is not None:
                if board != sender:  # of itself it says all by its messages
                    self._learn(self._members.peers[board], each, now_ms)

    def _accused(self, sender: BoardId, news: News, now_ms: int) -> None:
        """Others doubt that this board is there."""
        doubted = news.state != IS_ALIVE and news.boot == self._boot
        if not doubted or not self.incarnation <= news.incarnation <= self.incarnation + LEAP:
            return
        self.incarnation = news.incarnation + 1
        self.false_alarms += 1
        own = News(self._id, IS_ALIVE, self._boot, self.incarnation, self._id)
        self._spread(own, now_ms)
        self._send(sender, Gossip((own,)))

    def _learn(self, peer: Peer, news: News, now_ms: int) -> None:
        if news.state > HAS_LEFT:
            return  # of a newer board
        if news.boot != peer.boot:
            # A link says which boot is there. Without one, the later boot is the one that counts.
            if peer.linked or news.boot < peer.boot:
                return
        elif not peer.incarnation <= news.incarnation <= peer.incarnation + LEAP:
            return
        match news.state:
            case 0:  # IS_ALIVE
                self._learn_alive(peer, news, now_ms)
            case 1 | 2:  # IS_SUSPECT, IS_STALLED
                self._learn_suspect(peer, news, now_ms)
            case _:
                self._learn_gone(peer, news, now_ms)

    def _learn_alive(self, peer: Peer, news: News, now_ms: int) -> None:
        newer = (news.boot, news.incarnation) > (peer.boot, peer.incarnation)
        if not newer and peer.presence is not Presence.UNHEARD:
            return
        self._adopt(peer, news)
        self._calm(peer.board)
        self._members.vouched(peer.board)
        self._drop_rumours(news.board)
        self._spread(news, now_ms)

    def _learn_suspect(self, peer: Peer, news: News, now_ms: int) -> None:
        if news.boot != peer.boot or peer.presence not in _THERE:
            return
        peer.incarnation = news.incarnation
        self._suspect(peer, news.by, now_ms, stalled=news.state == IS_STALLED)
        self._suspicion_due(peer.board, now_ms)

    def _learn_gone(self, peer: Peer, news: News, now_ms: int) -> None:
        if peer.presence is Presence.GONE:
            return
        suspicion = self._suspicions.get(peer.board)
        found = suspicion is not None and self._id in suspicion.by
        if peer.linked and not found:
            self._learn_suspect(peer, news, now_ms)  # but this board wants to find it itself
            return
        self._adopt(peer, news)
        if peer.presence is Presence.UNHEARD:
            self._members.move(peer.board, LEFT)
            self._spread(news, now_ms)
        else:
            self._gone(peer, news.by, now_ms)

    def _adopt(self, peer: Peer, news: News) -> None:
        """Others know of a later life of the board."""
        if peer.boot != news.boot:
            known = peer.boot >= 0
            self._members.restarted(peer.board, news.boot)
            if known:
                self.lost.append((peer.board, "restarted"))
        peer.incarnation = news.incarnation

    def _spread(self, news: News, now_ms: int) -> None:
        doubted = news.state in (IS_SUSPECT, IS_STALLED)
        key = (news.board, news.by + bytes([news.state]) if doubted else b"")
        if not self._rumours:
            self._gossip_ms = max(now_ms, self._gossip_ms)
        self._rumours[key] = _Rumour(news)

    def _drop_rumours(self, board: bytes) -> None:
        for key in [key for key in self._rumours if key[0] == board]:
            del self._rumours[key]

    def _some(self, to: BoardId) -> tuple[News, ...]:
        """News to go along, those told least often first; what is said of the recipient itself
        before all, until it is contradicted."""
        own = self._ids[to]
        news = []
        if to in self._suspicions or self._members.peers[to].presence is Presence.GONE:
            news = [self._news(to, IS_SUSPECT)]
        if not self._rumours:
            return tuple(news)
        most = RETRANSMIT * math.ceil(math.log10(self._there() + 1))
        for rumour in sorted(self._rumours.values(), key=lambda rumour: rumour.told):
            if len(news) == limits.MAX_NEWS:
                break
            if rumour.news.board != own:
                news.append(rumour.news)
                rumour.told += 1
        self._rumours = {k: rumour for k, rumour in self._rumours.items() if rumour.told < most}
        return tuple(news)

    def digest(self) -> bytes:
        """What is believed of everybody, in 8 bytes; suspicions come and go and do not count."""
        view = hashlib.sha256()
        for news in self._view():
            view.update(
                news.board
                + bytes([news.state])
                + news.boot.to_bytes(8)
                + news.incarnation.to_bytes(8)
            )
        return view.digest()[:8]

    def _view(self) -> tuple[News, ...]:
        view = [News(self._id, IS_ALIVE, self._boot, self.incarnation, self._id)]
        for board, peer in self._members.peers.items():
            if peer.boot >= 0 and peer.presence is not Presence.UNHEARD:
                gone = peer.presence is Presence.GONE
                view.append(self._news(board, IS_GONE if gone else IS_ALIVE))
        view.sort(key=lambda news: news.board)
        return tuple(view[: limits.MAX_GROUP_BOARDS])

    # --- reports

    def announce(self, now_ms: int) -> None:
        """Tell everybody at once: something has changed that others should know."""
        self._report_ms = now_ms + REPORT_MS
        self._repeats = REPORT_REPEATS
        self._tell(self._reachable(), now_ms)

    def _report_due(self, now_ms: int) -> None:
        report = self._report(now_ms)
        if self._told is None or differs(self._told, report):
            self._repeats = REPORT_REPEATS
        elif self._repeats:
            self._repeats -= 1
        else:
            if self._latest is None or _figures(self._latest) != _figures(report):
                self._latest = report
                self._rides.clear()
            return
        self._told = self._latest = report
        self._rides.clear()
        for board in self._reachable():
            self._send(board, report)

    def _tell(self, boards: Iterable[BoardId], now_ms: int) -> None:
        self._told = self._latest = report = self._report(now_ms)
        for board in boards:
            self._send(board, report)

    def _ride(self, to: BoardId) -> Alive | None:
        """This board's report for a ping or an answer that goes out anyway, where it says more than
        what ``to`` was told before."""
        rides = self._rides.get(to, 0)
        if self._latest is self._told or rides >= REPORT_RIDES:
            return None
        self._rides[to] = rides + 1
        return self._latest

    # --- small change

    def last_words(self) -> None:
        """Good-bye to everybody within reach."""
        for board, peer in self._members.peers.items():
            if peer.linked:
                self._send(board, Leave(self._boot))

    def _reachable(self) -> list[BoardId]:
        return [
            board
            for board, peer in self._members.peers.items()
            if peer.linked and peer.presence in _THERE
        ]

    def _sample(self, boards: list[BoardId], most: int) -> list[BoardId]:
        return self._rng.sample(boards, min(most, len(boards)))

    def _send(self, to: BoardId, message: Message) -> None:
        self.out.append((to, message))


_THERE: Final = frozenset({Presence.ALIVE, Presence.SUSPECT})


def _figures(report: Alive) -> tuple[object, ...]:
    return tuple(getattr(report, name) for name in report.__struct_fields__ if name != "sequence")


def differs(old: Alive, new: Alive) -> bool:
    """Whether others should hear of the change at once: another state, or a figure off by a fifth
    of itself and by more than a little."""
    if (old.accepting, old.model, old.name) != (new.accepting, new.model, new.name):
        return True
    figures = (
        (old.waiting, new.waiting, 1),
        (old.running, new.running, 1),
        (old.expected_wait_ms, new.expected_wait_ms, 100),
        (old.proposal_ms, new.proposal_ms, 20),
        (old.aggregation_ms, new.aggregation_ms, 20),
        (old.utilisation_permille, new.utilisation_permille, 50),
    )
    return any(abs(was - now) >= max(0.2 * was, least) for was, now, least in figures)
