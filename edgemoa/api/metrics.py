"""``/metrics``: the board's state in Prometheus' words, made from what ``/v1/status`` tells.

Read when somebody asks, so a board that nobody watches pays nothing for it. Names follow
Prometheus' conventions: base units, ``_total`` for what only grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS: Final = {
    "accepted": "Prompts accepted",
    "answered": "Prompts answered",
    "failed": "Prompts that came to a bad end",
    "cancelled": "Prompts taken back by their clients",
    "degraded": "Prompts granted a smaller plan than was asked for",
    "refused": "Prompts refused",
    "proposals_served": "Proposals written for peers",
    "proposals_declined": "Peers' jobs that were declined",
    "proposers_left_out": "Proposers that a layer went on without",
    "engine_losses": "Times that the model process was lost",
    "tokens_read": "Tokens of prompts that the model read",
    "tokens_cached": "Tokens of prompts that it had read before",
    "tokens_written": "Tokens that the model wrote",
}
_SENSORS: Final = (
    ("temperature_c", "temperature_celsius", "Of the hottest processor zone"),
    ("throttled", "throttled", "Whether the system holds the processor back"),
    ("under_voltage", "under_voltage", "Whether the supply is too weak"),
)
_PRESENCES: Final = ("unheard", "alive", "suspect", "gone")


def exposition(status: dict[str, Any]) -> bytes:
    """All metrics of a board, in the text format.

    :param status: what ``GET /v1/status`` answers.
    """
    # Takes a moment to load, and a board that nobody watches never needs it.
    from prometheus_client.exposition import generate_latest  # noqa: PLC0415
    from prometheus_client.registry import Collector, CollectorRegistry  # noqa: PLC0415

    class Board(Collector):
        def collect(self) -> Iterator[Metric]:
            return _metrics(status)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Board())
    return generate_latest(registry)


def _metrics(status: dict[str, Any]) -> Iterator[Metric]:
    from prometheus_client.core import (  # noqa: PLC0415
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
    )

    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(f"edgemoa_{name}", text, value=value)

    def each(name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(f"edgemoa_{name}", text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        return family

    def count(name: str, text: str, value: float) -> Metric:
        return CounterMetricFamily(f"edgemoa_{name}", text, value=value)

    info = {key: str(status[key]) for key in ("id", "name", "model", "backend")}
    yield InfoMetricFamily("edgemoa_board", "What this board is", value=info)
    yield gauge("ready", "Whether the model takes work", status["ready"])
    yield gauge("draining", "Whether the board is about to stop", status["draining"])
    yield gauge("slots", "Jobs that the model works on at a time", status["slots"])
    yield each(
        "jobs",
        "Jobs of prompts and peers",
        "state",
        {"waiting": status["waiting"], "running": status["running"]},
    )
    yield each(
        "queue_length",
        "Prompts of own users, and peers' jobs",
        "class",
        {"own": status["prompts"], "peers": status["peer_jobs"]},
    )
    yield each(
        "queue_cap",
        "How many of each are taken at most",
        "class",
        {name: cap["requests"] for name, cap in status["caps"].items()},
    )
    yield each(
        "utilisation",
        "Work that comes against what the board can do",
        "class",
        {
            "own": status["utilisation"] - status["peers_utilisation"],
            "peers": status["peers_utilisation"],
        },
    )
    yield gauge(
        "expected_wait_seconds",
        "How long a prompt that came now would wait",
        status["expected_wait_ms"] / 1000,
    )
    yield gauge("prompts_per_second", "Prompts that come, averaged", status["prompts_per_min"] / 60)
    yield each(
        "service_seconds",
        "The model's time that a usual job takes",
        "kind",
        {kind: ms / 1000 for kind, ms in status["service_ms"].items()},
    )
    yield _headroom(status, GaugeMetricFamily)
    for name, text in _COUNTERS.items():
        yield count(name, text, status["counters"][name])
    yield count("engine_restarts", "Restarts of the model process", status["engine"]["restarts"])
    yield count("lent_bytes", "Bytes of models that peers copied", status["lent_bytes"])
    yield gauge(
        "loop_lag_seconds_max",
        "How late the daemon got to what was due, at worst",
        status["loop_lag_ms_max"] / 1000,
    )
    yield gauge(
        "backlog", "Prompts from before a restart, not taken up yet", status.get("backlog", 0)
    )
    hardware = status["hardware"]
    for key, name, text in _SENSORS:
        if hardware[key] is not None:
            yield gauge(name, text, float(hardware[key]))
    states = dict.fromkeys(_PRESENCES, 0.0)
    for peer in status["peers"]:
        states[peer["presence"]] = states.get(peer["presence"], 0.0) + 1
    yield each("peers", "Paired boards", "presence", states)
    yield _by_peer(status, GaugeMetricFamily)


def _headroom(status: dict[str, Any], family: Any) -> Metric:
    room: Metric = family(
        "edgemoa_headroom_prompts_per_second",
        "How many prompts more there is room for, by plan",
        labels=["layers", "proposers"],
    )
    for plan in status["headroom"]:
        value = plan["prompts_per_min"] / 60
        room.add_metric([str(plan["layers"]), str(plan["proposers"])], value)  # type: ignore[attr-defined]
    return room


def _by_peer(status: dict[str, Any], family: Any) -> Metric:
    waits: Metric = family(
        "edgemoa_peer_expected_wait_seconds",
        "How long a job would wait at a peer, by its last report",
        labels=["peer", "name"],
    )
    for peer in status["peers"]:
        waits.add_metric([peer["id"][:7], peer["name"]], peer["expected_wait_ms"] / 1000)  # type: ignore[attr-defined]
    return waits
