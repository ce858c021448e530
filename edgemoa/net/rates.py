"""How often somebody may do something: one token bucket, or one for each key of a bounded table."""

from __future__ import annotations

from collections import OrderedDict


class Bucket:
    """A token bucket, full at first.

    :param per_second: tokens that come back each second, up to ``burst``.
    """

    __slots__ = ("_burst", "_per_second", "_since", "_tokens")

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._since = now

    def take(self, now: float, tokens: float = 1.0) -> bool:
        """Whether there are so many at ``now`` seconds; takes them if so."""
        self._fill(now)
        if self._tokens < tokens:
            return False
        self._tokens -= tokens
        return True

    def owe(self, now: float, tokens: float = 1.0) -> float:
        """Take them whether they are there or not; returns for how many seconds to pause now."""
        self._fill(now)
        self._tokens -= tokens
        return max(0.0, -self._tokens / self._per_second)

    def _fill(self, now: float) -> None:
        gained = max(0.0, now - self._since) * self._per_second
        self._tokens = min(self._burst, self._tokens + gained)
        self._since = now


class Rates:
    """A token bucket for each key; the keys used longest ago make room for new ones.

    :param per_second: tokens that come back each second, up to ``burst``.
    :param max_keys: size of the table.
    """

    def __init__(self, per_second: float, burst: float, max_keys: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, key: str, now: float) -> bool:
        """Whether ``key`` may do it now, at ``now`` seconds; takes a token if so."""
        bucket = self._buckets.pop(key, None) or Bucket(self._per_second, self._burst, now)
        self._buckets[key] = bucket
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        return bucket.take(now)
