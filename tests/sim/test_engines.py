"""Simulated engines against what theory says of them, and recordings of real ones."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoa.core.rates import DecodeRate, PrefillRate, Rates
from edgemoa.errors import EdgemoaError, UserError
from edgemoa.sim.boards import KINDS, estimate
from edgemoa.sim.engines import Ask, Batch, Recorded, Timed
from edgemoa.sim.recording import Recording, Sample, Speeds, read_recording, write_recording
from edgemoa.sim.scenario import FREE, PAPER, Arrival, Scenario, Sizes
from edgemoa.sim.theory import limits
from edgemoa.sim.world import World

PROPOSAL = Ask("proposal", final=False, drafts=0)
AGGREGATION = Ask("aggregation", final=True, drafts=3)
RATES = Rates(
    prefill=(PrefillRate(64, 2.0), PrefillRate(1000, 2.5)),
    decode=(DecodeRate(1, 64, 20.0), DecodeRate(4, 64, 32.0), DecodeRate(1, 1000, 25.0)),
)
RECORDING = Recording(1, "shelf", "a model", 1, RATES, (
    Sample("proposal", 40, 100, 2000.0), Sample("proposal", 50, 120, 3000.0),
    Sample("aggregation", 500, 200, 6000.0),
))  # fmt: skip
# A board alone: a single server with Poisson arrivals.
ALONE = Scenario(boards=1, seconds=20_000, warm_up_s=500, layers=0, proposers=0, reports="table",
                 own_requests=FREE, peer_jobs=FREE, deadline_s=FREE, layer_deadline_s=FREE,
                 node=PAPER)  # fmt: skip


@pytest.mark.parametrize("cv", [0.25, 0.5, 2.0])
def test_gamma_has_the_moments_that_were_asked_for(cv: float) -> None:
    law = Timed(Scenario(distribution="gamma", cv=cv, aggregation_factor=3), 2.0)
    rng = Random(5)
    proposals = [law.draw(rng, PROPOSAL).model_ms for _ in range(40_000)]
    aggregations = [law.draw(rng, AGGREGATION).model_ms for _ in range(40_000)]
    assert statistics.fmean(proposals) == pytest.approx(2000, rel=0.04)
    assert statistics.fmean(aggregations) == pytest.approx(6000, rel=0.04)
    deviation = statistics.pstdev(proposals) / statistics.fmean(proposals)
    assert deviation == pytest.approx(cv, rel=0.05)


def test_exponential_is_gamma_of_one_and_fixed_of_none() -> None:
    rng = Random(1)
    fixed = Timed(Scenario(distribution="fixed"), 1.5)
    assert {fixed.draw(rng, PROPOSAL).model_ms for _ in range(9)} == {1500.0}
    by_gamma = Timed(Scenario(distribution="gamma", cv=1), 1.5)
    exponential = Timed(Scenario(), 1.5)
    assert by_gamma.draw(Random(2), PROPOSAL) == exponential.draw(Random(2), PROPOSAL)


def test_a_batch_by_hand() -> None:
    """tau(b) / tau(1) = .5 + .5 b: two jobs take 1.5 times as long, and half of the model each."""
    batch = Batch(0.5)
    batch.start(1, 1000.0, 0)
    assert batch.next_end_ms(0) == 1000
    batch.start(2, 1000.0, 400)  # 600 left of the first, at two thirds of the speed
    assert batch.next_end_ms(400) == 1300
    assert batch.ended(1299) is None
    ended = batch.ended(1300)
    assert ended is not None
    assert ended.job_id == 1
    assert batch.stop(1, 1300) == pytest.approx(400 + 450)
    assert batch.next_end_ms(1300) == 1700
    assert batch.stop(2, 1700) == pytest.approx(450 + 400)
    assert batch.stop(2, 1700) is None
    assert batch.next_end_ms(1700) is None


def test_shares_of_the_model_add_up_to_the_time_that_it_worked() -> None:
    rng, batch, running, now_ms = Random(3), Batch(0.3), dict[int, int](), 0
    shares = 0.0
    for job in range(500):
        now_ms += rng.randrange(0, 300)
        batch.start(job, rng.expovariate(1 / 500), now_ms)
        running[job] = now_ms
        while len(running) > rng.randrange(1, 6):
            end_ms = batch.next_end_ms(now_ms)
            assert end_ms is not None
            now_ms = end_ms
            ended = batch.ended(now_ms)
            assert ended is not None
            del running[ended.job_id]
            shares += batch.stop(ended.job_id, now_ms) or 0.0
    worked_ms = now_ms - 0
    shares += sum(batch.stop(job, now_ms) or 0.0 for job in list(running))
    assert shares <= worked_ms + 1
    assert shares >= 0.7 * worked_ms


def test_with_nothing_but_overhead_and_many_slots_nobody_waits() -> None:
    """M/G/infinity: everyone takes his own time, and lambda E[S] are there on average."""
    crowd = replace(ALONE, prompts_per_s=3.0, slots=64, batch_overhead=1.0, seconds=6_000)
    outcome = World(crowd, 1, checks=False).run()
    assert statistics.fmean(outcome.latency_ms) == pytest.approx(1000, rel=0.04)
    assert outcome.mean_queue == pytest.approx(3.0, rel=0.05)


def test_without_overhead_a_batch_is_one_server_shared() -> None:
    """M/M/1-PS: rho / (1 - rho) on average, as with one at a time, and for any distribution."""
    for cv in (1.0, 2.0):
        shared = replace(ALONE, prompts_per_s=0.6, slots=64, batch_overhead=0.0, seconds=40_000,
                         distribution="gamma", cv=cv)  # fmt: skip
        outcome = World(shared, 2, checks=False).run()
        assert outcome.utilisation == pytest.approx(0.6, abs=0.03)
        assert outcome.mean_queue == pytest.approx(1.5, rel=0.15)
        assert statistics.fmean(outcome.latency_ms) == pytest.approx(2500, rel=0.15)


def test_one_at_a_time_is_pollaczek_and_khinchine() -> None:
    for cv in (0.0, 0.5, 2.0):
        line = replace(ALONE, prompts_per_s=0.7, distribution="gamma", cv=cv)
        outcome = World(line, 3, checks=False).run()
        expected_s = 1 + 0.7 * (1 + cv * cv) / (2 * 0.3)
        assert statistics.fmean(outcome.latency_ms) / 1000 == pytest.approx(expected_s, rel=0.12)


def test_a_recording_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "shelf.json"
    write_recording(file, RECORDING)
    assert read_recording(file) == RECORDING


def test_a_recorded_board_draws_its_samples_or_goes_by_its_speeds() -> None:
    rng = Random(1)
    sampled = Recorded(Scenario(), RECORDING)
    assert {sampled.draw(rng, PROPOSAL).model_ms for _ in range(50)} == {2000.0, 3000.0}
    assert sampled.draw(rng, AGGREGATION).model_ms == 6000.0
    sized = Recorded(Scenario(sizes=Sizes(60, 150, 250), distribution="fixed"), RECORDING)
    need = sized.draw(rng, PROPOSAL)
    assert (need.prompt_tokens, need.tokens) == (60, 150)
    assert need.model_ms == pytest.approx(RATES.estimate(60, 150, 1))
    longer = sampled.draw(rng, replace(PROPOSAL, prompt_tokens=600, answer_tokens=250))
    assert (longer.prompt_tokens, longer.tokens) == (600, 150)
    assert longer.model_ms == pytest.approx(RATES.estimate(600, 150, 1))
    answer = sampled.draw(rng, replace(AGGREGATION, prompt_tokens=100, answer_tokens=500))
    assert answer.tokens == 500
    assert answer.prompt_tokens > 3 * 300  # three proposals, as long as such an answer's are


def test_replayed_prompts_have_their_own_sizes() -> None:
    """On a board by itself, the second of two waits for the first."""
    slow = Arrival(1.0, 0, prompt_tokens=100, answer_tokens=200)
    scenario = replace(ALONE, seconds=100, warm_up_s=0, recordings=(RECORDING,),
                       replay=(slow, slow))  # fmt: skip
    outcome = World(scenario, 1, checks=False).run()
    alone_ms = RATES.estimate(100, 200, 1)
    assert alone_ms is not None
    assert outcome.latency_ms == pytest.approx([alone_ms, 2 * alone_ms], abs=2)


def _hostile(**changed: object) -> bytes:
    told = json.loads(msgspec.json.encode(RECORDING))
    return json.dumps({**told, **changed}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        _hostile(version=2),
        _hostile(slots=0),
        _hostile(slots=10**9),
        _hostile(board="x" * 10_000),
        _hostile(surprise=1),
        _hostile(rates={"prefill": [], "decode": []}),
        _hostile(rates={"prefill": [{"context": 64, "ms_per_token": 0}],
                        "decode": [{"rows": 1, "context": 64, "step_ms": 0}]}),
        _hostile(rates={"prefill": [{"context": 64, "ms_per_token": -1}], "decode": []}),
        _hostile(samples=[{"kind": "proposal", "prompt_tokens": 1, "tokens": 1, "model_ms": 0}]),
        _hostile(samples=[{"kind": "other", "prompt_tokens": 1, "tokens": 1, "model_ms": 9}]),
        _hostile(note="x" * 300_000),
    ],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_recording_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "hostile.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_recording(file)
    assert str(file) in str(refused.value)
    assert "bench --record" in refused.value.hint
    assert len(str(refused.value)) < 1_000


positive = st.floats(0, 1e9)
whole = st.integers(0, 2**31)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.builds(PrefillRate, whole, positive), min_size=1, max_size=5),
    st.lists(st.builds(DecodeRate, whole, whole, positive), min_size=1, max_size=5),
)
def test_any_speeds_give_times_or_are_refused(
    prefill: list[PrefillRate], decode: list[DecodeRate]
) -> None:
    try:
        board = Recording(1, "b", "m", 2, Rates(tuple(prefill), tuple(decode)))
    except ValueError:
        return
    scenario = Scenario(recordings=(board,), sizes=Sizes())
    law = Recorded(scenario, board)
    assert 0 <= law.overhead <= 1
    assert 0 < law.draw(Random(1), PROPOSAL).model_ms < 1e300
    assert limits(scenario).uniform > 0


def test_estimates_are_ordered_as_their_boards_are_and_say_what_they_are() -> None:
    made = {kind.name: estimate(kind, "m", 100_000_000, 135_000_000, 4) for kind in KINDS}
    assert all(each.note.startswith("estimate: ") for each in made.values())
    took = {name: Speeds.of(each.rates).job_ms(60, 150) for name, each in made.items()}
    order = ["zero2w", "pi3", "pi4", "pi5", "orin-nano", "orin-nano-super", "agx-orin"]
    assert sorted(order, key=took.__getitem__, reverse=True) == order
    for kind in KINDS:
        # No faster than memory lets the weights through, and not a tenth of that.
        best = kind.bandwidth_gb_s * 1e9 / 100_000_000
        writes = 1000 / Speeds.of(made[kind.name].rates).job_ms(0, 1)
        assert best / 20 < writes < best


def test_what_cannot_be_simulated() -> None:
    for wrong in (
        {"reports": "table", "loss": 0.1},
        {"node": {"unknown": 1}},
        {"batch_overhead": 1.5},
        {"warm_up_s": 60.0},
    ):
        with pytest.raises(EdgemoaError):
            Scenario(**wrong)
