"""The board's queue and its measured service times."""

from __future__ import annotations

from edgemoa.core.events import Job
from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.core.queueing import PRIOR_SERVICE_MS, ServiceTimes, Work, WorkQueue

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


def test_service_times_follow_what_is_measured() -> None:
    times = ServiceTimes()
    assert times.mean_ms("proposal") == PRIOR_SERVICE_MS
    times.observe("proposal", 1_000)
    assert times.mean_ms("proposal") == 1_000
    for _ in range(40):
        times.observe("proposal", 2_000)
    assert 1_990 < times.mean_ms("proposal") <= 2_000
    assert times.measured().keys() == {"proposal"}


def test_expected_wait_is_the_work_ahead_over_the_slots() -> None:
    queue = WorkQueue()
    queue.times.observe("proposal", 1_000)
    assert queue.expected_wait_ms() == 0
    for i in range(4):
        queue.add(work(i))
    assert queue.expected_wait_ms() == 4_000
    queue.slots = 2
    assert queue.expected_wait_ms() == 2_000
