"""Who is there, found out by asking each other: SWIM with Lifeguard's additions.

Every second a board pings one other, that which it has not heard for longest. One that does not
answer is asked for by three others, and over the connection; if that fails too, it is suspected.
Suspicions spread as news on datagrams that are sent anyway, and on a few more while there are any.
Whoever hears one pings the board at once and tells it, so that it can contradict, by a higher
incarnation. It is gone when nothing has contradicted for some time, the shorter the more boards
found the same by themselves.

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
        *,
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
        self.deaths = 0
        """How often a board was given up here that had been there."""
        self._boot = boot
        self._members = members
        self._rng = rng
        self._report = report
        self._id = short_id(own)
        self._ids: dict[BoardId, bytes] = {}
        self._boards: dict[bytes, BoardId] = {}
        self._number = 0
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
        if board not in self._ids:
            return
        self._settle(board)
        known = self._ids.pop(board)
        del self._boards[known]
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

    # --- asking

    def _probe_next(self, now_ms: int) -> None:
        """Ask the board that was neither heard nor asked for longest; but each in two rounds, since
        who is heard need not hear. One that is gone while its link stands, as after a partition, is
        called as well, without waiting for an answer."""
        peers = [
            peer
            for board, peer in self._members.peers.items()
            if (peer.there or (peer.linked and not peer.left)) and board not in self._probes
        ]
        if not peers:
            return
        overdue_ms = now_ms - 2 * PROBE_MS * len(peers)

        def silent_since(peer: Peer) -> tuple[float, float]:
            only_heard = peer.mute or peer.asked_ms < overdue_ms
            since_ms = peer.asked_ms if only_heard else max(peer.heard_ms, peer.asked_ms)
            return since_ms, self._rng.random()

        peer = min(peers, key=silent_since)
        if peer.there:
            self._probe(peer.board, now_ms)
        else:
            peer.asked_ms = now_ms
            self._ping(peer.board, self._next_number(), sure=True)

    def _ping(self, board: BoardId, number: int, *, sure: bool = False) -> None:
        news, report = self._some(board), self._ride(board)
        self._send(board, Ping(number, self.incarnation, news, report, sure))

    def _probe(self, board: BoardId, now_ms: int) -> None:
        if board in self._probes:
            return
        stretch = self.health + 1
        probe = _Probe(
            board, self._next_number(), now_ms + TIMEOUT_MS * stretch, now_ms + PROBE_MS * stretch
        )
        self._probes[board] = probe
        self._members.peers[board].asked_ms = now_ms
        if self._members.peers[board].linked:
            self._ping(board, probe.number)
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
            self._ping(probe.board, probe.number, sure=True)

    def _probe_due(self, probe: _Probe, now_ms: int) -> None:
        if probe.helpers < 0:
            self._ask_around(probe, now_ms)
            return
        del self._probes[probe.board]
        peer = self._members.peers[probe.board]
        if probe.vouched:
            peer.mute = True
            return
        if not peer.there:
            return
        missing = probe.helpers - probe.nacks if probe.helpers else 1
        self.health = min(max(self.health + missing, 0), MAX_HEALTH)
        self._suspect(peer, self._id, now_ms)
        self._suspicions[probe.board].again_ms = now_ms + AGAIN_MS

    # --- suspecting

    def _needed(self) -> int:
        """Others that have to find the same, for a suspicion to be as short as it gets."""
        return min(CONFIRMATIONS, self._size() - 2)

    def _size(self) -> int:
        """How many boards the group has now, as far as is known, this one included."""
        return 1 + sum(peer.there for peer in self._members.peers.values())

    def _suspect(self, peer: Peer, by: bytes, now_ms: int) -> None:
        """Somebody found that a board does not answer. What follows is for :meth:`tick`: what is
        heard from the board may be next in line, where this one is late to listen."""
        suspicion = self._suspicions.get(peer.board)
        if suspicion is None:
            least_ms = round(SUSPICION_MS * max(1.0, math.log10(self._size())))
            suspicion = self._suspicions[peer.board] = _Suspicion(now_ms, least_ms, now_ms)
        if by == self._id:
            self._members.move(peer.board, SILENT)
        if by not in suspicion.by and (len(suspicion.by) <= CONFIRMATIONS or by == self._id):
            suspicion.by.add(by)
            self._spread(self._news(peer.board, IS_SUSPECT, by))

    def _may_end(self, board: BoardId) -> bool:
        """Whether time alone makes a suspected board gone: with a link, this board has to have
        found by itself that it does not answer."""
        return self._id in self._suspicions[board].by or not self._members.peers[board].linked

    def _suspicion_due(self, board: BoardId, now_ms: int) -> None:
        suspicion = self._suspicions[board]
        if self._may_end(board) and now_ms >= suspicion.ends_ms(self._needed()):
            self._gone(self._members.peers[board], self._id)
        elif now_ms >= suspicion.again_ms:
            suspicion.again_ms = now_ms + AGAIN_MS
            self._probe(board, now_ms)

    def _gone(self, peer: Peer, by: bytes) -> None:
        was_there = peer.there
        self._settle(peer.board)
        self._members.move(peer.board, LOST)
        self._spread(self._news(peer.board, IS_GONE, by))
        if was_there:
            self.deaths += 1
            self.lost.append((peer.board, "fell silent"))

    def _calm(self, board: BoardId) -> None:
        """It is not suspected any more."""
        if self._suspicions.pop(board, None) is not None:
            self._drop_rumours(self._ids[board], doubts=True)

    def _settle(self, board: BoardId) -> None:
        """What was being found out about it is known."""
        self._calm(board)
        self._probes.pop(board, None)

    # --- news

    def _news(self, board: BoardId, state: int, by: bytes = b"") -> News:
        peer = self._members.peers[board]
        return News(self._ids[board], state, max(peer.boot, 0), peer.incarnation, by or self._id)

    def _take(self, sender: BoardId, news: Iterable[News], now_ms: int) -> None:
        for each in news:
            board = self._boards.get(each.board)
            if each.board == self._id:
                self._accused(sender, each)
            elif board is not None and board != sender:  # of itself it says all by its messages
                self._learn(self._members.peers[board], each, now_ms)

    def _accused(self, sender: BoardId, news: News) -> None:
        """Others doubt that this board is there."""
        doubted = news.state != IS_ALIVE and news.boot == self._boot
        if not doubted or not self.incarnation <= news.incarnation <= self.incarnation + LEAP:
            return
        self.incarnation = news.incarnation + 1
        own = News(self._id, IS_ALIVE, self._boot, self.incarnation, self._id)
        self._spread(own)
        self._send(sender, Gossip((own,)))

    def _learn(self, peer: Peer, news: News, now_ms: int) -> None:
        if news.boot != peer.boot:
            # A link says which boot is there. Without one, the later boot is the one that counts.
            if peer.linked or news.boot < peer.boot:
                return
        elif not peer.incarnation <= news.incarnation <= peer.incarnation + LEAP:
            return
        match news.state:
            case 0:  # IS_ALIVE
                self._learn_alive(peer, news)
            case 1:  # IS_SUSPECT
                self._learn_suspect(peer, news, now_ms)
            case 2 if peer.linked:  # IS_GONE, but this board wants to find that itself
                self._learn_suspect(peer, news, now_ms)
            case 2:
                self._learn_gone(peer, news)

    def _learn_alive(self, peer: Peer, news: News) -> None:
        newer = (news.boot, news.incarnation) > (peer.boot, peer.incarnation)
        if not newer and peer.presence is not Presence.UNHEARD:
            return
        self._adopt(peer, news)
        self._calm(peer.board)
        self._members.vouched(peer.board)
        self._spread(news)

    def _learn_suspect(self, peer: Peer, news: News, now_ms: int) -> None:
        if news.boot == peer.boot and peer.there:
            peer.incarnation = news.incarnation
            self._suspect(peer, news.by, now_ms)

    def _learn_gone(self, peer: Peer, news: News) -> None:
        if peer.presence is not Presence.GONE or news.boot != peer.boot:
            self._adopt(peer, news)
            self._gone(peer, news.by)

    def _adopt(self, peer: Peer, news: News) -> None:
        """Others know of a later life of the board."""
        if self._members.is_boot(peer.board, news.boot):
            self.lost.append((peer.board, "restarted"))
        peer.incarnation = news.incarnation

    def _spread(self, news: News) -> None:
        by = news.by if news.state == IS_SUSPECT else b""
        if not by:
            self._drop_rumours(news.board)
        self._rumours[news.board, by] = _Rumour(news)

    def _drop_rumours(self, board: bytes, *, doubts: bool = False) -> None:
        """All news of a board, or only that it is suspected."""
        for key in [key for key in self._rumours if key[0] == board and (key[1] or not doubts)]:
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
        most = RETRANSMIT * math.ceil(math.log10(self._size() + 1))
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
            state = bytes([news.state])
            view.update(news.board + state + news.boot.to_bytes(8) + news.incarnation.to_bytes(8))
        return view.digest()[:8]

    def _view(self) -> tuple[News, ...]:
        view = [News(self._id, IS_ALIVE, self._boot, self.incarnation, self._id)]
        for board, peer in self._members.peers.items():
            if peer.boot >= 0 and peer.presence is not Presence.UNHEARD:
                view.append(self._news(board, IS_ALIVE if peer.there else IS_GONE))
        view.sort(key=lambda news: news.board)
        return tuple(view[: limits.MAX_GROUP_BOARDS])

    # --- reports

    def announce(self, now_ms: int) -> None:
        """Tell everybody at once: something has changed that others should know."""
        self._repeats = REPORT_REPEATS
        self._tell_all(self._report(now_ms), now_ms)

    def _report_due(self, now_ms: int) -> None:
        report = self._report(now_ms)
        if self._latest is None or _figures(self._latest) != _figures(report):
            self._latest = report
            self._rides.clear()
        stale = report.is_busy and now_ms >= self._told_ms + REFRESH_MS
        if self._told is None or differs(self._told, report):
            self._repeats = REPORT_REPEATS
        elif self._repeats:
            self._repeats -= 1
        elif not stale:
            return
        self._tell_all(report, now_ms)

    def _tell_all(self, report: Alive, now_ms: int) -> None:
        self._told, self._told_ms = report, now_ms
        for board in self._reachable():
            self._send(board, report)

    def _ride(self, to: BoardId) -> Alive | None:
        """This board's report, for what goes to ``to`` anyway, where that may not know it yet."""
        rides = self._rides.get(to, 0)
        if rides >= REPORT_RIDES:
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
        return [board for board, peer in self._members.peers.items() if peer.linked and peer.there]

    def _sample(self, boards: list[BoardId], most: int) -> list[BoardId]:
        return self._rng.sample(boards, min(most, len(boards)))

    def _send(self, to: BoardId, message: Message) -> None:
        self.out.append((to, message))


def _said(news: News, of: Iterable[News]) -> bool:
    """Whether ``of`` says the same, whoever found it."""
    same = news.board, news.state, news.boot, news.incarnation
    return any((each.board, each.state, each.boot, each.incarnation) == same for each in of)


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
