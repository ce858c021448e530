"""The board's queue and its measured service times."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoa.core.events import Job, WorkDone
from edgemoa.core.load import HORIZON_MS
from edgemoa.core.messages import BoardId, ChatMessage, Sampling
from edgemoa.core.queueing import LONGEST_WAIT_MS, OWN_WEIGHT, Work, WorkQueue
from edgemoa.core.rates import DecodeRate, PrefillRate, Rates

ME, PEER = BoardId("me"), BoardId("peer")


def work(job_id: int, source: BoardId = PEER) -> Work:
    job = Job(job_id, "proposal", (ChatMessage("user", "x"),), Sampling(), stream=False)
    return Work(job, source, f"request-{job_id}", 1, arrived_ms=0, deadline_ms=1_000)


def own(job_id: int, client: str = "", since_ms: int = 0) -> Work:
    it = work(job_id, ME)
    it.own, it.client, it.since_ms, it.size_bytes = True, client, since_ms, 7
    return it


def ids(queue: WorkQueue) -> list[int]:
    return [w.job.job_id for w in queue]


def served(queue: WorkQueue, most: int = 1_000) -> list[int]:
    """The order in which jobs begin, one at a time."""
    order: list[int] = []
    while len(order) < most and (next_one := queue.next(5)) is not None:
        assert queue.next(5) is None  # one slot
        order.append(next_one.job.job_id)
        queue.end(next_one.job.job_id)
    return order


def test_first_come_first_served_whoever_asks() -> None:
    queue = WorkQueue("fcfs")
    assert [queue.add(work(1)), queue.add(own(2, since_ms=-5)), queue.add(work(3))] == [0, 1, 2]
    assert (queue.jobs(own=True), queue.jobs(own=False)) == (1, 2)
    assert served(queue) == [1, 2, 3]


def test_own_work_goes_first_within_a_bound() -> None:
    queue = WorkQueue()
    for i in range(40):
        queue.add(work(i))
        queue.add(own(100 + i))
    order = served(queue)
    for end in range(8, 48):  # where both wait, peers get their share, and no more
        peers = sum(job_id < 100 for job_id in order[:end])
        assert peers == pytest.approx(end / (OWN_WEIGHT + 1), abs=1)


def test_who_did_not_come_for_a_while_has_no_credit() -> None:
    queue = WorkQueue()
    for i in range(40):
        queue.add(work(i))
    served(queue)
    for i in range(40):
        queue.add(work(i))
        queue.add(own(100 + i))
    assert sum(job_id < 100 for job_id in served(queue, 12)) in (2, 3)


def test_a_busy_peer_does_not_starve_the_others() -> None:
    queue = WorkQueue()
    for i in range(30):
        queue.add(work(i, BoardId("busy")))
    served(queue, 10)
    queue.add(work(100, BoardId("calm")))
    queue.add(work(101, BoardId("rare")))
    assert {100, 101} <= set(served(queue, 3))


def test_a_chatty_application_does_not_starve_the_others() -> None:
    queue = WorkQueue()
    for i in range(30):
        queue.add(own(i, client="chatty"))
    for i in range(100, 103):
        queue.add(own(i, client="other"))
    assert {100, 101, 102} <= set(served(queue, 6))


@pytest.mark.parametrize("owns", [True, False])
def test_who_comes_back_at_once_does_not_starve_the_others(owns: bool) -> None:
    def of(who: str, job_id: int) -> Work:
        return own(job_id, client=who) if owns else work(job_id, BoardId(who))

    queue = WorkQueue()
    for i in range(5):
        queue.add(of("patient", i))
    turns = []
    for i in range(100, 120):  # its line is empty whenever it was served, and full again at once
        queue.add(of("greedy", i))
        (job_id,) = served(queue, 1)
        turns.append(job_id)
        if len(turns) == 10:
            break
    assert sum(job_id < 100 for job_id in turns) >= 4


def test_what_belongs_to_the_older_prompt_goes_first() -> None:
    queue = WorkQueue()
    queue.add(own(1, since_ms=10))
    queue.add(own(2, since_ms=20))
    queue.add(own(3, since_ms=15))
    assert served(queue) == [1, 3, 2]


@given(st.lists(st.tuples(st.sampled_from("oabc"), st.integers(0, 2)), max_size=60))
def test_nothing_is_lost_and_the_books_are_right(steps: list[tuple[str, int]]) -> None:
    queue = WorkQueue()
    queue.slots = 2
    there: dict[int, Work] = {}
    for number, (who, act) in enumerate(steps):
        new = own(number) if who == "o" else work(number, BoardId(who))
        queue.add(new)
        there[number] = new
        if act == 1 and (begun := queue.next(number)) is not None:
            assert begun.job.job_id in there
        if act == 2 and queue.running:
            job_id = min(queue.running)
            assert queue.end(job_id) is there.pop(job_id)
    assert {each.job.job_id for each in queue} == there.keys()
    for owns in (True, False):
        mine = [each for each in there.values() if each.own is owns]
        assert queue.jobs(own=owns) == len(mine)
        assert queue.size_bytes(own=owns) == sum(each.size_bytes for each in mine)
    queue.put_back()
    queue.slots = 1
    assert sorted(served(queue)) == sorted(there)
    assert (len(queue), queue.size_bytes(own=True), queue.size_bytes(own=False)) == (0, 0, 0)
    assert queue.expected_wait_ms(0, own=True) == 0


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
    assert (len(queue), queue.waits) == (4, 2)


def test_what_ran_when_the_engine_died_goes_first_again() -> None:
    queue = WorkQueue()
    queue.slots = 2
    for i in range(3):
        queue.add(work(i))
    queue.next(0)
    queue.next(0)
    assert [w.job.job_id for w in queue.put_back()] == [0, 1]
    assert ids(queue) == [0, 1, 2]
    assert all(w.started_ms < 0 for w in queue), "it waits, and may be handed back"
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


def test_expected_wait_is_what_the_work_ahead_takes_of_the_model() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.times.observe("proposal", done(1_000))
    assert queue.expected_wait_ms(0, own=False) == 0
    for i in range(4):
        queue.add(work(i))
    # Shares of the model's time add up, however many jobs it works on at a time ...
    queue.slots = 2
    assert queue.expected_wait_ms(0, own=False) == 4_000
    # ... but are smaller where more is done at a time.
    rates = Rates((PrefillRate(100, 0.0),), (DecodeRate(1, 0, 9), DecodeRate(2, 0, 10)))
    queue.times.measured_rates(rates)
    assert queue.expected_wait_ms(0, own=False) == pytest.approx(4 * 50 * 5, rel=0.02)
    # Absurd figures end where other boards would no longer read what this one says.
    queue.times.measured_rates(Rates((PrefillRate(1, 1e9),), (DecodeRate(1, 1, 1e9),)))
    assert queue.expected_wait_ms(0, own=False) == LONGEST_WAIT_MS < 2**40


def test_own_work_waits_for_peers_only_as_far_as_they_have_their_turn() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.times.observe("proposal", done(1_000))
    for i in range(30):
        queue.add(work(i))
    assert queue.expected_wait_ms(0, own=True) == 0
    for i in range(100, 106):
        queue.add(own(i))
    assert queue.expected_wait_ms(0, own=True) == 6_000 + 6_000 / OWN_WEIGHT
    long_after = 100 * HORIZON_MS  # since own work came
    assert queue.expected_wait_ms(long_after, own=False) == 36_000
    assert 36_000 < queue.expected_wait_ms(0, own=False) <= 30_000 * (1 + OWN_WEIGHT)  # more comes


@pytest.mark.parametrize(
    ("times_ms", "left_ms"), [([1_000, 1_000, 1_000], 400), ([1, 3_000], 1_800)]
)
def test_what_a_running_job_still_takes_depends_on_how_jobs_vary(
    times_ms: list[int], left_ms: int
) -> None:
    queue = WorkQueue()
    for model_ms in times_ms * 10:
        queue.times.observe("proposal", done(model_ms))
    queue.add(work(1))
    queue.next(1_000)
    mean_ms = queue.times.mean_ms("proposal")
    waits_ms = queue.expected_wait_ms(1_600, own=False)
    if times_ms[0] == times_ms[1]:
        assert waits_ms == 400
    else:  # as good as memoryless
        assert mean_ms - 100 < waits_ms <= round(mean_ms)


def test_utilisation_is_what_comes_against_what_can_be_done() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.times.observe("proposal", done(1_000))
        queue.times.observe("aggregation", done(3_000))
    for i in range(0, 600, 2):  # every 4 s a peer's proposal, as often an aggregation of its own
        for job in (work(i), own(i + 1)):
            if job.own:
                job.job = msgspec.structs.replace(job.job, kind="aggregation")
            job.arrived_ms = i * 2_000
            queue.add(job)
    assert queue.utilisation(1_200_000, own=False) == pytest.approx(0.25, rel=0.05)
    assert queue.utilisation(1_200_000, own=True) == pytest.approx(0.75, rel=0.05)
    assert queue.utilisation(1_200_000) == pytest.approx(1.0, rel=0.05)
