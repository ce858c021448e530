"""Which addresses of this machine other boards may be behind, and when that changes.

The kernel tells by netlink that something changed; what it says is not read, only taken as a reason
to look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ifaddr

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
_GROUP: Final = "224.0.0.251"
# linux/rtnetlink.h; Python's socket module does not name them.
_NETLINK_ROUTE: Final = 0
_LINKS_AND_ADDRESSES: Final = 0x1 | 0x10 | 0x100
_SETTLE_S: Final = 0.3  # one change comes as several messages
_RECHECK_S: Final = 60.0
_POLL_S: Final = 5.0  # where nothing tells of changes
_SYS: Final = Path("/sys/class/net")
_CONTAINERS: Final = (
    *("docker", "podman", "nerdctl", "veth", "br-", "virbr", "vnet", "lxc", "lxd"),
    *("cni", "flannel", "cali", "cilium", "kube", "tunl", "weave"),
)


def usable(wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The addresses to do mDNS on: those that were asked for, or the usual ones, as far as they
    take part in multicast now. One that is gone must not keep the others from being used."""
    asked = tuple(wanted) or usual()
    return tuple(filter(_joins, asked)) or asked


def usual() -> tuple[str, ...]:
    """This machine's addresses on interfaces that other boards may be behind; 127.0.0.1 if there
    are none, so that boards on one machine without a network still meet. Those of IPv6 that hold on
    one link only count where an interface has no others."""
    import ifaddr  # noqa: PLC0415 - it looks for the C library, which takes a moment

    try:
        adapters = list(ifaddr.get_adapters())
    except OSError as error:  # in a sandbox without AF_NETLINK
        log.debug("interfaces cannot be listed", extra={"reason": str(error)})
        return _by_route()
    return tuple(a for adapter in adapters for a in _of(adapter)) or (LOOPBACK,)


def _of(adapter: ifaddr.Adapter) -> Iterator[str]:
    if _is_of_containers(adapter.name):
        return
    texts = [ip.ip if isinstance(ip.ip, str) else ip.ip[0] for ip in adapter.ips]
    found = [ipaddress.ip_address(text) for text in texts]
    local = [address for address in found if address.version == 6 and address.is_link_local]
    routed = [a for a in found if a not in local and not a.is_loopback]
    yield from map(str, routed or local)


def _is_of_containers(name: str) -> bool:
    """Whether software for containers or virtual machines made it for itself: it is called like
    that, and there is no device of the machine behind it."""
    entry = _SYS / name
    behind = (entry, *entry.glob("lower_*"))
    return name.startswith(_CONTAINERS) and not any((each / "device").exists() for each in behind)


def _by_route() -> tuple[str, ...]:
    """What can be found without a list: the address that the kernel would send multicast from."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((_GROUP, 9))  # sends nothing
        return (probe.getsockname()[0],)
    return (LOOPBACK,)


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


class Changes:
    """Tells when interfaces or their addresses may have changed. ``close`` it in the end."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)
            self._socket.setblocking(False)
            self._socket.bind((0, _LINKS_AND_ADDRESSES))
            asyncio.get_running_loop().add_reader(self._socket, self._heard)
        except (OSError, AttributeError) as error:
            log.debug("no netlink: the network is looked at", extra={"reason": str(error)})
            self.close()

    async def next(self) -> None:
        """Return when there is a reason to look again, once what caused it is over."""
        if self._socket is None:
            await asyncio.sleep(_POLL_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECHECK_S):
                await self._news.wait()
        await asyncio.sleep(_SETTLE_S)
        self._news.clear()

    def close(self) -> None:
        """Listen no longer."""
        sock, self._socket = self._socket, None
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()

    def _heard(self) -> None:
        self._news.set()
        # The rest of each message is thrown away; that there were more than could be kept, too.
        with contextlib.suppress(OSError):
            while self._socket is not None and self._socket.recv(1):
                pass
