"""How rosters spread: what each board tells over its links of whom it trusts.

News goes to every link at once. Each packet says which roster its sender has by now, and where two
differ, each tells the other all of it, once for each pair of rosters. If they still differ then,
and one trusts boards that the other cannot believe, it vouches for them (:meth:`Roster.vouched`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId
from edgemoa.core.roster import Roster
from edgemoa.errors import BoardError, ProtocolError
from edgemoa.net import wire
from edgemoa.net.link import Link
from edgemoa.net.peer import Peer
from edgemoa.net.tasks import Tasks

log = logging.getLogger(__name__)

_MAX_UNREAD: Final = 8  # packets of one link
_MAX_TOLD: Final = 64  # pairs of rosters remembered for one link


@dataclass(slots=True, eq=False)
class _Talk:
    """What was said over one link."""

    peer: Peer
    unread: deque[wire.RosterNews] = field(default_factory=deque)
    heard: wire.RosterNews | None = None
    where: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    told: set[tuple[bytes, bytes]] = field(default_factory=set)
    vouched: set[bytes] = field(default_factory=set)
    next_at: float = 0.0  # not before this, all of it is told again
    timer: asyncio.TimerHandle | None = None
    reading: bool = False


class Gossip:
    """See the module.

    :param roster: the present one.
    :param change: has a new one written down and used.
    :param hint: takes note of where boards are said to be, by their :func:`envelope.key_id`.
    """

    def __init__(
        self,
        *,
        timings: wire.Timings,
        tasks: Tasks,
        rng: random.Random,
        roster: Callable[[], Roster],
        change: Callable[[Callable[[Roster], Roster]], Awaitable[object]],
        hint: Callable[[Mapping[bytes, tuple[str, int]]], None],
    ) -> None:
        self._timings = timings
        self._tasks = tasks
        self._rng = rng
        self._roster = roster
        self._change = change
        self._hint = hint
        self._talks: dict[Link, _Talk] = {}
        self._news: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def linked(self, link: Link, peer: Peer) -> None:
        """There is a link: tell its end what is here, and the others where it is."""
        here = [_where(other, talk.peer) for other, talk in self._talks.items()]
        self._talks[link] = _Talk(peer)
        self._send(link, where=[w for w in here if w])
        new = _where(link, peer)
        for other, talk in self._talks.items():
            if talk.peer is not peer and new:
                self._send(other, where=[new])

    def unlinked(self, link: Link) -> None:
        """That link has ended."""
        talk = self._talks.pop(link, None)
        if talk is not None and talk.timer is not None:
            talk.timer.cancel()

    def hear(self, _: Peer, link: Link, news: wire.RosterNews) -> None:
        """A peer says what it has."""
        talk = self._talks.get(link)
        if talk is None or len(talk.unread) >= _MAX_UNREAD:
            return  # what is missed shows in a later digest
        talk.unread.append(news)
        if not talk.reading:
            talk.reading = True
            self._tasks.spawn(self._read(link, talk), "hear a roster")

    def spread(self, records: Iterable[bytes], *, now: bool) -> None:
        """Tell everybody of these records; a moment later, so that some go together, or ``now``."""
        self._news += records
        for talk in self._talks.values():
            self._hint(talk.where)  # of a board that is trusted only now
        if self._timer is not None and now:
            self._timer.cancel()
            self._timer = None
        if now:
            self._flush()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._timings.gossip, self._flush)

    async def remind(self) -> None:
        """Say now and then which roster is here, in case that something was missed."""
        while True:
            await asyncio.sleep(self._timings.reminder * self._rng.uniform(0.75, 1.25))
            for link in list(self._talks):
                self._send(link)

    def stop(self) -> None:
        """No timer fires after this."""
        for link in list(self._talks):
            self.unlinked(link)
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        news, self._news = self._news, []
        counting = set(self._roster().records)
        records = [r for r in news if r in counting]
        for link in list(self._talks):
            self._send(link, records)

    def _send(
        self, link: Link, records: Iterable[bytes] = (), where: Iterable[wire.Where] = ()
    ) -> None:
        roster = self._roster()
        packet = wire.roster_packet(
            wire.RosterNews(roster.digest, tuple(roster.known), tuple(records), tuple(where))
        )
        if link.has_room(len(packet)):
            link.send_frame(packet)

    async def _read(self, link: Link, talk: _Talk) -> None:
        try:
            while talk.unread and link in self._talks:
                news = talk.unread.popleft()
                if news.records:
                    await self._change(lambda r, told=news.records: r.merged(told))  # type: ignore[misc]
                talk.heard = news
                talk.where |= {w.key_id: (w.host, w.port) for w in news.where}
                while len(talk.where) > limits.MAX_GROUP_BOARDS:
                    del talk.where[next(iter(talk.where))]
                self._hint(talk.where)
                self._compare(link, talk)
        except ProtocolError as error:
            talk.peer.on_offence(str(error))
            link.close(str(error))
        except (BoardError, OSError) as error:
            log.warning("what a board says of whom it trusts cannot be kept: %s", error)
        finally:
            talk.reading = False

    def _compare(self, link: Link, talk: _Talk) -> None:
        """If there is something to say, say it, but not all the time."""
        differs = talk.heard is not None and talk.heard.digest != self._roster().digest
        if differs and talk.timer is None and link in self._talks:
            loop = asyncio.get_running_loop()
            talk.timer = loop.call_at(max(talk.next_at, loop.time()), self._answer, link, talk)

    def _answer(self, link: Link, talk: _Talk) -> None:
        talk.timer = None
        roster, heard = self._roster(), talk.heard
        if (
            heard is None
            or heard.digest == roster.digest
            or talk.peer.board.id not in roster.trusted
        ):
            return
        pair = (roster.digest, heard.digest)
        if pair not in talk.told:
            if len(talk.told) >= _MAX_TOLD:
                talk.told.clear()
            talk.told.add(pair)
            talk.next_at = asyncio.get_running_loop().time() + self._timings.repair
            self._send(link, roster.records)
            return
        missing = set(roster.known) - set(heard.known) - talk.vouched
        if missing:
            talk.vouched |= missing
            self._tasks.spawn(self._vouch(frozenset(roster.known) - missing), "vouch for boards")
        elif heard.records:
            self._send(link)  # it may have to vouch, in its turn

    async def _vouch(self, known: frozenset[bytes]) -> None:
        try:
            await self._change(lambda roster: roster.vouched(known))
        except (BoardError, OSError) as error:
            log.warning("cannot vouch for boards: %s", error)


def _where(link: Link, peer: Peer) -> wire.Where | None:
    """Where a linked board is, if that means anything to others: an address with a scope does
    not."""
    host, port = link.udp_address
    if "%" in host or not host:
        return None
    return wire.Where(envelope.key_id(peer.board.public_key), host, port)


def trusted_by_key(roster: Roster) -> dict[bytes, BoardId]:
    """Every trusted board by its :func:`envelope.key_id`."""
    return {envelope.key_id(r.public_key): board for board, r in roster.trusted.items()}
