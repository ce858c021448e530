"""One paired board: the messages on their way to it, and those that came from it.

Messages wait here, not in a link, so that they survive when the link is replaced. Each is signed
for one boot of the recipient. What was sent to an earlier boot and not acknowledged is reported as
undelivered when the board comes back: nobody knows whether it was acted on. What was never sent
goes to the new boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from edgemoa.core import envelope, limits
from edgemoa.core.envelope import short
from edgemoa.core.messages import HOP_MESSAGES, BoardId, Message, Part, goes_over_link
from edgemoa.errors import ProtocolError
from edgemoa.net import sealed, wire
from edgemoa.net.conduct import Conduct
from edgemoa.net.identity import Identity
from edgemoa.net.link import Link
from edgemoa.net.tls import Connection
from edgemoa.net.twins import Twins
from edgemoa.store import PairedBoard

log = logging.getLogger(__name__)

_MAX_LINKS = 3  # over which one message is tried; a peer that breaks links over it will not take it


class Events(Protocol):
    """What a peer has to tell."""

    def on_message(self, sender: BoardId, message: Message) -> None: ...
    def on_undelivered(self, to: BoardId, message: Message) -> None: ...


@dataclass(slots=True)
class Budget:
    """Bytes that wait for all boards together."""

    left: int = limits.MAX_ALL_OUTBOXES_BYTES


@dataclass(slots=True, eq=False)
class _Outgoing:
    message: Message
    kind: str
    body: bytes
    queued_at: float
    sequence: int = 0  # 0: not sent yet
    packet: bytes = b""
    datagrams: int = 0  # sent over the link that is now
    links: int = 0
    timer: asyncio.TimerHandle | None = None

    def after(self, delay: float, action: Callable[[_Outgoing], None]) -> None:
        self.stop()
        self.timer = asyncio.get_running_loop().call_later(delay, action, self)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


@dataclass(slots=True)
class _Incoming:
    """What came from one boot of the peer."""

    boot: int = -1
    window: sealed.ReplayWindow = field(default_factory=sealed.ReplayWindow)


class Peer:
    """See the module. All of it runs in the event loop; no method blocks or raises for a peer's
    absence."""

    def __init__(
        self,
        board: PairedBoard,
        *,
        identity: Identity,
        boot: int,
        events: Events,
        budget: Budget,
        timings: wire.Timings,
        hear: Callable[[Peer, Link, wire.RosterNews], None] = lambda *_: None,
    ) -> None:
        self.board = board
        self.link: Link | None = None
        self.changed = asyncio.Event()  # set when there is reason to look at link and addresses
        self.detail = ""
        self.given = ""  # what people want it to be called
        self.twins = Twins(timings)
        self.duplicates = 0
        self.conduct = Conduct(time.monotonic())
        self._copies: set[Connection] = set()
        self._identity = identity
        self._key_id = envelope.key_id(identity.public_key)
        self._boot = boot
        self._events = events
        self._budget = budget
        self._hear = hear
        self._timings = timings
        self._authors = {
            envelope.key_id(board.public_key): envelope.Author.from_key(board.public_key)
        }
        self._waiting: deque[_Outgoing] = deque()
        self._in_flight: dict[int, _Outgoing] = {}  # by sequence, ascending
        self._outbox_bytes = 0
        self._sequence = 0
        self._sent_to_boot = -1
        self._incoming = _Incoming()
        self._heard_at: float | None = None

    @property
    def outbox(self) -> int:
        """Messages that are not yet known to have arrived."""
        return len(self._waiting) + len(self._in_flight)

    @property
    def name(self) -> str:
        """What to call it before people."""
        return self.given or self.board.name or short(self.board.id)

    @property
    def known_as(self) -> str:
        """The name that people gave it, else the one that it calls itself, else ""."""
        return self.given or self.board.name

    @property
    def gray_s(self) -> float:
        """For how long nothing is to do with it, in seconds; see :mod:`edgemoa.net.conduct`."""
        return self.conduct.gray_s(time.monotonic())

    def heard_age(self) -> float | None:
        """Seconds since this board was last heard; None if never in this run."""
        if self.link is not None:
            return self.link.idle()
        if self._heard_at is None:
            return None
        return asyncio.get_running_loop().time() - self._heard_at

    # --- links

    def attach(self, link: Link) -> bool:
        """A new link: use it instead of the one there is, or not at all (False).

        Both ends decide alike: a link to another boot replaces; so does one that the same board
        dialled, as it would not have, had it still had the other; so does any if the old one is
        silent. Else both dialled at once, and the link from the smaller identity stays.
        """
        if self.gray_s:
            return False
        old = self.link
        if (
            old is not None
            and not old.closed
            and old.hello.boot == link.hello.boot
            and old.dialler != link.dialler
            and old.idle() < self._timings.idle
            and link.dialler != min(self.board.id, self._identity.board_id)
        ):
            return False
        if old is not None:
            old.close("replaced by a newer link")
        self.link = link
        if self._incoming.boot != link.hello.boot:
            self._incoming = _Incoming(link.hello.boot)
        lost = []
        if self._sent_to_boot != link.hello.boot:
            self._sent_to_boot = link.hello.boot
            self._sequence = 0
            lost = list(self._in_flight.values())
            self._in_flight.clear()
        again = list(self._in_flight.values())
        for entry in [*again, *self._waiting]:
            entry.stop()
        for entry in lost:
            self._undelivered(entry)
        for entry in again:
            entry.datagrams = 0
            entry.links += 1
            if entry.links > _MAX_LINKS:
                self._give_up(entry)
            else:
                self._transmit(entry, link)
        self._pump()
        self.changed.set()
        return True

    def detach(self, link: Link) -> None:
        """A link has ended. What is not acknowledged waits for another one, for a while."""
        if self.link is not link:
            return
        self.link = None
        self._heard_at = asyncio.get_running_loop().time() - link.idle()
        for entry in [*self._in_flight.values(), *self._waiting]:
            entry.after(self._timings.no_link, self._give_up)
        self.changed.set()

    @contextlib.contextmanager
    def copying(self, connection: Connection) -> Iterator[None]:
        """Models are copied over this connection, for as long as the board is paired."""
        self._copies.add(connection)
        try:
            yield
        finally:
            self._copies.discard(connection)
            connection.abort()

    def drop(self, reason: str) -> None:
        """The board is no longer paired: whatever waits for it is undelivered."""
        for entry in [*self._in_flight.values(), *self._waiting]:
            self._give_up(entry)
        if self.link is not None:
            self.link.part(reason)
        self._end_copies()

    def silence(self) -> None:
        """Stop: no timer fires after this, and nothing is reported; copies of models end."""
        for entry in [*self._in_flight.values(), *self._waiting]:
            entry.stop()
        self._end_copies()

    def _end_copies(self) -> None:
        for connection in self._copies:
            connection.abort()

    # --- out

    def send(self, message: Message) -> None:
        """Deliver a message, or call ``on_undelivered`` once, later. A hop message is sent or
        forgotten, without either; but a part of a text is undelivered where it cannot be sent."""
        loop = asyncio.get_running_loop()
        kind, body = envelope.encode(message)
        if isinstance(message, Part):
            self._send_part(message, bytes([wire.HOP]) + body)
            return
        if isinstance(message, HOP_MESSAGES):
            self._send_hop(bytes([wire.HOP]) + body, surely=goes_over_link(message))
            return
        entry = _Outgoing(message, kind, body, loop.time())
        size = len(body)
        if (
            self.outbox >= limits.MAX_OUTBOX_MESSAGES
            or self._outbox_bytes + size > limits.MAX_OUTBOX_BYTES
            or size > min(limits.MAX_FRAME_BYTES - limits.KIB, self._budget.left)
        ):
            log.warning("no room to send", extra={"board": self.board.id, "type": kind})
            loop.call_soon(self._events.on_undelivered, self.board.id, message)
            return
        self._outbox_bytes += size
        self._budget.left -= size
        self._waiting.append(entry)
        if self.link is None:
            entry.after(self._timings.no_link, self._give_up)
        else:
            self._pump()

    def admits(self, size: int) -> bool:
        """See :class:`edgemoa.net.link.Receiver`."""
        return self.conduct.admits(size, time.monotonic())

    def pause(self, size: int) -> float:
        """See :class:`edgemoa.net.link.Receiver`."""
        return self.conduct.pause(size, time.monotonic())

    def on_offence(self, what: str) -> None:
        """See :class:`edgemoa.net.link.Receiver`."""
        if self.conduct.offend(what, time.monotonic()):
            log.warning(
                "a board misbehaves and is left alone for a while",
                extra={"board": self.board.id, "reason": what, "for_s": round(self.gray_s)},
            )
            if self.link is not None:
                self.link.close(what)
            self._end_copies()

    def on_roster(self, link: Link, packet: bytes) -> None:
        """See :class:`edgemoa.net.link.Receiver`."""
        self._hear(self, link, wire.read_roster(packet))

    def on_room(self) -> None:
        """See :class:`edgemoa.net.link.Receiver`."""
        self._pump()

    def _send_hop(self, packet: bytes, *, surely: bool) -> None:
        link = self.link
        if link is None:
            return
        if not surely and link.udp_works and len(packet) <= sealed.MAX_PLAINTEXT_BYTES:
            link.send_datagram(packet)
        elif link.has_room(len(packet)):
            link.send_frame(packet)

    def _send_part(self, part: Part, packet: bytes) -> None:
        """Over the connection, which keeps the order, while little waits there. What is not sent
        now, the next part brings along: a slow reader gets fewer and longer ones."""
        if self.link is not None and self.link.has_room(len(packet), limits.MAX_PARTS_QUEUE_BYTES):
            self.link.send_frame(packet)
        else:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._events.on_undelivered, self.board.id, part)

    def _pump(self) -> None:
        """Send what may be sent. The sequences in flight stay within the receiver's window."""
        link = self.link
        while link is not None and self._waiting and len(self._in_flight) < limits.MAX_IN_FLIGHT:
            oldest = next(iter(self._in_flight), self._sequence + 1)
            if self._sequence + 1 - oldest >= limits.REPLAY_WINDOW - 1:
                return
            entry = self._waiting[0]
            if len(entry.body) > sealed.MAX_PLAINTEXT_BYTES and not link.has_room(len(entry.body)):
                return
            self._waiting.popleft()
            self._sequence += 1
            entry.sequence = self._sequence
            entry.packet = (
                bytes([wire.ENVELOPE])
                + entry.sequence.to_bytes(wire.NUMBER_BYTES)
                + envelope.sign(
                    entry.kind,
                    entry.body,
                    key=self._key_id,
                    signer=self._identity.sign,
                    boot=self._boot,
                    sequence=entry.sequence,
                    to=self.board.id,
                    to_boot=link.hello.boot,
                )
            )
            entry.links = 1
            self._in_flight[entry.sequence] = entry
            self._transmit(entry, link)

    def _transmit(self, entry: _Outgoing, link: Link) -> None:
        small = len(entry.packet) <= sealed.MAX_PLAINTEXT_BYTES
        if small and link.udp_works and entry.datagrams < len(self._timings.resend):
            link.send_datagram(entry.packet)
            entry.after(self._timings.resend[entry.datagrams], self._resend)
            entry.datagrams += 1
        else:
            if entry.datagrams:
                link.lost_datagram()
            link.send_frame(entry.packet)
            entry.after(self._timings.silence, self._overdue)

    def _resend(self, entry: _Outgoing) -> None:
        if self.link is not None:
            self._transmit(entry, self.link)

    def _overdue(self, entry: _Outgoing) -> None:
        link = self.link
        age = asyncio.get_running_loop().time() - entry.queued_at
        if link is not None and link.idle() >= self._timings.silence:
            link.close("the other board is silent")
            self._give_up(entry)
        elif age >= self._timings.deliver:
            self._give_up(entry)
            self._pump()  # its place is free
        else:
            entry.after(1.0, self._overdue)

    def _give_up(self, entry: _Outgoing) -> None:
        if entry.sequence:
            del self._in_flight[entry.sequence]
        else:
            self._waiting.remove(entry)
        self._undelivered(entry)

    def _undelivered(self, entry: _Outgoing) -> None:
        self._forget(entry)
        log.info("undelivered", extra={"board": self.board.id, "type": entry.kind})
        # Not now: the handler may send, or be the very one that called us.
        asyncio.get_running_loop().call_soon(
            self._events.on_undelivered, self.board.id, entry.message
        )

    def _forget(self, entry: _Outgoing) -> None:
        entry.stop()
        self._outbox_bytes -= len(entry.body)
        self._budget.left += len(entry.body)

    # --- in

    def on_packet(self, link: Link, packet: bytes, *, datagram: bool) -> None:
        """See :class:`edgemoa.net.link.Receiver`."""
        if packet[0] == wire.ACK:
            if link.hello.boot != self._sent_to_boot:
                return  # said before the board restarted, about numbers that are used again
            for sequence in wire.read_numbers(packet):
                entry = self._in_flight.pop(sequence, None)
                if entry is not None:
                    self._forget(entry)
            self._pump()
        elif packet[0] == wire.HOP:
            message = envelope.decode_hop(packet[1:])
            if not (datagram and isinstance(message, Part)):
                self._events.on_message(self.board.id, message)
        else:
            self._on_envelope(link, packet, datagram=datagram)

    def _on_envelope(self, link: Link, packet: bytes, *, datagram: bool) -> None:
        start = 1 + wire.NUMBER_BYTES
        sequence = int.from_bytes(packet[1:start])
        incoming = self._incoming
        if link.hello.boot != incoming.boot:
            raise ProtocolError("envelope over a link of an earlier boot")
        if incoming.window.seen(sequence):
            self.duplicates += 1
            link.acknowledge(sequence, datagram=datagram)
            return
        opened = envelope.verify(
            packet[start:], self._authors, to=self._identity.board_id, to_boot=self._boot
        )
        if (opened.sequence, opened.boot) != (sequence, incoming.boot):
            raise ProtocolError("envelope under another number than its own")
        incoming.window.mark(sequence)
        link.acknowledge(sequence, datagram=datagram)
        self._events.on_message(self.board.id, opened.message)

    def __repr__(self) -> str:
        return f"Peer({short(self.board.id)})"
