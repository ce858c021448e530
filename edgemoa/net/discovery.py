"""Who may be out there: mDNS announcements and a bounded table of what was heard.

Everything here is a hint. Anybody on the network can announce anything; a board is who it says
only once it has proved it over TLS.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import ProtocolError
from edgemoa.net import interfaces, wire
from edgemoa.net.interfaces import Changes
from edgemoa.net.tasks import Tasks

if TYPE_CHECKING:
    from zeroconf import DNSRecord, ServiceStateChange, Zeroconf  # type: ignore[attr-defined]
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

log = logging.getLogger(__name__)

SERVICE: Final = "_edgemoa._tcp.local."
_RESOLVE_MS: Final = 1500
_MAX_RESOLVING: Final = 16
# Of a board: pointer, service, text, and its addresses.
_MAX_RECORDS: Final = limits.MAX_DISCOVERED * (3 + limits.MAX_ADDRESSES)
_CONFLICT_S: Final = 10.0
_RETRY_S: Final = (2.0, 60.0)

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
    :param kept: whether a board's announcements must stay, however many strangers' there are.
    :param moved: called when this machine has other addresses than before.
    """

    def __init__(
        self,
        own: BoardId,
        port: int,
        interfaces: tuple[str, ...],
        found: Callable[[BoardId, tuple[Address, ...]], None],
        gone: Callable[[BoardId], None],
        *,
        moved: Callable[[], None] = lambda: None,
        kept: Callable[[BoardId], bool] = lambda _: False,
    ) -> None:
        self._own = own
        self._port = port
        self._interfaces = interfaces
        self._found = found
        self._gone = gone
        self._moved = moved
        self._kept = kept
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
        changes = Changes()
        try:
            while True:
                wait_s = await self._try(changes, wait_s)
        finally:
            changes.close()

    async def _try(self, changes: Changes, wait_s: float) -> float:
        """Returns for how long to wait after the next failure, if it is one."""
        try:
            await self._serve(changes)
        except Exception as error:
            log.warning(
                "no mDNS: boards are found by seeds and last addresses only",
                extra={"cause": f"{type(error).__name__}: {error}", "again_in_s": wait_s},
            )
        else:
            self._moved()
            return _RETRY_S[0]
        finally:
            await self._close()
        await asyncio.sleep(wait_s)
        return min(2 * wait_s, _RETRY_S[1])

    async def _serve(self, changes: Changes) -> None:
        """Announce and listen until there are other addresses to do it on."""
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo  # noqa: PLC0415

        addresses = await asyncio.to_thread(interfaces.usable, self._interfaces)
        self._zeroconf = _open(addresses)
        await self._zeroconf.zeroconf.async_wait_for_start()
        for listener in self._zeroconf.zeroconf.engine.protocols:
            if listener.transport is not None:
                listener.transport.transport.set_protocol(Sieve(listener, self._kept))
        info = AsyncServiceInfo(
            SERVICE,
            f"{self._own}.{SERVICE}",
            port=self._port,
            properties={"v": str(wire.MAX_VERSION)},
            server=f"{self._own}.local.",
            parsed_addresses=list(addresses),
        )
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE, handlers=[self._changed]
        )
        await self._announce(info)
        while await asyncio.to_thread(interfaces.usable, self._interfaces) == addresses:
            await changes.next()
        log.info("the network has changed")

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


def _open(addresses: Sequence[str]) -> AsyncZeroconf:
    """mDNS on these interfaces, or on those with IPv4 if IPv6 does not work.

    :raises OSError, RuntimeError, ValueError: if neither works.
    """
    from zeroconf.asyncio import AsyncZeroconf  # noqa: PLC0415

    try:
        return AsyncZeroconf(interfaces=list(addresses))
    except (OSError, RuntimeError, ValueError):
        return AsyncZeroconf(interfaces=[a for a in addresses if ":" not in a])


class Sieve(asyncio.DatagramProtocol):
    """Keeps from zeroconf what it cannot digest, and what is of no use to it.

    zeroconf (0.154) reads a label that is not UTF-8 with U+FFFD in the place of each bad byte, and
    raises when it later writes the longer name, in a timer or a reader where nobody can catch it:
    any stranger on the network could do that. And it keeps every record that it hears for as long
    as that says itself. Here it hears of boards alone, and of so many records at most.

    :param listener: of zeroconf, and what it keeps in ``zeroconf.cache``.
    :param kept: whether a board's records must stay, whatever strangers announce.
    """

    def __init__(self, listener: Any, kept: Callable[[BoardId], bool]) -> None:
        self._listener = listener
        self._kept = kept
        self._records: dict[DNSRecord, BoardId | None] = {}  # that were passed on, oldest first

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Passes on what can be read and written again."""
        try:
            if self._is_of_use(data):
                self._listener.datagram_received(data, addr)
        except Exception as error:
            log.debug("an mDNS packet was dropped", extra={"cause": type(error).__name__})

    def error_received(self, exc: Exception) -> None:
        """Passed on."""
        self._listener.error_received(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """Passed on."""
        self._listener.connection_lost(exc)

    def _is_of_use(self, data: bytes) -> bool:
        from zeroconf import DNSIncoming  # type: ignore[attr-defined]  # noqa: PLC0415

        packet = DNSIncoming(data)
        records = packet.answers()
        names = [question.name for question in packet.questions]
        for record in records:
            names += [record.name, _target(record)]
        if not packet.valid or "\N{REPLACEMENT CHARACTER}" in "".join(names):
            return False
        if packet.is_query():
            return True  # none of that is kept
        boards = {record: _board_of(record) for record in records}
        return all(board is not None for board in boards.values()) and self._have_room(boards)

    def _have_room(self, boards: Mapping[DNSRecord, BoardId | None]) -> bool:
        """Note what is passed on; strangers' records make room for others, the oldest first."""
        for record, board in boards.items():
            known = self._records.pop(record, None)
            if known is None and len(self._records) >= _MAX_RECORDS:
                strangers = (r for r, of in self._records.items() if not (of and self._kept(of)))
                oldest = next(strangers, None)
                if oldest is None:
                    return False
                del self._records[oldest]
                self._listener.zc.cache.async_remove_records([oldest])
            self._records[record] = board
        return True


def _target(record: DNSRecord) -> str:
    return getattr(record, "alias", "") or getattr(record, "server", "") or ""


def _board_of(record: DNSRecord) -> BoardId | None:
    """Whom a record is about; None if it is not about a board."""
    about = _target(record) if record.name == SERVICE else record.name
    for suffix in (f".{SERVICE}", ".local."):
        if about.endswith(suffix):
            try:
                return envelope.check_board_id(about.removesuffix(suffix))
            except ProtocolError:
                return None
    return None


def _is_host(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_multicast or address.is_unspecified or address.is_reserved)
