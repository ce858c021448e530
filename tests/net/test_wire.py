"""Parsers and tables of the network shell, on their own."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core import limits
from edgemoa.core.envelope import board_id
from edgemoa.core.messages import printable
from edgemoa.errors import ProtocolError
from edgemoa.net import pairing, sealed, wire
from edgemoa.net.discovery import Hints, _is_host
from edgemoa.net.rates import Rates

HELLO = wire.Hello((1, 1), 7, b"s" * 32, b"k" * 8, 9, "name")


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_raise_one_error(data: bytes) -> None:
    opener = sealed.Opener(bytes(32))
    for parse in (
        wire.read_hello,
        lambda d: wire.read_hello(bytes([wire.HELLO]) + d),
        wire.read_numbers,
        opener.open,
        pairing.identify,
    ):
        with contextlib.suppress(ProtocolError):
            parse(data)


def test_hello() -> None:
    packet = wire.hello_packet(HELLO)
    assert wire.read_hello(packet) == HELLO
    for end in range(len(packet)):
        with pytest.raises(ProtocolError):
            wire.read_hello(packet[:end])


@pytest.mark.parametrize(
    ("versions", "fits"),
    [((1, 1), True), ((1, 9), True), ((2, 9), False), ((9, 1), False), ((3, 2), False)],
)
def test_versions(versions: tuple[int, int], fits: bool) -> None:
    packet = wire.hello_packet(wire.Hello(versions, 7, b"s" * 32, b"k" * 8, 9, ""))
    if fits:
        wire.read_hello(packet)
    else:
        with pytest.raises(ProtocolError, match="another protocol version"):
            wire.read_hello(packet)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=wire.MAX_ACKS))
def test_numbers(numbers: list[int]) -> None:
    assert wire.read_numbers(wire.numbered(wire.ACK, *numbers)) == numbers


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.binary(max_size=20))
def test_frames(packets: list[bytes], rest: bytes) -> None:
    async def read() -> list[bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(map(wire.framed, packets)) + rest)
        reader.feed_eof()
        found = []
        try:
            while True:
                found.append(await wire.read_frame(reader, 50, 1.0))
        except (EOFError, ProtocolError):
            return found

    assert asyncio.run(read())[: len(packets)] == packets


@given(st.lists(st.integers(1, 5000), max_size=300))
def test_the_replay_window_accepts_each_number_once(numbers: list[int]) -> None:
    window = sealed.ReplayWindow()
    taken: set[int] = set()
    for number in numbers:
        in_reach = number > max(taken, default=0) - limits.REPLAY_WINDOW
        assert window.seen(number) == (number in taken or not in_reach)
        if not window.seen(number):
            window.mark(number)
            taken.add(number)


def test_a_forged_counter_does_not_move_the_window() -> None:
    sealer, opener = sealed.Sealer(bytes(32), b"k" * 8), sealed.Opener(bytes(32))
    first = sealer.seal(b"first")
    forged = first[:8] + (2**64 - 1).to_bytes(8) + first[16:]
    with pytest.raises(ProtocolError):
        opener.open(forged)
    assert opener.open(first) == b"first"
    with pytest.raises(ProtocolError, match="before"):
        opener.open(first)


def test_the_largest_datagram() -> None:
    datagram = sealed.Sealer(bytes(32), b"k" * 8).seal(bytes(sealed.MAX_PLAINTEXT_BYTES))
    assert len(datagram) == limits.MAX_DATAGRAM_BYTES


def test_hints_never_push_out_who_is_kept() -> None:
    kept = {board_id(bytes([n]) * 32) for n in range(4)}
    hints = Hints(kept.__contains__)
    for board in kept:
        assert hints.put(board, [("10.0.0.1", 1)])
    for n in range(10_000):
        hints.put(board_id(n.to_bytes(32)), [("10.0.0.2", 2)])
    assert set(hints) >= kept
    assert len(list(hints)) == limits.MAX_DISCOVERED


def test_hints_keep_the_newest_addresses() -> None:
    board = board_id(bytes(32))
    hints = Hints(lambda _: False)
    assert hints.put(board, [("10.0.0.1", 1)])
    assert not hints.put(board, [("10.0.0.1", 1)])
    assert hints.put(board, [("10.0.0.2", 1)])
    assert hints.get(board) == (("10.0.0.2", 1), ("10.0.0.1", 1))
    hints.put(board, [("10.0.1.1", n) for n in range(50)])
    assert len(hints.get(board)) == limits.MAX_ADDRESSES
    hints.drop(board)
    assert board not in hints


@pytest.mark.parametrize(
    "address",
    ["224.0.0.251", "0.0.0.0", "::", "ff02::fb", "240.0.0.1"],  # noqa: S104
)
def test_addresses_that_no_board_has(address: str) -> None:
    assert not _is_host(address)


def test_rates() -> None:
    rates = Rates(per_second=2, burst=3, max_keys=2)
    assert [rates.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert rates.take("b", 0.0)
    assert rates.take("a", 0.5)
    assert not rates.take("a", 0.5)
    for n in range(100):
        rates.take(str(n), 1.0)
    assert len(rates._buckets) == 2


def test_names_from_others_cannot_disturb_a_terminal() -> None:
    assert printable("pi\x1b[31m\n4\u202e ü") == "pi[31m4 ü"
