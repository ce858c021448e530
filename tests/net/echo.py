"""A board as a process of its own, which sends every message back to where it came from.

``python echo.py STATE_DIR NAME``, with the join secret on standard input, which it then keeps
reading: it stops when that ends. Finds others by mDNS on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from edgemoa import config
from edgemoa.core.messages import BoardId, Message
from edgemoa.net.identity import load_identity
from edgemoa.net.network import Network
from edgemoa.net.pairing import parse_join_secret
from edgemoa.store import Store


class Echo:
    """Sends back what it hears, and prints whom it paired with."""

    network: Network

    def on_message(self, sender: BoardId, message: Message) -> None:
        self.network.send(sender, message)

    def on_undelivered(self, to: BoardId, message: Message) -> None:
        print("undelivered", to, flush=True)

    def on_paired(self, board: BoardId, name: str) -> None:
        print("paired", board, flush=True)

    def on_unpaired(self, board: BoardId, reason: str) -> None:
        print("unpaired", board, flush=True)

    def on_linked(self, board: BoardId, boot: int) -> None:
        print("linked", board, flush=True)

    def on_unlinked(self, board: BoardId) -> None:
        print("unlinked", board, flush=True)


async def main() -> None:
    state_dir, name = Path(sys.argv[1]), sys.argv[2]
    secret = parse_join_secret(sys.stdin.readline())
    echo = Echo()
    store = Store(state_dir)
    store.open()
    echo.network = Network(
        config.Net(listen="127.0.0.1", interfaces=("127.0.0.1",)),
        name=name,
        identity=load_identity(state_dir),
        store=store,
        boot=store.count_boot(),
        handlers=echo,
        rng=random.Random(),
        join_secret=secret,
    )
    await echo.network.start()
    print("started", echo.network.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await echo.network.stop()
    store.close()


if __name__ == "__main__":
    asyncio.run(main())
