"""How often one address may do something: token buckets in a bounded table."""

from __future__ import annotations

from collections import OrderedDict


class Rates:
    """A token bucket for each key; the keys used longest ago make room for new ones.

    :param per_second: tokens that come back each second, up to ``burst``.
    :param max_keys: size of the table.
    """

    def __init__(self, per_second: float, burst: float, max_keys: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now: float) -> bool:
        """Whether ``key`` may do it now, at ``now`` seconds; takes a token if so."""
        tokens, since = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._per_second)
        allowed = tokens >= 1
        self._buckets[key] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        return allowed
