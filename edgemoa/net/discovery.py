"""Who may be out there: mDNS announcements and a bounded table of what was heard.

Everything here is a hint. Anybody on the network can announce anything; a board is who it says
only once it has proved it over TLS.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

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
        # Takes a moment to load, and a board with mdns = false never needs it.
        await asyncio.to_thread(importlib.import_module, "zeroconf.asyncio")
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo  # noqa: PLC0415

        addresses = list(self._interfaces) or await asyncio.to_thread(usual_addresses)
        self._zeroconf = _open(addresses)
        if self._zeroconf is None:
            return
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

    async def stop(self) -> None:
        """Say goodbye and stop."""
        await self._tasks.close()
        if self._browser is not None:
            await self._browser.async_cancel()
            self._browser = None
        if self._zeroconf is not None:
            await self._zeroconf.async_close()
            self._zeroconf = None

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
    return found or ["127.0.0.1"]


def _open(addresses: list[str]) -> AsyncZeroconf | None:
    """mDNS on these interfaces; on those with IPv4 if IPv6 does not work; else None."""
    from zeroconf.asyncio import AsyncZeroconf  # noqa: PLC0415

    failure: Exception | None = None
    for choice in (addresses, [a for a in addresses if ":" not in a]):
        try:
            return AsyncZeroconf(interfaces=choice)
        except (OSError, RuntimeError, ValueError) as error:
            failure = error
    log.warning("no mDNS (%s): boards are found by seeds and last addresses only", failure)
    return None


def _is_host(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_multicast or address.is_unspecified or address.is_reserved)
