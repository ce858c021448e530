"""The board's one port: a TCP listener and a UDP socket on the same number."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Final

from edgemoa.core import limits
from edgemoa.errors import AddressInUseError, ConfigError

_RECEIVE_BUFFER_BYTES: Final = 4 * limits.MIB  # asked for; the system may give less
_DATAGRAMS_A_PASS: Final = 64  # then other work gets its turn
_TRIES: Final = 16  # for a number that is free for both, when the system chooses

IpAddress = tuple[str, int]


class Sockets:
    """Both sockets. :meth:`bind` first, :meth:`close` last."""

    def __init__(self) -> None:
        self.port = 0
        self._family = socket.AF_INET
        self._tcp: socket.socket | None = None
        self._udp: socket.socket | None = None

    def bind(self, listen: str, port: int) -> None:
        """Take the port, on one address or (with ``""``) on all of IPv4 and IPv6.

        :param port: 0 lets the system choose.
        :raises AddressInUseError: if somebody else has it.
        :raises ConfigError: if ``listen`` is not an address of this machine, or the port is not
            for this user.
        """
        for left in reversed(range(_TRIES)):
            try:
                self._bind(listen, port)
            except OSError as error:
                self.close()
                if error.errno == errno.EADDRINUSE:
                    if port == 0 and left:
                        continue  # the UDP port of that number was taken
                    raise AddressInUseError(
                        f"port {port} is in use",
                        hint="is another edgemoa running here? choose another net.port, "
                        "or 0 to let the system choose",
                    ) from error
                raise ConfigError(
                    f"cannot listen on '{listen}' port {port}: {error.strerror}",
                    hint="net.listen must be an IP address of this machine, or empty for all; "
                    "ports under 1024 need privileges",
                ) from error
            return

    def _bind(self, listen: str, port: int) -> None:
        self._family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        if not listen and _has_ipv6():
            self._family = socket.AF_INET6
        self._tcp = self._socket(socket.SOCK_STREAM, listen, port)
        self._tcp.listen(limits.MAX_HALF_OPEN)
        self.port = self._tcp.getsockname()[1]
        self._udp = self._socket(socket.SOCK_DGRAM, listen, self.port)
        # asyncio reads when it gets round to it; a burst has to wait somewhere.
        self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)

    def _socket(self, kind: socket.SocketKind, listen: str, port: int) -> socket.socket:
        sock = socket.socket(self._family, kind)
        try:
            sock.setblocking(False)
            if self._family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(listen)))
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((listen, port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def accept(self) -> tuple[socket.socket, str]:
        """The next connection, and the IP address that it comes from. Raises OSError."""
        assert self._tcp is not None, "bind() comes first"  # noqa: S101
        while True:
            await _readable(self._tcp)
            with contextlib.suppress(BlockingIOError):  # who was there has left
                sock, address = self._tcp.accept()
                sock.setblocking(False)
                return sock, address[0]

    def receive(self, handle: Callable[[bytes], None]) -> None:
        """From now on, call ``handle`` with each datagram that is not longer than allowed."""
        udp = self._udp
        assert udp is not None, "bind() comes first"  # noqa: S101

        def drain() -> None:
            with contextlib.suppress(OSError):  # nothing more to read, or an earlier send failed
                for _ in range(_DATAGRAMS_A_PASS):
                    datagram = udp.recv(limits.MAX_DATAGRAM_BYTES + 1)
                    if len(datagram) <= limits.MAX_DATAGRAM_BYTES:
                        handle(datagram)

        asyncio.get_running_loop().add_reader(udp, drain)

    def send(self, datagram: bytes, address: IpAddress) -> None:
        """Send a datagram, or lose it: the network might have lost it just as well."""
        host, port = address
        if self._family == socket.AF_INET6 and ":" not in host:
            host = f"::ffff:{host}"
        if self._udp is not None:
            with contextlib.suppress(OSError):
                self._udp.sendto(datagram, (host, port))

    def close(self) -> None:
        """Give the port back."""
        if self._udp is not None:
            with contextlib.suppress(RuntimeError):  # bound where no event loop runs
                asyncio.get_running_loop().remove_reader(self._udp)
            self._udp.close()
            self._udp = None
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None


async def _readable(sock: socket.socket) -> None:
    """Until there is something to take. The event loop's own ``sock_accept`` (Python 3.11) takes a
    connection for a caller that was cancelled just then, loses it, and fails in the loop."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _has_ipv6() -> bool:
    """Whether one socket can serve IPv6 and IPv4; the kernel may know IPv6 and have it off."""
    if not socket.has_dualstack_ipv6():
        return False
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("::", 0))
        except OSError:
            return False
    return True
