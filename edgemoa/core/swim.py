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
