"""What ``bench-lan`` runs in processes of their own, on hosts of its network. Each prints one JSON
object.

``python bench_lan_sides.py receive`` and ``send PORT SECONDS``: the path of an envelope, one
process on each side. ``ask FOLDER SECRET_FILE ADDRESS:PORT TIMES``: a board that asks another for
small proposals, one after another. ``flood ADDRESS PORT SECONDS PER_S``: datagrams of nonsense.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgemoa import config
from edgemoa.core.envelope import Author, board_id, encode, key_id, sign, verify
from edgemoa.core.messages import (
    Ack,
    BoardId,
    ChatMessage,
    Message,
    Ping,
    Proposal,
    Propose,
    Sampling,
)
from edgemoa.net.identity import load_identity
from edgemoa.net.network import Network
from edgemoa.net.pairing import parse_join_secret
from edgemoa.net.sealed import KEY_ID_BYTES, Opener, Sealer
from edgemoa.store import Store

CREDIT: Final = 64  # datagrams that are on their way at most
PLACE: Final = "127.0.0.1"
KEY: Final = bytes(range(32))  # both of the link and of the author; who else knows it matters not
AUTHOR: Final = Ed25519PrivateKey.from_private_bytes(KEY)
BOARD: Final = board_id(AUTHOR.public_key().public_bytes_raw())
WORDS: Final = "Why is the sky blue, and why is it red in the evening?"


def question(number: int) -> Propose:
    """A small prompt."""
    name = f"{os.getpid()}-{number:08}"
    return Propose(name, 1, (ChatMessage("user", WORDS),), Sampling(16, seed=number), 60_000)


def receive() -> dict[str, Any]:
    """Open and verify what comes, and give credit for more, until a datagram of one byte."""
    with socket.socket(type=socket.SOCK_DGRAM) as own:
        own.bind((PLACE, 0))
        print(own.getsockname()[1], flush=True)
        opener = Opener(KEY)
        public = AUTHOR.public_key().public_bytes_raw()
        authors = {key_id(public): Author.from_key(public)}
        good = 0
        while True:
            data, sender = own.recvfrom(2048)
            if len(data) == 1:
                return {"messages": good}
            verify(opener.open(data), authors, to=BOARD, to_boot=1)
            good += 1
            if good % (CREDIT // 2) == 0:
                own.sendto(b"+", sender)


def send(port: int, seconds: float) -> dict[str, Any]:
    """Sign, seal and send as fast as the other side takes it."""
    public = AUTHOR.public_key().public_bytes_raw()
    sealer = Sealer(KEY, b"k" * KEY_ID_BYTES)
    with socket.socket(type=socket.SOCK_DGRAM) as own:
        own.connect((PLACE, port))
        number, may = 0, CREDIT
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if number == may:
                own.recv(16)
                may += CREDIT // 2
            number += 1
            kind, body = encode(question(number))
            signed = sign(
                kind, body, key=key_id(public), signer=AUTHOR.sign, boot=1, sequence=number,
                to=BOARD, to_boot=1,
            )  # fmt: skip
            own.send(sealer.seal(signed))
        took_s = time.monotonic() - began
        own.send(b"-")
    return {"messages": number, "seconds": took_s}


class Asker:
    """A paired board that asks, and does nothing else."""

    def __init__(self, folder: Path, secret: str, seed: str) -> None:
        folder.mkdir()
        self._store = Store(folder)
        self._store.open()
        self.network = Network(
            config.Net(mdns=False, seeds=(seed,)),
            name="asker",
            identity=load_identity(folder),
            store=self._store,
            boot=self._store.count_boot(),
            handlers=self,
            rng=random.Random(),
            join_secret=parse_join_secret(secret),
        )
        self._answers: asyncio.Queue[Message] = asyncio.Queue()

    async def run(self, times: int) -> dict[str, Any]:
        """How long each took, in ms, and how many were answered."""
        await self.network.start()
        async with asyncio.timeout(30):
            while not any(device.linked for device in self.network.devices()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        (board,) = (device.id for device in self.network.devices())
        await asyncio.sleep(1.0)  # for the two to know that datagrams pass
        took_ms = []
        for number in range(times):
            began = time.perf_counter()
            self.network.send(board, question(number))
            async with asyncio.timeout(10):
                while not isinstance(await self._answers.get(), Proposal):
                    pass
            took_ms.append((time.perf_counter() - began) * 1000)
        await self.network.stop()
        self._store.close()
        return {"took_ms": took_ms}

    def on_message(self, sender: BoardId, message: Message) -> None:
        if isinstance(message, Ping):
            self.network.send(sender, Ack(message.number, 0, sure=message.sure))
        else:
            self._answers.put_nowait(message)

    def on_undelivered(self, to: BoardId, message: Message) -> None:
        pass

    def on_paired(self, board: BoardId, name: str) -> None:
        pass

    def on_unpaired(self, board: BoardId, reason: str) -> None:
        pass

    def on_linked(self, board: BoardId, boot: int) -> None:
        pass

    def on_unlinked(self, board: BoardId) -> None:
        pass


def flood(address: str, port: int, seconds: float, per_s: float) -> dict[str, Any]:
    """So many datagrams of nonsense a second as can be sent, up to ``per_s``; and whether anything
    came back."""
    rng = random.Random(4711)
    junk = [rng.randbytes(rng.choice((1, 8, 16, 33, 200, 1200))) for _ in range(512)]
    with socket.socket(type=socket.SOCK_DGRAM) as own:
        own.connect((address, port))
        own.setblocking(False)
        sent, refused, replies = 0, 0, 0
        began = time.monotonic()
        while (passed_s := time.monotonic() - began) < seconds:
            due = min(round(passed_s * per_s) - sent, 256)
            for at in range(sent, sent + due):
                try:
                    own.send(junk[at % len(junk)])
                except OSError:
                    refused += 1
            sent += due
            try:
                own.recv(2048)
                replies += 1
            except OSError:
                if due == 0:
                    time.sleep(0.0005)
    return {"sent": sent - refused, "refused": refused, "replies": replies, "seconds": passed_s}


def ask(folder: str, secret_file: str, seed: str, times: str) -> dict[str, Any]:
    """See the module."""
    secret = Path(secret_file).read_text().strip()
    return asyncio.run(Asker(Path(folder), secret, seed).run(int(times)))


SIDES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "receive": receive,
    "send": lambda port, seconds: send(int(port), float(seconds)),
    "ask": ask,
    "flood": lambda address, port, *rest: flood(address, int(port), *map(float, rest)),
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](*sys.argv[2:])), flush=True)
