"""Runs without checks: as the watched ones in what they say, and many times as fast."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgemoa.errors import UserError
from edgemoa.sim.replay import read_replay
from edgemoa.sim.scenario import FREE, PAPER, PARTS, Arrival, Outcome, Scenario
from edgemoa.sim.sweep import Task, figures, grows, run_all
from edgemoa.sim.theory import limits
from edgemoa.sim.world import World

GROUP = Scenario(boards=8, seconds=900, warm_up_s=100, prompts_per_s=0.06, layers=2, proposers=2,
                 service_s=(1.0, 1.0, 2.0), distribution="gamma", cv=0.7, aggregation_factor=1.2,
                 slots=3, batch_overhead=0.4, reports="table", burst=2)  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("pick", ["uniform", "capacity", "shortest"])
def test_the_same_bits_in_another_process(pick: str) -> None:
    scenario = replace(GROUP, node={"pick": pick}, seconds=300)
    here = World(scenario, 9, checks=False).run()
    assert here.answered > 50
    code = (
        "from dataclasses import replace; from tests.sim.test_product import GROUP;"
        "from edgemoa.sim.world import World;"
        f"print(World(replace(GROUP, node={{'pick': {pick!r}}}, seconds=300), 9, checks=False)"
        ".run().digest)"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "4711"},
    ).stdout.strip()  # fmt: skip
    assert there == here.digest
    assert World(scenario, 10, checks=False).run().digest != here.digest


@pytest.mark.parametrize("scenario", [
    GROUP,
    replace(GROUP, reports="messages"),
    replace(GROUP, slots=1, boards=3, prompts_per_s=0.3, own_requests=4, peer_jobs=4),
], ids=["table", "messages", "crowded"])  # fmt: skip
def test_invariants_hold_in_both_modes_of_reports(scenario: Scenario) -> None:
    outcome = World(scenario, 4).run()
    assert outcome.answered > 100


@pytest.mark.parametrize("pick", ["uniform", "shortest"])
def test_a_table_of_reports_is_as_good_as_messages(pick: str) -> None:
    calm = Scenario(boards=10, seconds=2_500, warm_up_s=200, prompts_per_s=0.08,
                    service_s=(1.0, 1.0, 1.5), node={"pick": pick, "ladder": False},
                    own_requests=FREE, peer_jobs=FREE)  # fmt: skip
    listing = replace(calm, reports="table")
    beating = [World(calm, seed, checks=False).run() for seed in (4, 5, 6)]
    listed = [World(listing, seed, checks=False).run() for seed in (1, 2, 3)]

    def total(outcomes: list[Outcome], figure: str) -> float:
        return sum(float(getattr(each, figure)) for each in outcomes)

    assert total(listed, "events") < 0.5 * total(beating, "events")
    asked = [total(runs, "asked") for runs in (listed, beating)]
    assert asked[0] == pytest.approx(asked[1], rel=0.07)  # by chance
    work = [total(runs, "utilisation") for runs in (listed, beating)]
    assert work[0] / asked[0] == pytest.approx(work[1] / asked[1], rel=0.04)
    for percent in (50, 95):
        by_table, by_messages = (
            statistics.quantiles([ms for each in runs for ms in each.latency_ms], n=100)[
                percent - 1
            ]
            for runs in (listed, beating)
        )
        assert by_table == pytest.approx(by_messages, rel=0.15)


def test_old_reports_make_the_shortest_pick_worse() -> None:
    unequal = Scenario(boards=6, seconds=6_000, warm_up_s=300, prompts_per_s=0.08,
                       service_s=(1.0, 1.0, 1.0, 2.0, 4.0, 4.0), reports="table",
                       node={"pick": "shortest", "ladder": False})  # fmt: skip
    fresh, stale = (
        statistics.fmean(World(replace(unequal, report_age_s=age_s), 1, checks=False)
                         .run().latency_ms)
        for age_s in (0.0, 60.0)
    )  # fmt: skip
    assert stale > 1.1 * fresh


def test_a_burst_of_ten_drains_as_in_the_paper() -> None:
    """n = 4, M = 1, k = 2, alpha = 46 s, ten prompts each: .25 a second is as good as at once."""
    scenario = Scenario(boards=4, seconds=3_000, burst=10, prompts_per_s=0, service_s=(46.0,),
                        distribution="fixed", reports="table", own_requests=FREE, peer_jobs=FREE,
                        layer_deadline_s=FREE, deadline_s=FREE, node=PAPER)  # fmt: skip
    outcome = World(scenario, 1, checks=False).run()
    assert outcome.answered == outcome.asked == 40
    assert outcome.queue_over_time[0] > outcome.queue_over_time[-1]


def test_what_happens_where_prompts_are_replayed() -> None:
    arrivals = tuple(Arrival(float(i), board=i % 2) for i in range(20))
    scenario = Scenario(boards=4, seconds=60, replay=arrivals, reports="table")
    outcome = World(scenario, 1).run()
    assert outcome.asked == 20
    assert World(replace(scenario, seconds=10), 1).run().asked == 10


def test_rates_that_differ_between_boards_load_them_differently() -> None:
    scenario = Scenario(boards=4, seconds=4_000, prompts_per_s=(0.4, 0.1), layers=0, proposers=0,
                        reports="table", own_requests=FREE, deadline_s=FREE,
                        node=PAPER)  # fmt: skip
    outcome = World(scenario, 1, checks=False).run()
    assert outcome.utilisations == pytest.approx([0.4, 0.1, 0.4, 0.1], abs=0.04)


def test_books_add_up() -> None:
    """Little: jobs on a board are their rate times their time; and the parts make up the whole."""
    scenario = replace(GROUP, warm_up_s=0, burst=0, layers=0, proposers=0, own_requests=FREE,
                       deadline_s=FREE, node=PAPER, seconds=20_000)  # fmt: skip
    outcome = World(scenario, 1, checks=False).run()
    little = outcome.asked / 20_000 / 8 * statistics.fmean(outcome.latency_ms) / 1000
    assert outcome.mean_queue == pytest.approx(little, rel=0.02)
    assert len(outcome.queue_over_time) == PARTS
    assert statistics.fmean(outcome.queue_over_time) == pytest.approx(outcome.mean_queue, rel=1e-6)
    assert statistics.fmean(outcome.queues) == pytest.approx(outcome.mean_queue)


@pytest.mark.parametrize(("layers", "proposers", "factor"), [(0, 0, 1.0), (1, 2, 1.0), (2, 1, 2.0)])
def test_theory_says_where_queues_begin_to_grow(layers: int, proposers: int, factor: float) -> None:
    scenario = Scenario(boards=6, seconds=3_000, layers=layers, proposers=proposers,
                        aggregation_factor=factor, service_s=(0.5,), reports="table",
                        own_requests=FREE, peer_jobs=FREE, layer_deadline_s=FREE, deadline_s=FREE,
                        node=PAPER)  # fmt: skip
    limit = limits(scenario).uniform
    below, above = (
        World(replace(scenario, prompts_per_s=share * limit), 3, checks=False).run()
        for share in (0.85, 1.15)
    )
    assert below.utilisation == pytest.approx(0.85, abs=0.03)
    assert not grows(below)
    assert grows(above)


def test_theory_of_unequal_boards() -> None:
    """The example of the design notes, worked out there by another program."""
    unequal = Scenario(boards=6, service_s=(1.0, 1.0, 1.0, 2.0, 4.0, 4.0), layers=1, proposers=2)
    found = limits(unequal)
    assert found.uniform == pytest.approx(0.0625)
    assert found.best == pytest.approx(0.125)
    assert found.board in (4, 5)


def test_processes_give_the_same_in_the_same_order() -> None:
    tasks = [Task(replace(GROUP, seconds=200, layers=m), seed) for m in (0, 1) for seed in (1, 2)]
    told: list[float] = []
    spread = [outcome.digest for outcome in run_all(tasks, told.append)]
    assert spread == [World(t.scenario, t.seed, checks=False).run().digest for t in tasks]
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_an_interrupt_leaves_what_there_is() -> None:
    def interrupt(part: float) -> None:
        if part > 0.3:
            raise KeyboardInterrupt

    outcome = World(replace(GROUP, seconds=20_000), 1, checks=False).run(interrupt)
    assert outcome.interrupted
    assert 6_000 < outcome.seconds < 16_000
    assert outcome.answered > 500
    assert outcome.asked == outcome.answered + outcome.unfinished + outcome.refused + outcome.failed
    assert 0 < outcome.utilisation < 1
    assert figures([outcome])["latency_ms_mean"] > 0


def test_replay_files(tmp_path: Path) -> None:
    lines = tmp_path / "day.jsonl"
    lines.write_text('{"time_s": 2, "board": 1, "prompt_tokens": 30}\n\n{"time_s": 0.5}\n')
    table = tmp_path / "day.csv"
    table.write_text("time_s,board,prompt_tokens,answer_tokens\n2,1,30,\n0.5,*,,\n")
    expected = (Arrival(0.5), Arrival(2.0, 1, 30))
    assert read_replay(lines, 2) == read_replay(table, 2) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"not json\n"),
        ("a.jsonl", b'{"time_s": -1}\n'),
        ("a.jsonl", b'{"time_s": 1, "board": 2}\n'),
        ("a.jsonl", b'{"time_s": 1, "other": 2}\n'),
        ("a.jsonl", b'{"time_s": 1e400}\n'),
        ("a.jsonl", b"\xff\n"),
        ("a.jsonl", b" " * 10_000 + b"\n"),
        ("a.csv", b"time_s,board\n1,2\n"),
        ("a.csv", b"time_s,board\nx,*\n"),
        ("a.csv", b"board\n1\n"),
        ("a.csv", b"time_s\n1,2,3\n"),
        ("a.csv", b"time_s,board\n1,1.5\n"),
    ],
)
def test_what_is_no_replay(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match="entry 1"):
        read_replay(file, 2)
