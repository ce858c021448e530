"""mDNS packets, as net/discovery.py reads them: anybody on the network sends any.

The parser is zeroconf's. What :class:`edgemoa.net.discovery.Sieve` does not let through never
reaches it; what it does let through, zeroconf keeps, and writes back later in timers where nobody
catches what goes wrong. So that is done here at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Final

from generate import ANN
from targets import Target
from zeroconf import (  # type: ignore[attr-defined]
    DNSCache,
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSService,
    RecordUpdate,
)
from zeroconf.asyncio import AsyncServiceInfo

from edgemoa.core.envelope import check_board_id
from edgemoa.errors import ProtocolError
from edgemoa.net import discovery

_FROM: Final = ("192.0.2.1", 5353)
_TYPE: Final = [b"_edgemoa", b"_tcp", b"local"]
_BOARD: Final = ANN.board_id.encode()


class DroppedError(Exception):
    """The packet goes no further."""


class _Listener(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self.heard.append(data)


def _mdns(data: bytes) -> object:
    listener = _Listener()
    discovery.Sieve(listener, lambda _: False).datagram_received(data, _FROM)
    packet = DNSIncoming(data)
    if not listener.heard:
        kinds: set[str] = set()
        with contextlib.suppress(Exception):  # whatever the sieve kept from going on
            kinds = {type(record).__name__ for record in packet.answers()}
        raise DroppedError(*sorted(kinds))
    records = packet.answers()
    names = [question.name for question in packet.questions]
    names += [record.server for record in records if isinstance(record, DNSService)]
    for name in names:
        again = DNSOutgoing(0)
        again.add_question(DNSQuestion(name, 1, 1))
        again.packets()
    for record in records:
        if isinstance(record, DNSPointer):
            told = DNSOutgoing(0x8400)
            told.add_answer_at_time(record, 0)
            told.packets()
    return [found for record in records for found in _resolved(record, records, packet.now)]


def _resolved(pointer: Any, records: list[Any], now: float) -> Iterable[object]:
    """What discovery makes of an announcement, once there is an answer to its question."""
    if not isinstance(pointer, DNSPointer):
        return
    with contextlib.suppress(ProtocolError):
        board = check_board_id(pointer.alias.removesuffix(f".{discovery.SERVICE}"))
        # All of Zeroconf that this asks for; a real one would open sockets.
        network: Any = SimpleNamespace(cache=DNSCache())
        network.cache.async_add_records(records)
        info = AsyncServiceInfo(discovery.SERVICE, f"{board}.{discovery.SERVICE}")
        info.async_update_records(network, now, [RecordUpdate(each, None) for each in records])
        hosts = [a for a in info.parsed_scoped_addresses() if discovery._is_host(a)]
        yield board, info.port, hosts


def _name(labels: list[bytes]) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _record(owner: bytes, kind: int, data: bytes) -> bytes:
    size = len(data).to_bytes(2)
    return owner + kind.to_bytes(2) + b"\0\1" + (120).to_bytes(4) + size + data


def _seeds() -> Iterable[bytes]:
    board, host = _name([_BOARD, *_TYPE]), _name([_BOARD, b"local"])
    records = [
        _record(_name(_TYPE), 12, board),
        _record(board, 33, b"\0\0\0\0\x1f\x0a" + host),
        _record(board, 16, b"\x03v=1"),
        _record(host, 1, bytes([192, 0, 2, 1])),
        _record(host, 28, bytes.fromhex("fe80" + "00" * 13 + "01")),
        _record(host, 47, b"\xc0\x0c\0\x04\x40\0\0\x08"),
        _record(board, 13, b"\x03arm\x05linux"),
    ]
    head = b"\0\0\x84\0\0\0" + len(records).to_bytes(2) + b"\0\0\0\0"
    yield head + b"".join(records)
    pointed = b"\xc0\x0c"  # to the first name in the packet
    yield head[:7] + b"\1\0\0\0\0" + _record(_name(_TYPE), 12, bytes([56]) + _BOARD + pointed)
    yield b"\0\7\0\0\0\1\0\0\0\0\0\0" + _name(_TYPE) + b"\0\x0c\x80\1"
    yield b"\0\0\0\0\0\1\0\1\0\0\0\0" + _name(_TYPE) + b"\0\x0c\0\1" + _record(pointed, 12, board)


TARGETS: Final = [Target("mdns", _mdns, (DroppedError,), _seeds, "bytes", multiple=64)]
"""A pointer back to an earlier name takes two bytes, whatever the name's length; zeroconf bounds
how many a packet may hold."""
