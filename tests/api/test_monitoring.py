"""What is shipped for Prometheus and Grafana asks for what boards tell, in PromQL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from test_metrics import STATUS

from edgemoa.api import metrics

HERE = Path(__file__).parents[2] / "packaging" / "monitoring"
RULES = yaml.safe_load((HERE / "alerts.yml").read_text())["groups"][0]["rules"]
BOARD = json.loads((HERE / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def told() -> dict[str, set[str]]:
    """The labels of each metric, by its name."""
    sensors = dict.fromkeys(("temperature_c", "throttled", "under_voltage"), 1)
    everything: dict[str, Any] = {**STATUS, "hardware": sensors}
    text = metrics.exposition(everything).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {"up": {"job"}} | {sample.name: set(sample.labels) for sample in samples}


def selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if (below := getattr(node, name, None)) is not None:
            yield from selectors(below)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def check(expression: str) -> None:
    known = told()
    asked = list(selectors(promql_parser.parse(expression.replace("$__rate_interval", "5m"))))
    assert asked, expression
    for selector in asked:
        assert selector.name in known, f"{selector.name} is not told"
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert labels <= known[selector.name] | {"instance", "job"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_alerts_ask_for_what_is_told_and_say_what_to_do(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["next"]
    assert "$labels.instance" in rule["annotations"]["summary"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_the_dashboard_asks_for_what_is_told(panel: dict[str, Any]) -> None:
    known = told()
    for target in panel["targets"]:
        check(target["expr"])
        (selector, *_) = selectors(
            promql_parser.parse(target["expr"].replace("$__rate_interval", "5m"))
        )
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert shown <= known[selector.name] | {"instance"}


def test_panels_do_not_lie_upon_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
