"""The board's state as Prometheus reads it, by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from edgemoa.api import metrics

STATUS = {
    "id": "abc", "name": 'a "board"\n', "ready": True, "draining": False, "model": "tiny",
    "backend": "slots", "slots": 4, "waiting": 2, "running": 3, "expected_wait_ms": 1500,
    "utilisation": 0.75, "peers_utilisation": 0.25, "prompts_per_min": 30.0,
    "service_ms": {"proposal": 200}, "prompts": 5, "peer_jobs": 1,
    "caps": {"own": {"requests": 9}, "peers": {"requests": 7}},
    "headroom": [{"layers": 1, "proposers": 2, "prompts_per_min": 6.0, "limited_by": []}],
    "peers": [
        {"id": "b" * 56, "name": "bee", "presence": "alive", "expected_wait_ms": 40},
        {"id": "c" * 56, "name": "", "presence": "gone", "expected_wait_ms": 0},
    ],
    "counters": dict.fromkeys(metrics._COUNTERS, 8),
    "engine": {"restarts": 1}, "lent_bytes": 10, "loop_lag_ms_max": 3.0, "backlog": 4,
    "hardware": {"temperature_c": 61.5, "throttled": False, "under_voltage": None},
}  # fmt: skip


def test_prometheus_reads_it() -> None:
    text = metrics.exposition(STATUS).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["edgemoa_ready",] == 1
    assert values["edgemoa_jobs", ("state", "waiting")] == 2
    assert values["edgemoa_queue_cap", ("class", "peers")] == 7
    assert values["edgemoa_utilisation", ("class", "own")] == 0.5
    assert values["edgemoa_expected_wait_seconds",] == 1.5
    assert values["edgemoa_service_seconds", ("kind", "proposal")] == 0.2
    assert values["edgemoa_refused_total",] == 8
    assert values["edgemoa_temperature_celsius",] == 61.5
    assert values["edgemoa_throttled",] == 0
    assert ("edgemoa_under_voltage",) not in values, "not told"
    assert values["edgemoa_peers", ("presence", "gone")] == 1
    assert values["edgemoa_peers", ("presence", "suspect")] == 0
    room = ("edgemoa_headroom_prompts_per_second", ("layers", "1"), ("proposers", "2"))
    assert values[room] == 0.1
    info = families["edgemoa_board_info"].samples[0].labels
    assert info["name"] == 'a "board"\n'
    assert all(family.documentation for family in families.values())
    assert all(family.type in ("gauge", "counter") for family in families.values())
