"""The board's port, where the event loop is at its limits."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from edgemoa.net.sockets import Sockets


def test_who_stops_listening_just_when_somebody_calls_fails_nowhere() -> None:
    """A daemon that stops while another board dials it: that is no defect of it."""
    failed: list[dict[str, Any]] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failed.append(context))
        sockets = Sockets()
        sockets.bind("127.0.0.1", 0)
        listening = asyncio.create_task(sockets.accept())
        await asyncio.sleep(0)
        with socket.create_connection(("127.0.0.1", sockets.port)) as caller:
            loop.call_soon(listening.cancel)  # in the very pass in which the call is noticed
            await asyncio.wait({listening})
            assert listening.cancelled()
            sock, host = await asyncio.wait_for(sockets.accept(), 5)  # nor is the call lost
            assert (sock.getpeername(), host) == (caller.getsockname(), "127.0.0.1")
            sock.close()
        sockets.close()

    asyncio.run(test())
    assert failed == []
