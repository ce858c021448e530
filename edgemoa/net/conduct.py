"""How a paired board behaves: what it may send in a second, and when it is left alone for a while.

A pairing says who a board is, not that its software is sound or that nobody has taken it over. So
each one has a rate, by its key and not by its address: over it, what comes over TLS is read more
slowly, which slows the sender, and what comes by datagram is dropped. What no sound board sends at
all is an offence. A few of them close together, and it is put on the gray list: its link is cut and
none is made until some time has passed, longer each time. It stays paired; the reason is shown to
people, who may revoke it.
"""

from __future__ import annotations

from typing import Final

from edgemoa.net.rates import Bucket

PACKETS_PER_S: Final = 1_000.0
PACKETS_BURST: Final = 3_000.0
BYTES_PER_S: Final = 4.0 * 1024 * 1024
BYTES_BURST: Final = 8.0 * 1024 * 1024
OFFENCES: Final = 5.0  # more than this many put a board on the gray list ...
FORGIVEN_PER_S: Final = 1 / 20  # ... and so many are forgotten each second
GRAY_S: Final = (60.0, 3_600.0)  # the first time, and at most; doubled in between
CLEAN_S: Final = 4 * 3_600.0  # without one, the next time counts as the first again


class Conduct:
    """One board's. Times are seconds on the caller's monotonic clock."""

    def __init__(self, now: float) -> None:
        self.reason = ""
        """Why it is, or last was, on the gray list."""
        self.dropped = 0
        """Datagrams of it over its rate."""
        self._packets = Bucket(PACKETS_PER_S, PACKETS_BURST, now)
        self._bytes = Bucket(BYTES_PER_S, BYTES_BURST, now)
        self._offences = Bucket(FORGIVEN_PER_S, OFFENCES, now)
        self._gray_until = now
        self._gray_s = 0.0

    def pause(self, size: int, now: float) -> float:
        """For how many seconds not to read on, after a frame of ``size`` bytes."""
        return max(self._packets.owe(now), self._bytes.owe(now, size))

    def admits(self, size: int, now: float) -> bool:
        """Whether a datagram of ``size`` bytes is within the rate."""
        if self._packets.take(now) and self._bytes.take(now, size):
            return True
        self.dropped += 1
        return False

    def offend(self, what: str, now: float) -> bool:
        """It did what no sound board does; returns whether that puts it on the gray list now."""
        if self._offences.take(now) or self.gray_s(now):
            return False
        clean = now - self._gray_until > CLEAN_S
        self._gray_s = GRAY_S[0] if clean or not self._gray_s else min(2 * self._gray_s, GRAY_S[1])
        self._gray_until = now + self._gray_s
        self._offences = Bucket(FORGIVEN_PER_S, OFFENCES, now)
        self.reason = what
        return True

    def gray_s(self, now: float) -> float:
        """For how long it is still on the gray list, in seconds; 0 if it is not."""
        return max(0.0, self._gray_until - now)
