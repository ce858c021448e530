"""The board's queue and its measured service times."""

from __future__ import annotations

import msgspec
import pytest

from edgemoa.core.events import Job, WorkDone
from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.core.queueing import LONGEST_WAIT_MS, PRIOR_SERVICE_MS, ServiceTimes, Work, WorkQueue
from edgemoa.core.rates import DecodeRate, PrefillRate, Rates

ME, PEER = BoardId("me"), BoardId("peer")


def work(job_id: int, source: BoardId = PEER) -> Work:
    job = Job(job_id, "proposal", (ChatMessage("user", "x"),), Sampling(), stream=False)
    return Work(job, source, f"request-{job_id}", 1, arrived_ms=0, deadline_ms=1_000)


def ids(queue: WorkQueue) -> list[int]:
    return [w.job.job_id for w in queue]


def test_first_come_first_served_whoever_asks() -> None:
    queue = WorkQueue()
    assert [queue.add(work(1)), queue.add(work(2, ME)), queue.add(work(3))] == [0, 1, 2]
    order = []
    while (served := queue.next(5)) is not None:
        assert queue.next(5) is None  # one slot
        order.append(served.job.job_id)
        queue.end(served.job.job_id)
    assert order == [1, 2, 3]


def test_slots_bound_what_runs() -> None:
    queue = WorkQueue()
    queue.slots = 2
    for i in range(4):
        queue.add(work(i))
    assert [w is not None for w in (queue.next(0), queue.next(0), queue.next(0))] == [
        True,
        True,
        False,
    ]
    assert queue.position(lambda w: w.job.job_id == 3) == 3


def test_what_ran_when_the_engine_died_goes_first_again() -> None:
    queue = WorkQueue()
    queue.slots = 2
    for i in range(3):
        queue.add(work(i))
    queue.next(0)
    queue.next(0)
    assert [w.job.job_id for w in queue.put_back()] == [0, 1]
    assert ids(queue) == [0, 1, 2]
    again = queue.next(0)
    assert again is not None
    assert again.attempts == 2


def test_removing_says_what_ran() -> None:
    queue = WorkQueue()
    for i in range(3):
        queue.add(work(i, ME if i == 1 else PEER))
    queue.next(0)
    waiting, running = queue.remove(lambda w: w.source == PEER)
    assert [w.job.job_id for w in waiting] == [2]
    assert [w.job.job_id for w in running] == [0]
    assert ids(queue) == [1]
    assert queue.end(0) is None


def done(model_ms: int, prompt_tokens: int = 100, cached_tokens: int = 0) -> WorkDone:
    return WorkDone("", "stop", prompt_tokens, 50, 0, 9_999, cached_tokens, model_ms)


def test_service_times_follow_what_is_measured() -> None:
    times = ServiceTimes()
    assert times.mean_ms("proposal") == PRIOR_SERVICE_MS
    times.observe("proposal", done(1_000))
    assert times.mean_ms("proposal") == 1_000
    for _ in range(40):
        times.observe("proposal", done(2_000))
    assert 1_990 < times.mean_ms("proposal") <= 2_000
    assert times.measured().keys() == {"proposal"}


def test_what_a_job_takes_among_others_follows_from_the_engines_rates() -> None:
    times = ServiceTimes()
    times.rates = Rates(
        prefill=(PrefillRate(100, 1.0),),
        decode=tuple(DecodeRate(rows, 100, 8.0 + 2.0 * rows) for rows in (1, 2, 4)),
    )
    assert times.mean_ms("proposal") == PRIOR_SERVICE_MS  # no telling how large one is
    read_ahead = msgspec.structs.replace(
        done(1_000, prompt_tokens=120, cached_tokens=90), ahead_tokens=70
    )
    times.observe("proposal", read_ahead)
    assert times.mean_ms("proposal") == pytest.approx(100 + 50 * 10, rel=0.02)
    assert times.mean_ms("proposal", batch=4) == pytest.approx(100 + 50 * 4, rel=0.02)


def test_expected_wait_is_what_the_work_ahead_takes_of_the_model() -> None:
    queue = WorkQueue()
    queue.times.observe("proposal", done(1_000))
    assert queue.expected_wait_ms() == 0
    for i in range(4):
        queue.add(work(i))
    # Shares of the model's time add up, however many jobs it works on at a time ...
    queue.slots = 2
    assert queue.expected_wait_ms() == 4_000
    # ... but are smaller where more is done at a time.
    queue.times.rates = Rates((PrefillRate(100, 0.0),), (DecodeRate(1, 0, 9), DecodeRate(2, 0, 10)))
    assert queue.expected_wait_ms() == pytest.approx(4 * 50 * 5, rel=0.02)
    # Absurd figures end where other boards would no longer read what this one says.
    queue.times.rates = Rates((PrefillRate(1, 1e9),), (DecodeRate(1, 1, 1e9),))
    assert queue.expected_wait_ms() == LONGEST_WAIT_MS < 2**40
