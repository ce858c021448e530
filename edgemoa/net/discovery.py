"""Who may be out there: mDNS announcements and a bounded table of what was heard.

Everything here is a hint. Anybody on the network can announce anything; a board is who it says
only once it has proved it over TLS.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import ProtocolError
from edgemoa.net import wire
from edgemoa.net.tasks import Tasks

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

log = logging.getLogger(__name__)

SERVICE: Final = "_edgemoa._tcp.local."
_RESOLVE_MS: Final = 1500
_MAX_RESOLVING: Final = 16
_CONFLICT_S: Final = 10.0
_RETRY_S: Final = (2.0, 60.0)
_LATE_NETWORK_S: Final = 5.0
_LOOPBACK: Final = "127.0.0.1"
_GROUP: Final = "224.0.0.251"
_CONTAINER_INTERFACES: Final = ("docker", "veth", "br-", "virbr", "lxc", "cni", "flannel")

Address = tuple[str, int]


class Hints:
    """Where boards say they are: bounded, and strangers never push out a board that is kept.

    :param kept: whether a board's hints must stay, however many strangers announce themselves.
    """

    def __init__(self, kept: Callable[[BoardId], bool]) -> None:
        self._kept = kept
        self._addresses: dict[BoardId, tuple[Address, ...]] = {}

    def put(self, board: BoardId, addresses: Iterable[Address]) -> bool:
        """Note where a board is said to be, before what was said earlier; True if that is news."""
        old = self._addresses.pop(board, None)
        new = tuple(dict.fromkeys([*addresses, *(old or ())]))[: limits.MAX_ADDRESSES]
        if old is None and len(self._addresses) >= limits.MAX_DISCOVERED:
            strangers = (b for b in self._addresses if not self._kept(b))
            oldest = next(strangers, None)
            if oldest is not None:
                del self._addresses[oldest]
            elif not self._kept(board):
                return False
        self._addresses[board] = new
        return new != old

    def drop(self, board: BoardId) -> None:
        """The board said goodbye."""
        self._addresses.pop(board, None)

    def get(self, board: BoardId) -> tuple[Address, ...]:
        """Where the board says it is, as far as known."""
        return self._addresses.get(board, ())

    def __contains__(self, board: BoardId) -> bool:
        return board in self._addresses

    def __iter__(self) -> Iterator[BoardId]:
        return iter(self._addresses)


class Discovery:
    """Announces this board by mDNS and listens for others.

    :param interfaces: addresses of the interfaces to use; all usual ones if empty.
    :param found: called with a board and its addresses; ``gone`` when it says goodbye.
    """

    def __init__(
        self,
        own: BoardId,
        port: int,
        interfaces: tuple[str, ...],
        found: Callable[[BoardId, tuple[Address, ...]], None],
        gone: Callable[[BoardId], None],
    ) -> None:
        self._own = own
        self._port = port
        self._interfaces = interfaces
        self._found = found
        self._gone = gone
        self._tasks = Tasks()
        self._resolving: set[str] = set()
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None

    def start(self) -> None:
        """Announce and listen from now on. Where that fails, it is logged, and boards have to be
        found by their seeds and last addresses."""
        self._tasks.spawn(self._run(), "mdns")

    async def _run(self) -> None:
        """Keep mDNS going. It is a hint, and its trouble is never the daemon's: whatever fails is
        said, and tried again."""
        # Takes a moment to load, and a board with mdns = false never needs it.
        await asyncio.to_thread(importlib.import_module, "zeroconf.asyncio")
        wait_s = _RETRY_S[0]
        while True:
            try:
                await self._serve()
                wait_s = _RETRY_S[0]
            except Exception as error:
                log.warning(
                    "no mDNS: boards are found by seeds and last addresses only",
                    extra={"cause": f"{type(error).__name__}: {error}", "again_in_s": wait_s},
                )
            finally:
                await self._close()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _RETRY_S[1])

    async def _serve(self) -> None:
        """Announce and listen until there may be better interfaces to do it on."""
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo  # noqa: PLC0415

        addresses = await asyncio.to_thread(_usable, self._interfaces)
        self._zeroconf = _open(addresses)
        await self._zeroconf.zeroconf.async_wait_for_start()
        for listener in self._zeroconf.zeroconf.engine.protocols:
            if listener.transport is not None:
                listener.transport.transport.set_protocol(Sieve(listener))
        info = AsyncServiceInfo(
            SERVICE,
            f"{self._own}.{SERVICE}",
            port=self._port,
            properties={"v": str(wire.MAX_VERSION)},
            server=f"{self._own}.local.",
            parsed_addresses=addresses,
        )
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE, handlers=[self._changed]
        )
        await self._announce(info)
        if self._interfaces or addresses != [_LOOPBACK]:
            await asyncio.Event().wait()  # for ever
        # A board that came up before its network: look again, now and then.
        while await asyncio.to_thread(_usable, ()) == [_LOOPBACK]:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(_LATE_NETWORK_S)

    async def stop(self) -> None:
        """Say goodbye and stop."""
        await self._tasks.close()
        await self._close()

    async def _close(self) -> None:
        browser, self._browser = self._browser, None
        zeroconf, self._zeroconf = self._zeroconf, None
        if browser is not None:
            await browser.async_cancel()
        if zeroconf is not None:
            await zeroconf.async_close()

    async def _announce(self, info: AsyncServiceInfo) -> None:
        from zeroconf import NonUniqueNameException  # noqa: PLC0415

        assert self._zeroconf is not None, "start() made it"  # noqa: S101
        level = logging.WARNING
        while True:
            try:
                await (await self._zeroconf.async_register_service(info))
            except NonUniqueNameException:
                log.log(
                    level,
                    "another board announces this board's identity: was its storage copied? "
                    "Give one of them a new identity",
                )
                level = logging.DEBUG
                await asyncio.sleep(_CONFLICT_S)
            else:
                return

    def _changed(
        self,
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        from zeroconf import ServiceStateChange  # noqa: PLC0415

        try:
            board = envelope.check_board_id(name.removesuffix(f".{SERVICE}"))
        except ProtocolError:
            return
        if board == self._own:
            return
        if state_change is ServiceStateChange.Removed:
            self._gone(board)
        elif board not in self._resolving and len(self._resolving) < _MAX_RESOLVING:
            self._resolving.add(board)
            self._tasks.spawn(self._resolve(zeroconf, service_type, name, board), "mdns resolve")

    async def _resolve(
        self, zeroconf: Zeroconf, service_type: str, name: str, board: BoardId
    ) -> None:
        from zeroconf.asyncio import AsyncServiceInfo  # noqa: PLC0415

        try:
            info = AsyncServiceInfo(service_type, name)
            if await info.async_request(zeroconf, _RESOLVE_MS) and info.port:
                heard = [a for a in info.parsed_scoped_addresses() if _is_host(a)]
                if heard:
                    self._found(board, tuple((a, info.port) for a in heard))
        except Exception as error:
            # zeroconf writes back names that it could not read (0.154); a hint less.
            log.debug("an announcement was not understood", extra={"cause": type(error).__name__})
        finally:
            self._resolving.discard(board)


def usual_addresses() -> list[str]:
    """This machine's addresses on interfaces that other boards may be behind; 127.0.0.1 if there
    are none, so that boards on one machine without a network still meet."""
    import ifaddr  # noqa: PLC0415

    found: list[str] = []
    for adapter in ifaddr.get_adapters():
        if adapter.name.startswith(_CONTAINER_INTERFACES):
            continue
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            address = ipaddress.ip_address(text)
            if not (address.is_loopback or (address.is_link_local and address.version == 6)):
                found.append(text)
    return found or [_LOOPBACK]


def _usable(interfaces: tuple[str, ...]) -> list[str]:
    """The addresses to do mDNS on: those that were asked for, or the usual ones, as far as they
    take part in multicast now. One that is gone must not keep the others from being used."""
    wanted = list(interfaces) or usual_addresses()
    usable = [address for address in wanted if _joins(address)]
    return usable or wanted


def _joins(address: str) -> bool:
    if ":" in address:
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            membership = socket.inet_aton(_GROUP) + socket.inet_aton(address)
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        except OSError:
            return False
    return True


def _open(addresses: list[str]) -> AsyncZeroconf:
    """mDNS on these interfaces, or on those with IPv4 if IPv6 does not work.

    :raises OSError, RuntimeError, ValueError: if neither works.
    """
    from zeroconf.asyncio import AsyncZeroconf  # noqa: PLC0415

    try:
        return AsyncZeroconf(interfaces=addresses)
    except (OSError, RuntimeError, ValueError):
        return AsyncZeroconf(interfaces=[a for a in addresses if ":" not in a])


class Sieve(asyncio.DatagramProtocol):
    """Keeps from zeroconf what it cannot digest.

    zeroconf (0.154) reads a label that is not UTF-8 with U+FFFD in the place of each bad byte, and
    raises when it later writes the longer name, in a timer or a reader where nobody can catch it:
    any stranger on the network could do that. Such packets end here.
    """

    def __init__(self, listener: Any) -> None:
        self._listener = listener

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Passes on what can be read and written again."""
        try:
            if _readable(data):
                self._listener.datagram_received(data, addr)
        except Exception as error:
            log.debug("an mDNS packet was dropped", extra={"cause": type(error).__name__})

    def error_received(self, exc: Exception) -> None:
        """Passed on."""
        self._listener.error_received(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """Passed on."""
        self._listener.connection_lost(exc)


def _readable(data: bytes) -> bool:
    from zeroconf import DNSIncoming  # type: ignore[attr-defined]  # noqa: PLC0415

    packet = DNSIncoming(data)
    names = [question.name for question in packet.questions]
    for record in packet.answers():
        names += [record.name, getattr(record, "alias", ""), getattr(record, "server", "") or ""]
    return packet.valid and "\N{REPLACEMENT CHARACTER}" not in "".join(names)


def _is_host(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_multicast or address.is_unspecified or address.is_reserved)
