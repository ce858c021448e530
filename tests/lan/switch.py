"""A switch of Ethernet frames that can be told to fail, and the hosts on its ports.

A process of its own, which :class:`lan.bed.Bed` starts. Each host is a network namespace with one
interface, ``eth0``, whose other end (a TAP device) is held here. Nothing has a name outside of this
process, so nothing is left when it ends, however it ends; and it ends when its standard input does.

Commands come on standard input and are answered on standard output, one JSON object a line.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any, Final

CLONE_NEWNET: Final = 0x40000000
TUNSETIFF: Final = 0x400454CA
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
LONGEST: Final = 1514  # of a frame
AT_ONCE: Final = 64  # frames taken from a port before the next has its turn
ETHERNET: Final = 14  # bytes before the packet
MDNS: Final = 5353
PCAP_HEAD: Final = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 1)


@dataclass(slots=True)
class Rule:
    """What becomes of frames from one host to another. Shares are of 1; ``jitter_ms`` is at most
    what is added to the delay, and has frames overtake each other."""

    loss: float = 0.0
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    twice: float = 0.0


@dataclass(slots=True)
class Port:
    """One host: its namespace, its end of the cable, and what it sent, in bytes of packets."""

    name: str
    mac: bytes
    namespace: int
    tap: int
    sent: Counter[str] = field(default_factory=Counter)
    frames: int = 0


class Switch:
    """See the module."""

    def __init__(self) -> None:
        self._ports: dict[str, Port] = {}
        self._by_tap: dict[int, Port] = {}
        self._by_mac: dict[bytes, Port] = {}
        self._usual = Rule()
        self._rules: dict[tuple[str, str], Rule] = {}
        self._late: list[tuple[float, int, int, bytes]] = []  # when, order, tap, frame
        self._order = itertools.count()
        self._chance = random.Random(4711)
        self._capture: IO[bytes] | None = None
        self._unread = b""
        self._poll = select.epoll()

    def run(self) -> None:
        """Until standard input ends."""
        self._poll.register(0, select.EPOLLIN)
        while True:
            wait_s = max(self._late[0][0] - time.monotonic(), 0.0) if self._late else -1
            for fd, _ in self._poll.poll(wait_s):
                if fd != 0:
                    self._take(self._by_tap[fd])
                elif not self._listen():
                    return
            now = time.monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, tap, frame = heapq.heappop(self._late)
                _give(tap, frame)

    # --- frames

    def _take(self, port: Port) -> None:
        for _ in range(AT_ONCE):
            try:
                frame = os.read(port.tap, LONGEST)
            except OSError:  # none, or the interface is down
                return
            port.frames += 1
            port.sent[_kind(frame)] += len(frame) - ETHERNET
            if self._capture is not None:
                seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
                head = struct.pack("<IIII", seconds, micros, len(frame), len(frame))
                self._capture.write(head + frame)
            to = self._by_mac.get(frame[:6])
            if to is not None:
                self._pass(port, to, frame)
            elif frame[0] & 1:  # to all, or to a group
                for each in self._ports.values():
                    if each is not port:
                        self._pass(port, each, frame)

    def _pass(self, port: Port, to: Port, frame: bytes) -> None:
        rule = self._rules.get((port.name, to.name), self._usual)
        if rule.loss and self._chance.random() < rule.loss:
            return
        times = 2 if rule.twice and self._chance.random() < rule.twice else 1
        for _ in range(times):
            if rule.delay_ms or rule.jitter_ms:
                delay_ms = rule.delay_ms + self._chance.random() * rule.jitter_ms
                due = time.monotonic() + delay_ms / 1000
                heapq.heappush(self._late, (due, next(self._order), to.tap, frame))
            else:
                _give(to.tap, frame)

    # --- commands

    def _listen(self) -> bool:
        """Whether there may be more of them."""
        data = os.read(0, 65_536)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            answer = getattr(self, "do_" + told.pop("do"))(**told)
            print(json.dumps(answer), flush=True)
        return bool(data)

    def do_host(self, name: str, address: str) -> dict[str, Any]:
        """A host more. Says which descriptor of this process is its namespace, or the trouble."""
        mac = b"\x02\0\0\0" + struct.pack(">H", len(self._ports) + 1)
        try:
            namespace, tap = _new_host(mac, address)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None)
            return {"error": (said or str(error)).strip()}
        port = Port(name, mac, namespace, tap)
        self._ports[name] = self._by_tap[tap] = self._by_mac[mac] = port
        self._poll.register(tap, select.EPOLLIN)
        return {"namespace": namespace}

    def do_usual(self, **rule: float) -> dict[str, Any]:
        """What holds where nothing else was said."""
        self._usual = Rule(**rule)
        return {}

    def do_rule(self, senders: list[str], to: list[str], **rule: float) -> dict[str, Any]:
        """What holds from these to those."""
        self._rules |= {(a, b): Rule(**rule) for a in senders for b in to}
        return {}

    def do_heal(self) -> dict[str, Any]:
        """Only what is usual holds from now on."""
        self._rules.clear()
        return {}

    def do_sent(self) -> dict[str, Any]:
        """What each host sent so far: bytes of packets by kind, and frames."""
        return {p.name: {"frames": p.frames, **p.sent} for p in self._ports.values() if p.name}

    def do_capture(self, file: str) -> dict[str, Any]:
        """Write every frame that is sent to a file (pcap), lost ones too; "" ends it."""
        if self._capture is not None:
            self._capture.close()
        self._capture = None
        if file:
            self._capture = open(file, "wb")  # noqa: SIM115, PTH123 - until the next command
            self._capture.write(PCAP_HEAD)
        return {}


def _give(tap: int, frame: bytes) -> None:
    try:
        os.write(tap, frame)
    except OSError:  # its interface is down, or it does not keep up: as on a real wire
        return


def _kind(frame: bytes) -> str:
    """arp, tcp, udp, mdns or other."""
    if frame[12:14] == b"\x08\x06":
        return "arp"
    if frame[12:14] != b"\x08\x00":
        return "other"
    if frame[23] == 6:
        return "tcp"
    if frame[23] != 17:
        return "other"
    after = ETHERNET + 4 * (frame[14] & 15)
    return "mdns" if struct.unpack_from(">H", frame, after + 2)[0] == MDNS else "udp"


def _new_host(mac: bytes, address: str) -> tuple[int, int]:
    """A namespace with one interface that is up and has an address; its descriptor, and that of
    the cable's other end.

    :raises OSError, CalledProcessError: it is not allowed, or there is no such thing here.
    """
    made: list[tuple[int, int]] = []
    failed: list[BaseException] = []

    def make() -> None:
        # A namespace belongs to a thread, and what the thread starts is in it.
        try:
            _unshare(CLONE_NEWNET)
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH14x", b"eth0", IFF_TAP | IFF_NO_PI))
            for line in (
                "link set lo up",
                f"link set eth0 address {mac.hex(':')} up",
                f"addr add {address}/24 dev eth0",
                "route add 224.0.0.0/4 dev eth0",
            ):
                subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)
            made.append((os.open("/proc/thread-self/ns/net", os.O_RDONLY), tap))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _unshare(what: int) -> None:
    """What ``os.unshare`` does, from Python 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).unshare(what):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


if __name__ == "__main__":
    Switch().run()
