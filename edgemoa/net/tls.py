"""TLS 1.3 as two boards use it: each pinned certificate is its own anchor, and no other counts.

The chain check alone would let a pinned board speak for another one, so whoever uses a connection
compares :func:`peer_certificate`'s key with the one it means. A client's handshake "succeeds"
before the server has looked at its certificate: it sends nothing before the server has spoken.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from edgemoa.net.identity import Identity

# Sent in the clear by every client, and the same for all: boards are told apart by key.
_SERVER_NAME: Final = "edgemoa"
COPIES: Final = "edgemoa-models/1"
"""The ALPN protocol of a connection that models are copied over; links have none."""
_SHUTDOWN_S: Final = 0.5
_READ_AHEAD_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Contexts:
    """The TLS settings for one state of the roster.

    :param server: asks for a certificate; one that is shown must be pinned.
    :param member: for dialling a paired board.
    :param borrower: the same, to copy a model from it.
    :param stranger: for dialling a board to pair with: shows nothing, trusts nothing.
    """

    server: ssl.SSLContext
    member: ssl.SSLContext
    borrower: ssl.SSLContext
    stranger: ssl.SSLContext


def make_contexts(
    identity: Identity, pinned: Iterable[bytes], told: Iterable[bytes] = ()
) -> Contexts:
    """Settings that trust exactly the ``pinned`` certificates (DER). Reads the identity file.

    :param told: of boards that are not trusted any more. They may call and prove who they are,
        and whoever answers tells them that they are not let in.
    """
    anchors = b"".join(pinned)
    callers = anchors + b"".join(told)
    server = _context(ssl.PROTOCOL_TLS_SERVER)
    server.num_tickets = 0  # a resumed session would not be checked against the roster again
    server.verify_mode = ssl.CERT_OPTIONAL
    member, borrower = _context(ssl.PROTOCOL_TLS_CLIENT), _context(ssl.PROTOCOL_TLS_CLIENT)
    member.verify_mode = borrower.verify_mode = ssl.CERT_REQUIRED
    for context in (server, borrower):
        context.set_alpn_protocols([COPIES])
    for context in (server, member, borrower):
        context.load_cert_chain(identity.file)
        known = callers if context is server else anchors
        if known:
            context.load_verify_locations(cadata=known)
    return Contexts(server, member, borrower, _context(ssl.PROTOCOL_TLS_CLIENT))


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Connection:
    """A TLS connection after its handshake."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, dialled: bool
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.dialled = dialled
        """Whether this board opened it."""

    @property
    def certificate(self) -> bytes | None:
        """What the other side showed, in DER; it has proved to hold the key."""
        tls: ssl.SSLObject = self.writer.get_extra_info("ssl_object")
        return tls.getpeercert(binary_form=True)

    @property
    def for_copies(self) -> bool:
        """Whether both sides mean to copy models over it."""
        tls: ssl.SSLObject = self.writer.get_extra_info("ssl_object")
        return tls.selected_alpn_protocol() == COPIES

    @property
    def address(self) -> tuple[str, int]:
        """The other side's IP address and port."""
        host, port = self.writer.get_extra_info("peername")[:2]
        return host.removeprefix("::ffff:"), port

    async def close(self) -> None:
        """Let what was written go out, and close; a peer that does not take part is cut off."""
        self.writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2 * _SHUTDOWN_S):
                await self.writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self.writer.transport.abort()


async def dial(address: tuple[str, int], context: ssl.SSLContext, timeout: float) -> Connection:
    """Connect to an IP address and port.

    :param timeout: seconds for the connection and for the handshake, each.
    :raises OSError: if nobody listens there, or it does not speak TLS with a certificate as
        ``context`` demands, or takes too long.
    """
    protocol = _Remembering()
    try:
        async with asyncio.timeout(2 * timeout):
            await asyncio.get_running_loop().create_connection(
                lambda: protocol,
                *address,
                ssl=context,
                server_hostname=_SERVER_NAME,
                ssl_handshake_timeout=timeout,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        return protocol.ready(dialled=True)
    except BaseException:
        protocol.abort()
        raise


async def accept(sock: socket.socket, context: ssl.SSLContext, timeout: float) -> Connection:
    """The server's side of the handshake, on an accepted socket, which this then owns.

    :raises OSError: if it fails or takes too long.
    """
    protocol = _Remembering()
    try:
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=context,
            ssl_handshake_timeout=timeout,
            ssl_shutdown_timeout=_SHUTDOWN_S,
        )
        return protocol.ready(dialled=False)
    except BaseException:
        protocol.abort()
        sock.close()
        raise


class _Remembering(asyncio.StreamReaderProtocol):
    """Keeps the transport: whoever is cancelled in the moment in which the handshake ends never
    gets it, and asyncio only begins to close it. Closed under it, its descriptor would be the next
    connection's while the event loop still took it for this one's."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader(limit=_READ_AHEAD_BYTES)
        self._made: asyncio.Transport | None = None
        super().__init__(self._reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """After the handshake."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream socket
        self._made = transport
        super().connection_made(transport)

    def abort(self) -> None:
        """Let go of the descriptor, if it has been handed to a transport."""
        if self._made is not None:
            self._made.abort()

    def ready(self, *, dialled: bool) -> Connection:
        """The connection, once it is made."""
        assert self._made is not None  # noqa: S101 - asyncio has just said so
        loop = asyncio.get_running_loop()
        writer = asyncio.StreamWriter(self._made, self, self._reader, loop)
        _set_options(writer.get_extra_info("socket"))
        return Connection(self._reader, writer, dialled=dialled)


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A board that lost its power says nothing: notice within about 11 s.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 11_000)
