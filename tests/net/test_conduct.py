"""What a paired board may send, and what happens to one that does not keep to it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from netbed import Bed, closed, frame, raw_link, run, until
from test_hostile import friend, signed

from edgemoa.net import conduct, wire
from edgemoa.net.conduct import Conduct
from edgemoa.net.rates import Bucket, Rates


def test_a_bucket_gives_what_comes_back() -> None:
    bucket = Bucket(per_second=2.0, burst=4.0, now=10.0)
    assert [bucket.take(10.0) for _ in range(5)] == [True] * 4 + [False]
    assert not bucket.take(10.4)
    assert bucket.take(10.5)
    assert not bucket.take(9.0), "a clock that steps back gives nothing"
    assert bucket.owe(9.0, 3.0) == pytest.approx(1.5)
    assert bucket.owe(10.0, 0.0) == pytest.approx(0.5)


def test_a_table_of_buckets_is_bounded() -> None:
    rates = Rates(per_second=1.0, burst=1.0, max_keys=2)
    assert rates.take("a", 0)
    assert not rates.take("a", 0)
    assert rates.take("b", 0)
    assert rates.take("c", 0)
    assert rates.take("a", 0), "pushed out, so it begins anew"
    assert len(rates._buckets) == 2


def test_offences_are_forgiven_one_by_one() -> None:
    """As many as a bad network may cause put nobody on the gray list."""
    mild = Conduct(0.0)
    assert not any(mild.offend("x", 20.0 * n) for n in range(1_000))
    assert mild.gray_s(20_000.0) == 0


def test_gray_longer_each_time_and_first_again_after_hours() -> None:
    bad, now, times = Conduct(0.0), 0.0, []
    for _ in range(9):
        offences = 1
        while not bad.offend(f"offence {offences}", now):
            offences += 1
        assert offences == conduct.OFFENCES + 1
        assert bad.reason == f"offence {offences}"
        assert not bad.offend("while it is on it", now)
        times.append(bad.gray_s(now))
        now += times[-1]
        assert bad.gray_s(now) == 0
    assert times == [60.0 * 2**n for n in range(6)] + [3600.0] * 3
    now += conduct.CLEAN_S + 1
    while not bad.offend("again", now):
        pass
    assert bad.gray_s(now) == 60


def test_too_much_is_paused_or_dropped() -> None:
    busy = Conduct(0.0)
    assert all(busy.admits(100, 0.0) for _ in range(int(conduct.PACKETS_BURST)))
    assert not busy.admits(100, 0.0)
    assert busy.dropped == 1
    assert busy.pause(100, 0.0) > 0
    large = Conduct(0.0)
    assert large.pause(1 << 20, 0.0) == 0
    assert sum(large.pause(1 << 20, 0.0) for _ in range(9)) == pytest.approx(
        (1 + 2) * (1 << 20) / conduct.BYTES_PER_S, rel=0.01
    )


def test_a_board_that_misbehaves_is_left_alone_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "GRAY_S", (0.8, 2.0))

    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        bad = wire.framed(bytes([wire.ENVELOPE]) + b"not one")
        for _ in range(int(conduct.OFFENCES) + 1):
            async with raw_link(own, a) as (connection, _):
                connection.writer.write(bad)
                assert await closed(connection)
        (device,) = a.network.devices()
        assert device.detail.startswith("it misbehaved (")
        assert not device.linked
        with pytest.raises((OSError, EOFError)):
            async with raw_link(own, a):
                pass
        assert a.network.counters["a board that misbehaved calls before its time"] == 1
        await until(lambda: a.network._peers[own.board_id].gray_s == 0)
        async with raw_link(own, a) as (connection, _):
            connection.writer.write(wire.framed(signed(own, a, 1)))
            assert await frame(connection) == wire.numbered(wire.ACK, 1)
        assert len(a.heard.messages) == 1

    run(tmp_path, test)


def test_what_anybody_can_forge_is_no_offence(tmp_path: Path) -> None:
    """Who saw a datagram on the air can send others under its key id, and it again."""

    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        peer = a.network._peers[b.id]
        link = peer.link
        assert link is not None
        for n in range(100):
            a.network._on_datagram(link.key_id + (1_000 + n).to_bytes(8) + b"x" * 40)
            a.network._on_datagram(link.key_id)
        assert a.network.counters["datagram that does not decrypt"] == 100
        assert peer.gray_s == 0
        assert a.linked(b)

    run(tmp_path, test)


def test_a_flood_over_tls_is_read_slowly_and_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "PACKETS_PER_S", 200.0)
    monkeypatch.setattr(conduct, "PACKETS_BURST", 100.0)

    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        c = await bed.board("c", seeds=(a.seed,))
        await until(lambda: a.linked(c))
        async with raw_link(own, a) as (connection, _):
            answered = 0

            async def flood() -> None:
                while True:
                    connection.writer.write(wire.framed(wire.numbered(wire.PING, 7)) * 50)
                    await connection.writer.drain()

            async def count() -> None:
                nonlocal answered
                while True:
                    await frame(connection)
                    answered += 1

            since = time.monotonic()
            tasks = [asyncio.create_task(work()) for work in (flood, count)]
            await asyncio.sleep(1.0)
            taken = time.monotonic() - since
            for task in tasks:
                task.cancel()
            assert answered <= 100 + 200 * taken + 10
            assert answered > 100
            assert a.linked(c)

    run(tmp_path, test)
