"""One authenticated connection to a paired board: frames over TLS, and the datagrams beside it.

A link knows nothing of messages: packets in, packets out. Whoever makes it runs :meth:`Link.run`
until it returns and then has to consider the link gone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from typing import Protocol

from edgemoa.core import limits
from edgemoa.core.envelope import short
from edgemoa.core.messages import BoardId
from edgemoa.errors import ProtocolError
from edgemoa.net import sealed, wire
from edgemoa.net.tls import Connection

log = logging.getLogger(__name__)


class Receiver(Protocol):
    """Where a link's packets go."""

    def on_packet(self, link: Link, packet: bytes, *, datagram: bool) -> None:
        """A packet that the peer sent. :raises ProtocolError: if it is not a valid one."""

    def admits(self, size: int) -> bool:
        """Whether an authentic datagram of so many bytes is to be looked at."""

    def pause(self, size: int) -> float:
        """For how many seconds to read no further, after a frame of so many bytes."""

    def on_offence(self, what: str) -> None:
        """The peer, and nobody else, sent what no board should."""

    def on_roster(self, link: Link, packet: bytes) -> None:
        """What the peer says of whom it trusts. :raises ProtocolError: if it is malformed."""

    def on_room(self) -> None:
        """Frames went out: :meth:`Link.has_room` may have changed."""


async def greet(connection: Connection, own: wire.Hello, timings: wire.Timings) -> wire.Hello:
    """Exchange HELLO: the board that was dialled speaks first.

    :raises ProtocolError: if the other says something else, or shares no version.
    :raises OSError, EOFError: if the connection breaks, which for the dialling board is the usual
        sign that the other one does not know it; TimeoutError if nothing comes.
    """
    async with asyncio.timeout(timings.handshake):
        if not connection.dialled:
            connection.writer.write(wire.framed(wire.hello_packet(own)))
        packet = await wire.read_frame(connection.reader, wire.MAX_HELLO_BYTES, timings.handshake)
        hello = wire.read_hello(packet)
        if connection.dialled:
            connection.writer.write(wire.framed(wire.hello_packet(own)))
        return hello


class Link:
    """See the module.

    :param own: what this end said in its HELLO, and ``hello`` what the other said.
    :param sendto: sends a datagram to an IP address and port, or drops it.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        own_id: BoardId,
        peer_id: BoardId,
        own: wire.Hello,
        hello: wire.Hello,
        receiver: Receiver,
        sendto: Callable[[bytes, tuple[str, int]], None],
        timings: wire.Timings,
    ) -> None:
        self.connection = connection
        self.peer_id = peer_id
        self.hello = hello
        self.key_id = own.key_id
        self.dialler = own_id if connection.dialled else peer_id
        self.udp_address = (connection.address[0], hello.port)
        self.udp_works = False  # until a PONG or ACK came by datagram
        self._receiver = receiver
        self._sendto = sendto
        self._timings = timings
        self._sealer = sealed.Sealer(
            sealed.direction_key(own_id, peer_id, own.secret, hello.secret), hello.key_id
        )
        self._opener = sealed.Opener(
            sealed.direction_key(peer_id, own_id, hello.secret, own.secret)
        )
        self._loop = asyncio.get_running_loop()
        self._frames: deque[bytes] = deque()
        self._queued_bytes = 0
        self._more = asyncio.Event()
        self._closed: asyncio.Future[str] = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._acks: list[tuple[int, bool]] = []
        self._ping = 0  # the number in the last PING that nobody answered; 0 for none
        self._datagram_losses = 0

    # --- sending

    def has_room(self, size: int, most: int = limits.MAX_LINK_QUEUE_BYTES) -> bool:
        """Whether a frame of ``size`` bytes may be queued now, of ``most`` altogether."""
        return not self._frames or self._queued_bytes + size <= most

    def send_frame(self, packet: bytes) -> None:
        """Queue a packet for the connection, behind what is queued."""
        self._frames.append(packet)
        self._queued_bytes += len(packet)
        self._more.set()

    def send_datagram(self, packet: bytes) -> None:
        """Seal a packet of at most :data:`sealed.MAX_PLAINTEXT_BYTES` and send it; may be lost."""
        self._sendto(self._sealer.seal(packet), self.udp_address)

    def acknowledge(self, sequence: int, *, datagram: bool) -> None:
        """Tell the peer that its envelope arrived, together with others of this loop pass."""
        if not self._acks:
            self._loop.call_soon(self._send_acks)
        self._acks.append((sequence, datagram))

    def lost_datagram(self) -> None:
        """An envelope had to go over the connection after all; after three, all of them do."""
        self._datagram_losses += 1
        if self._datagram_losses >= 3:
            self.udp_works = False

    def _send_acks(self) -> None:
        acks, self._acks = self._acks, []
        for by_datagram in (True, False):
            numbers = [n for n, datagram in acks if datagram is by_datagram]
            for at in range(0, len(numbers), wire.MAX_ACKS):
                packet = wire.numbered(wire.ACK, *numbers[at : at + wire.MAX_ACKS])
                if by_datagram:
                    self.send_datagram(packet)
                elif self.has_room(len(packet)):  # a peer that only talks is not fed
                    self.send_frame(packet)

    # --- receiving

    def idle(self) -> float:
        """Seconds since the peer was last heard."""
        return self._loop.time() - self._heard_at

    def receive_datagram(self, datagram: bytes) -> None:
        """A datagram with this link's key id.

        :raises ProtocolError: if it is not from the peer, came before, or holds no valid packet.
        """
        packet = self._opener.open(datagram)
        if not self._receiver.admits(len(datagram)):
            return
        try:
            self._receive(packet, datagram=True)
        except ProtocolError as error:
            self._receiver.on_offence(str(error))
            raise

    def _receive(self, packet: bytes, *, datagram: bool) -> None:
        self._heard_at = self._loop.time()
        match packet[0] if packet else None:
            case wire.PING:
                pong = wire.numbered(wire.PONG, wire.read_numbers(packet)[0])
                if datagram:
                    self.send_datagram(pong)
                elif self.has_room(len(pong)):
                    self.send_frame(pong)
            case wire.PONG:
                if datagram and self._ping in wire.read_numbers(packet):
                    self._ping = 0
                    self._datagrams_arrive()
            case wire.HOP | wire.ENVELOPE | wire.ACK:
                if datagram and packet[0] == wire.ACK:
                    self._datagrams_arrive()
                self._receiver.on_packet(self, packet, datagram=datagram)
            case wire.ROSTER if not datagram:
                self._receiver.on_roster(self, packet)
            case wire.BYE if not datagram:
                self.close(f"it ended the link: {wire.read_bye(packet)}")
            case wire.HELLO | None:
                raise ProtocolError("packet out of place")
            case _:
                pass  # a kind that a newer board of this version added

    def _datagrams_arrive(self) -> None:
        self._datagram_losses = 0
        self.udp_works = True

    # --- living

    async def is_alive(self, seconds: float) -> bool:
        """Whether the peer shows within so many seconds that it is there."""
        asked = self._loop.time()
        ping = wire.numbered(wire.PING, secrets.randbits(63) | 1)
        self.send_datagram(ping)
        self.send_frame(ping)
        while not self.closed and self._loop.time() - asked < seconds:
            if self._heard_at > asked:
                return True
            await asyncio.sleep(0.01)
        return False

    def part(self, reason: str) -> None:
        """End the link, and let the peer know why, as far as that gets through."""
        if not self.closed:
            self.connection.writer.write(wire.framed(wire.bye_packet(reason)))
            self.close(reason)

    def close(self, reason: str) -> None:
        """End the link; :meth:`run` returns ``reason``. What is queued is lost."""
        if not self._closed.done():
            self._closed.set_result(reason)

    @property
    def closed(self) -> bool:
        """Whether the link has ended or is about to."""
        return self._closed.done()

    async def flush(self) -> None:
        """Wait until everything queued was handed to the system."""
        while self._frames and not self.closed:  # noqa: ASYNC110 (only while stopping)
            await asyncio.sleep(0.01)

    async def run(self) -> str:
        """Serve the link until it ends; returns why. Its connection is closed then."""
        tasks = [
            self._loop.create_task(work, name=f"link {short(self.peer_id)}")
            for work in (self._read(), self._write(), self._probe())
        ]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        try:
            return await self._closed
        finally:
            self.close("cancelled")
            for task in tasks:
                task.cancel()
            self.connection.abort()
            # Each task's own failure has become the link's reason, in _task_ended.
            await asyncio.gather(*tasks, return_exceptions=True)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        match task.exception():
            case None | EOFError() | OSError():
                self.close("connection lost")
            case ProtocolError() as error:
                self.close(str(error))
            case error:
                self.close("internal error")
                task.get_loop().call_exception_handler(
                    {"message": "a link failed", "exception": error}
                )

    async def _read(self) -> None:
        reader, timeout = self.connection.reader, self._timings.frame
        while True:
            try:
                packet = await wire.read_frame(reader, limits.MAX_FRAME_BYTES, timeout)
                self._receive(packet, datagram=False)
            except ProtocolError as error:
                self._receiver.on_offence(str(error))
                raise
            pause = self._receiver.pause(len(packet))
            if pause:
                await asyncio.sleep(pause)

    async def _write(self) -> None:
        writer = self.connection.writer
        # Under TLS, half a megabyte would wait there otherwise before anything waits here.
        writer.transport.set_write_buffer_limits(limits.MAX_PARTS_QUEUE_BYTES)
        while True:
            await self._more.wait()
            while self._frames:
                packet = self._frames.popleft()
                self._queued_bytes -= len(packet)
                writer.write(wire.framed(packet))
                try:
                    async with asyncio.timeout(self._timings.write):
                        await writer.drain()
                except TimeoutError:
                    raise ProtocolError("the other board does not read") from None
            self._more.clear()
            self._receiver.on_room()

    async def _probe(self) -> None:
        """Find out whether datagrams get through, and go on finding out."""
        waits = self._timings.ping
        tries = 0
        while True:
            self._ping = secrets.randbits(63) | 1
            self.send_datagram(wire.numbered(wire.PING, self._ping))
            if self.udp_works and not self._datagram_losses:
                tries = len(waits) - 1
            await asyncio.sleep(waits[tries])
            if not self._ping:
                continue
            if self.udp_works:  # did it stop working? ask again soon
                self.lost_datagram()
                tries = len(waits) // 2
            else:
                tries = min(tries + 1, len(waits) - 1)
