"""Boards of this process on 127.0.0.1, with real sockets, TLS, keys and databases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from free_loop import free_loop

from edgemoa import config
from edgemoa.core.messages import BoardId, Cancel, ChatMessage, Message, Propose, Sampling
from edgemoa.net import tls, wire
from edgemoa.net.copies import Shelf
from edgemoa.net.identity import Identity, load_identity
from edgemoa.net.link import greet
from edgemoa.net.network import DatagramHook, Network
from edgemoa.net.pairing import JoinSecret, new_join_secret, parse_join_secret
from edgemoa.store import PairedBoard, Store

FAST = wire.Timings(
    handshake=2.0,
    pairing=2.0,
    silence=1.0,
    deliver=2.0,
    no_link=0.6,
    retry_min=0.05,
    retry_max=0.4,
    yield_dial=0.05,
    yield_pairing=0.05,
    refused_min=0.3,
    refused_max=0.5,
)
HASTY = replace(FAST, handshake=0.5, pairing=1.0, frame=0.4, write=0.4, silence=9, deliver=9)
SECRET = parse_join_secret(new_join_secret())
CANARY = "the canary sings at midnight"


@dataclass
class Recorder:
    """What a network told its daemon."""

    messages: list[tuple[BoardId, Message]] = field(default_factory=list)
    undelivered: list[tuple[BoardId, Message]] = field(default_factory=list)
    paired: dict[BoardId, str] = field(default_factory=dict)
    unpaired: dict[BoardId, str] = field(default_factory=dict)
    linked: list[tuple[BoardId, int]] = field(default_factory=list)
    unlinked: list[BoardId] = field(default_factory=list)

    def on_message(self, sender: BoardId, message: Message) -> None:
        self.messages.append((sender, message))

    def on_undelivered(self, to: BoardId, message: Message) -> None:
        self.undelivered.append((to, message))

    def on_paired(self, board: BoardId, name: str) -> None:
        self.paired[board] = name

    def on_unpaired(self, board: BoardId, reason: str) -> None:
        self.unpaired[board] = reason

    def on_linked(self, board: BoardId, boot: int) -> None:
        self.linked.append((board, boot))

    def on_unlinked(self, board: BoardId) -> None:
        self.unlinked.append(board)


@dataclass
class Board:
    """A network with its identity and database."""

    identity: Identity
    store: Store
    network: Network
    heard: Recorder

    @property
    def id(self) -> BoardId:
        return self.identity.board_id

    @property
    def seed(self) -> str:
        return f"127.0.0.1:{self.network.port}"

    def linked(self, *others: Board) -> bool:
        there = {d.id for d in self.network.devices() if d.linked}
        return all(o.id in there for o in others)

    def detail(self, other: Board) -> str:
        return next((d.detail for d in self.network.devices() if d.id == other.id), "unheard of")

    async def crash(self) -> None:
        """End as a process does that is killed: no flush, no goodbye."""
        await self.network._tasks.close()
        for peer in self.network._peers.values():
            peer.silence()
        self.network._sockets.close()
        await asyncio.to_thread(self.store.close)


class Bed:
    """Makes boards, and stops them in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boards: list[Board] = []

    async def board(
        self,
        name: str,
        *,
        seeds: tuple[str, ...] = (),
        secret: JoinSecret | None = SECRET,
        mdns: bool = False,
        port: int = 0,
        listen: str = "127.0.0.1",
        hook: DatagramHook | None = None,
        timings: wire.Timings = FAST,
        trusts: tuple[Identity, ...] = (),
        shelf: Shelf | None = None,
        start: bool = True,
    ) -> Board:
        state_dir = self.folder / name
        identity = await asyncio.to_thread(load_identity, state_dir)
        store = Store(state_dir)
        await asyncio.to_thread(store.open)
        for other in trusts:
            await asyncio.to_thread(store.add, paired(other))
        heard = Recorder()
        network = Network(
            config.Net(listen=listen, interfaces=("127.0.0.1",), mdns=mdns, seeds=seeds, port=port),
            name=name,
            identity=identity,
            store=store,
            boot=await asyncio.to_thread(store.count_boot),
            handlers=heard,
            rng=random.Random(name),
            join_secret=secret,
            shelf=shelf,
            timings=timings,
            datagram_hook=hook,
        )
        board = Board(identity, store, network, heard)
        self.boards.append(board)
        if start:
            await network.start()
        return board

    async def pair(self, **hooks: DatagramHook) -> tuple[Board, Board]:
        """Boards "a" and "b", paired and linked."""
        a = await self.board("a", hook=hooks.get("a"))
        b = await self.board("b", hook=hooks.get("b"), seeds=(a.seed,))
        await until(lambda: a.linked(b) and b.linked(a))
        return a, b

    async def stop(self) -> None:
        await asyncio.gather(*(b.network.stop() for b in self.boards))
        for board in self.boards:
            await asyncio.to_thread(board.store.close)


def paired(identity: Identity, *addresses: tuple[str, int]) -> PairedBoard:
    return PairedBoard(identity.board_id, identity.public_key, identity.certificate, "", addresses)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def run(folder: Path, test: Callable[[Bed], Coroutine[Any, Any, None]]) -> None:
    """Run a test; it fails too if a task failed unseen or the event loop was blocked."""

    async def whole() -> None:
        bed = Bed(folder)
        try:
            async with asyncio.timeout(60):
                await test(bed)
        finally:
            await bed.stop()

    errors = _Errors()
    logging.getLogger().addHandler(errors)
    try:
        with free_loop():
            asyncio.run(whole())
    finally:
        logging.getLogger().removeHandler(errors)
    assert [r.getMessage() for r in errors.records] == []


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def small(number: int = 0) -> Cancel:
    return Cancel(f"request-{number:08}", 1)


def large(size: int = 200_000) -> Propose:
    text = (CANARY + " ") * (size // len(CANARY))
    return Propose("request-large", 1, (ChatMessage("user", text),), Sampling(), 1000)


@contextlib.asynccontextmanager
async def raw_link(own: Identity, board: Board) -> AsyncIterator[tuple[tls.Connection, wire.Hello]]:
    """A connection to ``board`` after HELLO, made by hand: what a hostile paired board can do."""
    contexts = tls.make_contexts(own, [board.identity.certificate])
    connection = await tls.dial(("127.0.0.1", board.network.port), contexts.member, 2.0)
    try:
        mine = wire.Hello((1, 1), 7, b"s" * 32, b"k" * 8, 9, "raw")
        yield connection, await greet(connection, mine, wire.Timings())
    finally:
        connection.abort()
        await asyncio.sleep(0)


async def frame(connection: tls.Connection, timeout: float = 3.0) -> bytes:
    """The next frame on a connection made by hand, but for what is said of the roster."""
    async with asyncio.timeout(timeout):
        while True:
            packet = await wire.read_frame(connection.reader, 1 << 20, timeout)
            if packet[0] != wire.ROSTER:
                return packet


async def closed(connection: tls.Connection, timeout: float = 3.0) -> bool:
    """Whether the other side closes the connection in time, whatever it still sends."""
    try:
        async with asyncio.timeout(timeout):
            while await connection.reader.read(65_536):
                pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
