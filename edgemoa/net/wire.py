"""What both ends of a connection agree on: packets, frames, HELLO, and how long things may take.

A packet is one byte that says its kind, and a body. It travels either in a sealed datagram
(:mod:`edgemoa.net.sealed`) or as a frame on the link: its length in 4 bytes, big endian, before it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from edgemoa.core import envelope, limits
from edgemoa.core.messages import printable
from edgemoa.errors import PairingError, ProtocolError

MIN_VERSION: Final = 1
MAX_VERSION: Final = 1
"""Of the protocol as a whole; both ends use the highest that both have."""

SECRET_BYTES: Final = 32
KEY_ID_BYTES: Final = 8
NUMBER_BYTES: Final = 8
LENGTH_BYTES: Final = 4

# Kinds of packets
HOP: Final = 0  # a message that is neither signed nor repeated
ENVELOPE: Final = 1  # sequence (8), envelope; answered by ACK
ACK: Final = 2  # the sequences (8 each) of envelopes that arrived
PING: Final = 3  # a number (8), to be sent back by the same way
PONG: Final = 4
HELLO: Final = 5  # the first frame of a link, never in a datagram
ROSTER: Final = 6  # whom the sender trusts; only over the link
BYE: Final = 7  # why the sender ends the link, or does not begin one; only over the link

MAX_ACKS: Final = 64  # in one packet
MAX_HELLO_BYTES: Final = 1 * limits.KIB


@dataclass(frozen=True, slots=True)
class Timings:
    """How long to wait, in seconds. The defaults are the protocol's; tests shorten them."""

    handshake: float = 3.0  # TCP connection; TLS handshake; HELLO: each
    pairing: float = 5.0  # a pairing run as a whole
    frame: float = 30.0  # the rest of a frame, once its length is there
    write: float = 10.0  # a peer that reads nothing for so long is cut off
    resend: tuple[float, ...] = (0.1, 0.2, 0.3)  # wait after each datagram; then over the link
    silence: float = 10.0  # unacknowledged, and nothing at all heard: the link is dead
    deliver: float = 30.0  # unacknowledged for so long is undelivered
    no_link: float = 3.0  # undelivered when there is no link for so long
    idle: float = 3.0  # a link that was silent so long gives way to a new one
    ping: tuple[float, ...] = (0.02, 0.1, 0.4, 1.0, 10.0)  # between tries to reach a peer by UDP
    retry_min: float = 0.25  # between rounds of dialling, doubled each time ...
    retry_max: float = 8.0  # ... up to this
    yield_dial: float = 0.4  # the board with the larger identity lets the other dial first
    yield_pairing: float = 1.0
    alive: float = 0.5  # for a board to show that a link is alive, before another takes its place
    quarantine: float = 300.0  # for a key that two boards have, since both were last seen
    gossip: float = 0.05  # before news of the roster are told, so that some go together
    repair: float = 1.0  # between two tellings of a whole roster over one link
    reminder: float = 60.0  # between two tellings of what one has heard
    window: float = 180.0  # that boards may pair by a code
    join: float = 30.0  # to find the board that shows the code
    refused_min: float = 20.0  # before pairing is tried again with a board that failed the proof
    refused_max: float = 300.0


KeyId = Annotated[bytes, msgspec.Meta(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]
Version = Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class Hello(msgspec.Struct, frozen=True):
    """The first frame in each direction of a link.

    :param versions: lowest and highest protocol version that the sender speaks.
    :param boot: its boot epoch.
    :param secret: this end's half of what the datagram keys are made of.
    :param key_id: what datagrams to it must start with.
    :param port: where it takes datagrams, and connections.
    :param name: what people call it.
    """

    versions: tuple[Version, Version]
    boot: envelope.Boot
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    key_id: Annotated[bytes, msgspec.Meta(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    name: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)]


class Where(msgspec.Struct, array_like=True, frozen=True):
    """Where a board is, as far as the sender knows: a place to try."""

    key_id: KeyId
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_NAME_BYTES)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class RosterNews(msgspec.Struct, frozen=True):
    """A ROSTER packet.

    :param digest: of the sender's roster.
    :param known: :func:`envelope.key_id` of every board that it trusts, and its own.
    :param records: some of it, or all.
    :param where: boards that it has links with.
    """

    digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    known: Annotated[tuple[KeyId, ...], msgspec.Meta(max_length=limits.MAX_GROUP_BOARDS)]
    records: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=limits.MAX_RECORD_BYTES)], ...],
        msgspec.Meta(max_length=limits.MAX_GROUP_BOARDS + limits.MAX_GONE_BOARDS),
    ] = ()
    where: Annotated[tuple[Where, ...], msgspec.Meta(max_length=limits.MAX_GROUP_BOARDS)] = ()


class Bye(msgspec.Struct, frozen=True):
    """A BYE packet: the reason is for people."""

    reason: Annotated[str, msgspec.Meta(max_length=limits.MAX_REASON_BYTES)]


_hellos = msgspec.msgpack.Decoder(Hello)


_rosters = msgspec.msgpack.Decoder(RosterNews)
_byes = msgspec.msgpack.Decoder(Bye)


def roster_packet(news: RosterNews) -> bytes:
    """``news`` as a packet."""
    return bytes([ROSTER]) + msgspec.msgpack.encode(news)


def read_roster(packet: bytes) -> RosterNews:
    """:raises ProtocolError: if it is malformed."""
    return envelope.decode(_rosters, packet[1:], "roster packet")


def bye_packet(reason: str) -> bytes:
    """The reason as a packet."""
    return bytes([BYE]) + msgspec.msgpack.encode(Bye(reason[: limits.MAX_REASON_BYTES]))


def read_bye(packet: bytes) -> str:
    """The reason, made harmless.

    :raises ProtocolError: if it is malformed.
    """
    return printable(envelope.decode(_byes, packet[1:], "farewell").reason)


def hello_packet(hello: Hello) -> bytes:
    """``hello`` as a packet."""
    return bytes([HELLO]) + msgspec.msgpack.encode(hello)


def read_hello(packet: bytes) -> Hello:
    """The HELLO in a packet.

    :raises PairingError: if the other board says BYE instead.
    :raises ProtocolError: if it is something else, or of a version that this board cannot speak.
    """
    if packet[:1] == bytes([BYE]):
        raise PairingError(f"it does not let this board in: {read_bye(packet)}")
    if packet[:1] != bytes([HELLO]):
        raise ProtocolError("the first frame is not HELLO")
    hello = envelope.decode(_hellos, packet[1:], "HELLO")
    low, high = hello.versions
    if not max(low, MIN_VERSION) <= min(high, MAX_VERSION):
        raise ProtocolError(
            "the other board speaks another protocol version",
            hint=f"it speaks {low} to {high}, this one {MIN_VERSION} to {MAX_VERSION}: "
            "upgrade the older of the two",
        )
    return hello


def numbered(kind: int, *numbers: int) -> bytes:
    """An ACK, PING or PONG packet."""
    return bytes([kind]) + b"".join(n.to_bytes(NUMBER_BYTES) for n in numbers)


def read_numbers(packet: bytes) -> list[int]:
    """The numbers in an ACK, PING or PONG packet: at least one.

    :raises ProtocolError: if there are none, too many, or a part of one.
    """
    size = len(packet) - 1
    if not 0 < size <= MAX_ACKS * NUMBER_BYTES or size % NUMBER_BYTES:
        raise ProtocolError("not a valid list of numbers")
    return [
        int.from_bytes(packet[at : at + NUMBER_BYTES]) for at in range(1, len(packet), NUMBER_BYTES)
    ]


def framed(packet: bytes) -> bytes:
    """A packet as a frame."""
    return len(packet).to_bytes(LENGTH_BYTES) + packet


async def read_frame(reader: asyncio.StreamReader, max_bytes: int, timeout: float) -> bytes:
    """The next packet, waiting for its first byte as long as it takes.

    :param max_bytes: a longer one is refused before anything is allocated for it.
    :param timeout: seconds for the rest, once the length is there.
    :raises ProtocolError: if it is empty, too long or too slow.
    :raises EOFError: if the connection ends; what a socket raises, if it breaks.
    """
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
    if not 0 < length <= max_bytes:
        raise ProtocolError("frame of a length that is not allowed")
    try:
        async with asyncio.timeout(timeout):
            return await reader.readexactly(length)
    except TimeoutError:
        raise ProtocolError("frame that does not come to its end") from None
