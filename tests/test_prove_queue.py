"""What tools/prove-queue makes of what it sees; the boards themselves are for the tool."""

from __future__ import annotations

import importlib
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("prove_queue")


def test_arrivals_are_poisson(tool: Any) -> None:
    times = tool.poisson(2.0, 10_000.0, random.Random(4))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.25, rel=0.06)
    assert max(times) < 10_000


def test_percentiles(tool: Any) -> None:
    assert tool.percentile(range(1, 101), 0.95) == 95
    assert tool.percentile([7.0], 0.5) == 7
    assert math.isnan(tool.percentile([], 0.5))


def test_what_is_lost_or_answered_twice_is_seen(tool: Any) -> None:
    fates = [(1, 1, ""), (1, 0, ""), (1, 2, ""), (0, 0, "overloaded"), (0, 1, ""), (1, 1, "")]
    asked = [tool.Asked(0, 0.0, accepted=a, answered=b, refused=code) for a, b, code in fates]
    phase = tool.Phase("below", 1.0, 10.0, asked)
    assert phase.lost() == 3
    assert len(phase.accepted()) == 4
    assert len(phase.refused()) == 1
    assert phase.broken() == []
    asked[1].refused = "engine_failed"
    assert phase.broken() == ["engine_failed"]


def test_a_queue_without_a_bound_is_told_from_one_that_varies(tool: Any) -> None:
    growing = [(t / 2, 0.3 * t / 2) for t in range(180)]
    phase = tool.Phase("below", 1.0, 90.0, [], growing)
    assert tool.grew(*phase.halves())
    rng = random.Random(1)
    bounded = [(t / 2, rng.uniform(0, 4)) for t in range(180)]
    assert not tool.grew(*tool.Phase("below", 1.0, 90.0, [], bounded).halves())
    assert tool.grew(math.nan, math.nan)  # nothing was seen: nothing is proven


def test_only_whole_plans_of_the_settled_phase_count_for_the_boundary(tool: Any) -> None:
    def one(ended_s: float, layers: int = 1, proposers: int = 2, answered: int = 1) -> Any:
        return tool.Asked(
            0, 0.0, ended_s, 1, answered, layers, proposers, first_ms=[100, 200, 300], last_ms=900
        )

    asked = [one(20.0), one(29.0), one(59.0), one(61.0), one(45.0, 1, 1), one(45.0, answered=0)]
    asked.append(one(46.0))
    asked[-1].left_out.append("its queue is full (3 jobs)")
    phase = tool.Phase("strict", 1.0, 60.0, asked)
    assert phase.served_per_s(1, 2) == pytest.approx(3 / 40)
    assert phase.served_per_s(1, 2, whole=False) == pytest.approx(4 / 40)
    asked[4].last_ms = asked[-1].last_ms = 1  # fewer proposals to read: not what S_a is about
    assert phase.service_s(20.0, 2) == pytest.approx((0.2, 0.9))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"id": 1, "instruction": "One?"}\n\n{"prompt": "Two?"}\n{"prompt": " "}\n'),
        ("a.csv", 'id,question\n1,One?\n2,Two?\n3,""\n'),
    ],
)
def test_prompts_are_read(tool: Any, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert tool.read_prompts(tmp_path / name) == ["One?", "Two?"]


@pytest.mark.parametrize("text", ["", "{", '"One?"\n', '{"prompt": 3}\n', "\udcff"])
def test_files_without_prompts_are_refused(tool: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=r"a\.jsonl"):
        tool.read_prompts(tmp_path / "a.jsonl")


def test_own_prompts_differ(tool: Any) -> None:
    assert len(set(tool.own_prompts())) == len(tool.own_prompts()) > 400
