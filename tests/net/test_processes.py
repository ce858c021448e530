"""Boards in processes of their own: killed without a word, frozen, started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from netbed import FAST, Bed, run, small, until

from edgemoa.net import wire
from edgemoa.net.pairing import new_join_secret, parse_join_secret

ECHO = Path(__file__).with_name("echo.py")


@contextlib.asynccontextmanager
async def echo(folder: Path, secret: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ECHO),
        str(folder / "echo"),
        "echo",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(secret.encode() + b"\n")
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_killed_and_started_again(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        text = new_join_secret()
        a = await bed.board("a", secret=parse_join_secret(text), mdns=True)
        async with echo(tmp_path, text) as process:
            await until(lambda: any(d.linked for d in a.network.devices()))
            (board,) = a.heard.paired
            a.network.send(board, small(1))
            await until(lambda: a.heard.messages == [(board, small(1))])
            process.kill()
            await process.wait()
        a.network.send(board, small(2))
        await until(lambda: a.heard.undelivered == [(board, small(2))])
        async with echo(tmp_path, text):  # on another port
            await until(lambda: a.network.devices()[0].linked)
            a.network.send(board, small(3))
            await until(lambda: (board, small(3)) in a.heard.messages)

    run(tmp_path, test)


def test_frozen(tmp_path: Path) -> None:
    """It takes what is sent, and says nothing: messages are undelivered, and the link is given up.
    When it thaws, it is back without anybody's help."""

    async def test(bed: Bed) -> None:
        text = new_join_secret()
        a = await bed.board("a", secret=parse_join_secret(text), mdns=True)
        async with echo(tmp_path, text) as process:
            await until(lambda: any(d.linked for d in a.network.devices()))
            (board,) = a.heard.paired
            process.send_signal(signal.SIGSTOP)
            a.network.send(board, small(1))
            await until(lambda: a.heard.undelivered == [(board, small(1))])
            await until(lambda: not a.network.devices()[0].linked)
            process.send_signal(signal.SIGCONT)
            await until(lambda: a.network.devices()[0].linked)
            a.network.send(board, small(2))
            await until(lambda: (board, small(2)) in a.heard.messages)
            assert len(a.heard.undelivered) == 1

    assert FAST.silence < wire.Timings().silence
    run(tmp_path, test)
